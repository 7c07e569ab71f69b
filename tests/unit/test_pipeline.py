from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline
from diffusers.models.embeddings import apply_rotary_emb
from silkscreen import TemplatePipeline, hookimpl, registry
from silkscreen.cache import TemplateCache, inject
from silkscreen.errors import CacheError, InputError, PipelineError, UnknownNameError
from small_flux2 import CALL, SHAPES, build_pipeline, draw, random_lora, random_picture, random_tensor

MakeKV = Callable[..., dict[str, Any]]


def cache(kv: Any) -> TemplateCache:
    return TemplateCache.from_result({"kv_cache": kv}, "x")


EMPTY = TemplateCache({}, {}, "")


def naive_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv: Any) -> torch.Tensor:
    """Softmax attention over a block's own tokens and the template's, written out head by head."""
    key, value = (torch.cat([own, extra.expand(2, -1, -1, -1)], 1) for own, extra in zip((key, value), kv, strict=True))
    heads = []
    for head in range(query.shape[2]):
        scores = query[:, :, head] @ key[:, :, head].transpose(1, 2) / query.shape[3] ** 0.5
        heads.append(scores.softmax(dim=-1) @ value[:, :, head])
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("block", ["double_0", "single_0"])
@torch.no_grad()
def test_injected_attention_equals_a_naive_one(
    block: str, small_pipe: Any, small_kv: MakeKV, transformer_inputs: dict[str, Any]
) -> None:
    kind, _, index = block.partition("_")
    blocks = {
        "double": small_pipe.transformer.transformer_blocks,
        "single": small_pipe.transformer.single_transformer_blocks,
    }
    attention = blocks[kind][int(index)].attn
    calls: list[Any] = []
    hook = attention.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    kv = small_kv(block)
    with inject(small_pipe, cache(kv), EMPTY):
        small_pipe.transformer(**transformer_inputs)
    hook.remove()
    _, _, given, result = calls[0]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, 16))

    hidden = given["hidden_states"]
    if kind == "double":
        text = given["encoder_hidden_states"]
        query = torch.cat(
            [
                attention.norm_added_q(split(attention.add_q_proj(text))),
                attention.norm_q(split(attention.to_q(hidden))),
            ],
            1,
        )
        key = torch.cat(
            [
                attention.norm_added_k(split(attention.add_k_proj(text))),
                attention.norm_k(split(attention.to_k(hidden))),
            ],
            1,
        )
        value = torch.cat([split(attention.add_v_proj(text)), split(attention.to_v(hidden))], 1)
    else:
        query, key, value, gate, up = attention.to_qkv_mlp_proj(hidden).split([32, 32, 32, 96, 96], dim=-1)
        query, key, value = attention.norm_q(split(query)), attention.norm_k(split(key)), split(value)
    rotary = given["image_rotary_emb"]
    attended = naive_attention(
        apply_rotary_emb(query, rotary, sequence_dim=1), apply_rotary_emb(key, rotary, sequence_dim=1), value, kv[block]
    )
    if kind == "double":
        torch.testing.assert_close(result[0], attention.to_out[0](attended[:, 6:]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result[1], attention.to_add_out(attended[:, :6]), atol=1e-5, rtol=1e-5)
    else:
        expected = attention.to_out(torch.cat([attended, F.silu(gate) * up], dim=-1))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_each_side_of_guidance_has_its_own_cache(small_pipe: Any, small_kv: MakeKV) -> None:
    kv = cache(small_kv("double_0", "single_1"))
    bare = draw(small_pipe)
    with inject(small_pipe, kv, EMPTY):
        positive = draw(small_pipe)
        unguided = draw(small_pipe, guidance_scale=1.0)
    with inject(small_pipe, EMPTY, kv):
        negative = draw(small_pipe)
        other_unguided = draw(small_pipe, guidance_scale=1.0)
    assert len({picture.tobytes() for picture in (bare, positive, negative)}) == 3
    assert not np.array_equal(unguided, other_unguided)
    np.testing.assert_allclose(other_unguided, draw(small_pipe, guidance_scale=1.0), atol=1e-6)


def test_a_batch_has_the_cache_in_every_picture(small_pipe: Any, small_kv: MakeKV) -> None:
    latents = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(3))
    with inject(small_pipe, cache(small_kv("double_0", "single_0")), EMPTY):
        one = draw(small_pipe, latents=latents)
        two = draw(small_pipe, latents=latents.repeat(2, 1, 1, 1), num_images_per_prompt=2)
    np.testing.assert_allclose(two, np.repeat(one, 2, axis=0), atol=1e-5)


