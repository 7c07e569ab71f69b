"""The two sides of guidance, and how injected content knows which of them is running."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from silkscreen.errors import PipelineError
from silkscreen.flux2.replacing import method_replaced

POSITIVE = "cond"
NEGATIVE = "uncond"
BOTH = "both"

Fields = Mapping[str, Any]
"""Contents by carrier name."""

Later = Sequence[tuple[float, Fields]]
"""Fields that take the place of others in the course of a run, each with the fraction of its steps from which, rising.
"""

Call = Mapping[str, Any]
"""The arguments of a pass through the transformer, by name; none where it is not known yet."""

Change = Callable[[Call], Call]
"""What is to be done before a pass: it gets the pass's arguments, and returns them, as they are or others."""


def fields_at(fraction: float, fields: Fields, later: Later) -> Fields:
    """Return which fields act when a fraction of a run's steps is done."""
    return [fields, *(changed for start, changed in later if start <= fraction)][-1]


@dataclasses.dataclass
class Sides:
    """What each side of a call has: for each side, its fields by carrier name.

    Attributes:
        fields: `POSITIVE` and `NEGATIVE` to the side's fields at the first step; also `BOTH`, as a batch of two, when
            they may run in one pass.
        later: for a side, the fields that take the place of these.
        running: the side whose pass through the transformer is under way.
        picture_ids: ids (N, 4) of the transformer's picture sequence, during a pass that a carrier watches with them.
    """

    fields: Mapping[str, Fields]
    later: Mapping[str, Later] = dataclasses.field(default_factory=dict)
    running: str = POSITIVE
    picture_ids: torch.Tensor | None = None
    _pipe: Any = None
    _watchers: list[Change] = dataclasses.field(default_factory=list)

    def current(self, carrier: str) -> Any:
        """Return what the running side has of a carrier at this step, or None."""
        fields, later = self.fields.get(self.running, {}), self.later.get(self.running, ())
        return fields_at(self._fraction() if later else 0.0, fields, later).get(carrier)

    def values(self, carrier: str) -> list[Any]:
        """Return everything that a side has of a carrier at any step."""
        later = [fields for changes in self.later.values() for _, fields in changes]
        return [fields[carrier] for fields in [*self.fields.values(), *later] if carrier in fields]

    def has(self, carrier: str) -> bool:
        """Whether any side has content of a carrier."""
        return bool(self.values(carrier))

    def run(self, side: str) -> None:
        """Let a side be the one that is running."""
        self.running = side
        for change in self._watchers:
            change({})

    @contextmanager
    def follow(self, pipe: Any) -> Iterator[None]:
        """Keep `running` up to date while a pipeline calls its transformer.

        diffusers' pipelines wrap each pass in `transformer.cache_context("cond")` or `("uncond")`.

        Raises:
            PipelineError: the fields change between steps, and the scheduler does not tell its step.
        """
        self._pipe, transformer = pipe, pipe.transformer
        if self._changes and not hasattr(pipe.scheduler, "step_index"):
            raise PipelineError(
                f"{type(pipe.scheduler).__name__} does not tell its step, which start and end of a template need: "
                "leave them out, or use FlowMatchEulerDiscreteScheduler"
            )
        original = transformer.cache_context

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before = self.running
            self.run(name)
            inner: AbstractContextManager[None] = original(name, **kwargs)
            try:
                with inner:
                    yield
            finally:
                self.running = before

        with method_replaced(transformer, "cache_context", cache_context):
            yield

    @contextmanager
    def watch(self, change: Change, *, with_ids: bool = False) -> Iterator[None]:
        """Call a function before each pass, once, and now if nothing changes between steps, while the context lasts.

        Args:
            change: puts in place what is `current`, where it can be found without looking it up.
            with_ids: keep `picture_ids` up to date, and give and take the arguments of each pass.
        """

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_pass(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Call]:
            if with_ids:
                ids = kwargs["img_ids"].reshape(-1, *kwargs["img_ids"].shape[-2:])[0]
                if self.picture_ids is None or not torch.equal(self.picture_ids, ids):
                    self.picture_ids = ids
            return args, change(kwargs)

        if with_ids or self._changes:  # not every pipeline has cache contexts, which tell no ids either
            end = self._pipe.transformer.register_forward_pre_hook(before_pass, with_kwargs=True).remove
        else:
            change({})
            self._watchers.append(change)
            end = partial(self._watchers.remove, change)
        try:
            yield
        finally:
            end()

    @property
    def _changes(self) -> bool:
        return any(self.later.values())

    def _fraction(self) -> float:
        """Return the steps done as a fraction of the run's, which may begin late in those of the scheduler."""
        step = self._pipe.scheduler.step_index
        if step is None:
            return 0.0
        run: int = self._pipe.num_timesteps
        done: int = step - len(self._pipe.scheduler.timesteps) + run
        return done / run
