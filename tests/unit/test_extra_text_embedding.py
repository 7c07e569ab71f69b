from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silkscreen import TemplatePipeline
from silkscreen.bases import Base, Geometry
from silkscreen.cache import TemplateCache, inject, merge
from silkscreen.carriers.extra_text_embedding import ExtraTextEmbedding
from silkscreen.errors import CacheError
from small_flux2 import CALL, draw, random_tensor

BASE = Base("flux2-small", "", "", "Flux2KleinPipeline", False, {}, Geometry(2, 2, 2, 16, 32), {}, (), Path(), "")
EMPTY = TemplateCache({}, {}, "")


def cache(embedding: Any, name: str = "extra_text_embedding") -> TemplateCache:
    return TemplateCache.from_result({name: embedding}, "x")


def longer(inputs: dict[str, Any], extra: torch.Tensor) -> dict[str, Any]:
    """The arguments of the transformer with tokens after the 6 of the prompt, their ids (0, 0, 0, 6) and so on."""
    ids = torch.tensor([[0, 0, 0, 6 + i] for i in range(extra.shape[1])])
    text = torch.cat([inputs["encoder_hidden_states"], extra.expand(2, -1, -1)], 1)
    return {**inputs, "encoder_hidden_states": text, "txt_ids": torch.cat([inputs["txt_ids"], ids])}


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_tokens_and_their_ids_follow_those_of_the_prompt(
    batch: int, small_pipe: Any, transformer_inputs: dict[str, Any]
) -> None:
    extra = random_tensor(1, batch, 3, 32)
    naive = small_pipe.transformer(**longer(transformer_inputs, extra))[0]
    with inject(small_pipe, cache(extra), EMPTY):
        flat = small_pipe.transformer(**transformer_inputs)[0]
        ids = transformer_inputs["txt_ids"].expand(2, -1, -1)
        batched = small_pipe.transformer(**{**transformer_inputs, "txt_ids": ids})[0]
    assert torch.equal(flat, naive)
    assert torch.equal(batched, naive)
    assert not torch.equal(naive, small_pipe.transformer(**transformer_inputs)[0])


@torch.no_grad()
def test_each_side_has_tokens_of_its_own(small_pipe: Any, transformer_inputs: dict[str, Any]) -> None:
    positive, negative = random_tensor(1, 1, 3, 32), random_tensor(2, 1, 1, 32)
    bare = small_pipe.transformer(**transformer_inputs)[0]
    for extras, side, naive in (
        ((cache(positive), cache(negative)), "cond", longer(transformer_inputs, positive)),
        ((cache(positive), cache(negative)), "uncond", longer(transformer_inputs, negative)),
        ((cache(positive), EMPTY), "uncond", transformer_inputs),
        ((EMPTY, cache(negative)), "cond", transformer_inputs),
    ):
        with inject(small_pipe, *extras), small_pipe.transformer.cache_context(side):
            output = small_pipe.transformer(**transformer_inputs)[0]
        assert torch.equal(output, small_pipe.transformer(**naive)[0])
    assert torch.equal(bare, small_pipe.transformer(**transformer_inputs)[0])


