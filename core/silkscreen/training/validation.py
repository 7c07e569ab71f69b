"""Is it learning? The loss on rows held out, and pictures of the same prompts and seeds, as training goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from silkscreen.errors import TrainingError
from silkscreen.pipeline import TemplatePipeline
from silkscreen.sheet import contact_sheet
from silkscreen.template import Template
from silkscreen.training import objective
from silkscreen.training.data import draw_seed

LOSSES = 64
"""At least so many pairs of a row and a timestep make a validation loss."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A held-out row at a noise level: the same at every validation.

    Attributes:
        row: number of the row.
        index: its point of the grid of noise levels.
        seed: of its noise.
    """

    row: int
    index: int
    seed: int


def probes(rows: Sequence[int], seed: int) -> list[Probe]:
    """Return the probes of rows; with noise levels from as many equal parts of the grid."""
    rounds = max(1, -(-LOSSES // len(rows)))
    count = rounds * len(rows)
    generator = torch.Generator().manual_seed(draw_seed(seed, "validation"))
    order = torch.randperm(count, generator=generator).tolist()
    return [
        Probe(rows[n % len(rows)], (2 * part + 1) * objective.STEPS // (2 * count), draw_seed(seed, "validation", n))
        for n, part in enumerate(order)
    ]


@dataclasses.dataclass(frozen=True)
class _InTraining(Template):
    """A template whose model is the one being trained."""

    model: nn.Module | None = None

    def load(
        self, base_id: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", streamed: bool = False
    ) -> nn.Module:
        """Return the model as it is."""
        assert self.model is not None
        return self.model


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a file of prompts with template inputs.

    Raises:
        TrainingError: it cannot be read; the line is named.
    """
    rows = []
    try:
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                row = json.loads(text)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise TrainingError(f'{path}:{line}: a line is {{"prompt": "...", "template_inputs": {{...}}}}')
                rows.append(row)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is no .jsonl of prompts: {error}") from error
    if not rows:
        raise TrainingError(f"{path} has no prompts")
    return rows


def draw_sheet(pipe: Any, template: Template, model: nn.Module, prompts: Sequence[dict[str, Any]]) -> Image.Image:
    """Draw each prompt with its template inputs and its seed, and label the pictures on one sheet."""
    live = _InTraining(**vars(template), model=model)
    templates = TemplatePipeline(live)
    pictures, labels = [], []
    for number, row in enumerate(prompts):
        inputs = row.get("template_inputs", {})
        result = templates(
            pipe,
            prompt=row["prompt"],
            seed=row.get("seed", number),
            template_inputs=[inputs],
            negative_template_inputs="default",
        )
        pictures.append(result.images[0])
        labels.append(f"{row['prompt']} | {json.dumps(inputs)}")
    return contact_sheet(pictures, labels, columns=min(6, len(pictures)))
