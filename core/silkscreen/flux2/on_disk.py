"""Which components of a base are on this disk: in its package, or in the caches of the hubs' clients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from silkscreen.bases import Base


def components_on_disk(base: Base, hub: str | None = None) -> list[str]:
    """Return the names of the components whose folders are there; no network is asked, and no file is opened.

    Args:
        base: the base.
        hub: `modelscope` or `hf`, whose cache is looked into; by default that of the base's own sources.
    """
    copy = cache(_copy)  # most components come from one repository
    return [name for name, reference in base.components.items() if _is_there(str(reference), base.folder, hub, copy)]


def _is_there(reference: str, folder: Path, hub: str | None, find_copy: Callable[..., Path | None]) -> bool:
    scheme, _, rest = reference.partition(":")
    if not rest:
        return (folder / reference).is_dir()
    repo, _, path = rest.partition(":")
    name, _, revision = repo.partition("@")
    copy = find_copy(hub or scheme, name, revision or None)
    return copy is not None and any(path.suffix in (".json", ".safetensors") for path in (copy / path).glob("*"))


def _copy(hub: str, repo: str, revision: str | None) -> Path | None:
    try:
        if hub == "modelscope":
            from modelscope_hub.compat import snapshot_download as from_modelscope  # `modelscope` imports torch

            return Path(from_modelscope(repo, revision=revision, local_files_only=True))
        if hub == "hf":
            from huggingface_hub import snapshot_download as from_huggingface

            return Path(from_huggingface(repo, revision=revision, local_files_only=True))
    except Exception:  # each client has its own for what is not there
        return None
    return None
