from __future__ import annotations

from typing import Any

import numpy as np
from measure import draw, held_out_scenes, pearson
from silkscreen import TemplatePipeline
from silkscreen_tiny import analysis

SCALES = (0.1, 0.3, 0.5, 0.7, 0.9)


def test_the_picture_is_as_bright_as_asked(tiny: Any) -> None:
    templates = TemplatePipeline("brightness")
    prompts = [scene.prompt for scene in held_out_scenes(16)]
    measured = np.array(
        [[analysis.mean_luminance(p) for p in draw(tiny, templates, prompts, [{"scale": s}])] for s in SCALES]
    )
    r = pearson(np.repeat(SCALES, 16), measured.flatten())
    print(measured.mean(axis=1), r)
    assert (np.diff(measured, axis=0) > 0).all(), measured
    assert r >= 0.95
    assert (measured[-1] - measured[0]).mean() >= 0.4
