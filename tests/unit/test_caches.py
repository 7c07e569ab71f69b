"""What is kept between calls, made caches in a call, templates loaded when they are needed, and threads in turn."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from silkscreen import TemplateCache, TemplatePipeline, hookimpl, load_base, registry
from silkscreen.cache import merge
from silkscreen.cli import command_line
from silkscreen.content import content
from silkscreen.errors import CacheError, InputError, PipelineError
from silkscreen.lru import LRU
from small_flux2 import CALL, build_pipeline, draw, random_picture

KEYS = '{"kv_cache": random_kv(seed)}'

BYTES = 2 * 2 * 2 * 16 * 4
"""Of the keys and values below, and of the weights that they are made of."""

TEMPLATE = """
    import random
    from pathlib import Path

    import numpy as np
    import torch

    LOG = Path(__file__).with_name("log.txt")
    TEMPLATE_MODEL_PATH = "weights.safetensors"

    def note(word):
        with LOG.open("a") as file:
            file.write(word + "\\n")

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.key = torch.nn.Parameter(torch.empty(1, 2, 2, 16))
            self.value = torch.nn.Parameter(torch.empty(1, 2, 2, 16))

        def load_state_dict(self, *args, **kwargs):
            note("read")
            return super().load_state_dict(*args, **kwargs)

        @torch.no_grad()
        def process_inputs(self, pipe, scale=1.0, image=None, draws="", prompt=None, **kwargs):
            note("process")
            if image is not None:
                scale = scale + pipe.preprocess_image(image).mean()
            if prompt is not None:
                scale = scale + pipe.encode_prompt(prompt)[0].mean()
            return {"scale": scale + (eval(draws) if draws else 0.0)}

        def forward(self, pipe, scale, **kwargs):
            return {"kv_cache": {"single_1": (self.key, self.value * scale)}}
"""
"""A template that notes beside its `model.py` each time that it is read, and that it processes inputs."""


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with that template and weights."""

    def make(name: str = "noted", value: float = 1.0) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "model.py").write_text(textwrap.dedent(TEMPLATE))
        save_weights(path, value)
        return path

    return make


def save_weights(folder: Path, value: float) -> None:
    tensors = {name: torch.full((1, 2, 2, 16), value) for name in ("key", "value")}
    save_file(tensors, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "weights.safetensors")


def noted(folder: Path) -> Counter[str]:
    log = folder / "log.txt"
    return Counter(log.read_text().split() if log.exists() else ())


def kv(cache: TemplateCache) -> torch.Tensor:
    return torch.cat(cache.fields["kv_cache"]["single_1"])


def picture(templates: TemplatePipeline, pipe: Any, **arguments: Any) -> np.ndarray:
    return np.asarray(templates(pipe, **{"prompt": "red", "seed": 0, **CALL, **arguments}).images)


# Results