def test_each_picture_of_a_batch_may_have_its_own_inputs(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)

    def pictures(prompts: list[str], first_seed: int, *scales: list[float], **arguments: Any) -> np.ndarray:
        count = len(prompts) * arguments.get("num_images_per_prompt", 1)
        positive, negative = ([[{"scale": scale}] for scale in side] for side in scales)
        generators = [torch.Generator().manual_seed(first_seed + n) for n in range(count)]
        return templates(
            small_pipe,
            prompt=prompts,
            generator=generators,
            template_inputs=positive,
            negative_template_inputs=negative,
            **{**CALL, **arguments},
        ).images

    together = pictures(["red", "blue"], 0, [20.0, -20.0], [5.0, 0.0])
    alone = [pictures(["red"], 0, [20.0], [5.0])[0], pictures(["blue"], 1, [-20.0], [0.0])[0]]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    swapped = pictures(["red", "blue"], 0, [-20.0, 20.0], [0.0, 5.0])
    assert np.abs(together - swapped).max(axis=(1, 2, 3)).min() > 1e-3

    for_prompts = pictures(["red", "blue"], 0, [20.0, -20.0], [5.0, 0.0], num_images_per_prompt=2)
    for_pictures = pictures(["red", "blue"], 0, [20, 20, -20, -20], [5, 5, 0, 0], num_images_per_prompt=2)
    assert np.array_equal(for_prompts, for_pictures)
    np.testing.assert_allclose(for_prompts[3], pictures(["blue"], 3, [-20.0], [0.0])[0], atol=1e-5)


