"""Rotary position embeddings (RoPE): applied as one complex product, and made once for all passes that share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from silkscreen.content import nbytes
from silkscreen.flux2.replacing import method_replaced
from silkscreen.lru import LRU

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines (N, D) of the angles by which each pair of a token's D values is turned, each twice in a row."""

_MAX_BYTES = 2**26


class Rotation:
    """Applies RoPE, for one pass after the other: what is made of its angles serves all of its blocks."""

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._turn: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Turn (B, N, H, D) by a complex product, which takes half the passes over x and keeps no copy of it."""
        if torch.compiler.is_compiling():  # it fuses real products, and has none for complex numbers
            rotated: torch.Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
            return rotated
        cos, sin = rotary
        if self._turn is None or self._cos is not cos or self._turn.device != x.device:
            self._cos, self._turn = cos, torch.complex(cos[:, None, ::2], sin[:, None, ::2]).to(x.device)
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * self._turn
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@contextmanager
def embedded_once(transformer: Any) -> Iterator[None]:
    """Keep what a transformer's `pos_embed` makes of ids, which are the same at each step, while the context lasts."""
    forward, kept = transformer.pos_embed.forward, LRU[tuple[torch.Tensor, Rotary]](_MAX_BYTES)

    def embed(ids: torch.Tensor) -> Rotary:
        place = (ids.untyped_storage()._cdata, ids.storage_offset(), ids.shape)
        known = kept.get(place)
        if known is None:
            known = ids, forward(ids)  # while the ids are kept, no others can be in their place
            kept.put(place, known, nbytes(known))
        return known[1]

    with method_replaced(transformer.pos_embed, "forward", embed):
        yield
