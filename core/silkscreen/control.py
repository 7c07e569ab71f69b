"""Control over a template in a call: how strongly, when, and where in the picture it acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from silkscreen.errors import InputError
from silkscreen.manifest import CONTROLS, check_values

if TYPE_CHECKING:
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Control:
    """How a template acts in a call. Every template input takes these values beside the template's own.

    Attributes:
        strength: 0 leaves the template out and 1 is as trained. It is the weight of the template's tokens in the
            softmax of attention, and a factor of a LoRA.
        start, end: the part of the denoising steps in which the template acts, as fractions of their number.
        region: a greyscale picture, stretched over the drawn one. The template acts on tokens of the picture where it
            is white, by a share where it is grey, and, for keys and values, on a copy of the prompt of its own;
            None is everywhere.
    """

    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    region: Image.Image | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Control:
        """Check what a template input says of it; a region that is white all over is none.

        Raises:
            InputError: a value is of another type or out of range.
        """
        checked = check_values(CONTROLS, values)
        if checked["start"] >= checked["end"]:
            raise InputError(f"start={checked['start']:g}, end={checked['end']:g}: start has to be before end")
        region = checked.pop("region", None)
        if region is not None:
            region = region.convert("L")
        if region is not None and region.getextrema() == (255, 255):
            region = None
        return cls(**checked, region=region)

    @property
    def changes(self) -> dict[str, Any]:
        """The values that are not the defaults: none when the template acts as trained, everywhere and in all steps."""
        return {name: value for name, value in vars(self).items() if value != getattr(Control, name)}
