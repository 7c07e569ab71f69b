"""Folders in the field's format: each way in which published files use `pipe`, against plain computations."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import Flux2Pipeline
from PIL import Image
from safetensors.torch import save_file
from silkscreen import TemplatePipeline, load_base
from silkscreen.cli import command_line
from silkscreen.errors import ContractError, InputError
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import base_of
from small_flux2 import build_pipeline

Make = Callable[..., Path]
PROMPT = "a large red circle on a blue background"
UNIT = """
                unit = [unit for unit in pipe.units if unit.__class__.__name__ == "Flux2Unit_Qwen3PromptEmbedder"][0]
                prompt_embeds = unit.process(pipe, prompt)["prompt_embeds"]
"""


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny base: its text encoder gives three layers' states, 16 tokens of 3 x 96."""
    pipe = load_base("flux2-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dev() -> Any:
    """A small random FLUX.2 dev, whose text encoder is a Mistral and whose tokenizer a processor."""
    pipe = build_pipeline(Flux2Pipeline)
    call = {"max_sequence_length": 6, "text_encoder_out_layers": (1, 2)}
    pipe._silkscreen_base = dataclasses.replace(base_of(pipe), call=call)
    return pipe


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """Write a folder with a `model.py` whose `process_inputs` and `forward` have these bodies."""

    def make(process: str, forward: str, arguments: str = "", before: str = "", init: str = "pass") -> Path:
        path = tmp_path / "published"
        path.mkdir()
        indent = " " * 8
        lines = [
            "import torch",
            textwrap.dedent(before),
            "class PublishedTemplate(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            textwrap.indent(textwrap.dedent(init), indent),
            "    @torch.no_grad()",
            f"    def process_inputs(self, pipe, {arguments}**kwargs):",
            textwrap.indent(textwrap.dedent(process), indent),
            "    def forward(self, pipe, use_gradient_checkpointing=False, given=None, **kwargs):",
            textwrap.indent(textwrap.dedent(forward), indent),
            "TEMPLATE_MODEL = PublishedTemplate",
            "TEMPLATE_MODEL_PATH = None",
        ]
        (path / "model.py").write_text("\n".join(lines))
        return path

    return make


KV = 'return {"kv_cache": {"single_0": (given, given)}}'
TEXT = 'return {"text_embedding": given}'


def fields(path: Path, pipe: Any, **inputs: Any) -> Any:
    return TemplatePipeline(path, trust_code=True).compose(pipe, [inputs]).fields


def drawn(pipe: Any, path: Path | None = None, **inputs: Any) -> np.ndarray[Any, Any]:
    """Draw with the template in a folder, or with none."""
    templates = TemplatePipeline([path] if path else [], trust_code=True)
    options: dict[str, Any] = {"prompt": PROMPT, "seed": 0, "num_inference_steps": 2, "output_type": "np"}
    return np.asarray(templates(pipe, template_inputs=[inputs] if path else [], **options).images)


def a_picture(width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_torch_dtype_and_device_say_where_tensors_are_made(tiny: Any, folder: Make) -> None:
    path = folder("return {'given': torch.full((1, 2, 6, 32), 0.5, dtype=pipe.torch_dtype, device=pipe.device)}", KV)
    key = fields(path, tiny)["kv_cache"]["single_0"][0]
    assert (key.dtype, key.device, key.unique().tolist()) == (torch.float32, torch.device("cpu"), [0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preprocess_image_scales_pixels_to_minus_one_to_one(dtype: torch.dtype) -> None:
    context = TemplateContext(load_base("flux2-tiny", dtype=dtype))
    picture = a_picture()
    expected = torch.tensor(np.asarray(picture, np.float32).transpose(2, 0, 1)[None]) / 127.5 - 1
    result = context.preprocess_image(picture)
    assert (result.dtype, tuple(result.shape)) == (dtype, (1, 3, 32, 48))
    assert torch.equal(result, expected.to(dtype))
    assert context.preprocess_image(picture.convert("L")).shape == (1, 3, 32, 48)
    assert context.vae.encode(result).dtype == dtype


@pytest.mark.parametrize("name", ["tiny", "dev"])
@torch.no_grad()
def test_vae_encode_patchifies_and_normalises(name: str, folder: Make, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    heads, size = (6, 32) if name == "tiny" else (2, 16)
    path = folder(
        f"""
        pipe.load_models_to_device(["vae"])
        latents = pipe.vae.encode(pipe.preprocess_image(image))
        return {{"given": torch.zeros(1, 1, {heads}, {size}) + latents.mean()}}
        """,
        KV,
        "image, ",
    )
    templates = TemplatePipeline(path, trust_code=True, cache_bytes=0)
    key = templates.compose(pipe, [{"image": a_picture()}]).fields["kv_cache"]["single_0"][0]
    x = torch.tensor(np.asarray(a_picture()).transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
    plain = pipe.vae.encode(x).latent_dist.mode()[0]
    channels = []
    for channel in plain:  # the four tokens of each 2 x 2 square follow one another, row by row
        channels += [channel[dy::2, dx::2] for dy in range(2) for dx in range(2)]
    mean, deviation = pipe.vae.bn.running_mean, (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    expected = (torch.stack(channels) - mean[:, None, None]) / deviation[:, None, None]
    assert tuple(expected.shape) == (4 * plain.shape[0], 2, 3)
    assert pipe.vae.config.batch_norm_eps == pytest.approx(1e-4)
    torch.testing.assert_close(key.flatten()[0], expected.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TemplateContext(pipe).vae.encode(x)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_batch_of_pictures_is_encoded_as_each_is(tiny: Any) -> None:
    context = TemplateContext(tiny)
    pictures = [context.preprocess_image(picture) for picture in (a_picture(), a_picture().rotate(180))]
    singles = torch.cat([context.vae.encode(picture) for picture in pictures])
    torch.testing.assert_close(context.vae.encode(torch.cat(pictures)), singles, atol=1e-5, rtol=1e-5)


def test_a_picture_of_odd_sides_is_refused_with_its_size(tiny: Any) -> None:
    context = TemplateContext(tiny)
    with pytest.raises(InputError, match="a picture of 40x32 cannot be encoded: crop or scale"):
        context.vae.encode(context.preprocess_image(a_picture(40, 32)))


@torch.no_grad()
def test_tokenizer_and_text_encoder_are_the_bases_own_and_the_unit_stacks_three_layers(tiny: Any, folder: Make) -> None:
    path = folder(
        """
        pipe.load_models_to_device(["text_encoder"])
        messages = [{"role": "user", "content": prompt}]
        text = pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        tokens = pipe.tokenizer(text, return_tensors="pt", padding="max_length", truncation=True, max_length=16)
        states = pipe.text_encoder(
            input_ids=tokens.input_ids.to(pipe.device),
            attention_mask=tokens.attention_mask.to(pipe.device),
            output_hidden_states=True,
        ).hidden_states
        return {"given": torch.cat([states[1], states[2], states[3]], dim=-1)}
        """,
        TEXT,
        "prompt, ",
    )
    by_hand = fields(path, tiny, prompt=PROMPT)["extra_text_embedding"]
    (unit,) = (unit for unit in TemplateContext(tiny).units if type(unit).__name__ == "Flux2Unit_Qwen3PromptEmbedder")
    result = unit.process(TemplateContext(tiny), PROMPT)
    assert tuple(by_hand.shape) == (1, 16, 288)
    torch.testing.assert_close(result["prompt_embeds"], by_hand, atol=1e-5, rtol=1e-5)
    expected_ids = torch.cartesian_prod(*(torch.arange(size) for size in (1, 1, 1, 16)))
    assert torch.equal(result["text_ids"].reshape(-1, 4), expected_ids)


@pytest.mark.parametrize("name", ["tiny", "dev"])
@torch.no_grad()
def test_the_unit_found_by_its_class_name_encodes_prompts_as_the_pipeline_does(
    name: str, folder: Make, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    path = folder(f"{textwrap.dedent(UNIT)}\nreturn {{'given': prompt_embeds}}", TEXT, "prompt='', ")
    options = {key: base_of(pipe).call[key] for key in ("max_sequence_length", "text_encoder_out_layers")}
    for prompt in ("red", ""):
        expected = pipe.encode_prompt(prompt, **options)[0]
        assert torch.equal(fields(path, pipe, prompt=prompt)["extra_text_embedding"], expected)
    two = TemplateContext(pipe).encode_prompt(["red", "blue"])[0]
    assert tuple(two.shape) == (2, *expected.shape[1:])
    torch.testing.assert_close(two[:1], pipe.encode_prompt("red", **options)[0], atol=1e-5, rtol=1e-5)


def test_a_lora_with_the_fields_names_updates_the_layers(tiny: Any, folder: Make) -> None:
    path = folder(
        "return {'given': scale}",
        """
        layer = "diffusion_model.single_transformer_blocks.0.attn.to_out"
        generator = torch.Generator().manual_seed(0)
        return {"lora": {
            f"{layer}.lora_A.default.weight": torch.randn(2, 768, generator=generator),
            f"{layer}.lora_B.default.weight": torch.randn(192, 2, generator=generator) * given,
        }}
        """,
        "scale=0.0, ",
    )
    assert np.abs(drawn(tiny, path, scale=0.0) - drawn(tiny)).max() < 1e-5
    assert np.abs(drawn(tiny, path, scale=0.05) - drawn(tiny)).max() > 0.02


def test_a_text_embedding_is_read_after_the_prompt(tiny: Any, folder: Make) -> None:
    path = folder(f"{textwrap.dedent(UNIT)}\nreturn {{'given': prompt_embeds[:, :9]}}", TEXT, "prompt, ")
    changed = drawn(tiny, path, prompt="a small yellow star on a purple background")
    assert np.abs(changed - drawn(tiny)).max() > 0.02


def test_weights_in_parts_beside_the_model_and_arguments_of_its_constructor_are_read(tiny: Any, folder: Make) -> None:
    path = folder("return {'given': self.key * self.value}", KV, init="self.key = self.value = None")
    code = (path / "model.py").read_text().replace("def __init__(self):", "def __init__(self, heads):")
    code = code.replace(
        "self.key = self.value = None",
        "self.key = torch.nn.Parameter(torch.empty(1, 2, heads, 32)); "
        "self.value = torch.nn.Parameter(torch.empty(1, 2, heads, 32))",
    )
    code = code.replace("TEMPLATE_MODEL_PATH = None", 'TEMPLATE_MODEL_PATH = ["a.safetensors", "parts/b.safetensors"]')
    (path / "model.py").write_text(code + '\nTEMPLATE_MODEL_CONFIG = {"heads": 6}\n')
    (path / "parts").mkdir()
    save_file({"key": torch.full((1, 2, 6, 32), 3.0)}, path / "a.safetensors")
    save_file({"value": torch.full((1, 2, 6, 32), 5.0)}, path / "parts" / "b.safetensors")
    assert fields(path, tiny)["kv_cache"]["single_0"][0].unique().tolist() == [15.0]


def test_the_command_line_takes_pictures_without_a_manifest_and_repeats_what_it_drew(
    folder: Make, tmp_path: Path
) -> None:
    body = "return {'given': pipe.preprocess_image(image).mean().expand(1, 2, 6, 32)}"
    path = folder(body, KV, "image, ")
    a_picture().save(tmp_path / "in.png")
    words = [["-t", str(path), f"image={tmp_path / 'in.png'}", "--steps", "2"], ["--like", str(tmp_path / "0.png")]]
    for number, given in enumerate(words):
        prompt = [] if number else [PROMPT]
        drawing = ["generate", *prompt, *given, "--trust-code", "-o", str(tmp_path / f"{number}.png")]
        result = CliRunner().invoke(command_line(), drawing)
        assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "0.png").tobytes() == Image.open(tmp_path / "1.png").tobytes()


def test_other_fields_become_arguments_of_the_pipelines_call(tiny: Any, folder: Make) -> None:
    path = folder("return {'given': image}", "return {'image': given}", "image, ")
    cache = TemplatePipeline(path, trust_code=True).compose(tiny, [{"image": a_picture()}])
    assert (dict(cache.fields), list(cache.arguments)) == ({}, ["image"])
    call = {**base_of(tiny).call, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    plain = tiny(prompt=PROMPT, image=a_picture(128, 128), output_type="np", **call)
    assert np.array_equal(drawn(tiny, path, image=a_picture(128, 128)), plain.images)


@pytest.mark.parametrize("where", ["before", "init", "process", "forward"])
def test_a_package_that_is_not_installed_is_named_with_its_command(tiny: Any, folder: Make, where: str) -> None:
    parts = {"process": "return {}", "forward": "return {}"}
    parts[where] = "from diffsynth_absent.models.flux2 import Block\n" + parts.get(where, "pass")
    path = folder(**parts)
    with pytest.raises(ContractError, match="imports diffsynth_absent, which is not installed: pip install diffsynth"):
        fields(path, tiny)


def test_a_module_that_an_installed_package_lacks_is_not_called_a_package(folder: Make) -> None:
    path = folder("return {}", "return {}", before="import torch.absent")
    with pytest.raises(ContractError, match=r"ModuleNotFoundError: No module named 'torch\.absent'"):
        TemplatePipeline(path, trust_code=True)
