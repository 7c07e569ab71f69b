"""What diffusers can do with a pipeline, done with every carrier, against the same content put in by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    Flux2KleinInpaintPipeline,
    Flux2Pipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_flux2
from silkscreen import TemplatePipeline
from silkscreen.errors import PipelineError
from small_flux2 import CALL, build_pipeline, draw, random_kv, random_lora, random_picture, random_tensor

PAGE = Path(__file__).parents[2] / "core/docs/diffusers.md"
CPU = torch.device("cpu")

TEMPLATES = {
    "kv_cache": '{"kv_cache": random_kv(seed)}',
    "lora": '{"lora": random_lora(seed)}',
    "extra_text_embedding": '{"extra_text_embedding": random_tensor(seed, 1, 3, 32)}',
    "image": '{"image": random_picture(seed)}',
    "latents": '{"latents": pipe.vae.encode(pipe.preprocess_image(random_picture(seed).resize((32, 32))))}',
}
"""What a template returns of a seed: for each carrier, and for two arguments of the pipeline's call."""

CARRIERS = [name for name in TEMPLATES if name not in ("image", "latents")]


@pytest.fixture(params=TEMPLATES)
def carrier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def templates(carrier: str, fixed_folder: Callable[[str, str], Path]) -> TemplatePipeline:
    return TemplatePipeline(fixed_folder(carrier, TEMPLATES[carrier]), trust_code=True)


@pytest.fixture
def equal(carrier: str, templates: TemplatePipeline) -> Callable[..., np.ndarray]:
    """Compare the pictures of a template in `pipe` with those of its content put by hand into `plain`; return them."""

    def check(pipe: Any, plain: Any, *, negative: int | None = 2, tolerance: float = 1e-5, **call: Any) -> np.ndarray:
        asked = {"prompt": "red", "template_inputs": [{"seed": 1}], **CALL, **call}
        if negative is not None:
            asked["negative_template_inputs"] = [{"seed": negative}]
        drawn = np.asarray(templates(pipe, seed=0, **asked).images)
        expected = by_hand(plain, carrier, 1, negative, **call)
        np.testing.assert_allclose(drawn, expected, atol=tolerance, rtol=0)
        bare = draw(plain, **call)
        assert np.abs(expected - bare).max() > 50 * tolerance
        np.testing.assert_allclose(draw(pipe, **call), bare, atol=tolerance, rtol=0)
        return drawn

    return check


def by_hand(pipe: Any, carrier: str, positive: int, negative: int | None, **call: Any) -> np.ndarray:
    """Draw with a carrier's content of a seed on each side, using nothing of ours."""
    if carrier == "image":
        return draw(pipe, image=random_picture(positive), **call)
    if carrier == "latents":
        return draw(pipe, latents=encoded(pipe.vae, positive), **call)
    if carrier == "extra_text_embedding":
        longer = longer_prompts(pipe, positive, negative, call.get("prompt", "red"))
        return draw(pipe, **call | longer | {"prompt": None})
    putting = {"kv_cache": naive_keys_and_values, "lora": merged_weights}[carrier]
    with putting(pipe, (positive, negative)):
        return draw(pipe, **call)


