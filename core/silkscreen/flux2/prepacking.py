"""Prepacked weights: those of a transformer's linear layers, laid out as a CPU's matrix products read them.

A product of a few hundred tokens spends a tenth to a third of its time on laying out weights that are the same in each
pass. oneDNN takes them laid out: a copy is kept as long as a layer lives and its weights stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from silkscreen.flux2.replacing import method_replaced

LARGEST = 2**28
"""Bytes of a transformer's weights up to which they are prepacked: a copy of more would take too much memory."""

_SMALLEST = 2**16
"""Values of a layer's weights below which prepacking them gains nothing."""


class _Prepacked:
    """The weights W (out, in) of a linear layer, laid out for x W^T and, once it is asked for, for g W."""

    def __init__(self, layer: nn.Linear) -> None:
        self.content = _content(layer)
        self.forward = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self._backward: Any = None

    def backward(self, weight: torch.Tensor) -> Any:
        """Return what is laid out for g W; `weight` is W."""
        if self._backward is None:
            self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().T)
        return self._backward


class _FrozenProduct(torch.autograd.Function):
    """The product of a layer whose weights get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear, packed: _Prepacked) -> torch.Tensor:
        ctx.layer, ctx.packed = layer, packed
        return _product(x, packed.forward, layer.bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _product(gradients[0], ctx.packed.backward(ctx.layer.weight), None), None, None


_kept: WeakKeyDictionary[nn.Linear, _Prepacked] = WeakKeyDictionary()


@contextmanager
def weights_prepacked(transformer: nn.Module) -> Iterator[None]:
    """Let the linear layers of a transformer's blocks use prepacked weights while the context lasts.

    For plain layers in float32 on a CPU; where there are none, or all together are larger than `LARGEST`, nothing
    changes. Weights that were changed, also in place, since the last time are laid out anew; in the context they have
    to stay as they are.
    """
    with ExitStack() as stack:
        for layer in prepackable(transformer):
            if type(layer.weight.data) is not torch.Tensor:  # quantized, or nothing but a shape
                continue
            packed = _kept.get(layer)
            if packed is None or packed.content != _content(layer):
                packed = _kept[layer] = _Prepacked(layer)
            stack.enter_context(method_replaced(layer, "forward", _forward(layer, packed)))
        yield


def prepackable(transformer: nn.Module) -> list[nn.Linear]:
    """Return the layers whose weights are prepacked, if they are numbers and not quantized."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    blocks = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear and _suits(layer)]
    return layers if sum(layer.weight.nbytes for layer in layers) <= LARGEST else []


def _suits(layer: nn.Linear) -> bool:
    """Whether nothing but its weights makes a layer's result, and these are at hand and large enough."""
    weight = layer.weight
    in_float32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return "forward" not in vars(layer) and in_float32 and weight.is_contiguous() and weight.numel() >= _SMALLEST


def _content(layer: nn.Linear) -> tuple[int, int]:
    """Return what tells whether weights were changed in place, which leaves no other trace: their address and sum."""
    weight = layer.weight.detach()
    return weight.data_ptr(), int(weight.view(torch.int32).sum())


def _forward(layer: nn.Linear, packed: _Prepacked) -> Callable[[torch.Tensor], torch.Tensor]:
    original, frozen = layer.forward, not any(parameter.requires_grad for parameter in layer.parameters())

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return original(x)
        if not torch.is_grad_enabled():
            return _product(x, packed.forward, layer.bias)
        if not frozen:
            return original(x)
        return _FrozenProduct.apply(x, layer, packed)  # type: ignore[no-untyped-call, no-any-return]

    return forward


def _product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
