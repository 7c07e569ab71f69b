"""How strongly, and where in the picture, the units of a carrier's content act: template tokens, or ranks of a LoRA.

Shapes: P pictures of a batch, or 1 for all of them, N tokens of the transformer's picture sequence, U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of the picture.

    Attributes:
        mask: greyscale, white inside; it is stretched over the picture. Regions of equal masks are equal.
    """

    mask: Image.Image

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.mask.size, self.mask.tobytes()))

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """Return how much of each token is inside, (N,) in 0..1, by the ids (N, 4) of the picture sequence.

        The ids of FLUX.2 are image, row, column and layer. Image 0 is the drawn one; reference pictures are outside.
        """
        image, row, column, _ = ids.long().cpu().unbind(-1)
        drawn = image == 0
        grid = int(row[drawn].max()) + 1, int(column[drawn].max()) + 1
        mask = torch.from_numpy(np.asarray(self.mask, dtype=np.float32) / 255)
        share = torch.nn.functional.interpolate(mask[None, None], grid, mode="area")[0, 0]
        return torch.where(drawn, share[row * drawn, column * drawn], 0.0)


@dataclasses.dataclass(frozen=True)
class Part:
    """Units that share a strength and a region."""

    units: int
    strength: float = 1.0
    region: Region | None = None

    def at(self, ids: torch.Tensor | None) -> torch.Tensor:
        """Return the weights (N, units) of tokens of the picture sequence by their ids, or (1, units) elsewhere."""
        if self.region is None:
            inside = torch.ones(1 if ids is None else len(ids))
        else:
            inside = torch.zeros(1) if ids is None else self.region.at(ids)
        return (self.strength * inside)[:, None].expand(-1, self.units)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of units: their strength, and 0 outside their region.

    Attributes:
        pictures: for each picture of a batch, or once for all, the parts that follow each other.
    """

    pictures: tuple[tuple[Part, ...], ...]

    @classmethod
    def of(cls, units: int, strength: float = 1.0, region: Region | None = None) -> Weights:
        """Return those of units that are alike."""
        return cls(((Part(units, strength, region),),))

    @classmethod
    def join(cls, several: Sequence[Weights]) -> Weights:
        """Return those of units that follow each other."""
        count = max(len(weights.pictures) for weights in several)
        whole = [weights.pictures * (count // len(weights.pictures)) for weights in several]
        return cls(tuple(sum(parts, ()) for parts in zip(*whole, strict=True)))

    @classmethod
    def stack(cls, several: Sequence[Weights], units: int) -> Weights:
        """Return those of the pictures of a batch; units of weight 0 fill up those that have fewer."""
        pictures = [picture for weights in several for picture in weights.pictures]
        missing = [units - sum(part.units for part in picture) for picture in pictures]
        fill = [(Part(count, 0.0),) if count else () for count in missing]
        return cls(tuple(picture + rest for picture, rest in zip(pictures, fill, strict=True)))

    @property
    def plain(self) -> bool:
        """Whether all weights are 1, everywhere."""
        return all(part.strength == 1 and part.region is None for picture in self.pictures for part in picture)

    @property
    def regional(self) -> bool:
        """Whether any unit has a region."""
        return any(part.region is not None for picture in self.pictures for part in picture)

    def at(self, ids: torch.Tensor | None) -> Placed:
        """Return the weights as tensors; `ids` (N, 4) are those of the picture sequence, once they are known."""

        def rows(ids: torch.Tensor | None) -> torch.Tensor:
            return torch.stack([torch.cat([part.at(ids) for part in picture], dim=1) for picture in self.pictures])

        return Placed(rows(None), rows(ids) if self.regional and ids is not None else None)


class Placed(NamedTuple):
    """Weights of the tokens of a call.

    Attributes:
        elsewhere: (P, 1, U), of tokens that are not of the picture sequence.
        picture: (P, N, U), of tokens of the picture sequence; None when `elsewhere` holds for them too.
    """

    elsewhere: torch.Tensor
    picture: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Placed:
        """Return what a function makes of the tensors."""
        return Placed(change(self.elsewhere), None if self.picture is None else change(self.picture))

    def over(self, tokens: int) -> torch.Tensor:
        """Return those of a sequence that ends with the picture's: (P, tokens, U), or (P, 1, U) when all are alike."""
        if self.picture is None:
            return self.elsewhere
        others = self.elsewhere.expand(-1, tokens - self.picture.shape[1], -1)
        return torch.cat([others, self.picture], dim=1)
