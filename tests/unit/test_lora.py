from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from silkscreen import TemplatePipeline
from silkscreen.bases import Base, Geometry
from silkscreen.cache import TemplateCache, inject, merge
from silkscreen.carriers.lora import LoRA, linear_layers
from silkscreen.errors import CacheError, PipelineError
from silkscreen.training.config import TrainingConfig
from silkscreen.training.trainer import train
from small_flux2 import CALL, SHAPES, draw, random_lora, random_tensor
from torch import nn

GEOMETRY = Geometry(2, 2, 2, 16, 32, in_channels=16)
BASE = Base("flux2-small", "", "", "Flux2KleinPipeline", False, {}, GEOMETRY, {}, (), Path(), "")
EMPTY = TemplateCache({}, {}, "")
TO_Q = "transformer_blocks.0.attn.to_q"


def cache(lora: Any, source: str = "x") -> TemplateCache:
    return TemplateCache.from_result({"lora": lora}, source)


def updated(transformer: nn.Module, *loras: Mapping[str, torch.Tensor], scale: float = 1.0) -> Any:
    """A copy of a transformer whose weights are W + scale B A, summed over updates."""
    transformer = copy.deepcopy(transformer)
    with torch.no_grad():
        for lora in loras:
            for key, a in lora.items():
                if key.endswith(".lora_A.weight"):
                    module = key.removesuffix(".lora_A.weight")
                    weight = transformer.get_submodule(module).weight
                    weight += scale * lora[f"{module}.lora_B.weight"] @ a
    return transformer


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max().item() < 1e-5


@pytest.fixture
def run(small_pipe: Any, transformer_inputs: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """Call a transformer, or that of `small_pipe` with caches in it."""

    def call(*caches: TemplateCache, transformer: Any = None, side: str = "cond") -> torch.Tensor:
        positive, negative = (*caches, EMPTY, EMPTY)[:2]
        with torch.no_grad(), inject(small_pipe, positive, negative):
            transformer = transformer or small_pipe.transformer
            with transformer.cache_context(side):
                output: torch.Tensor = transformer(**transformer_inputs)[0]
        return output

    return call


def test_the_layers_of_a_geometry_are_those_of_the_real_transformer(small_pipe: Any) -> None:
    modules = small_pipe.transformer.named_modules()
    real = {name: tuple(module.weight.shape) for name, module in modules if isinstance(module, nn.Linear)}
    assert linear_layers(GEOMETRY) == real
    assert len(linear_layers(Geometry(5, 20, 24, 128, 7680))) == 5 * 12 + 20 * 2 + 9


def test_an_update_of_every_layer_equals_merged_weights(small_pipe: Any, run: Callable[..., torch.Tensor]) -> None:
    lora = {}
    for index, (module, (outputs, inputs)) in enumerate(linear_layers(GEOMETRY).items()):
        lora[f"{module}.lora_A.weight"] = random_tensor(2 * index, 3, inputs) / 10
        lora[f"{module}.lora_B.weight"] = random_tensor(2 * index + 1, outputs, 3) / 10
    cache(lora).check(BASE)
    result = run(cache(lora))
    assert close(result, run(transformer=updated(small_pipe.transformer, lora)))
    assert (result - run()).abs().max() > 0.1


def test_merging_sums_over_the_union_of_modules(small_pipe: Any, run: Callable[..., torch.Tensor]) -> None:
    first, *rest = SHAPES
    one, two, three = random_lora(1, first, rank=2), random_lora(2, rank=3), random_lora(3, *rest, rank=1)
    merged = merge([cache(one), cache(two), cache(three)])
    merged.check(BASE)
    lora = merged.fields["lora"]
    assert lora[f"{first}.lora_A.weight"].shape == (5, SHAPES[first][1])
    assert lora[f"{rest[-1]}.lora_B.weight"].shape == (SHAPES[rest[-1]][0], 4)
    assert close(run(merged), run(transformer=updated(small_pipe.transformer, one, two, three)))


@pytest.mark.parametrize("alpha", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0])])
def test_alpha_scales_an_update_by_alpha_over_rank(
    alpha: Any, small_pipe: Any, run: Callable[..., torch.Tensor]
) -> None:
    lora = random_lora(1, rank=2)
    scaled = lora | {f"{module}.alpha": alpha for module in SHAPES}
    cache(scaled).check(BASE)
    naive = run(transformer=updated(small_pipe.transformer, lora, scale=3 / 2))
    assert close(run(cache(scaled)), naive)
    twice = merge([cache(scaled), cache(lora)])
    assert close(run(twice), run(transformer=updated(small_pipe.transformer, lora, scale=1 + 3 / 2)))


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("middle", ["", ".default"])
def test_the_fields_spellings_are_one(prefix: str, middle: str, run: Callable[..., torch.Tensor]) -> None:
    lora = random_lora(1)
    spelled = {prefix + key.replace(".weight", f"{middle}.weight"): tensor for key, tensor in lora.items()}
    cache(spelled).check(BASE)
    assert torch.equal(run(cache(spelled)), run(cache(lora)))
    assert merge([cache(spelled)]).fields["lora"].keys() == lora.keys()


