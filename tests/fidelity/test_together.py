from __future__ import annotations

from typing import Any

import numpy as np
from measure import draw_each, held_out_scenes, pearson
from PIL import Image
from silkscreen import TemplatePipeline
from silkscreen_tiny import analysis, scenes

NAMES = ("brightness", "softrgb", "structure")


def request(scene: scenes.Scene) -> dict[str, dict[str, Any]]:
    """What each template is told of a scene."""
    picture = scene.draw()
    return {
        "brightness": {"model_id": "brightness", "scale": analysis.mean_luminance(picture)},
        "softrgb": {"model_id": "softrgb", **dict(zip("RGB", map(float, analysis.mean_color(picture)), strict=True))},
        "structure": {"model_id": "structure", "image": scene.outline().convert("RGB"), "prompt": scene.prompt},
    }


def figures(drawn: list[scenes.Scene], pictures: list[Image.Image]) -> dict[str, float]:
    wanted = [scene.draw() for scene in drawn]
    colors = [np.array([analysis.mean_color(p) for p in some]).flatten() for some in (wanted, pictures)]
    edges = [
        analysis.f1(analysis.edges(p), analysis.outline_pixels(s.outline()))
        for s, p in zip(drawn, pictures, strict=True)
    ]
    return {
        "brightness": pearson(
            [analysis.mean_luminance(p) for p in wanted], [analysis.mean_luminance(p) for p in pictures]
        ),
        "softrgb": pearson(*colors),
        "structure": float(np.mean(edges)),
    }


def test_each_of_three_in_one_call_keeps_nine_tenths_of_its_figure(tiny: Any) -> None:
    drawn = held_out_scenes(32)
    prompts = [scene.prompt for scene in drawn]
    templates = TemplatePipeline(NAMES)
    requests = [request(scene) for scene in drawn]
    together = figures(drawn, draw_each(tiny, templates, prompts, [list(each.values()) for each in requests]))
    for name in NAMES:
        alone = figures(drawn, draw_each(tiny, templates, prompts, [[each[name]] for each in requests]))[name]
        print(name, alone, together[name])
        assert together[name] >= 0.9 * alone, name