def encoded(vae: Any, seed: int) -> torch.Tensor:
    """The latents of a picture, patchified and normalised."""
    pixels = torch.from_numpy(np.array(random_picture(seed).resize((32, 32)))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = F.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
    return F.batch_norm(latents, vae.bn.running_mean, vae.bn.running_var, eps=vae.config.batch_norm_eps)


def longer_prompts(pipe: Any, positive: int, negative: int | None, prompt: str | list[str]) -> dict[str, torch.Tensor]:
    """The arguments for prompts with tokens after their own."""
    options = {name: CALL[name] for name in ("max_sequence_length", "text_encoder_out_layers")}

    def embeds(text: str | list[str], seed: int | None) -> torch.Tensor:
        with torch.no_grad():
            own = pipe.encode_prompt(text, **options)[0]
        return own if seed is None else torch.cat([own, random_tensor(seed, 1, 3, 32).expand(len(own), -1, -1)], 1)

    empty = "" if isinstance(prompt, str) else [""] * len(prompt)
    longer = {"prompt_embeds": embeds(prompt, positive)}
    return longer if isinstance(pipe, Flux2Pipeline) else longer | {"negative_prompt_embeds": embeds(empty, negative)}


@contextmanager
def each_pass(pipe: Any, seeds: tuple[int, int | None], prepare: Callable[[int | None], None]) -> Iterator[None]:
    """Call `prepare` with the seed of its side before each pass of the transformer: the sides take turns."""
    passes = itertools.count()

    def before(*_: Any) -> None:
        guided = getattr(pipe, "do_classifier_free_guidance", False)
        prepare(seeds[next(passes) % 2 if guided else 0])

    hook = pipe.transformer.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def merged_weights(pipe: Any, seeds: tuple[int, int | None]) -> Iterator[None]:
    """Give the linear layers the weights W + B A."""
    modules = [key.removesuffix(".lora_A.weight") for key in random_lora(1) if "lora_A" in key]
    layers = {module: pipe.transformer.get_submodule(module) for module in modules}
    weights = {module: layer.weight.data for module, layer in layers.items()}

    def put(seed: int | None) -> None:
        lora = {} if seed is None else random_lora(seed)
        for module, layer in layers.items():
            update = lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"] if lora else 0
            layer.weight.data = weights[module] + update

    with each_pass(pipe, seeds, put):
        yield
    put(None)


@contextmanager
def naive_keys_and_values(pipe: Any, seeds: tuple[int, int | None]) -> Iterator[None]:
    """Let attention be softmax(Q [K K']^T) [V V'], written out."""
    transformer = pipe.transformer
    names = {block.attn: f"double_{i}" for i, block in enumerate(transformer.transformer_blocks)}
    names |= {block.attn: f"single_{i}" for i, block in enumerate(transformer.single_transformer_blocks)}
    now: dict[str, Any] = {}

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        if now["kv"]:
            extra = [part.expand(len(query), -1, -1, -1) for part in now["kv"][now["block"]]]
            key, value = torch.cat([key, extra[0]], 1), torch.cat([value, extra[1]], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    def put(seed: int | None) -> None:
        now["kv"] = None if seed is None else random_kv(seed)

    with ExitStack() as stack:
        for module in names:
            hook = module.register_forward_pre_hook(lambda module, _: now.update(block=names[module]))
            stack.callback(hook.remove)
        stack.enter_context(patch.object(transformer_flux2, "dispatch_attention_fn", attention))
        stack.enter_context(each_pass(pipe, seeds, put))
        yield


@pytest.mark.parametrize("negative", [None, 2])
def test_guidance_on(negative: int | None, equal: Callable[..., Any]) -> None:
    equal(build_pipeline(), build_pipeline(), negative=negative)


def test_guidance_off(equal: Callable[..., Any]) -> None:
    equal(build_pipeline(), build_pipeline(), negative=None, guidance_scale=1.0)


def test_a_distilled_base(equal: Callable[..., Any]) -> None:
    equal(build_pipeline(is_distilled=True), build_pipeline(is_distilled=True), negative=None)


@pytest.mark.parametrize(
    ("build", "guidance", "reason"),
    [
        ({"is_distilled": True}, 4.0, "it is distilled"),
        ({"pipeline": Flux2Pipeline}, 4.0, "Flux2Pipeline has no classifier-free guidance"),
        ({}, 1.0, "guidance_scale is 1.0, and guidance begins above 1"),
    ],
)
def test_negative_inputs_without_a_negative_side_are_refused_with_the_reason(
    build: dict[str, Any], guidance: float, reason: str, templates: TemplatePipeline
) -> None:
    call = CALL | {"guidance_scale": guidance}
    with pytest.raises(PipelineError, match=f"runs no negative side in this call, because {reason}: leave it out"):
        templates(build_pipeline(**build), prompt="red", negative_template_inputs=[{}], **call)


def test_reference_images(carrier: str, equal: Callable[..., Any]) -> None:
    references = {} if carrier == "image" else {"image": [random_picture(8), random_picture(9)]}
    equal(build_pipeline(), build_pipeline(), **references)


INPAINTING = {"image": random_picture(8), "mask_image": random_picture(9).convert("L"), "strength": 0.7}


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
def test_inpainting(equal: Callable[..., Any]) -> None:
    pipe, plain = build_pipeline(Flux2KleinInpaintPipeline), build_pipeline(Flux2KleinInpaintPipeline)
    equal(pipe, plain, num_inference_steps=4, **INPAINTING)


def test_inpainting_takes_arguments_of_templates(fixed_folder: Callable[[str, str], Path]) -> None:
    result = '{"image": random_picture(8), "mask_image": random_picture(9).convert("L"), "strength": 0.7}'
    templates = TemplatePipeline(fixed_folder("inpaint", result), trust_code=True)
    pipe, call = build_pipeline(Flux2KleinInpaintPipeline), CALL | {"num_inference_steps": 4}
    drawn = templates(pipe, prompt="red", seed=0, template_inputs=[{}], **call).images
    np.testing.assert_array_equal(drawn, draw(pipe, **INPAINTING, **call))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_flux2_dev_with_its_guidance_embedding(guidance: float, equal: Callable[..., Any]) -> None:
    equal(build_pipeline(Flux2Pipeline), build_pipeline(Flux2Pipeline), negative=None, guidance_scale=guidance)


@pytest.mark.parametrize("carrier", [*CARRIERS, "image"], indirect=True)
def test_a_batch_of_prompts_with_several_pictures_each(equal: Callable[..., Any]) -> None:
    drawn = equal(build_pipeline(), build_pipeline(), prompt=["red", "blue"], num_images_per_prompt=2)
    assert len({picture.tobytes() for picture in drawn}) == 4


@pytest.mark.parametrize("carrier", [*CARRIERS, "latents"], indirect=True)
def test_compiled_repeated_blocks_compile_once(equal: Callable[..., Any]) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe, plain = build_pipeline(), build_pipeline()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    equal(pipe, plain, num_inference_steps=1)
    count = len(graphs)
    equal(pipe, plain, num_inference_steps=4)
    assert 0 < count == len(graphs)


def offload_models(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers_to_meta(pipe: Any, folder: Path) -> None:
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, CPU)
        assert model.device.type == "meta"


def offload_blocks(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)


def offload_leaves(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(CPU, CPU, "leaf_level")


def offload_blocks_to_disk(pipe: Any, folder: Path) -> None:
    disk = {"offload_to_disk_path": str(folder / "disk"), "exclude_modules": ["vae"]}
    pipe.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1, **disk)


def offload_leaves_to_disk(pipe: Any, folder: Path) -> None:
    disk = {"offload_to_disk_path": str(folder / "disk"), "exclude_modules": ["vae"]}
    pipe.enable_group_offload(CPU, CPU, "leaf_level", **disk)


@pytest.mark.parametrize(
    "offload",
    [
        offload_models,
        offload_layers_to_meta,
        offload_blocks,
        offload_leaves,
        offload_blocks_to_disk,
        offload_leaves_to_disk,
    ],
)
def test_offloading(offload: Callable[[Any, Path], None], tmp_path: Path, equal: Callable[..., Any]) -> None:
    pipe = build_pipeline()
    offload(pipe, tmp_path)
    equal(pipe, build_pipeline())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting(storage: torch.dtype, equal: Callable[..., Any]) -> None:
    pipe, plain = build_pipeline(), build_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    rounded = {name: weight.float() for name, weight in pipe.transformer.state_dict().items()}
    plain.transformer.load_state_dict(rounded)
    equal(pipe, plain)
    assert pipe.transformer.x_embedder.weight.dtype == storage


@pytest.fixture
def _native_backend() -> Iterator[None]:
    """Undo what a transformer's backend does to the process."""
    with attention_backend("native"):
        yield


@pytest.mark.usefixtures("_native_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_backends(backend: str, equal: Callable[..., Any]) -> None:
    pipe, plain = build_pipeline(), build_pipeline()
    pipe.transformer.set_attention_backend(backend)
    equal(pipe, plain)


@pytest.mark.usefixtures("_native_backend")
def test_a_backend_that_cannot_run_fails_as_it_does_without_templates(templates: TemplatePipeline) -> None:
    pipe = build_pipeline()
    before = draw(pipe)
    pipe.transformer.set_attention_backend("_native_cudnn")
    with pytest.raises(RuntimeError, match="No viable backend"):
        draw(pipe)
    with pytest.raises(RuntimeError, match="No viable backend"):
        templates(pipe, prompt="red", seed=0, template_inputs=[{}], **CALL)
    pipe.transformer.set_attention_backend("native")
    np.testing.assert_array_equal(draw(pipe), before)


def taylor(pipe: Any) -> Any:
    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)


def taylor_lite(pipe: Any) -> Any:
    return TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
    )


def mag(pipe: Any) -> Any:
    return MagCacheConfig(threshold=1.0, num_inference_steps=5, mag_ratios=[1.0] * 5)


def pyramid(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Any) -> Any:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        is_guidance_distilled=pipe.config.is_distilled,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def cached(config: Callable[[Any], Any], **build: Any) -> Any:
    pipe = build_pipeline(**build)
    pipe.transformer.enable_cache(config(pipe))
    return pipe


@pytest.mark.parametrize(
    ("config", "distilled"),
    [(taylor, False), (taylor_lite, False), (mag, False), (pyramid, False), (pyramid, True), (faster, True)],
)
def test_step_caches(config: Callable[[Any], Any], distilled: bool, carrier: str, equal: Callable[..., Any]) -> None:
    build = {"is_distilled": distilled}
    negative = None if distilled else 2
    drawn = equal(cached(config, **build), cached(config, **build), negative=negative, num_inference_steps=5)
    uncached = by_hand(build_pipeline(**build), carrier, 1, negative, num_inference_steps=5)
    assert np.abs(drawn - uncached).max() > 1e-4


@pytest.mark.parametrize("carrier", ["lora"], indirect=True)
def test_a_layer_whose_results_a_step_cache_keeps_takes_no_update(templates: TemplatePipeline) -> None:
    pipe = build_pipeline()
    module = "single_transformer_blocks.0.attn.to_out"
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_identifiers=[module]))
    with pytest.raises(PipelineError, match=f"lora: {module} keeps its results .* pipe.transformer.disable_cache"):
        templates(pipe, prompt="red", template_inputs=[{}], **CALL)
    pipe.transformer.disable_cache()
    templates(pipe, prompt="red", template_inputs=[{}], **CALL)


