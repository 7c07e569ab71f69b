"""The two sides of guidance, and how injected content knows which of them is running."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

POSITIVE = "cond"
NEGATIVE = "uncond"


@dataclasses.dataclass
class Sides:
    """What each side of a call has: for each side, its fields by carrier name.

    Attributes:
        fields: `POSITIVE` and `NEGATIVE` to the side's fields.
        running: the side whose pass through the transformer is under way.
    """

    fields: Mapping[str, Mapping[str, Any]]
    running: str = POSITIVE

    def current(self, carrier: str) -> Any:
        """Return the running side's value of a carrier, or None."""
        return self.fields.get(self.running, {}).get(carrier)

    def has(self, carrier: str) -> bool:
        """Whether any side has content of a carrier."""
        return any(carrier in fields for fields in self.fields.values())

    @contextmanager
    def follow(self, transformer: Any) -> Iterator[None]:
        """Keep `running` up to date while a pipeline calls its transformer.

        diffusers' pipelines wrap each pass in `transformer.cache_context("cond")` or `("uncond")`.
        """
        original, own = transformer.cache_context, vars(transformer).get("cache_context")

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self.running = self.running, name
            inner: AbstractContextManager[None] = original(name, **kwargs)
            try:
                with inner:
                    yield
            finally:
                self.running = before

        transformer.cache_context = cache_context
        try:
            yield
        finally:
            if own is None:
                del transformer.cache_context
            else:
                transformer.cache_context = own