@pytest.mark.parametrize("name", ["extra_text_embedding", "text_embedding"])
def test_a_call_equals_one_with_the_longer_prompt_embeddings(
    name: str, small_pipe: Any, fixed_folder: Callable[..., Path]
) -> None:
    folder = fixed_folder("words", f'{{"{name}": random_tensor(seed, 1, 3, 32)}}')
    templates = TemplatePipeline(folder, trust_code=True)
    sides = {"template_inputs": [{"seed": 1}, {"seed": 2}], "negative_template_inputs": [{"seed": 3}]}
    drawn = templates(small_pipe, prompt="red", seed=0, **sides, **CALL).images
    options = {name: CALL[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    embeds, _ = small_pipe.encode_prompt("red", **options)
    negative, _ = small_pipe.encode_prompt("", **options)
    one, two, three = (random_tensor(seed, 1, 3, 32) for seed in (1, 2, 3))
    naive = draw(
        small_pipe,
        prompt=None,
        prompt_embeds=torch.cat([embeds, one, two], 1),
        negative_prompt_embeds=torch.cat([negative, three], 1),
    )
    assert np.array_equal(drawn, naive)


def test_a_call_leaves_no_trace(small_pipe: Any, fixed_folder: Callable[..., Path]) -> None:
    folder = fixed_folder("words", '{"extra_text_embedding": random_tensor(seed, 1, 3, 32)}')
    templates = TemplatePipeline(folder, trust_code=True)
    before = draw(small_pipe)

    def fail(*_: Any) -> Any:
        raise RuntimeError("stopped")

    drawn = templates(small_pipe, prompt="red", seed=0, template_inputs=[{}], **CALL).images
    assert not np.array_equal(drawn, before)
    with pytest.raises(RuntimeError, match="stopped"):
        templates(small_pipe, prompt="red", seed=0, template_inputs=[{}], callback_on_step_end=fail, **CALL)
    assert not small_pipe.transformer._forward_pre_hooks
    assert np.array_equal(draw(small_pipe), before)


def test_gradients_reach_the_embedding(small_pipe: Any, transformer_inputs: dict[str, Any]) -> None:
    extra, naive = (random_tensor(1, 1, 3, 32).requires_grad_() for _ in range(2))
    with inject(small_pipe, cache(extra), EMPTY):
        loss = small_pipe.transformer(**transformer_inputs)[0].square().sum()
    loss.backward()
    small_pipe.transformer(**longer(transformer_inputs, naive))[0].square().sum().backward()
    assert extra.grad is not None
    assert extra.grad.abs().max() > 0
    assert torch.equal(extra.grad, naive.grad)  # type: ignore[arg-type]


def test_a_compiled_transformer_takes_tokens_and_compiles_once(small_pipe: Any) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    extra = cache(random_tensor(1, 1, 3, 32))
    bare = draw(small_pipe)
    with inject(small_pipe, extra, EMPTY):
        expected = draw(small_pipe)
    small_pipe.transformer.compile(backend=backend)
    assert np.array_equal(draw(small_pipe), bare)
    counts = []
    for steps in (2, 2, 4):
        with inject(small_pipe, extra, EMPTY):
            drawn = draw(small_pipe, num_inference_steps=steps)
        counts.append(len(graphs))
        if steps == 2:
            assert np.array_equal(drawn, expected)
    assert len(set(counts)) == 1
    assert np.array_equal(draw(small_pipe), bare)


def test_merging_concatenates_tokens_in_order_and_repeats_a_batch_of_one() -> None:
    one, two = random_tensor(1, 1, 3, 32), random_tensor(2, 2, 1, 32)
    merged = merge([cache(one), cache(two, "text_embedding")]).fields["extra_text_embedding"]
    assert torch.equal(merged, torch.cat([torch.cat([one, one]), two], 1))


def test_what_does_not_fit_the_base_is_refused() -> None:
    cache(torch.zeros(2, 3, 32)).check(BASE)
    for value, message in (
        (torch.zeros(1, 3, 31), r"it has shape \[1, 3, 31\], flux2-small wants \(batch, tokens, 32\)"),
        (torch.zeros(3, 32), r"it has shape \[3, 32\]"),
        ([], "expected a tensor, got list"),
    ):
        with pytest.raises(CacheError, match=f"template 'x': extra_text_embedding: {message}"):
            cache(value, "text_embedding").check(BASE)


def test_one_carrier_under_two_names_is_refused() -> None:
    both = {"text_embedding": torch.zeros(1, 3, 32), "extra_text_embedding": torch.zeros(1, 3, 32)}
    with pytest.raises(CacheError, match="'x': forward returned 'extra_text_embedding' under two names: return one"):
        TemplateCache.from_result(both, "x")


def test_a_saved_embedding_is_the_same_when_loaded(tmp_path: Path) -> None:
    embedding = random_tensor(1, 1, 3, 32)
    cache(embedding, "text_embedding").save(tmp_path / "c.safetensors")
    loaded = TemplateCache.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.fields["extra_text_embedding"], embedding)


def test_pictures_of_a_batch_have_tokens_of_their_own() -> None:
    one, two = torch.randn(2, 1, 3, 8)
    assert torch.equal(ExtraTextEmbedding().stack([one, two]), torch.cat([one, two]))
    with pytest.raises(CacheError, match="picture 0 has 3 tokens and picture 1 has 2"):
        ExtraTextEmbedding().stack([one, two[:, :2]])