def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return tensors


def test_a_callback_that_stops_a_run(carrier: str, equal: Callable[..., Any]) -> None:
    call = {"num_inference_steps": 4}
    drawn = equal(build_pipeline(), build_pipeline(), callback_on_step_end=stop, **call)
    assert np.abs(drawn - by_hand(build_pipeline(), carrier, 1, 2, **call)).max() > 1e-3


@pytest.mark.parametrize(
    ("place", "config"),
    [("a callback", None), ("a callback", pyramid), ("a pass", None), ("a pass", taylor)],
)
def test_an_exception_leaves_the_pipeline_as_it_was(
    place: str, config: Callable[[Any], Any] | None, templates: TemplatePipeline
) -> None:
    call = CALL | {"num_inference_steps": 5}
    pipe = cached(config) if config else build_pipeline()
    before = draw(pipe, **call)
    state, modules, processors = snapshot(pipe)
    passes = itertools.count(1)

    def fail(*_: Any) -> None:
        if place == "a callback" or next(passes) == 4:
            raise RuntimeError("stopped")

    watched = pipe.transformer.norm_out.register_forward_hook(fail) if place == "a pass" else None
    callback = {} if watched else {"callback_on_step_end": fail}
    sides = {"template_inputs": [{"seed": 1}], "negative_template_inputs": [{"seed": 2}]}
    with pytest.raises(RuntimeError, match="stopped"):
        templates(pipe, prompt="red", seed=0, **sides, **callback, **call)
    if watched:
        watched.remove()
    assert snapshot(pipe) == (state, modules, processors)
    np.testing.assert_array_equal(draw(pipe, **call), before)


