from __future__ import annotations

from typing import Any

import numpy as np
from measure import draw, draw_each, held_out_scenes
from silkscreen import TemplatePipeline
from silkscreen_tiny import analysis


def test_the_picture_follows_the_outline(tiny: Any) -> None:
    drawn = held_out_scenes(32)
    prompts = [scene.prompt for scene in drawn]
    templates = TemplatePipeline("structure")
    inputs = [[{"image": scene.outline().convert("RGB"), "prompt": scene.prompt}] for scene in drawn]
    wanted = [analysis.outline_pixels(scene.outline()) for scene in drawn]
    followed, free = (
        np.mean([analysis.f1(analysis.edges(picture), lines) for picture, lines in zip(pictures, wanted, strict=True)])
        for pictures in (draw_each(tiny, templates, prompts, inputs), draw(tiny, templates, prompts))
    )
    print(followed, free)
    assert followed >= 0.8
    assert followed >= free + 0.3
