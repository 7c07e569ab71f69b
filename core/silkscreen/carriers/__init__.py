"""Carriers: the kinds of content that a template cache can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from silkscreen import registry
from silkscreen.bases import Base
from silkscreen.flux2.sides import Sides

ALIASES = {"text_embedding": "extra_text_embedding"}
"""Other names that templates of the field have for a carrier."""


class Carrier(Protocol):
    """One kind of content of a template cache: how it is checked, merged, stacked, saved and injected.

    It may also have a method `control(value, strength, region)`, which returns the value at a strength, and in a
    `silkscreen.carriers.weights.Region` if there is one; without it, another strength than 1 and a region are refused.
    It may do without `stack`: then all pictures of a call share its values.
    And it may have an attribute `nothing`, a value without effect; without it, all pictures of a call need the carrier
    if one has it.
    """

    @property
    def name(self) -> str:
        """The field of a template's result that holds it."""

    def check(self, value: Any, base: Base) -> list[str]:
        """Return what in a value does not fit a base, one sentence each, without computing anything."""

    def merge(self, values: Sequence[Any]) -> Any:
        """Return one value that has the effect of all of them together, in their order."""

    def stack(self, values: Sequence[Any]) -> Any:
        """Return the values of several pictures, one each, as one value of a batch.

        Raises:
            CacheError: they cannot be one value; which pictures differ is told.
        """

    def flatten(self, value: Any) -> dict[str, torch.Tensor]:
        """Return the value as named tensors, to be saved."""

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return the value that `flatten` made these tensors of."""

    def describe(self, value: Any) -> str:
        """Return a value's size in a few words, as `8 tokens in 6 blocks`."""

    def inject(self, pipe: Any, sides: Sides) -> AbstractContextManager[None]:
        """Let the sides' values of this carrier act on a pipeline, for as long as the context lasts.

        `sides.current` tells the running side's value; in a pass that is for both sides at once, it is their stack.
        """


def carriers() -> dict[str, Carrier]:
    """Return every carrier by name: the core's and the plugins'."""
    registered: list[Sequence[Carrier]] = registry.plugin_manager().hook.register_carriers()
    return {carrier.name: carrier for some in registered for carrier in some}
