"""Strength and timing of a trained template, measured in pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from measure import draw, held_out_scenes
from PIL import Image
from silkscreen import TemplatePipeline
from silkscreen_tiny import analysis


def luminance(pictures: list[Image.Image]) -> Any:
    return np.array([analysis.mean_luminance(picture) for picture in pictures])


def test_brightness_rises_with_strength_and_falls_with_an_early_end(tiny: Any) -> None:
    prompts = [scene.prompt for scene in held_out_scenes(8)]
    templates = TemplatePipeline("brightness")

    def drawn(**control: float) -> Any:
        return luminance(draw(tiny, templates, prompts, [{"scale": 0.9, **control}]))

    levels = [drawn(strength=strength) for strength in (0, 0.1, 0.25, 0.5, 1)]
    assert (np.diff(levels, axis=0) > 0).all(), levels
    half = drawn(end=0.5)
    assert (levels[0] + 0.02 < half).all()
    assert (half < levels[-1] - 0.02).all()


def test_two_regions_have_a_brightness_each(tiny: Any) -> None:
    prompts = [scene.prompt for scene in held_out_scenes(8)]
    left, right = Image.new("L", (128, 128)), Image.new("L", (128, 128))
    left.paste(255, (0, 0, 64, 128))
    right.paste(255, (64, 0, 128, 128))
    inputs = [{"scale": 0.9, "region": left}, {"scale": 0.1, "region": right}]
    pictures = draw(tiny, TemplatePipeline("brightness"), prompts, inputs)
    halves = [luminance([picture.crop(box) for picture in pictures]) for box in ((0, 0, 64, 128), (64, 0, 128, 128))]
    difference = halves[0] - halves[1]
    assert difference.mean() >= 0.4
    assert difference.min() >= 0.35
