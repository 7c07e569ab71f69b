"""A template that adds tokens to the prompt, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from silkscreen.architectures.value import ValueEncoder, sinusoids


class Words(nn.Module):
    """Tokens in the space of the base's prompt embeddings, from one number.

    Args:
        joint_attention_dim: size of the base's prompt embeddings.
        length: how many tokens.
    """

    def __init__(self, joint_attention_dim: int, length: int) -> None:
        super().__init__()
        self.encoder = ValueEncoder(joint_attention_dim, length)

    @torch.no_grad()
    def process_inputs(self, pipe: Any, scale: float, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Turn a number, 0 to 1, into a tensor (1,)."""
        return {"scale": torch.tensor([scale], dtype=torch.float32, device=pipe.device)}

    def forward(self, scale: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for numbers (B,)."""
        return {"extra_text_embedding": self.encoder(sinusoids(scale))}


TEMPLATE_MODEL = Words
TEMPLATE_MODEL_PATH = {"flux2-tiny": "flux2-tiny.safetensors"}
TEMPLATE_MODEL_CONFIG = {"flux2-tiny": {"joint_attention_dim": 288, "length": 4}}
