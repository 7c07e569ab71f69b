"""The soft RGB template, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from silkscreen.architectures.value import ValueKV
from torch import nn

CHANNELS = ("R", "G", "B")


class SoftRGB(nn.Module):
    """Keys and values from three numbers, the mean of each channel, by a value encoder for each.

    Args:
        **geometry: see `silkscreen.architectures.value.ValueKV`.
    """

    def __init__(self, **geometry: int) -> None:
        super().__init__()
        self.channels = nn.ModuleDict({channel: ValueKV(**geometry) for channel in CHANNELS})

    @torch.no_grad()
    def process_inputs(self, pipe: Any, R: float, G: float, B: float, **kwargs: Any) -> dict[str, torch.Tensor]:  # noqa: N803
        """Turn three means in 0..1 into a tensor (1, 3)."""
        return {"rgb": torch.tensor([[R, G, B]], dtype=torch.float32, device=pipe.device)}

    def forward(self, rgb: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for means (B, 3): the channels' tokens one after another."""
        parts = [self.channels[channel].keys_and_values(rgb[:, i]) for i, channel in enumerate(CHANNELS)]  # type: ignore[operator]
        return {
            "kv_cache": {
                block: tuple(
                    torch.cat(tensors, dim=1) for tensors in zip(*(part[block] for part in parts), strict=True)
                )
                for block in parts[0]
            }
        }


class RowToInputs:
    """Takes a dataset row's `template_inputs` as they are."""

    def __call__(self, R: float, G: float, B: float, **kwargs: Any) -> dict[str, float]:  # noqa: N803
        """Return the arguments of `process_inputs`."""
        return {"R": R, "G": G, "B": B}


TEMPLATE_MODEL = SoftRGB
TEMPLATE_MODEL_PATH = {"flux2-tiny": "flux2-tiny.safetensors"}
TEMPLATE_MODEL_CONFIG = {
    "flux2-tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "length": 4,
    }
}
TEMPLATE_DATA_PROCESSOR = RowToInputs
