"""Linear layers that use prepacked weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from silkscreen import TemplatePipeline
from silkscreen.flux2 import prepacking
from silkscreen.flux2.prepacking import prepackable, weights_prepacked
from small_flux2 import CALL, build_pipeline
from torch import nn

INPUTS = 256
LAYERS = 2


class Blocks(nn.Module):
    """As many linear layers as a transformer might have, in a list of blocks, and a small one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(INPUTS, INPUTS, **options) for _ in range(LAYERS))
        self.blocks.append(nn.Linear(INPUTS, 8, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def layers() -> Blocks:
    return Blocks().requires_grad_(False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how many products of prepacked weights were made so far."""
    made, product = [], prepacking._product

    def counted(*args: Any) -> torch.Tensor:
        made.append(args)
        return product(*args)

    monkeypatch.setattr(prepacking, "_product", counted)
    return lambda: len(made)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, INPUTS), (2, 80, INPUTS), (3, 1, INPUTS)])
@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients_are_those_of_the_layers(
    shape: tuple[int, ...], bias: bool, products: Callable[[], int]
) -> None:
    layers = Blocks(bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    wanted = layers(x)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    with weights_prepacked(layers):
        found = layers(x)
        close(found, wanted)
        close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
        with torch.no_grad():
            close(layers(x), wanted)
    assert products() == 3 * LAYERS


def test_tokens_that_do_not_follow_each_other_in_memory_are_multiplied_right(layers: Blocks) -> None:
    x = torch.randn(2, 96, 2 * INPUTS)[:, 16:, ::2]
    wanted = layers(x)
    with weights_prepacked(layers):
        close(layers(x), wanted)


def test_nothing_is_left_behind(layers: Blocks) -> None:
    before = [dict(vars(layer)) for layer in layers.modules()]
    with pytest.raises(ZeroDivisionError), weights_prepacked(layers):
        1 / 0  # noqa: B018
    assert [dict(vars(layer)) for layer in layers.modules()] == before


def test_weights_are_prepacked_once_and_as_long_as_their_layer_lives(
    layers: Blocks, products: Callable[[], int]
) -> None:
    known = len(prepacking._kept)
    for _ in range(2):
        with weights_prepacked(layers):
            kept = [prepacking._kept[layer] for layer in layers.blocks[:LAYERS]]
        assert len(prepacking._kept) == known + LAYERS
    assert kept == [prepacking._kept[layer] for layer in layers.blocks[:LAYERS]]
    del layers.blocks
    assert len(prepacking._kept) == known


def in_place(layer: nn.Linear) -> None:
    layer.weight.data[3, 5] += 0.5


def negated(layer: nn.Linear) -> None:
    layer.weight.data.neg_()


def replaced(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


@pytest.mark.parametrize("change", [in_place, negated, replaced])
def test_weights_that_were_changed_are_prepacked_anew(layers: Blocks, change: Callable[[nn.Linear], None]) -> None:
    x = torch.randn(4, INPUTS, requires_grad=True)
    with weights_prepacked(layers):
        layers(x).sum().backward()
    change(layers.blocks[0])
    wanted = layers(x)
    with weights_prepacked(layers):
        close(layers(x), wanted)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_what_is_trained_gets_its_gradients(trained: str, products: Callable[[], int]) -> None:
    layers = Blocks().requires_grad_(False)
    for layer in layers.blocks:
        layer.get_parameter(trained).requires_grad_(True)
    with weights_prepacked(layers):
        layers(torch.randn(4, INPUTS)).sum().backward()
    assert products() == 0
    assert all(layer.get_parameter(trained).grad is not None for layer in layers.blocks)


@contextmanager
def largest(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as changed:
        changed.setattr(prepacking, "LARGEST", size)
        yield


def test_what_is_too_large_or_computed_otherwise_is_left_alone(
    layers: Blocks, products: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * LAYERS * INPUTS**2
    with largest(size - 1, monkeypatch):
        assert prepackable(layers) == []
    with largest(size, monkeypatch):
        assert prepackable(layers) == list(layers.blocks[:LAYERS])
    with weights_prepacked(layers), torch.autocast("cpu", torch.bfloat16):
        assert layers(torch.randn(4, INPUTS)).dtype == torch.bfloat16
    with torch.device("meta"):
        assert prepackable(Blocks()) == []
    assert prepackable(Blocks(dtype=torch.bfloat16)) == []
    assert products() == 0


# -- in drawings


@pytest.fixture
def pipe() -> Any:
    """A pipeline whose transformer has layers large enough."""
    pipe = build_pipeline()
    torch.manual_seed(0)
    geometry = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32}
    sizes = {"in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False}
    pipe.register_modules(transformer=Flux2Transformer2DModel(**geometry, **sizes).eval())
    return pipe


EVERYTHING = '{"kv_cache": {"double_0": (torch.ones(1, 4, 4, 32),) * 2}, "lora": {' + ", ".join(
    f'"single_transformer_blocks.0.attn.to_out.lora_{factor}.weight": torch.ones({shape})'
    for factor, shape in (("A", "2, 512"), ("B", "128, 2"))
) + "}}"  # fmt: skip


@pytest.fixture
def draw(
    pipe: Any, fixed_folder: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Draw with prepacked weights, and by the layers themselves."""
    templates = TemplatePipeline(fixed_folder("everything", EVERYTHING), trust_code=True)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        call = {"template_inputs": [{"model_id": "everything"}], "prompt": "red", "seed": 0, **CALL}
        prepacked = templates(pipe, **call).images
        with largest(0, monkeypatch):
            return prepacked, templates(pipe, **call).images

    return drawn


Draw = Callable[..., tuple[np.ndarray, np.ndarray]]


def test_a_picture_is_the_same(draw: Draw, products: Callable[[], int]) -> None:
    prepacked, plain = draw()
    assert products() > 0
    np.testing.assert_allclose(prepacked, plain, atol=1e-5)


def test_what_is_added_to_the_weights_is_seen(pipe: Any, draw: Draw) -> None:
    """As diffusers fuses a LoRA into them."""
    before, _ = draw()
    weight = pipe.transformer.single_transformer_blocks[0].attn.to_qkv_mlp_proj.weight
    weight.data += torch.randn_like(weight)
    fused, plain = draw()
    np.testing.assert_allclose(fused, plain, atol=1e-5)
    assert np.abs(fused - before).max() > 1e-3
