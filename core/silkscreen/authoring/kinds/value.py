"""A template that takes a number, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch

from silkscreen.architectures.value import ValueKV


class Value(ValueKV):
    """Keys and values for every block, from one number."""

    @torch.no_grad()
    def process_inputs(self, pipe: Any, scale: float, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Turn a number, 0 to 1, into a tensor (1,)."""
        return {"scale": torch.tensor([scale], dtype=torch.float32, device=pipe.device)}

    def forward(self, scale: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for numbers (B,)."""
        return {"kv_cache": self.keys_and_values(scale)}


TEMPLATE_MODEL = Value
TEMPLATE_MODEL_PATH = {"flux2-tiny": "flux2-tiny.safetensors"}
TEMPLATE_MODEL_CONFIG = {
    "flux2-tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "length": 8,
    },
}
