"""A template that updates layers of the base, by as much as a number says, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Direction(nn.Module):
    """A low-rank update of layers in every block, one direction and its opposite.

    Args:
        num_layers, num_single_layers, num_attention_heads, attention_head_dim: the base's geometry.
        rank: of the update.
    """

    def __init__(
        self, num_layers: int, num_single_layers: int, num_attention_heads: int, attention_head_dim: int, rank: int
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        # Outputs and inputs. A single block's two layers hold its feed-forward part, of 3 dim, too.
        self.layers: dict[str, tuple[int, int]] = {}
        for i in range(num_layers):
            self.layers |= {f"transformer_blocks.{i}.attn.{end}": (dim, dim) for end in ("to_v", "to_out.0")}
        for i in range(num_single_layers):
            self.layers[f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"] = (9 * dim, dim)
            self.layers[f"single_transformer_blocks.{i}.attn.to_out"] = (dim, 4 * dim)
        self.a = nn.ParameterList(torch.randn(rank, inputs) / inputs**0.5 for _, inputs in self.layers.values())
        self.b = nn.ParameterList(torch.zeros(outputs, rank) for outputs, _ in self.layers.values())

    @torch.no_grad()
    def process_inputs(self, pipe: Any, scale: float, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Turn a number, 0 to 1, into how far to go in the direction, (1,): from -1 to 1."""
        return {"distance": torch.tensor([2 * scale - 1], dtype=torch.float32, device=pipe.device)}

    def forward(self, distance: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for distances (B,)."""
        lora = {}
        for layer, a, b in zip(self.layers, self.a, self.b, strict=True):
            lora[f"{layer}.lora_A.weight"] = a.expand(len(distance), -1, -1)
            lora[f"{layer}.lora_B.weight"] = b * distance.to(b.dtype)[:, None, None]
        return {"lora": lora}


TEMPLATE_MODEL = Direction
TEMPLATE_MODEL_PATH = {"flux2-tiny": "flux2-tiny.safetensors"}
TEMPLATE_MODEL_CONFIG = {
    "flux2-tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "rank": 8,
    },
}
