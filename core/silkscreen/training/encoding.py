"""Encoding rows: everything about a row that does not depend on trained weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from silkscreen.bases import Base, known_bases
from silkscreen.errors import TrainingError
from silkscreen.files import sha256
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import component_references, locate_component
from silkscreen.template import Template
from silkscreen.training.config import TrainingConfig, digest
from silkscreen.training.data import Preparation, Prepared, Row, Size, seed_all
from silkscreen.training.models import read_components
from silkscreen.training.store import Example, flatten


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Runs the base's VAE and text encoder and the template's `process_inputs` on prepared rows, one by one.

    Attributes:
        context: what the template sees as `pipe`.
        model: the template's model.
        seed: of what `process_inputs` draws at random; it depends on epoch and row besides.
    """

    context: TemplateContext
    model: nn.Module
    seed: int

    @torch.no_grad()
    def encode(self, prepared: Prepared, epoch: int) -> Example:
        """Encode a row.

        Raises:
            TrainingError: `process_inputs` raised, or returned no dict.
        """
        self.context.make_room()
        seed_all(self.seed, epoch, prepared.row, "process_inputs")
        try:
            processed = self.model.process_inputs(pipe=self.context, **prepared.values)  # type: ignore[operator]
        except Exception as error:  # whatever a template raises
            raise TrainingError(f"process_inputs raised {type(error).__name__}: {error}") from error
        if not isinstance(processed, dict):
            raise TrainingError(
                f"process_inputs returned {type(processed).__name__}, not a dict of forward's arguments"
            )
        embeds, ids = self.context.encode_prompt(prepared.prompt)
        latents = self.context.vae.encode(self.context.preprocess_image(prepared.picture))
        return Example(latents, embeds, ids, processed)

    def is_constant(self, preparation: Preparation) -> bool:
        """Whether encoding a row gives the same at any time: whatever the chance, the epoch and the trained weights."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in trained]
        try:
            before = flatten(self.encode(preparation.prepare(0, 0), 0), 0)
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(1.0)
            after = flatten(self.encode(preparation.prepare(0, 1), 1), 0)
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, kept, strict=True):
                    parameter.copy_(value)
        same_form = before[0] == after[0]
        return same_form and all(torch.equal(value, after[1][name]) for name, value in before[1].items())


def stacked(processed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what `process_inputs` returned for each row: tensors along the batch, equal values as they are."""
    joined: dict[str, Any] = {}
    for key in processed[0]:
        values = [each[key] for each in processed]
        if len(values) == 1 or all(not isinstance(v, torch.Tensor | list) and v == values[0] for v in values):
            joined[key] = values[0]
        elif all(isinstance(v, torch.Tensor) and v.shape[0] == 1 for v in values):
            joined[key] = torch.cat(values)
        elif all(isinstance(v, list) and len(v) == len(values[0]) for v in values):
            joined[key] = [torch.cat(parts) for parts in zip(*values, strict=True)]
        else:
            raise TrainingError(
                f"process_inputs returned {key!r} in a form that does not stack into a batch: "
                "return tensors whose first dimension is 1, or train with --batch_size 1"
            )
    return joined


def about(
    config: TrainingConfig, base: Base, template: Template, rows: Sequence[Row], sizes: Sequence[Size]
) -> dict[str, Any]:
    """Return what encoded rows depend on, as plain data."""
    assert config.dataset_metadata_path is not None
    contents = sha256(config.dataset_metadata_path)
    pictures = [(row.line, row.image.stat().st_size) for row in rows]
    references = _references(config, base)
    encoders = {name: str(references[name]) for name in ("vae", "text_encoder", "tokenizer") if name in references}
    return {
        **about_models(config, base, template),
        "encoders": {**encoders, "quantize": config.quantize},
        "dataset": digest({"metadata": contents, "pictures": pictures, "sizes": sizes}),
        "sizes": [list(size) for size in sizes],
    }


def about_models(config: TrainingConfig, base: Base, template: Template) -> dict[str, Any]:
    """Return the part of it that does not depend on the data set and what encodes it."""
    code = sha256(Path(template.module.__file__ or ""))[:16]
    return {"base": _name(config, base), "template": template.name, "code": code}


def _name(config: TrainingConfig, base: Base) -> str:
    """Return the id of a known base, or one made of the weights of the transformer."""
    if base.id in known_bases():
        return base.id
    place = locate_component(base, "transformer", _references(config, base)["transformer"])
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    return f"{base.id} {digest({file.name: sha256(file) for file in files})}"


def _references(config: TrainingConfig, base: Base) -> dict[str, str | Path]:
    return component_references(base, read_components(config.components), config.hub, config.revision)
