"""The value template: numbers become keys and values for every block.

The architecture of the field's Brightness, Sharpness and Age templates for FLUX.2-klein-base-4B.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

KV = tuple[torch.Tensor, torch.Tensor]

FREQUENCIES = 128
"""Frequencies of the sinusoidal embedding, each as a cosine and a sine; the longest period is 10000."""


def sinusoids(value: torch.Tensor) -> torch.Tensor:
    """Return the sinusoidal embeddings, (B, 256), of values (B,), about 0 to 1."""
    embedding: torch.Tensor = get_timestep_embedding(
        value.float() * 1000, 2 * FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return embedding


class ValueEncoder(nn.Module):
    """Maps a value's sinusoidal embedding to `length` tokens of size `dim`."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.prefer_value_embedder = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.positional_embedding = nn.Parameter(torch.randn(length, dim))

    def forward(self, sinusoids: torch.Tensor) -> torch.Tensor:
        """Map sinusoidal embeddings (B, 256) to (B, length, dim)."""
        embedded: torch.Tensor = self.prefer_value_embedder(sinusoids.to(self.positional_embedding.dtype))
        return embedded.unsqueeze(1) + self.positional_embedding


class ValueKV(nn.Module):
    """Maps a value to keys and values for each block of a base.

    Args:
        num_layers, num_single_layers, num_attention_heads, attention_head_dim: the base's geometry.
        length: tokens for each block.
    """

    def __init__(
        self, num_layers: int, num_single_layers: int, num_attention_heads: int, attention_head_dim: int, length: int
    ) -> None:
        super().__init__()
        blocks = [f"double_{i}" for i in range(num_layers)] + [f"single_{i}" for i in range(num_single_layers)]
        dim = num_attention_heads * attention_head_dim
        self.head_dim = attention_head_dim
        self.proj_k = nn.ModuleDict({block: ValueEncoder(dim, length) for block in blocks})
        self.proj_v = nn.ModuleDict({block: ValueEncoder(dim, length) for block in blocks})

    def keys_and_values(self, value: torch.Tensor) -> dict[str, KV]:
        """Map values (B,) to, for each block, keys and values (B, length, heads, head size)."""
        embedded = sinusoids(value)
        keys, values = (
            {block: encoder(embedded).unflatten(-1, (-1, self.head_dim)) for block, encoder in encoders.items()}
            for encoders in (self.proj_k, self.proj_v)
        )
        return {block: (keys[block], values[block]) for block in keys}
