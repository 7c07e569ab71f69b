"""Both sides of guidance in one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import Flux2KleinInpaintPipeline, MagCacheConfig
from PIL import Image
from silkscreen import TemplatePipeline
from silkscreen.flux2 import guidance
from small_flux2 import CALL, build_pipeline

MakeTemplate = Callable[[str, str], Path]
STEPS = 4

HALF = Image.new("L", (64, 64))
HALF.paste(255, (0, 0, 32, 64))

EVERYTHING = (
    '{"kv_cache": random_kv(seed), "lora": random_lora(seed), "extra_text_embedding": random_tensor(seed, 1, 3, 32)}'
)


@pytest.fixture
def templates(fixed_folder: MakeTemplate) -> TemplatePipeline:
    every = TemplatePipeline(fixed_folder("everything", EVERYTHING), trust_code=True)
    every.add(fixed_folder("keys", '{"kv_cache": random_kv(seed)}'), trust_code=True)
    every.add(fixed_folder("words", '{"extra_text_embedding": random_tensor(seed, 1, 2, 32)}'), trust_code=True)
    every.add(fixed_folder("update", '{"lora": random_lora(seed)}'), trust_code=True)
    return every


@pytest.fixture
def draw(
    templates: TemplatePipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[np.ndarray, np.ndarray, int]]:
    """Draw in one pass a step and in two; returns both pictures, and how often a block ran when in one."""

    def drawn(pipe: Any, inputs: Any, negative: Any, **arguments: Any) -> tuple[np.ndarray, np.ndarray, int]:
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        pictures = []
        for largest in (0, guidance.LARGEST):
            monkeypatch.setattr(guidance, "LARGEST", largest)
            runs = 0
            settings = {"prompt": "red", "seed": 0, **CALL, "num_inference_steps": STEPS, **arguments}
            end = pipe.transformer.single_transformer_blocks[-1].register_forward_hook(count)
            result = templates(pipe, template_inputs=inputs, negative_template_inputs=negative, **settings)
            end.remove()
            pictures.append(np.asarray(result.images))
        return pictures[1], pictures[0], runs

    return drawn


Draw = Callable[..., tuple[np.ndarray, np.ndarray, int]]


@pytest.mark.parametrize(
    ("inputs", "negative"),
    [
        ([{"model_id": "everything"}], [{"model_id": "everything", "seed": 1}]),
        ([{"model_id": "keys"}, {"model_id": "keys", "seed": 2}], [{"model_id": "update", "seed": 1}]),
        ([{"model_id": "update"}], None),
        ([{"model_id": "keys"}], None),
        ([], [{"model_id": "keys"}]),
        ([{"model_id": "keys", "strength": 0.5, "region": HALF}], [{"model_id": "keys", "seed": 1}]),
        ([{"model_id": "keys", "start": 0.3}, {"model_id": "update", "end": 0.6}], [{"model_id": "keys", "end": 0.8}]),
    ],
)
def test_one_pass_gives_what_two_give(small_pipe: Any, draw: Draw, inputs: Any, negative: Any) -> None:
    one, two, runs = draw(small_pipe, inputs, negative)
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert runs == STEPS


def test_sides_of_unequal_texts_run_one_after_the_other(small_pipe: Any, draw: Draw) -> None:
    one, two, runs = draw(small_pipe, [{"model_id": "words"}], None)
    assert np.array_equal(one, two)
    assert runs == 2 * STEPS
    short = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    one, two, runs = draw(small_pipe, [{"model_id": "keys"}], None, negative_prompt_embeds=short)
    assert np.array_equal(one, two)
    assert runs == 2 * STEPS


def test_guidance_that_ends_in_the_course_of_a_run_stays_right(small_pipe: Any, draw: Draw) -> None:
    def end_guidance(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
        return kwargs

    one, two, runs = draw(small_pipe, [{"model_id": "keys"}], None, callback_on_step_end=end_guidance)
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert runs == 2 + 2


def test_a_text_that_changes_in_the_course_of_a_run_is_seen(small_pipe: Any, draw: Draw) -> None:
    def change_text(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value + step for name, value in kwargs.items()}

    arguments = {
        "callback_on_step_end": change_text,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    one, two, runs = draw(small_pipe, [{"model_id": "keys"}], None, **arguments)
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert runs == STEPS


def test_large_passes_step_caches_and_batches_run_one_side_after_the_other(
    small_pipe: Any, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [{"model_id": "keys"}]
    assert draw(small_pipe, inputs, None, num_images_per_prompt=2)[2] == 2 * STEPS
    small_pipe.transformer.enable_cache(
        MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)
    )
    one, two, _ = draw(small_pipe, inputs, None)
    assert np.array_equal(one, two)
    small_pipe.transformer.disable_cache()
    assert draw(small_pipe, inputs, None)[2] == STEPS
    tokens = 2 * 2 + CALL["max_sequence_length"]
    monkeypatch.setattr(guidance, "LARGEST", tokens * 32 - 1)
    assert draw(small_pipe, inputs, None)[2] == 2 * STEPS


def test_an_inpainting_pipeline_runs_both_in_one_pass(draw: Draw) -> None:
    pipe = build_pipeline(Flux2KleinInpaintPipeline)
    picture = Image.new("RGB", (32, 32), "white")
    arguments = {"image": picture, "mask_image": HALF.resize((32, 32)), "strength": 1.0}
    one, two, runs = draw(pipe, [{"model_id": "keys"}], [{"model_id": "keys", "seed": 1}], **arguments)
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert runs == STEPS


def test_a_run_without_guidance_has_one_side(small_pipe: Any, draw: Draw) -> None:
    one, two, runs = draw(small_pipe, [{"model_id": "keys"}], None, guidance_scale=1.0)
    assert np.array_equal(one, two)
    assert runs == STEPS


def test_weights_that_are_moved_in_a_pass_stay_fit_for_training(small_pipe: Any, draw: Draw) -> None:
    cpu_offload(small_pipe.transformer, torch.device("cpu"))  # makes each weight anew when it is needed
    weights = []
    small_pipe.transformer.proj_out.register_forward_pre_hook(lambda layer, _: weights.append(layer.weight))
    assert draw(small_pipe, [{"model_id": "keys"}], None)[2] == STEPS
    assert weights
    assert not any(weight.is_inference() for weight in weights)


def test_what_a_pass_returns_can_be_differentiated(small_pipe: Any, templates: TemplatePipeline) -> None:
    kept: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs["latents"])
        return {}

    end = small_pipe.transformer.register_forward_hook(lambda *call: kept.append(call[-1][0]))
    templates(small_pipe, prompt="red", template_inputs={"model_id": "keys"}, callback_on_step_end=keep, **CALL)
    end.remove()
    assert len(kept) == 3 * CALL["num_inference_steps"]
    for tensor in kept:
        (tensor * torch.ones((), requires_grad=True)).sum().backward()


def test_the_transformer_is_left_as_it_was(small_pipe: Any, draw: Draw) -> None:
    before = dict(vars(small_pipe.transformer))
    hooks = len(small_pipe.transformer._forward_pre_hooks)
    draw(small_pipe, [{"model_id": "keys"}], None)
    after = vars(small_pipe.transformer)
    assert {name for name in after if name not in before} <= {"_diffusers_hook"}
    assert len(small_pipe.transformer._forward_pre_hooks) == hooks