def test_each_picture_of_a_batch_may_have_its_own_content_of_every_carrier(
    small_pipe: Any, fixed_folder: Callable[..., Path]
) -> None:
    folder = fixed_folder(
        "style",
        """{
            "lora": random_lora(seed, *list(SHAPES)[seed:], rank=seed),
            "extra_text_embedding": random_tensor(seed, 1, 3, 32),
            "kv_cache": {"double_0": (random_tensor(seed, 1, 2, 2, 16), random_tensor(seed + 1, 1, 2, 2, 16))},
        }""",
    )
    templates = TemplatePipeline(folder, trust_code=True)

    def pictures(*seeds: int) -> np.ndarray:
        return templates(
            small_pipe,
            prompt=["red"] * len(seeds),
            generator=[torch.Generator().manual_seed(0) for _ in seeds],
            template_inputs=[[{"seed": seed}] for seed in seeds],
            negative_template_inputs=[[{"seed": seed + 1}] for seed in seeds],
            **CALL,
        ).images

    together = pictures(1, 2)
    np.testing.assert_allclose(together, [pictures(1)[0], pictures(2)[0]], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_default_negatives_are_each_pictures_own(small_pipe: Any, constant_folder: Path) -> None:
    manifest = 'title = "C"\n[inputs.scale]\ntype = "number"\n[inputs.other]\ntype = "number"\nnegative = 0.0\n'
    (constant_folder / "template.toml").write_text(manifest)
    model = (constant_folder / "model.py").read_text()
    model = model.replace("scale=1.0,", "scale, other,").replace('{"scale": scale}', '{"scale": 20 * (scale + other)}')
    (constant_folder / "model.py").write_text(model)
    templates = TemplatePipeline(constant_folder, trust_code=True)
    inputs = [[{"scale": 1.0, "other": 1.0}], [{"scale": -1.0, "other": 1.0}]]
    negatives = [[{"scale": 1.0, "other": 0.0}], [{"scale": -1.0, "other": 0.0}]]
    arguments = {"prompt": ["red", "blue"], "seed": 0, "template_inputs": inputs, **CALL}
    default = templates(small_pipe, negative_template_inputs="default", **arguments).images
    assert np.array_equal(default, templates(small_pipe, negative_template_inputs=negatives, **arguments).images)
    assert not np.array_equal(default, templates(small_pipe, **arguments).images)


def test_pictures_that_cannot_share_a_batch_are_named(small_pipe: Any, constant_folder: Path) -> None:
    model = (constant_folder / "model.py").read_text()
    changed = model.replace('return {"kv_cache"', 'return {"height": 32 * int(scale), "kv_cache"')
    (constant_folder / "model.py").write_text(changed)
    templates = TemplatePipeline(constant_folder, trust_code=True)
    with pytest.raises(CacheError, match="pictures 0 and 1 differ in the pipeline argument 'height'"):
        templates.compose(small_pipe, [[{"scale": 1}], [{"scale": 2}]])
    assert templates.compose(small_pipe, [[{"scale": 2}], [{"scale": 2}]]).arguments == {"height": 64}


def test_lists_of_inputs_have_to_be_as_many_as_the_pictures(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    arguments = {"prompt": ["red", "blue"], "num_images_per_prompt": 2, **CALL}
    with pytest.raises(InputError, match="has 3 lists: give 2, one for each prompt, or 4, one for each picture"):
        templates(small_pipe, template_inputs=[[{}], [{}], [{}]], **arguments)
    with pytest.raises(InputError, match="mixes inputs with lists of inputs"):
        templates(small_pipe, template_inputs=[[{}], {}], **arguments)
    with pytest.raises(UnknownNameError, match=r"template_inputs\[1\]\[0\] for 'constant': unknown input 'scael'"):
        templates(small_pipe, template_inputs=[[{}], [{"scael": 1}]], **arguments)


def test_a_call_leaves_no_trace(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    processors = dict(small_pipe.transformer.attn_processors)
    before = draw(small_pipe)
    with_template = templates(small_pipe, prompt="red", seed=0, template_inputs=[{"scale": 5.0}], **CALL).images
    assert not np.array_equal(before, with_template)
    assert all(small_pipe.transformer.attn_processors[name] is p for name, p in processors.items())
    assert "cache_context" not in vars(small_pipe.transformer)
    assert np.array_equal(before, draw(small_pipe))


def test_a_failed_call_leaves_no_trace(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    processors = dict(small_pipe.transformer.attn_processors)
    before = draw(small_pipe)

    def fail(*_: Any) -> Any:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        templates(small_pipe, prompt="red", seed=0, template_inputs=[{}], callback_on_step_end=fail, **CALL)
    assert all(small_pipe.transformer.attn_processors[name] is p for name, p in processors.items())
    assert np.array_equal(before, draw(small_pipe))


def test_without_templates_a_call_is_the_pipelines_own(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    assert np.array_equal(draw(small_pipe), templates(small_pipe, prompt="red", seed=0, **CALL).images)


def test_a_template_used_twice_counts_twice(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    composed = templates.compose(small_pipe, [{"scale": 1.0}, {"model_id": 0, "scale": 3.0}])
    key, value = composed.fields["kv_cache"]["single_1"]
    assert key.shape[1] == 4
    assert value[0, :, 0, 0].tolist() == [1.0, 1.0, 3.0, 3.0]


def test_wrong_names_get_the_nearest_right_ones(small_pipe: Any, constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    with pytest.raises(UnknownNameError, match=r"template_inputs\[0\] for 'constant': unknown input 'scael'"):
        templates(small_pipe, prompt="red", template_inputs=[{"scael": 1}], **CALL)
    with pytest.raises(UnknownNameError, match="unknown model_id 'constnat': did you mean 'constant'"):
        templates(small_pipe, prompt="red", template_inputs=[{"model_id": "constnat"}], **CALL)
    with pytest.raises(UnknownNameError, match="model_id 1 of 1 templates"):
        templates(small_pipe, prompt="red", template_inputs=[{"model_id": 1}], **CALL)
    with pytest.raises(InputError, match="unknown argument 'promt': did you mean 'prompt'"):
        templates(small_pipe, promt="red")


def test_a_cache_for_another_geometry_is_refused_before_anything_runs(small_pipe: Any, constant_folder: Path) -> None:
    model = (constant_folder / "model.py").read_text().replace("head_dim=16", "head_dim=8")
    (constant_folder / "model.py").write_text(model)
    templates = TemplatePipeline(constant_folder, trust_code=True)
    with pytest.raises(CacheError, match=r"'constant': kv_cache\['single_1'\]: K has shape \[1, 2, 2, 8\]"):
        templates(small_pipe, prompt="red", template_inputs=[{}], **CALL)


def test_negative_inputs_that_would_have_no_effect_are_refused(constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    for pipe, guidance in ((build_pipeline(is_distilled=True), 4.0), (build_pipeline(), 1.0)):
        with pytest.raises(PipelineError, match="no negative side"):
            templates(pipe, prompt="red", negative_template_inputs=[{}], **{**CALL, "guidance_scale": guidance})


def test_a_field_that_is_neither_carrier_nor_argument_is_refused(small_pipe: Any, constant_folder: Path) -> None:
    model = (constant_folder / "model.py").read_text().replace('"kv_cache":', '"kv_cash":')
    (constant_folder / "model.py").write_text(model)
    templates = TemplatePipeline(constant_folder, trust_code=True)
    with pytest.raises(CacheError, match="'kv_cash', which is neither a carrier nor an argument"):
        templates(small_pipe, prompt="red", template_inputs=[{}], **CALL)


def test_a_template_may_give_an_argument_of_the_call(small_pipe: Any, constant_folder: Path) -> None:
    model = (constant_folder / "model.py").read_text()
    (constant_folder / "model.py").write_text(model.replace('return {"kv_cache"', 'return {"height": 64, "kv_cache"'))
    templates = TemplatePipeline(constant_folder, trust_code=True)
    arguments = {name: value for name, value in CALL.items() if name != "height"}
    assert templates(small_pipe, prompt="red", template_inputs=[{}], **arguments).images.shape[1] == 64
    with pytest.raises(CacheError, match="'height', and so does the call"):
        templates(small_pipe, prompt="red", template_inputs=[{}], **CALL)


def test_a_picture_that_a_template_gives_is_edited(small_pipe: Any, fixed_folder: Callable[..., Path]) -> None:
    folder = fixed_folder("photo", '{"image": random_picture(seed)}')
    drawn = TemplatePipeline(folder, trust_code=True)(
        small_pipe, prompt="red", seed=0, template_inputs=[{"seed": 3}], **CALL
    )
    assert np.array_equal(drawn.images, draw(small_pipe, image=random_picture(3)))
    assert not np.array_equal(drawn.images, draw(small_pipe))


def test_a_conflict_of_templates_is_an_error_or_settled_by_a_policy(fixed_folder: Callable[..., Path]) -> None:
    pipe = build_pipeline(Flux2KleinInpaintPipeline)
    first = fixed_folder("first", '{"strength": 0.9, "image": random_picture(1)}')
    last = fixed_folder("last", '{"strength": 0.6, "mask_image": random_picture(3).convert("L")}')
    templates = TemplatePipeline([first, last], trust_code=True)
    call = {**CALL, "num_inference_steps": 4, "height": 64, "width": 64}
    asked = {"prompt": "red", "seed": 0, "template_inputs": [{"model_id": "first"}, {"model_id": "last"}], **call}
    with pytest.raises(CacheError, match=r"'first' and 'last' both give the pipeline argument 'strength'"):
        templates(pipe, **asked)
    pictures = {"image": random_picture(1), "mask_image": random_picture(3).convert("L")}
    for policy, strength in (("first", 0.9), ("last", 0.6)):
        drawn = templates(pipe, on_conflict=policy, **asked).images
        assert np.array_equal(drawn, draw(pipe, strength=strength, **pictures, **call))


def test_several_templates_with_several_carriers_act_in_one_call(
    small_pipe: Any, constant_folder: Path, fixed_folder: Callable[..., Path]
) -> None:
    style = fixed_folder(
        "style",
        """{
            "lora": random_lora(seed),
            "extra_text_embedding": random_tensor(seed, 1, 3, 32),
            "kv_cache": {"double_0": (random_tensor(seed, 1, 2, 2, 16), random_tensor(seed + 1, 1, 2, 2, 16))},
        }""",
    )
    templates = TemplatePipeline([style, constant_folder], trust_code=True)
    drawn = templates(
        small_pipe,
        prompt="red",
        seed=0,
        template_inputs=[
            {"model_id": "style", "seed": 1},
            {"model_id": "constant", "scale": 2.0},
            {"model_id": "style", "seed": 5},
        ],
        **{**CALL, "guidance_scale": 1.0},
    ).images

    one, two = ((random_tensor(seed, 1, 2, 2, 16), random_tensor(seed + 1, 1, 2, 2, 16)) for seed in (1, 5))
    kv = {
        "double_0": tuple(torch.cat(parts, 1) for parts in zip(one, two, strict=True)),
        "single_1": (torch.ones(1, 2, 2, 16), torch.full((1, 2, 2, 16), 2.0)),
    }
    embeds, _ = small_pipe.encode_prompt("red", max_sequence_length=6, text_encoder_out_layers=(1, 2))
    embeds = torch.cat([embeds, random_tensor(1, 1, 3, 32), random_tensor(5, 1, 3, 32)], 1)
    bare = draw(small_pipe, guidance_scale=1.0)
    for lora in (random_lora(1), random_lora(5)):
        for module in SHAPES:
            update = lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
            small_pipe.transformer.get_submodule(module).weight.data += update
    with inject(small_pipe, cache(kv), EMPTY):
        naive = draw(small_pipe, prompt=None, prompt_embeds=embeds, guidance_scale=1.0)
    np.testing.assert_allclose(drawn, naive, atol=1e-5)
    assert np.abs(drawn - bare).max() > 1e-3


def test_a_pipeline_with_other_attention_processors_is_refused_by_name(constant_folder: Path) -> None:
    templates = TemplatePipeline(constant_folder, trust_code=True)
    pipe = build_pipeline(Flux2KleinKVPipeline)
    with pytest.raises(PipelineError, match=r"double_0 has the attention processor Flux2KVAttnProcessor"):
        templates(pipe, prompt="red", template_inputs=[{}])
    with pytest.raises(PipelineError, match=r"object is no FLUX\.2 pipeline"):
        templates(object(), prompt="red")


def test_default_negatives_take_the_values_that_manifests_declare(small_pipe: Any, constant_folder: Path) -> None:
    manifest = 'title = "Constant"\n[inputs.scale]\ntype = "number"\ndefault = 1.0\n'
    (constant_folder / "template.toml").write_text(manifest)
    undeclared = TemplatePipeline(constant_folder, trust_code=True)
    assert undeclared.default_negatives([{"scale": 3}]) == []
    (constant_folder / "template.toml").write_text(manifest + "negative = 0.25\n")
    templates = TemplatePipeline(constant_folder, trust_code=True)
    assert templates.default_negatives([{"scale": 3}]) == [{"model_id": "constant", "scale": 0.25}]
    arguments = {"prompt": "red", "seed": 0, "template_inputs": [{"scale": 3}], **CALL}
    asked = templates(small_pipe, negative_template_inputs=[{"scale": 0.25}], **arguments).images
    default = templates(small_pipe, negative_template_inputs="default", **arguments).images
    bare = templates(small_pipe, **arguments).images
    assert np.array_equal(default, asked)
    assert not np.array_equal(default, bare)


def test_hooks_see_and_may_change_a_call(small_pipe: Any, constant_folder: Path) -> None:
    seen: list[Any] = []

    class Plugin:
        @hookimpl
        def before_generate(self, arguments: dict[str, Any]) -> None:
            arguments["num_inference_steps"] = 1

        @hookimpl
        def after_generate(self, arguments: dict[str, Any], result: Any) -> None:
            seen.append((arguments["num_inference_steps"], result))

    registry.plugin_manager().register(Plugin())
    result = TemplatePipeline([])(small_pipe, prompt="red", seed=0, **CALL)
    assert seen == [(1, result)]
    assert np.array_equal(result.images, draw(small_pipe, num_inference_steps=1))
