"""Time of one 128 x 128 picture of 20 steps with guidance, once the tiny base is loaded; the goal is under 2 s."""

from __future__ import annotations

from typing import Any

from silkscreen import TemplatePipeline, load_base


def test_one_picture(benchmark: Any) -> None:
    pipe = load_base("flux2-tiny")
    pipe.set_progress_bar_config(disable=True)
    templates = TemplatePipeline([])
    prompt = "a large red circle on a blue background"
    benchmark.pedantic(lambda: templates(pipe, prompt=prompt, seed=0), rounds=5, warmup_rounds=1)


def test_one_picture_under_three_controls(benchmark: Any) -> None:
    from PIL import Image

    pipe = load_base("flux2-tiny")
    pipe.set_progress_bar_config(disable=True)
    templates = TemplatePipeline(["brightness", "softrgb", "structure"])
    inputs = [
        {"model_id": "brightness", "scale": 0.6},
        {"model_id": "softrgb", "R": 0.6, "G": 0.6, "B": 0.6},
        {"model_id": "structure", "image": Image.new("RGB", (128, 128))},
    ]
    arguments = {"template_inputs": inputs, "negative_template_inputs": "default", "seed": 0}
    prompt = "a large red circle on a blue background"
    benchmark.pedantic(lambda: templates(pipe, prompt=prompt, **arguments), rounds=5, warmup_rounds=1)
