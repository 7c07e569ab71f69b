"""How the trained plugins are measured: held-out prompts and seeds, drawn in batches at default settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from silkscreen import TemplatePipeline
from silkscreen_tiny import scenes

SEED = 90_000
"""No training uses seeds from here on."""


def held_out_scenes(count: int, *, wide_exposure: bool = False, seed: int = SEED) -> list[scenes.Scene]:
    """Return drawn scenes of prompts all over the grammar."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice(scenes.prompts(), count, replace=False)
    return [scenes.Scene.random(rng, str(prompt), wide_exposure=wide_exposure) for prompt in prompts]


def draw(
    pipe: Any,
    templates: TemplatePipeline,
    prompts: Sequence[str],
    template_inputs: Sequence[dict[str, Any]] = (),
    first_seed: int = SEED,
    batch: int = 16,
) -> list[Image.Image]:
    """Draw a picture for each prompt, the n-th with seed `first_seed + n`, all with the same template inputs."""
    return draw_each(pipe, templates, prompts, [template_inputs] * len(prompts), first_seed, batch)


def draw_each(
    pipe: Any,
    templates: TemplatePipeline,
    prompts: Sequence[str],
    inputs: Sequence[Sequence[dict[str, Any]]],
    first_seed: int = SEED,
    batch: int = 16,
) -> list[Image.Image]:
    """Draw a picture for each prompt, the n-th with seed `first_seed + n` and template inputs of its own."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        seeds = range(first_seed + start, first_seed + start + len(some))
        result = templates(
            pipe,
            prompt=some,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            template_inputs=inputs[start : start + batch],
            negative_template_inputs="default",
        )
        pictures += result.images
    return pictures


def pearson(requested: Sequence[float], measured: Sequence[float]) -> float:
    """Return Pearson's r."""
    return float(np.corrcoef(requested, measured)[0, 1])
