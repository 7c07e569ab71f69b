from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from measure import draw, held_out_scenes
from silkscreen import TemplatePipeline, load_base
from silkscreen_tiny import analysis


def shares(readings: list[dict[str, bool]]) -> dict[str, float]:
    return {word: float(np.mean([reading[word] for reading in readings])) for word in readings[0]}


def test_the_analyser_reads_drawn_scenes() -> None:
    drawn = held_out_scenes(400, seed=1) + held_out_scenes(400, seed=2, wide_exposure=True)
    found = shares([analysis.read(scene.draw()).agrees(scene.prompt) for scene in drawn])
    assert min(found.values()) >= 0.99, found


def test_the_analyser_finds_outlines_where_they_are() -> None:
    scores = [analysis.f1(analysis.edges(s.draw()), analysis.outline_pixels(s.outline())) for s in held_out_scenes(100)]
    others = held_out_scenes(100, seed=3)
    misplaced = [
        analysis.f1(analysis.edges(s.draw()), analysis.outline_pixels(other.outline()))
        for s, other in zip(held_out_scenes(100), others, strict=True)
    ]
    assert np.mean(scores) >= 0.95
    assert np.mean(misplaced) <= 0.4


def test_the_vae_keeps_scenes_and_outlines(tiny: Any) -> None:
    from silkscreen.flux2.context import TemplateContext

    context = TemplateContext(tiny)
    for drawing, limit in (("draw", 0.01), ("outline", 0.05)):
        errors = []
        for scene in held_out_scenes(8):
            picture = context.preprocess_image(getattr(scene, drawing)())
            latents = context.vae.encode(picture)
            variance, mean = tiny.vae.bn.running_var + tiny.vae.config.batch_norm_eps, tiny.vae.bn.running_mean
            latents = latents * variance.sqrt().view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
            decoded = tiny.vae.decode(tiny._unpatchify_latents(latents)).sample.detach()
            errors.append((decoded - picture).square().mean().item())
        assert np.mean(errors) <= limit, drawing


def test_it_draws_what_the_prompt_says(tiny: Any) -> None:
    prompts = [scene.prompt for scene in held_out_scenes(128)]
    pictures = draw(tiny, TemplatePipeline([]), prompts, batch=32)
    found = shares([analysis.read(picture).agrees(p) for picture, p in zip(pictures, prompts, strict=True)])
    print(found)
    assert found["background"] >= 0.95, found
    assert found["color"] >= 0.95, found
    assert found["size"] >= 0.90, found
    assert found["shape"] >= 0.85, found


def test_a_word_it_does_not_know_is_named_in_a_warning(tiny: Any) -> None:
    with pytest.warns(UserWarning, match=r"flux2-tiny does not know huge, dog; it knows a, an, on"):
        TemplatePipeline([])(tiny, prompt="a huge red dog on a blue background", num_inference_steps=1)


def test_it_is_the_geometry_its_description_says() -> None:
    from silkscreen.bases import Geometry, find_base

    pipe = load_base("flux2-tiny")
    assert Geometry.from_config(pipe.transformer.config) == find_base("flux2-tiny").geometry
