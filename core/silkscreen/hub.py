"""Files and folders from the hubs, by `owner/repo[@revision]:path`, where a folder's path ends in a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from silkscreen.errors import WeightsError

_REFERENCE = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?:(?P<path>.+)")


def from_modelscope(reference: str) -> Path:
    """Return the local copy of a file or folder on ModelScope, downloaded when there is none.

    Args:
        reference: `owner/repo[@revision]:path`.

    Raises:
        WeightsError: the reference is none, or the client failed; its reason is given.
    """
    from modelscope.hub.file_download import model_file_download
    from modelscope.hub.snapshot_download import snapshot_download

    return _fetch("modelscope", reference, model_file_download, snapshot_download)


def from_huggingface(reference: str) -> Path:
    """Return the local copy of a file or folder on Hugging Face, downloaded when there is none.

    Args:
        reference: `owner/repo[@revision]:path`.

    Raises:
        WeightsError: the reference is none, or the client failed; its reason is given.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    return _fetch("hf", reference, hf_hub_download, snapshot_download)


def _fetch(hub: str, reference: str, fetch_file: Callable[..., str], fetch_folder: Callable[..., str]) -> Path:
    repo, revision, path = _parse(reference)
    try:
        if path.endswith("/"):
            return Path(fetch_folder(repo, revision=revision, allow_patterns=[f"{path}*"])) / path
        return Path(fetch_file(repo, path, revision=revision))
    except Exception as error:  # whatever a client raises
        raise WeightsError(f"{hub}:{reference} cannot be had: {error}") from error


def _parse(reference: str) -> tuple[str, str | None, str]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise WeightsError(f"{reference!r} names nothing on a hub: write owner/repo[@revision]:path")
    return match["repo"], match["revision"], match["path"]
