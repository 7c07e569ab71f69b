from __future__ import annotations

from typing import Any

import numpy as np
from measure import draw_each, held_out_scenes, pearson
from silkscreen import TemplatePipeline
from silkscreen_tiny import analysis


def test_each_channel_is_as_asked(tiny: Any) -> None:
    drawn = held_out_scenes(48)
    requested = np.array([analysis.mean_color(scene.draw()) for scene in drawn])
    inputs = [[dict(zip("RGB", map(float, means), strict=True))] for means in requested]
    pictures = draw_each(tiny, TemplatePipeline("softrgb"), [scene.prompt for scene in drawn], inputs)
    measured = np.array([analysis.mean_color(picture) for picture in pictures])
    r = [pearson(requested[:, channel], measured[:, channel]) for channel in range(3)]
    print(r)
    assert min(r) >= 0.9
