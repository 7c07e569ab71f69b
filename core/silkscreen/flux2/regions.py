"""Regions of a picture, each drawn under templates of its own.

Where template tokens have regions, each region gets a copy of the prompt's tokens. The copy sees the region's template
tokens, and only the picture's tokens in the region see the copy. Picture tokens of different regions see each other by
a small weight: by the full one, a base evens out what the templates ask of the regions; by none, nothing goes on across
their border. What is outside of all regions is one more, without templates of its own.

Shapes: P pictures of a batch, or 1 for all of them, G regions, N tokens of the picture sequence, L text tokens, T
template tokens. The transformer's sequence is G copies of the text, then the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch

from silkscreen.carriers.weights import Part, Region, Weights

ACROSS = 0.1
"""The weight by which tokens of different regions see each other's part of the picture."""


@dataclasses.dataclass(frozen=True, eq=False)
class Separation:
    """How the tokens of a pass are shared out among regions.

    Attributes:
        regions: those that hold tokens; None stands for what is outside of all.
        shares: (P, G, N), how much of a picture token is in each region, 1 in all.
        ids: (N, 4), of the picture sequence.
    """

    regions: tuple[Region | None, ...]
    shares: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, weights: Iterable[Weights], ids: torch.Tensor) -> Separation | None:
        """Return that of template tokens with these weights, or None when none of them has a region."""
        pictures = [
            {part.region for parts in several for part in parts if part.region is not None}
            for several in zip_longest(*(each.pictures for each in weights), fillvalue=())
        ]
        regions = list(dict.fromkeys(region for own in pictures for region in own))
        if not regions:
            return None
        inside = {region: region.at(ids) for region in regions}
        nowhere = torch.zeros(len(ids))
        shares = torch.stack(
            [torch.stack([inside[region] if region in own else nowhere for region in regions]) for own in pictures]
        )
        outside = (1 - shares.sum(1, keepdim=True)).clamp(min=0)
        shares = torch.cat([outside, shares], dim=1)
        held = shares.sum((0, 2)) > 0
        named = tuple(region for region, some in zip([None, *regions], held.tolist(), strict=True) if some)
        return cls(named, shares[:, held] / shares.sum(1, keepdim=True), ids)

    def repeat_text(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pass through the transformer, with a copy of the text for each region."""
        text, ids, count = call["encoder_hidden_states"], call["txt_ids"], len(self.regions)
        return {**call, "encoder_hidden_states": text.repeat(1, count, 1), "txt_ids": torch.cat([ids] * count, dim=-2)}

    def bias(self, weights: Weights, text: int) -> torch.Tensor:
        """Return what is added to the logits of attention, (P, G*L + N, G*L + N + T).

        Args:
            weights: of the template tokens.
            text: number of text tokens, L.
        """
        own = self._of_own_tokens(text)
        template = torch.stack(
            [torch.cat([self._of_template_tokens(part, text) for part in parts], dim=1) for parts in weights.pictures]
        )
        count = max(len(own), len(template))
        return torch.cat([own.expand(count, -1, -1), template.expand(count, -1, -1)], dim=2).log()

    def _of_own_tokens(self, text: int) -> torch.Tensor:
        drawn = self.ids[:, 0].cpu() == 0  # reference pictures are seen, and see, everywhere
        copies = torch.eye(len(self.regions)).repeat_interleave(text, 0).repeat_interleave(text, 1)
        shares = self.shares.repeat_interleave(text, 1)
        common = sum(torch.minimum(share[:, :, None], share[:, None, :]) for share in self.shares.unbind(1))
        seen = torch.where(drawn & drawn[:, None], ACROSS + (1 - ACROSS) * common, 1.0)
        seen_by_text = torch.where(drawn, ACROSS + (1 - ACROSS) * shares, 1.0)
        rows = [[copies.expand(len(shares), -1, -1), seen_by_text], [shares.transpose(1, 2), seen]]
        return torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)

    def _of_template_tokens(self, part: Part, text: int) -> torch.Tensor:
        by_copy = [part.strength * (part.region in (None, region)) for region in self.regions]
        picture = part.at(self.ids).expand(len(self.ids), -1)
        return torch.cat([torch.tensor(by_copy).repeat_interleave(text)[:, None].expand(-1, part.units), picture])