def snapshot(pipe: Any) -> tuple[list[str], dict[str, int], dict[str, int]]:
    """The transformer's attributes, and which modules, processors and hooks it has."""
    modules = {name: (id(module), len(module._forward_pre_hooks)) for name, module in pipe.transformer.named_modules()}
    processors = {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}
    return sorted(vars(pipe.transformer)), modules, processors


def stream_on_a_cpu() -> None:
    build_pipeline().enable_group_offload(CPU, use_stream=True)


def first_block_cache() -> None:
    draw(cached(lambda _: FirstBlockCacheConfig(threshold=0.5)))


def faster_cache_with_guidance() -> None:
    draw(cached(faster))


def sides_of_different_length_with_pyramid_attention_broadcast() -> None:
    embeds = {"prompt_embeds": random_tensor(1, 1, 9, 32), "negative_prompt_embeds": random_tensor(1, 1, 6, 32)}
    draw(cached(pyramid), prompt=None, **embeds)


def taylor_seer_on_dev() -> None:
    draw(cached(taylor, pipeline=Flux2Pipeline))


def model_offload_without_an_accelerator() -> None:
    build_pipeline().enable_model_cpu_offload()


def sequential_offload_without_an_accelerator() -> None:
    build_pipeline().enable_sequential_cpu_offload()


def an_attention_backend_that_is_not_installed() -> None:
    build_pipeline().transformer.set_attention_backend("xformers")


def an_attention_backend_of_other_devices() -> None:
    pipe = build_pipeline()
    pipe.transformer.set_attention_backend("_native_efficient")
    draw(pipe)


@pytest.mark.usefixtures("_native_backend")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the page tells what happens on a CPU")
@pytest.mark.parametrize(
    "refused",
    [
        stream_on_a_cpu,
        first_block_cache,
        faster_cache_with_guidance,
        sides_of_different_length_with_pyramid_attention_broadcast,
        taylor_seer_on_dev,
        model_offload_without_an_accelerator,
        sequential_offload_without_an_accelerator,
        an_attention_backend_that_is_not_installed,
        an_attention_backend_of_other_devices,
    ],
)
def test_what_diffusers_refuses_without_any_template_is_on_the_page(refused: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as caught:
        refused()
    assert str(caught.value) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("config", [SeaCacheConfig(threshold=10.0), TextKVCacheConfig()])
def test_step_caches_that_do_nothing_for_flux2_change_no_picture(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    call = {"num_inference_steps": 5}
    np.testing.assert_array_equal(draw(cached(lambda _: config), **call), draw(build_pipeline(), **call))
    assert all(record.getMessage() in PAGE.read_text(encoding="utf-8") for record in caplog.records)
