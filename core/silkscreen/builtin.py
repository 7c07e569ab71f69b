"""What the core itself provides, through the same hooks as any plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from silkscreen.hooks import hookimpl

if TYPE_CHECKING:
    import click

    from silkscreen.carriers import Carrier


@hookimpl
def register_bases() -> Mapping[str, str]:
    """The published FLUX.2 bases."""
    return {
        "black-forest-labs/FLUX.2-klein-4B": "silkscreen.flux2.bases.klein_4b",
        "black-forest-labs/FLUX.2-klein-base-4B": "silkscreen.flux2.bases.klein_base_4b",
        "black-forest-labs/FLUX.2-klein-9B": "silkscreen.flux2.bases.klein_9b",
        "black-forest-labs/FLUX.2-klein-base-9B": "silkscreen.flux2.bases.klein_base_9b",
        "black-forest-labs/FLUX.2-dev": "silkscreen.flux2.bases.dev",
    }


@hookimpl
def register_carriers() -> Sequence[Carrier]:
    """The carriers of the field."""
    from silkscreen.carriers.extra_text_embedding import ExtraTextEmbedding
    from silkscreen.carriers.kv_cache import KVCache
    from silkscreen.carriers.lora import LoRA

    return [KVCache(), LoRA(), ExtraTextEmbedding()]


@hookimpl
def register_weight_sources() -> Mapping[str, Callable[[str], Path]]:
    """The hubs."""
    from silkscreen import hub

    return {"modelscope": hub.from_modelscope, "hf": hub.from_huggingface}


@hookimpl
def register_commands(group: click.Group) -> None:
    """The commands of `silkscreen`."""
    from silkscreen.cli import (
        bases,
        batch,
        check,
        generate,
        info,
        new,
        pack,
        plan,
        publish,
        show,
        sweep,
        train,
        wrap,
    )
    from silkscreen.cli import list as listing

    for module in (listing, info, bases, plan, generate, show, batch, sweep, train, new, check, pack, wrap, publish):
        group.add_command(module.command)
