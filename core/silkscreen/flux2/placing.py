"""Where a pipeline's weights are while it draws: diffusers' and accelerate's ways of fitting a base to a machine."""

from __future__ import annotations

from typing import Any

import torch

from silkscreen.bases import OFFLOADS, Base, Offload
from silkscreen.errors import BaseError
from silkscreen.manifest import unknown_name

_MARK = "_silkscreen_offload"


def check_offload(offload: str, quantized: dict[str, str], device: torch.device) -> None:
    """Refuse an offload mode that does not exist, does nothing on the device, or does not go with quantized weights.

    Raises:
        BaseError: with the modes that do.
    """
    if offload not in OFFLOADS:
        raise BaseError(unknown_name("offload mode", offload, list(OFFLOADS)))
    if device.type == "cpu" and offload in ("model", "group", "sequential"):
        raise BaseError(
            f"offload {offload}: it moves weights between the main memory and an accelerator, and this is a CPU: "
            "use disk, which leaves them in their files, or none"
        )
    if quantized and offload in ("sequential", "disk"):
        raise BaseError(f"offload {offload} does not go with quantized weights: use model or group, or do not quantize")
    if "nf4" in quantized.values() and offload == "group":
        raise BaseError("offload group does not go with nf4: use model, or quantize to fp8 or int8")


def place(pipe: Any, offload: Offload, device: torch.device) -> None:
    """Put a pipeline's models where they are to be.

    Args:
        pipe: a pipeline whose models are on the CPU, or, for `disk`, in their files.
        offload: `none` puts all on the device; `model` one model at a time, when it runs; `group` a block of the
            transformer at a time, and of other models a layer; `sequential` a layer of any; `disk` leaves them.
        device: where they run.
    """
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        from diffusers.hooks import apply_group_offloading

        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
                how: dict[str, Any] = blocks if name == "transformer" else {"offload_type": "leaf_level"}
                apply_group_offloading(component, onload_device=device, **how)
    setattr(pipe, _MARK, offload)


def offload_of(pipe: Any) -> Offload:
    """Return the offload mode that a pipeline was loaded with."""
    mode: Offload = getattr(pipe, _MARK, "none")
    return mode


def speed_up(pipe: Any, base: Base, *, compiled: bool, attention_backend: str | None) -> None:
    """Choose how the transformer's attention is computed, and compile its repeated blocks.

    Raises:
        BaseError: diffusers does not know the attention backend, or its package is not installed.
    """
    if attention_backend is not None:
        try:
            pipe.transformer.set_attention_backend(attention_backend)
        except Exception as error:  # ValueError, ImportError or RuntimeError, as the backend has it
            raise BaseError(f"{base.id}: attention backend {attention_backend!r} cannot be used: {error}") from error
    if compiled:
        pipe.transformer.compile_repeated_blocks()
