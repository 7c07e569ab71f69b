"""The brightness template, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from silkscreen.architectures.value import ValueKV


class Brightness(ValueKV):
    """Keys and values from one number: how bright the picture is to be."""

    @torch.no_grad()
    def process_inputs(self, pipe: Any, scale: float, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Turn a brightness in 0..1 into a tensor (1,)."""
        return {"scale": torch.tensor([scale], dtype=torch.float32, device=pipe.device)}

    def forward(self, scale: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for brightnesses (B,)."""
        return {"kv_cache": self.keys_and_values(scale)}


class RowToInputs:
    """Takes a dataset row's `template_inputs` as they are."""

    def __call__(self, scale: float, **kwargs: Any) -> dict[str, float]:
        """Return the arguments of `process_inputs`."""
        return {"scale": scale}


TEMPLATE_MODEL = Brightness
TEMPLATE_MODEL_PATH = {
    "flux2-tiny": "flux2-tiny.safetensors",
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "modelscope:DiffSynth-Studio/Template-KleinBase4B-Brightness:model.safetensors"
    ),
}
TEMPLATE_MODEL_CONFIG = {
    "flux2-tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "length": 8,
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "length": 512,
    },
}
TEMPLATE_DATA_PROCESSOR = RowToInputs