def test_each_picture_of_a_batch_can_have_an_update_of_its_own(
    small_pipe: Any, run: Callable[..., torch.Tensor]
) -> None:
    modulation = {
        "double_stream_modulation_img.linear.lora_A.weight": random_tensor(8, 2, 2, 32) / 4,
        "double_stream_modulation_img.linear.lora_B.weight": random_tensor(9, 2, 192, 2) / 4,
    }
    both, shared = random_lora(1, batch=(2,)) | modulation, random_lora(2, TO_Q)
    merged = merge([cache(both), cache(shared)])
    merged.check(BASE)
    result = run(merged)
    for picture in (0, 1):
        own = {key: tensor[picture] for key, tensor in both.items()}
        naive = run(transformer=updated(small_pipe.transformer, own, shared))
        assert close(result[picture], naive[picture])
    assert not close(result[0], run(cache({key: tensor[1] for key, tensor in both.items()}))[0])


def test_an_update_that_is_batched_by_one_is_for_all(run: Callable[..., torch.Tensor]) -> None:
    batched = random_lora(1, batch=(1,))
    single = {key: tensor[0] for key, tensor in batched.items()}
    assert close(run(cache(batched)), run(cache(single)))


def test_each_side_has_an_update_of_its_own(small_pipe: Any, run: Callable[..., torch.Tensor]) -> None:
    positive, negative = random_lora(1, TO_Q), random_lora(2)
    naive = {
        "cond": run(transformer=updated(small_pipe.transformer, positive)),
        "uncond": run(transformer=updated(small_pipe.transformer, negative)),
    }
    for side, expected in naive.items():
        assert close(run(cache(positive), cache(negative), side=side), expected)
    assert torch.equal(run(cache(positive), side="uncond"), run())
    assert torch.equal(run(EMPTY, cache(negative)), run())


def test_guidance_runs_each_side_with_its_own_update(small_pipe: Any, fixed_folder: Callable[..., Path]) -> None:
    templates = TemplatePipeline(fixed_folder("style", '{"lora": random_lora(seed)}'), trust_code=True)
    asked = {"prompt": "red", "seed": 0, "template_inputs": [{"seed": 1}], **CALL}
    bare = draw(small_pipe)
    alone = templates(small_pipe, **asked).images
    guided = templates(small_pipe, negative_template_inputs=[{"seed": 1}], **asked).images
    assert len({picture.tobytes() for picture in (bare, alone, guided)}) == 3
    small_pipe.transformer = updated(small_pipe.transformer, random_lora(1))
    np.testing.assert_allclose(guided, draw(small_pipe), atol=1e-5)


class Int8Linear(nn.Module):
    """A linear layer whose weight is not one that could be added to."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_a_quantized_layer_takes_an_update(small_pipe: Any, run: Callable[..., torch.Tensor]) -> None:
    quantized = Int8Linear(small_pipe.transformer.get_submodule(TO_Q))
    small_pipe.transformer.set_submodule(TO_Q, quantized)
    lora = random_lora(1, TO_Q)
    a, b = lora.values()
    result, bare = run(cache(lora)), run()
    hook = quantized.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ (b @ a).T)
    naive = run()
    hook.remove()
    assert close(result, naive)
    assert not close(result, bare)
    assert quantized.weight.dtype == torch.int8


def test_gradients_reach_both_factors(small_pipe: Any, transformer_inputs: dict[str, Any]) -> None:
    lora = {key: nn.Parameter(tensor) for key, tensor in random_lora(1).items()}
    transformer = small_pipe.transformer.requires_grad_(False)
    with inject(small_pipe, cache(lora), EMPTY):
        loss = transformer(**transformer_inputs)[0].square().sum()
    loss.backward()
    got = {key: tensor.grad for key, tensor in lora.items()}
    naive = {key: tensor.detach().clone().requires_grad_() for key, tensor in lora.items()}
    weights = {
        f"{module}.weight": transformer.get_submodule(module).weight
        + naive[f"{module}.lora_B.weight"] @ naive[f"{module}.lora_A.weight"]
        for module in SHAPES
    }
    torch.func.functional_call(transformer, weights, (), transformer_inputs)[0].square().sum().backward()
    for key, gradient in got.items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, naive[key].grad, atol=1e-4, rtol=1e-3)


TRAINED_TEMPLATE = """
    import torch

    MODULE = "single_transformer_blocks.1.attn.to_out"

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.full((2, 768), 0.01))
            self.b = torch.nn.Parameter(torch.full((192, 2), 0.01))
            self.words = torch.nn.Parameter(torch.full((1, 1, 288), 0.01))

        def process_inputs(self, pipe, scale, **kwargs):
            return {"scale": torch.tensor([scale])}

        def forward(self, pipe, scale, **kwargs):
            b = self.b * scale.view(-1, 1, 1)
            lora = {f"{MODULE}.lora_A.weight": self.a, f"{MODULE}.lora_B.weight": b}
            return {"lora": lora, "text_embedding": self.words}
