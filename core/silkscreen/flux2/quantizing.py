"""Weights at fewer bits, by diffusers' own back ends: which component, which kind, which package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from silkscreen.errors import BaseError
from silkscreen.manifest import unknown_name

KINDS = ("int8", "fp8", "nf4")
"""8-bit integers (torchao), 8-bit floats (diffusers' layerwise casting), 4-bit floats (bitsandbytes)."""

COMPONENTS = ("transformer", "text_encoder")
"""What can be quantized; the VAE is small and cannot."""

_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}

_BYTES: Mapping[str | None, float] = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of a number of a quantized layer; for nf4, 64 of them share a scale of 4 bytes."""

_LEFT_ALONE = ("proj_out", "lm_head")


def parse_quantize(quantize: str | Mapping[str, str] | None, device: torch.device) -> dict[str, str]:
    """Return the kind of each component that is to be quantized.

    Args:
        quantize: a kind for all of `COMPONENTS`, or one for some of them by name.
        device: the kind has to work there.

    Raises:
        BaseError: a component or kind is unknown, needs an accelerator, or its package is not installed.
    """
    chosen = dict.fromkeys(COMPONENTS, quantize) if isinstance(quantize, str) else dict(quantize or {})
    for component, kind in chosen.items():
        if component not in COMPONENTS:
            raise BaseError(f"quantize: {unknown_name('component', component, list(COMPONENTS))}")
        if kind not in KINDS:
            raise BaseError(f"quantize {component}: {unknown_name('kind', kind, list(KINDS))}")
        if kind == "nf4" and device.type == "cpu":
            raise BaseError("quantize nf4: diffusers needs an accelerator for it, and this is a CPU: use fp8 or int8")
        package = _PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise BaseError(f"quantize {kind} needs the package {package}: pip install 'silkscreen[quantize]'")
    return chosen


def loading_options(component: str, kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize a component; none for fp8, which comes after loading."""
    if kind not in _PACKAGES:
        return {}
    if component == "transformer":
        from diffusers import BitsAndBytesConfig, TorchAoConfig
    else:
        from transformers import BitsAndBytesConfig, TorchAoConfig
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config}


def store_as_float8(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep a model's weights as 8-bit floats, and cast each layer's to the dtype while it runs; norms stay as they are.

    An embedding is kept too: its table is read in the dtype of what follows it.
    """
    from diffusers.hooks import apply_layerwise_casting

    if hasattr(model, "enable_layerwise_casting"):
        model.enable_layerwise_casting(torch.float8_e4m3fn, dtype)  # type: ignore[operator]
        return
    apply_layerwise_casting(model, torch.float8_e4m3fn, dtype, ("norm", "embed_tokens", "lm_head"), (nn.Embedding,))


def stored_bytes(model: nn.Module, kind: str | None, dtype: torch.dtype) -> int:
    """Return the bytes that a model's weights and buffers take in a dtype, its layers quantized.

    Without a kind this is exact, with one as near as the package's own notes of scales allow.
    """
    seen: set[int] = set()
    total = 0
    for name, module in model.named_modules():
        for parameter in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            plain = kind is None or not isinstance(module, nn.Linear) or name in _LEFT_ALONE
            size = dtype.itemsize if parameter.is_floating_point() else parameter.itemsize
            total += parameter.numel() * size if plain else round(parameter.numel() * _BYTES[kind])
    return total