def test_a_call_computes_only_what_changed(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    inputs: dict[str, Any] = {"template_inputs": [{"scale": 2.0}, {"scale": 9.0}]}
    inputs["negative_template_inputs"] = [{"scale": -5.0}]
    first = picture(templates, small_pipe, **inputs)
    assert noted(path)["process"] == 3
    assert np.array_equal(picture(templates, small_pipe, **inputs), first)
    assert noted(path)["process"] == 3
    inputs["template_inputs"][0]["scale"] = 30.0
    changed = picture(templates, small_pipe, **inputs)
    assert noted(path)["process"] == 4
    assert not np.array_equal(changed, first)
    assert np.array_equal(
        changed, picture(TemplatePipeline(path, trust_code=True, cache_bytes=0), small_pipe, **inputs)
    )


def test_pictures_are_told_by_their_pixels(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    image = random_picture(0)
    first = kv(templates.compose(small_pipe, [{"image": image}]))
    assert torch.equal(kv(templates.compose(small_pipe, [{"image": random_picture(0)}])), first)
    assert noted(path)["process"] == 1
    image.putpixel((0, 0), (0, 0, 0))
    assert not torch.equal(kv(templates.compose(small_pipe, [{"image": image}])), first)
    assert noted(path)["process"] == 2


def test_results_are_of_the_weights_dtype_and_parts_of_the_pipeline(
    small_pipe: Any, folder: Callable[..., Path]
) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    templates.compose(small_pipe, [{}])
    save_weights(path, 3.0)
    assert kv(templates.compose(small_pipe, [{}])).unique().tolist() == [3.0]
    assert noted(path) == {"read": 2, "process": 2}
    small_pipe.vae = build_pipeline().vae
    templates.compose(small_pipe, [{}])
    small_pipe.text_encoder = build_pipeline().text_encoder
    templates.compose(small_pipe, [{}])
    assert noted(path) == {"read": 2, "process": 4}
    assert kv(templates.compose(small_pipe.to(torch.bfloat16), [{}])).dtype == torch.bfloat16
    assert noted(path) == {"read": 3, "process": 5}


def test_results_used_longest_ago_make_room(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True, cache_bytes=2 * BYTES)
    for scale, computed in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        templates.compose(small_pipe, [{"scale": scale}])
        assert noted(path)["process"] == computed


def test_keeping_can_be_turned_off(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True, cache_bytes=0)
    for _ in range(3):
        templates.compose(small_pipe, [{}])
    assert noted(path) == {"read": 1, "process": 3}


@pytest.mark.parametrize(
    "draws", ["torch.rand(())", "random.random()", "np.random.standard_normal()", "np.random.rand()"]
)
def test_a_template_that_draws_at_random_does_so_at_every_call(
    draws: str, small_pipe: Any, folder: Callable[..., Path]
) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    scales = {kv(templates.compose(small_pipe, [{"draws": draws}]))[1, 0, 0, 0].item() for _ in range(4)}
    assert len(scales) == noted(path)["process"] == 4
    for _ in range(2):
        templates.compose(small_pipe, [{"draws": "torch.rand((), generator=torch.Generator().manual_seed(1))"}])
    assert noted(path)["process"] == 5


def test_what_cannot_be_told_by_its_content_is_computed_anew(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    model = (path / "model.py").read_text().replace("prompt=None", "prompt=None, thing=None")
    (path / "model.py").write_text(model)
    templates = TemplatePipeline(path, trust_code=True)
    for _ in range(2):
        templates.compose(small_pipe, [{"thing": object()}])
    assert noted(path)["process"] == 2


def test_content_tells_apart_what_differs() -> None:
    palette = random_picture(0).quantize(4)
    recoloured = palette.copy()
    recoloured.putpalette([255, 0, 0] * 4)
    values = [
        *(None, 1, 1.0, True, "1", [1], (1,), [[1]], {"tuple": [1]}, {"a": 1}, {"a": 1.5}),
        *(random_picture(0), random_picture(1), random_picture(0).convert("L"), palette, recoloured),
        *(Image.new("L", (2, 8)), Image.new("L", (8, 2)), Image.new("L", (4, 4))),
        *(torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2), torch.ones(2), torch.zeros(())),
        *(torch.zeros(2, dtype=torch.bfloat16), np.zeros(2), np.zeros(2, dtype=np.float32), np.float32(0)),
    ]
    assert len({json.dumps(content(value)) for value in values}) == len(values)
    assert content([random_picture(5), torch.ones(3)]) == content([random_picture(5), torch.ones(3)])
    with pytest.raises(TypeError, match=r"a \w*Path cannot be told by its content"):
        content([Path("a")])


def test_an_lru_drops_what_was_used_longest_ago() -> None:
    kept: LRU[str] = LRU(10)
    kept.put("a", "A", 4)
    kept.put("b", "B", 4)
    assert kept.get("a") == "A"
    kept.put("c", "C", 4)
    assert [kept.get(key) for key in "abc"] == ["A", None, "C"]
    kept.put("a", "larger", 6)
    assert (kept.get("a"), kept.get("c"), kept.bytes) == ("larger", "C", 10)
    kept.put("a", "too large", 11)
    assert (kept.get("a"), kept.get("c"), kept.bytes) == (None, "C", 4)


# Prompts


@pytest.fixture
def encoded(small_pipe: Any) -> list[Any]:
    """One entry for each pass through the text encoder of `small_pipe`."""
    passes: list[Any] = []
    small_pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_a_prompt_is_encoded_once(small_pipe: Any, encoded: list[Any]) -> None:
    bare = {prompt: draw(small_pipe, prompt=prompt) for prompt in ("red", "blue")}
    encoded.clear()
    templates = TemplatePipeline([])
    for prompt, passes in (("red", 2), ("red", 2), ("blue", 3), ("red", 3)):
        assert np.array_equal(picture(templates, small_pipe, prompt=prompt), bare[prompt])
        assert len(encoded) == passes
    assert "encode_prompt" not in vars(small_pipe)
    picture(templates, small_pipe, max_sequence_length=8)
    assert len(encoded) == 5
    picture(TemplatePipeline([], prompt_cache_bytes=0), small_pipe)
    picture(TemplatePipeline([], prompt_cache_bytes=0), small_pipe)
    assert len(encoded) == 9


def test_of_a_list_only_prompts_that_are_new_are_encoded(small_pipe: Any, encoded: list[Any]) -> None:
    bare = draw(small_pipe, prompt=["red", "blue"], num_images_per_prompt=2)
    encoded.clear()
    templates = TemplatePipeline([])
    both = picture(templates, small_pipe, prompt=["red", "blue"], num_images_per_prompt=2)
    assert len(encoded) == 3  # and the empty one of the negative side, once
    np.testing.assert_allclose(both, bare, atol=1e-5)
    for prompts, passes in ((["red", "blue red"], 4), (["blue", "red", "blue"], 4), ("red", 4)):
        picture(templates, small_pipe, prompt=prompts)
        assert len(encoded) == passes
    picture(TemplatePipeline([], prompt_cache_bytes=0), small_pipe, prompt=["red", "red"])
    assert len(encoded) == 6


def test_kept_prompts_are_not_changed_by_what_a_callback_does_to_them(small_pipe: Any) -> None:
    templates = TemplatePipeline([])
    before = picture(templates, small_pipe)

    def spoil(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["prompt_embeds"].zero_()
        return {}

    spoilt = picture(
        templates,
        small_pipe,
        callback_on_step_end=spoil,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert not np.array_equal(spoilt, before)
    assert np.array_equal(picture(templates, small_pipe), before)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_base("flux2-tiny")


def test_templates_and_the_call_share_an_encoded_prompt(tiny: Any, folder: Callable[..., Path]) -> None:
    passes: list[Any] = []
    hook = tiny.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    model = folder() / "model.py"
    model.write_text(model.read_text().replace('{"kv_cache": {"single_1": (self.key, self.value * scale)}}', "{}"))
    prompt = "a large red circle on a blue background"
    TemplatePipeline(model.parent, trust_code=True)(
        tiny, prompt=prompt, template_inputs=[{"prompt": prompt}], num_inference_steps=1, output_type="latent"
    )
    hook.remove()
    assert len(passes) == 2  # of the prompt and of the negative side's empty one


# A cache as an object


def test_made_caches_draw_what_their_inputs_draw(small_pipe: Any, folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    inputs, negatives = [{"scale": 20.0}, {"image": random_picture(0)}], [{"scale": -20.0}]
    asked = picture(templates, small_pipe, template_inputs=inputs, negative_template_inputs=negatives)
    for name, given in (("positive", inputs), ("negative", negatives)):
        templates.compose(small_pipe, given).save(tmp_path / name)
    made = {
        "template_cache": TemplateCache.load(tmp_path / "positive"),
        "negative_template_cache": TemplateCache.load(tmp_path / "negative"),
    }
    assert np.array_equal(picture(TemplatePipeline([]), small_pipe, **made), asked)
    assert np.array_equal(
        picture(templates, small_pipe, template_inputs=inputs, negative_template_cache=made["negative_template_cache"]),
        asked,
    )
    assert not np.array_equal(picture(TemplatePipeline([]), small_pipe), asked)


def test_a_saved_cache_tells_what_it_was_made_of(small_pipe: Any, folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    image = random_picture(0)
    made = templates.compose(small_pipe, [{"scale": 2.0, "image": image}])
    made.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        metadata = file.metadata()
    (part,) = json.loads(metadata["parts"])
    assert metadata["base"] == "unknown"
    assert (part["template"], part["version"]) == ("noted", str(path))
    weights = (path / "weights.safetensors").read_bytes()
    assert part["weights"] == {"weights.safetensors": hashlib.sha256(weights).hexdigest()}
    assert part["inputs"]["scale"] == 2.0
    assert part["inputs"]["image"]["sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
    loaded = TemplateCache.load(tmp_path / "c.safetensors")
    loaded.save(tmp_path / "again.safetensors")
    assert TemplateCache.load(tmp_path / "again.safetensors").parts == loaded.parts
    assert torch.equal(kv(TemplateCache.load(tmp_path / "again.safetensors")), kv(made))


def test_a_cache_is_inspected(small_pipe: Any, folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True)
    made = templates.compose(small_pipe, [{"scale": 2.0}, {"image": random_picture(0)}])
    assert made.inspect().splitlines() == [
        f'noted ({path}) scale=2.0 draws=""',
        f'noted ({path}) scale=1.0 image=picture RGB 64 64 draws=""',
        "base unknown",
        f"kv_cache: 4 tokens in 1 blocks, {2 * BYTES:,} bytes",
    ]
    made.save(tmp_path / "c.safetensors")
    shown = CliRunner().invoke(command_line(), ["show", str(tmp_path / "c.safetensors")])
    assert shown.exit_code == 0
    assert shown.output == made.inspect() + "\n"


def test_every_carrier_tells_its_size(small_pipe: Any, fixed_folder: Callable[[str, str], Path]) -> None:
    result = '{"lora": random_lora(seed, rank=3), "extra_text_embedding": random_tensor(seed, 1, 7, 32)}'
    made = TemplatePipeline(fixed_folder("style", result), trust_code=True).compose(small_pipe, [{}])
    lora = sum(tensor.nbytes for tensor in made.fields["lora"].values())
    assert f"lora: rank 3 in 5 layers, {lora:,} bytes" in made.inspect()
    assert f"extra_text_embedding: 7 tokens, {7 * 32 * 4} bytes" in made.inspect()


def test_a_cache_for_another_base_is_refused(
    small_pipe: Any, tiny: Any, folder: Callable[..., Path], tmp_path: Path
) -> None:
    made = TemplatePipeline(folder(), trust_code=True).compose(small_pipe, [{}])
    made.save(tmp_path / "c.safetensors")
    message = "of 'noted' was made for the base unknown, and this pipeline is flux2-tiny: compose it anew"
    for cache in (made, TemplateCache.load(tmp_path / "c.safetensors")):
        for side in ("template_cache", "negative_template_cache"):
            with pytest.raises(CacheError, match=message):
                TemplatePipeline([])(tiny, prompt="red", **{side: cache})
    with pytest.raises(CacheError, match=r"caches for different bases \(unknown, flux2-tiny\)"):
        merge([made, TemplateCache({}, {}, "x", base="flux2-tiny")])


def test_a_made_cache_that_does_not_suit_the_call_is_refused(small_pipe: Any, folder: Callable[..., Path]) -> None:
    templates = TemplatePipeline(folder(), trust_code=True)
    made = templates.compose(small_pipe, [{}])
    for side in ("", "negative_"):
        both = {f"{side}template_inputs": [{}], f"{side}template_cache": made}
        with pytest.raises(InputError, match=f"{side}template_inputs and {side}template_cache were both given"):
            picture(templates, small_pipe, **both)
    with pytest.raises(InputError, match="goes by template_inputs, and template_cache was given instead"):
        picture(templates, small_pipe, template_cache=made, negative_template_inputs="default")
    with pytest.raises(PipelineError, match="negative_template_cache has no effect"):
        picture(templates, small_pipe, negative_template_cache=made, guidance_scale=1.0)
    for_two = templates.compose(small_pipe, [[{}], [{"scale": 2.0}]])
    with pytest.raises(InputError, match="template_cache was made for 2 pictures, and the call draws 3"):
        picture(templates, small_pipe, template_cache=for_two, num_images_per_prompt=3)
    assert len(picture(templates, small_pipe, template_cache=for_two, num_images_per_prompt=2)) == 2
    assert len(picture(templates, small_pipe, template_cache=made, num_images_per_prompt=3)) == 3


def test_a_file_that_is_no_whole_cache_is_not_loaded(
    small_pipe: Any, folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    TemplatePipeline(folder(), trust_code=True).compose(small_pipe, [{}]).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    (tmp_path / "short").write_bytes(path.read_bytes()[:-1])
    save_file(tensors, tmp_path / "bare")
    save_file(tensors, tmp_path / "garbled", {**metadata, "parts": "{"})
    save_file(tensors, tmp_path / "strange part", {**metadata, "parts": '[{"colour": 1}]'})
    for name in ("missing", "short", "bare", "garbled", "strange part"):
        with pytest.raises(CacheError, match=f"{name} is no saved template cache"):
            TemplateCache.load(tmp_path / name)
    save_file({"kv_cache/single_1.k": tensors["kv_cache/single_1.k"]}, tmp_path / "half", metadata)
    save_file({**tensors, "kv_cache/single_1.x": torch.ones(1)}, tmp_path / "more", metadata)
    save_file({**tensors, "other/x": torch.ones(1)}, tmp_path / "other", metadata)
    for name in ("half", "more", "other"):
        with pytest.raises(CacheError, match=f"{name} is broken"):
            TemplateCache.load(tmp_path / name)
    save_file(tensors, tmp_path / "plugin", {**metadata, "carriers": '["kv_cache", "depth"]'})
    with pytest.raises(CacheError, match="holds depth: install the plugin that brings this carrier"):
        TemplateCache.load(tmp_path / "plugin")


# Templates loaded when they are needed


def test_ten_templates_used_in_turn_are_read_once_when_they_fit(small_pipe: Any, folder: Callable[..., Path]) -> None:
    paths = [folder(f"t{n}", float(n)) for n in range(10)]
    for bound, reads in ((None, 1), (10 * BYTES, 1), (9 * BYTES, 3)):
        templates = TemplatePipeline(paths, trust_code=True, cache_bytes=0, max_loaded_bytes=bound)
        assert sum(noted(path)["read"] for path in paths) == 0
        for _ in range(3):
            for n, path in enumerate(paths):
                assert kv(templates.compose(small_pipe, [{"model_id": path.name}])).unique().tolist() == [n]
        assert {noted(path)["read"] for path in paths} == {reads}
        for path in paths:
            (path / "log.txt").unlink()


def test_the_template_used_longest_ago_is_dropped(small_pipe: Any, folder: Callable[..., Path]) -> None:
    paths = {name: folder(name) for name in "abc"}
    templates = TemplatePipeline([*paths.values()], trust_code=True, cache_bytes=0, max_loaded_bytes=2 * BYTES)
    for name in "abacab":
        templates.compose(small_pipe, [{"model_id": name}])
    assert {name: noted(path)["read"] for name, path in paths.items()} == {"a": 1, "b": 2, "c": 1}


def test_a_kept_result_needs_no_model(small_pipe: Any, folder: Callable[..., Path]) -> None:
    path = folder()
    templates = TemplatePipeline(path, trust_code=True, max_loaded_bytes=0)
    for scale in (1.0, 2.0, 1.0, 2.0):
        templates.compose(small_pipe, [{"scale": scale}])
    assert noted(path) == {"read": 2, "process": 2}


# Threads


def in_threads(*jobs: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Run jobs at the same time, and return what they return."""
    together, results = Barrier(len(jobs)), [np.empty(0)] * len(jobs)

    def run(index: int) -> None:
        together.wait()
        results[index] = jobs[index]()

    threads = [Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results


def test_threads_that_share_a_transformer_draw_what_each_draws_alone(
    small_pipe: Any, folder: Callable[..., Path], fixed_folder: Callable[[str, str], Path]
) -> None:
    style = fixed_folder("style", '{"lora": random_lora(seed), "extra_text_embedding": random_tensor(seed, 1, 3, 32)}')
    paths = [folder("noted"), style]
    templates, others = (TemplatePipeline(paths, trust_code=True) for _ in range(2))
    same_transformer = type(small_pipe)(**small_pipe.components)
    same_transformer.set_progress_bar_config(disable=True)
    calls: list[tuple[TemplatePipeline, Any, dict[str, Any]]] = [
        (templates, small_pipe, {"template_inputs": [{"model_id": "noted", "scale": 30.0}], "prompt": "blue"}),
        (others, small_pipe, {"template_inputs": [{"model_id": "style"}], "seed": 1, "num_inference_steps": 3}),
        (templates, same_transformer, {"negative_template_inputs": [{"model_id": "noted", "scale": -30.0}]}),
    ]

    def job(call: tuple[TemplatePipeline, Any, dict[str, Any]]) -> Callable[[], np.ndarray]:
        own, pipe, arguments = call
        return lambda: np.concatenate([picture(own, pipe, **arguments) for _ in range(5)])

    alone = [picture(own, pipe, **arguments) for own, pipe, arguments in calls]
    assert len({drawn.tobytes() for drawn in alone}) == 3
    together = in_threads(*map(job, calls))
    for one, many in zip(alone, together, strict=True):
        assert np.array_equal(many, np.concatenate([one] * 5))


@pytest.mark.parametrize("pipeline", [Flux2KleinPipeline, Flux2Pipeline])
def test_a_pipeline_called_past_its_turn_is_refused(pipeline: type, fixed_folder: Callable[[str, str], Path]) -> None:
    """Flux2Pipeline has no cache contexts."""
    pipe, templates = build_pipeline(pipeline), TemplatePipeline(fixed_folder("keys", KEYS), trust_code=True)
    alone, bare = picture(templates, pipe, template_inputs=[{}]), draw(pipe)
    refused: list[str] = []

    def past_its_turn() -> np.ndarray:
        with pytest.raises(PipelineError) as error:
            draw(pipe)
        refused.append(str(error.value))
        return np.empty(0)

    def in_between(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        in_threads(past_its_turn)
        return {}

    disturbed = picture(templates, pipe, template_inputs=[{}], callback_on_step_end=in_between)
    assert np.array_equal(disturbed, alone)
    assert set(refused) == {
        "another thread is drawing with templates on this transformer: "
        "call the pipeline by TemplatePipeline([]), which waits for its turn"
    }
    assert np.array_equal(draw(pipe), bare)


def test_a_hook_may_draw_with_the_same_pipeline(small_pipe: Any, folder: Callable[..., Path]) -> None:
    templates = TemplatePipeline(folder(), trust_code=True)
    inner: list[np.ndarray] = []

    class Plugin:
        @hookimpl
        def before_generate(self, pipe: Any) -> None:
            if not inner:
                inner.append(np.empty(0))
                inner.append(picture(templates, pipe, template_inputs=[{"scale": 20.0}]))

    registry.plugin_manager().register(Plugin())
    (outer,) = in_threads(lambda: picture(templates, small_pipe, template_inputs=[{"scale": 5.0}]))
    assert np.array_equal(inner[1], picture(templates, small_pipe, template_inputs=[{"scale": 20.0}]))
    assert np.array_equal(outer, picture(templates, small_pipe, template_inputs=[{"scale": 5.0}]))