"""


def test_training_reaches_what_makes_an_update(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(textwrap.dedent(TRAINED_TEMPLATE))
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    row = {"image": "red.png", "prompt": "a large red star on a red background"}
    rows = [row | {"template_inputs": {"scale": scale}} for scale in (0.5, 1.0)]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    config = TrainingConfig(
        template_model_id_or_path=str(tmp_path),
        dataset_metadata_path=tmp_path / "metadata.json",
        output_path=tmp_path / "out",
        batch_size=2,
        weight_decay=0.0,
    )
    weights = load_file(train(config))
    assert weights.keys() == {"a", "b", "words"}
    for weight in weights.values():
        assert (weight != 0.01).float().mean() > 0.9


def test_a_call_leaves_no_trace(small_pipe: Any, fixed_folder: Callable[..., Path]) -> None:
    templates = TemplatePipeline(fixed_folder("style", '{"lora": random_lora(seed)}'), trust_code=True)
    modules, before = dict(small_pipe.transformer.named_modules()), draw(small_pipe)
    names = list(modules)

    def fail(*_: Any) -> Any:
        raise RuntimeError("stopped")

    def unchanged() -> bool:
        now = dict(small_pipe.transformer.named_modules())
        return list(now) == names and all(now[name] is module for name, module in modules.items())

    drawn = templates(small_pipe, prompt="red", seed=0, template_inputs=[{}], **CALL).images
    assert unchanged()
    assert not np.array_equal(drawn, before)
    with pytest.raises(RuntimeError, match="stopped"):
        templates(small_pipe, prompt="red", seed=0, template_inputs=[{}], callback_on_step_end=fail, **CALL)
    assert unchanged()
    assert np.array_equal(draw(small_pipe), before)


def test_compiled_blocks_take_updates_and_compile_once(small_pipe: Any) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    lora = random_lora(1, *(f"single_transformer_blocks.{i}.attn.to_out" for i in (0, 1)))
    bare = draw(small_pipe)
    with inject(small_pipe, cache(lora), EMPTY):
        expected = draw(small_pipe)
    small_pipe.transformer.compile_repeated_blocks(backend=backend)
    assert np.array_equal(draw(small_pipe), bare)
    assert len(graphs) == 2  # a double and a single block
    counts = []
    for steps in (2, 2, 4):
        with inject(small_pipe, cache(lora), EMPTY):
            drawn = draw(small_pipe, num_inference_steps=steps)
        counts.append(len(graphs))
        if steps == 2:
            np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert counts == [4, 4, 4]  # a single block with an update, and one without on the other side
    assert np.array_equal(draw(small_pipe), bare)
    assert len(graphs) == 4


def test_fused_projections_are_refused(small_pipe: Any) -> None:
    small_pipe.transformer.fuse_qkv_projections()
    with (
        pytest.raises(PipelineError, match=r"to_q does not run while .* call pipe.transformer.unfuse_qkv_projections"),
        inject(small_pipe, cache(random_lora(1)), EMPTY),
    ):
        pass
    small_pipe.transformer.unfuse_qkv_projections()
    with inject(small_pipe, cache(random_lora(1)), EMPTY):
        pass


def test_a_module_that_is_not_there_gets_the_nearest_names() -> None:
    lora = {key.replace("to_q.", "to_qq."): tensor for key, tensor in random_lora(1, TO_Q).items()}
    with pytest.raises(CacheError) as caught:
        cache(lora, "style").check(BASE)
    assert str(caught.value).startswith(
        "template 'style': lora['transformer_blocks.0.attn.to_qq']: flux2-small has no such linear layer: "
        "did you mean 'transformer_blocks.0.attn.to_q' or "
    )


def test_every_problem_is_reported() -> None:
    to_k, to_v, out = (TO_Q.replace("to_q", name) for name in ("to_k", "to_v", "to_out.0"))
    ff = "transformer_blocks.1.ff"
    lora = {
        **random_lora(1, TO_Q),
        f"transformer.{TO_Q}.lora_A.default.weight": torch.zeros(2, 32),
        "something": torch.zeros(1),
        f"{to_k}.lora_A.weight": torch.zeros(2, 31),
        f"{to_k}.lora_B.weight": torch.zeros(33, 2),
        f"{to_v}.lora_A.weight": torch.zeros(2, 32),
        f"{out}.lora_A.weight": torch.zeros(2, 32),
        f"{out}.lora_B.weight": torch.zeros(32, 3),
        f"{ff}.linear_in.lora_A.weight": 1,
        f"{ff}.linear_in.lora_B.weight": 2,
        f"{ff}.linear_out.lora_A.weight": torch.zeros(96),
        f"{ff}.linear_out.lora_B.weight": torch.zeros(32, 1),
        f"{ff}.linear_out.alpha": "one",
        "zzz.alpha": 1,
    }
    with pytest.raises(CacheError) as caught:
        cache(lora).check(BASE)
    for problem in (
        f"lora['transformer.{TO_Q}.lora_A.default.weight']: the lora_A of {TO_Q} is there twice",
        "lora['something']: expected <module>.lora_A.weight, <module>.lora_B.weight or <module>.alpha",
        f"lora[{to_k!r}]: lora_A has shape [2, 31], flux2-small wants ([batch,] rank, 32)",
        f"lora[{to_k!r}]: lora_B has shape [33, 2], flux2-small wants ([batch,] 32, rank)",
        f"lora[{to_v!r}]: lora_B missing",
        f"lora[{out!r}]: lora_A has rank 2 and lora_B 3",
        f"lora['{ff}.linear_in']: expected two tensors, got int and int",
        f"lora['{ff}.linear_out']: lora_A has shape [96]",
        f"lora['{ff}.linear_out']: alpha has to be one number",
        "lora['zzz']: flux2-small has no such linear layer: name it as diffusers does",
    ):
        assert problem in str(caught.value)
    with pytest.raises(CacheError, match="lora: expected a dict of tensors, got list"):
        cache([]).check(BASE)
    first, second, *_ = SHAPES
    with pytest.raises(CacheError, match=r"lora: its tensors differ in batch: \[2, 3\]"):
        cache(random_lora(1, first, batch=(2,)) | random_lora(1, second, batch=(3,))).check(BASE)


def test_keys_that_do_not_read_are_refused_also_without_a_check(small_pipe: Any) -> None:
    with (
        pytest.raises(CacheError, match=r"lora\['something'\]: expected <module>"),
        inject(small_pipe, cache({"something": torch.zeros(1)}), EMPTY),
    ):
        pass


def test_a_saved_update_is_the_same_when_loaded(tmp_path: Path, run: Callable[..., torch.Tensor]) -> None:
    lora = random_lora(1, batch=(2,)) | {f"{TO_Q}.alpha": 4}
    cache(lora).save(tmp_path / "c.safetensors")
    loaded = TemplateCache.load(tmp_path / "c.safetensors")
    loaded.check(BASE)
    assert loaded.fields["lora"].keys() == random_lora(1).keys()
    assert torch.equal(run(loaded), run(cache(lora)))


def test_pictures_of_a_batch_have_updates_of_their_own() -> None:
    one, two = random_lora(1, TO_Q), random_lora(2, rank=3)
    stacked = LoRA().stack([one, two])
    for module in SHAPES:
        a, b = stacked[f"{module}.lora_A.weight"], stacked[f"{module}.lora_B.weight"]
        assert a.shape[:2] == (2, 3)
        for picture, own in enumerate((one, two)):
            update = torch.zeros(b.shape[1], a.shape[2])
            if f"{module}.lora_A.weight" in own:
                update = own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
            torch.testing.assert_close(b[picture] @ a[picture], update)
    with pytest.raises(CacheError, match="picture 0 has a batch of 2"):
        LoRA().stack([stacked, two])
