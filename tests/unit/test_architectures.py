from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from silkscreen import find_template
from silkscreen.architectures.dit import PictureKV, from_transformer
from silkscreen.architectures.value import ValueEncoder, sinusoids
from silkscreen.cache import TemplateCache, inject
from silkscreen.weights import TensorFile, differences
from torch import nn

KLEIN_BASE_4B = "black-forest-labs/FLUX.2-klein-base-4B"
BLOCKS = [f"double_{i}" for i in range(5)] + [f"single_{i}" for i in range(20)]


def on_meta(name: str, base: str) -> nn.Module:
    with torch.device("meta"):
        return find_template(name).construct(base)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def klein_4b_transformer() -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )


def test_brightness_for_klein_base_4b_has_the_published_tensors() -> None:
    model = on_meta("brightness", KLEIN_BASE_4B)
    assert parameters(model) == 590_131_200
    expected = {}
    for projection in ("proj_k", "proj_v"):
        for block in BLOCKS:
            prefix = f"{projection}.{block}"
            expected |= {
                f"{prefix}.prefer_value_embedder.0.weight": (3072, 256),
                f"{prefix}.prefer_value_embedder.0.bias": (3072,),
                f"{prefix}.prefer_value_embedder.2.weight": (3072, 3072),
                f"{prefix}.prefer_value_embedder.2.bias": (3072,),
                f"{prefix}.positional_embedding": (512, 3072),
            }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_structure_for_klein_base_4b_has_the_published_tensors() -> None:
    model = on_meta("structure", KLEIN_BASE_4B)
    assert parameters(model) == 3_875_544_576
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["transformer_blocks.0.img_to_qkv.weight"] == (9216, 3072)
    assert shapes["transformer_blocks.4.txt_norm_k.weight"] == (128,)
    assert shapes["single_transformer_blocks.19.to_qkv_mlp_proj.weight"] == (27648, 3072)
    renamed = from_transformer(klein_4b_transformer().state_dict())
    assert {name: tuple(value.shape) for name, value in renamed.items()} == shapes


def published_structure() -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in the published file, written out."""
    dim, head = 3072, 128
    shapes: dict[str, tuple[int, ...]] = {
        "time_guidance_embed.timestep_embedder.0": (dim, 256),
        "time_guidance_embed.timestep_embedder.2": (dim, dim),
        "double_stream_modulation_img.linear": (6 * dim, dim),
        "double_stream_modulation_txt.linear": (6 * dim, dim),
        "single_stream_modulation.linear": (3 * dim, dim),
        "img_embedder": (dim, 128),
        "txt_embedder": (dim, 7680),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (128, dim),
    }
    for block in range(5):
        for side in ("img", "txt"):
            prefix = f"transformer_blocks.{block}.{side}"
            shapes |= {f"{prefix}_to_qkv": (3 * dim, dim), f"{prefix}_to_out": (dim, dim)}
            shapes |= {f"{prefix}_norm_q": (head,), f"{prefix}_norm_k": (head,)}
            shapes |= {f"{prefix}_ff.linear_in": (6 * dim, dim), f"{prefix}_ff.linear_out": (dim, 3 * dim)}
    for block in range(20):
        prefix = f"single_transformer_blocks.{block}"
        shapes |= {f"{prefix}.to_qkv_mlp_proj": (9 * dim, dim), f"{prefix}.to_out": (dim, 4 * dim)}
        shapes |= {f"{prefix}.norm_q": (head,), f"{prefix}.norm_k": (head,)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def test_the_published_files_are_named_as_sources_and_load_into_the_plugins() -> None:
    for name, published in (("brightness", "Brightness"), ("structure", "ControlNet")):
        source = f"modelscope:DiffSynth-Studio/Template-KleinBase4B-{published}:model.safetensors"
        assert find_template(name).weight_paths(KLEIN_BASE_4B) == [source]
    file = TensorFile(Path("model.safetensors"), published_structure())
    assert sum(math.prod(shape) for shape in file.shapes.values()) == 3_875_544_576
    assert differences(on_meta("structure", KLEIN_BASE_4B), [file]) == []


def test_the_transformer_they_are_for_has_the_published_fingerprint() -> None:
    listed = []
    for name, value in klein_4b_transformer().state_dict().items():
        listed += [name, f"{name}:{'_'.join(map(str, value.shape))}"]
    assert hashlib.md5(",".join(sorted(listed)).encode()).hexdigest() == "3bde7b817fec8143028b6825a63180df"


@pytest.mark.parametrize("name", ["brightness", "softrgb", "structure"])
def test_a_plugin_for_the_tiny_base_is_small(name: str) -> None:
    assert parameters(on_meta(name, "flux2-tiny")) * 2 < 10e6


def test_a_value_is_embedded_as_cosines_then_sines() -> None:
    torch.manual_seed(0)
    encoder = ValueEncoder(dim=8, length=3)
    frequencies = [10000 ** (-i / 128) for i in range(128)]
    expected = [math.cos(250 * f) for f in frequencies] + [math.sin(250 * f) for f in frequencies]
    expected = encoder.prefer_value_embedder(torch.tensor(expected)) + encoder.positional_embedding
    torch.testing.assert_close(encoder(sinusoids(torch.tensor([0.25])))[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_copy_has_the_keys_and_values_of_the_transformer_it_copies(small_pipe: Any) -> None:
    """With the same weights, at timestep 0, over the same tokens, both attend with the same keys and values."""
    transformer = small_pipe.transformer
    copy = PictureKV(2, 2, 2, 16, 32, in_channels=16, axes_dims_rope=(4, 4, 4, 4))
    copy.load_state_dict(from_transformer(transformer.state_dict()))
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 2, generator=generator), torch.randn(1, 6, 32, generator=generator)
    kv = copy.keys_and_values([latents], text)
    inputs = {
        "hidden_states": latents.flatten(2).transpose(1, 2),
        "encoder_hidden_states": text,
        "timestep": torch.zeros(1),
        "img_ids": torch.cartesian_prod(torch.tensor([10]), torch.arange(2), torch.arange(2), torch.arange(1)),
        "txt_ids": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(6)),
        "return_dict": False,
    }
    # Attention over every key and value twice is attention over them once.
    plain = transformer(**inputs)[0]
    with inject(small_pipe, TemplateCache({"kv_cache": kv}, {}, "x"), TemplateCache({}, {}, "")):
        doubled = transformer(**inputs)[0]
    torch.testing.assert_close(doubled, plain, atol=1e-5, rtol=1e-5)
