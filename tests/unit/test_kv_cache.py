from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silkscreen.bases import Base, Geometry
from silkscreen.cache import TemplateCache, inject, merge, stack
from silkscreen.errors import CacheError
from small_flux2 import build_pipeline, draw

MakeKV = Callable[..., dict[str, Any]]

BASE = Base("flux2-small", "", "", "Flux2KleinPipeline", False, {}, Geometry(2, 2, 2, 16, 32), {}, (), Path(), "")


def cache(kv: Any, source: str = "x") -> TemplateCache:
    return TemplateCache.from_result({"kv_cache": kv}, source)


def test_a_fitting_cache_passes(small_kv: MakeKV) -> None:
    cache(small_kv("double_0", "single_1", batch=2)).check(BASE)


def test_a_block_the_base_has_not_is_named(small_kv: MakeKV) -> None:
    with pytest.raises(CacheError, match=r"template 'x': kv_cache\['single_31'\]: flux2-small has 2 single blocks"):
        cache(small_kv("single_31")).check(BASE)


def test_heads_and_head_size_are_compared_with_the_base() -> None:
    kv = {"double_0": (torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, 2, 8))}
    with pytest.raises(CacheError) as caught:
        cache(kv).check(BASE)
    assert "K has shape [1, 3, 4, 16], flux2-small wants (batch, tokens, 2, 16)" in str(caught.value)
    assert "V has shape [1, 3, 2, 8]" in str(caught.value)


def test_keys_and_values_of_different_length_are_refused() -> None:
    with pytest.raises(CacheError, match="they have to be equal"):
        cache({"double_0": (torch.zeros(1, 3, 2, 16), torch.zeros(1, 4, 2, 16))}).check(BASE)


def test_blocks_of_different_batch_are_refused(small_kv: MakeKV) -> None:
    with pytest.raises(CacheError, match=r"differ in batch: \[2, 3\]"):
        cache(small_kv("double_0", batch=2) | small_kv("double_1", batch=3)).check(BASE)


def test_what_is_no_dict_of_tensors_is_refused() -> None:
    with pytest.raises(CacheError, match="expected a dict of block names, got list"):
        cache([]).check(BASE)
    with pytest.raises(CacheError, match=r"expected two tensors \(K, V\), got int"):
        cache({"double_0": 3}).check(BASE)
    with pytest.raises(CacheError, match="forward returned Tensor"):
        TemplateCache.from_result(torch.zeros(1), "x")


def test_merging_concatenates_tokens_in_order_block_by_block(small_kv: MakeKV) -> None:
    one, two = small_kv("double_0", "single_0", seed=1), small_kv("single_0", tokens=2, seed=2)
    merged = merge([cache(one), cache(two)]).fields["kv_cache"]
    assert list(merged) == ["double_0", "single_0"]
    assert torch.equal(merged["double_0"][0], one["double_0"][0])
    for part in (0, 1):
        assert torch.equal(merged["single_0"][part], torch.cat([one["single_0"][part], two["single_0"][part]], dim=1))


def test_merging_repeats_a_batch_of_one(small_kv: MakeKV) -> None:
    one, two = small_kv("single_0", batch=1), small_kv("single_0", batch=2, seed=2)
    key, _ = merge([cache(one), cache(two)]).fields["kv_cache"]["single_0"]
    assert key.shape == (2, 6, 2, 16)
    assert torch.equal(key[0, :3], key[1, :3])


def test_stacking_gives_each_picture_its_own_keys_and_values(small_kv: MakeKV) -> None:
    one, two = small_kv("double_0", "single_0", seed=1), small_kv("single_0", "double_0", seed=2)
    stacked = stack([cache(one), cache(two), cache(one)]).fields["kv_cache"]
    for block in ("double_0", "single_0"):
        for part in (0, 1):
            assert torch.equal(stacked[block][part], torch.cat([one[block][part], two[block][part], one[block][part]]))


def test_pictures_of_fewer_tokens_are_filled_up_with_tokens_of_no_weight(small_kv: MakeKV) -> None:
    one, two = small_kv("double_0"), small_kv("double_0", "single_0", tokens=5)
    stacked = stack([cache(one), cache(two)]).fields["kv_cache"]
    for block, own in (("double_0", 3), ("single_0", 0)):
        key, _, weights = stacked[block]
        assert key.shape == (2, 5, 2, 16)
        assert weights.at(None).elsewhere[:, 0].tolist() == [[1.0] * own + [0.0] * (5 - own), [1.0] * 5]
        assert torch.equal(key[1:], two[block][0])


def test_a_picture_of_a_batch_of_its_own_is_named(small_kv: MakeKV) -> None:
    with pytest.raises(CacheError, match="picture 1 has a batch of 2"):
        stack([cache(small_kv("double_0")), cache(small_kv("double_0", batch=2))])


def test_a_pipeline_argument_given_twice_is_a_conflict_unless_a_policy_chooses() -> None:
    caches = [TemplateCache.from_result({"strength": value}, name) for name, value in (("a", 1), ("b", 2))]
    with pytest.raises(CacheError, match="'a' and 'b' both give the pipeline argument 'strength'"):
        merge(caches)
    assert merge(caches, "first").arguments == {"strength": 1}
    assert merge(caches, "last").arguments == {"strength": 2}


def test_a_saved_cache_is_the_same_when_loaded(small_kv: MakeKV, tmp_path: Path) -> None:
    kv = small_kv("double_0", "single_1")
    cache(kv).save(tmp_path / "c.safetensors")
    loaded = TemplateCache.load(tmp_path / "c.safetensors")
    assert loaded.source == "x"
    assert loaded.fields["kv_cache"].keys() == kv.keys()
    assert all(torch.equal(loaded.fields["kv_cache"][b][p], kv[b][p]) for b in kv for p in (0, 1))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        cache(kv).save(tmp_path / "c.safetensors")


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_text("no")
    with pytest.raises(CacheError, match=r"c\.safetensors is no saved template cache"):
        TemplateCache.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("single_blocks", [2, 6])
def test_compiled_blocks_of_one_kind_share_their_graphs(single_blocks: int, small_kv: MakeKV) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe = build_pipeline(single_blocks=single_blocks)
    blocks = ["double_0", "double_1", *(f"single_{i}" for i in range(single_blocks))]
    one, two = (
        (cache(small_kv(*blocks, seed=seed)), cache(small_kv(*blocks, tokens=2, seed=seed + 1))) for seed in (1, 3)
    )

    def drawn(sides: tuple[TemplateCache, TemplateCache], steps: int) -> np.ndarray:
        with inject(pipe, *sides):
            return draw(pipe, num_inference_steps=steps)

    calls = [(one, 2), (two, 2), (one, 4)]
    expected = [drawn(*call) for call in calls]
    bare = draw(pipe)
    pipe.transformer.compile_repeated_blocks(backend=backend)
    for call, picture in zip(calls, expected, strict=True):
        np.testing.assert_allclose(drawn(*call), picture, atol=1e-5)
        assert len(graphs) == 4  # a double and a single block on each side
    assert np.array_equal(draw(pipe), bare)
    assert len(graphs) == 6  # and without a template
