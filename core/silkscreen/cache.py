"""The template cache: what templates return, as named carriers and pipeline arguments, composed into one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from silkscreen.bases import Base
from silkscreen.carriers import ALIASES, carriers
from silkscreen.carriers.weights import Region
from silkscreen.control import Control
from silkscreen.errors import CacheError
from silkscreen.files import replacing
from silkscreen.flux2.sides import NEGATIVE, POSITIVE, Sides

ConflictPolicy = Literal["error", "first", "last"]


@dataclasses.dataclass(frozen=True)
class TemplateCache:
    """What one template returned, or several together.

    Attributes:
        fields: for each carrier's name, its content.
        arguments: arguments for the pipeline's call, by name.
        source: the template or templates it comes from, for messages.
        later: fields that take the place of these in the course of a run, each with the fraction of its steps from
            which, rising.
    """

    fields: Mapping[str, Any]
    arguments: Mapping[str, Any]
    source: str
    later: Sequence[tuple[float, Mapping[str, Any]]] = ()

    @classmethod
    def from_result(cls, result: Any, template: str) -> TemplateCache:
        """Take what a template's `forward` returned: a dict of fields.

        Raises:
            CacheError: it is no dict, or has one carrier under two names.
        """
        if not isinstance(result, Mapping):
            raise CacheError(
                f"template {template!r}: forward returned {type(result).__name__}, not a dict of fields: "
                'return {"kv_cache": ...} or another carrier'
            )
        named: dict[str, Any] = {}
        for given, value in result.items():
            name = ALIASES.get(str(given), str(given))
            if name in named:
                raise CacheError(f"template {template!r}: forward returned {name!r} under two names: return one")
            named[name] = value
        known = carriers()
        return cls(
            fields={name: value for name, value in named.items() if name in known},
            arguments={name: value for name, value in named.items() if name not in known},
            source=template,
        )

    def check(self, base: Base) -> None:
        """Compare every carrier's content with a base.

        Raises:
            CacheError: with everything that does not fit.
        """
        known = carriers()
        problems = [problem for name, value in self.fields.items() for problem in known[name].check(value, base)]
        if problems:
            raise CacheError("; ".join(f"template {self.source!r}: {problem}" for problem in problems))

    def at(self, fraction: float) -> Mapping[str, Any]:
        """Return the fields that act when this fraction of a run's steps is done."""
        return [self.fields, *(fields for start, fields in self.later if start <= fraction)][-1]

    def controlled(self, control: Control) -> TemplateCache:
        """Return the cache under a control. Pipeline arguments are not changed by it.

        Raises:
            CacheError: a carrier has no strength or region, or there are only pipeline arguments.
        """
        if control.is_default:
            return self
        if self.later or not self.fields:
            has = "times already" if self.later else f"only pipeline arguments ({', '.join(self.arguments) or 'none'})"
            raise CacheError(f"template {self.source!r} has {has}: leave strength, start, end and region out")
        fields = dict(self.fields)
        if control.strength != 1 or control.region is not None:
            known = carriers()
            region = None if control.region is None else Region(control.region)
            fields = {}
            for name, value in self.fields.items():
                carrier: Any = known[name]
                if not hasattr(carrier, "control"):
                    raise CacheError(
                        f"template {self.source!r}: its carrier {name!r} has no strength and no region: leave them out"
                    )
                fields[name] = carrier.control(value, control.strength, region)
        later: list[tuple[float, Mapping[str, Any]]] = [(control.end, {})] if control.end < 1 else []
        if control.start > 0:
            fields, later = {}, [(control.start, fields), *later]
        return dataclasses.replace(self, fields=fields, later=later)

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write the carriers to a safetensors file, whole or not at all.

        Raises:
            FileExistsError: the file exists, and `overwrite` is not given.
            CacheError: it holds pipeline arguments, which have no tensors, or what belongs to a call.
        """
        path = Path(path)
        if self.arguments:
            raise CacheError(
                f"the cache of {self.source!r} holds pipeline arguments ({', '.join(self.arguments)}), which cannot be "
                "saved: save the caches of the other templates"
            )
        if self.later:
            raise CacheError(
                f"the cache of {self.source!r} has a start or an end, which belong to a call: save it without these"
            )
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another name, or pass overwrite=True")
        known = carriers()
        tensors = {
            f"{carrier}/{name}": tensor.detach().cpu().contiguous()
            for carrier, value in self.fields.items()
            for name, tensor in known[carrier].flatten(value).items()
        }
        with replacing(path) as partial:
            save_file(tensors, partial, {"source": self.source, "carriers": json.dumps(list(self.fields))})

    @classmethod
    def load(cls, path: Path | str) -> TemplateCache:
        """Read what `save` wrote.

        Raises:
            CacheError: the file is none, or needs a carrier that is not installed.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(metadata["carriers"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CacheError(f"{path} is no saved template cache ({type(error).__name__}: {error})") from error
        known = carriers()
        missing = [name for name in names if name not in known]
        if missing:
            raise CacheError(f"{path} holds {', '.join(missing)}: install the plugin that brings this carrier")
        fields = {
            carrier: known[carrier].unflatten(
                {name.removeprefix(f"{carrier}/"): t for name, t in tensors.items() if name.startswith(f"{carrier}/")}
            )
            for carrier in names
        }
        return cls(fields, {}, metadata.get("source", str(path)))


def merge(caches: Sequence[TemplateCache], policy: ConflictPolicy = "error") -> TemplateCache:
    """Compose caches into one, carrier by carrier, in their order.

    Args:
        caches: what the templates returned.
        policy: what happens when two give the same pipeline argument.

    Raises:
        CacheError: two give the same pipeline argument, and the policy is `error`.
    """
    arguments: dict[str, Any] = {}
    givers: dict[str, str] = {}
    for cache in caches:
        for name, value in cache.arguments.items():
            if name in arguments and policy == "error":
                raise CacheError(
                    f"templates {givers[name]!r} and {cache.source!r} both give the pipeline argument {name!r}: "
                    'use one of them, or choose with on_conflict="first" or "last"'
                )
            if name not in arguments or policy == "last":
                arguments[name], givers[name] = value, cache.source
    source = ", ".join(cache.source for cache in caches)
    return _joined(caches, arguments, source, _merge_fields)


def stack(caches: Sequence[TemplateCache]) -> TemplateCache:
    """Make the caches of several pictures, one each, into one of a batch, carrier by carrier.

    Raises:
        CacheError: the pictures differ in pipeline arguments, or in what a carrier needs to be alike.
    """
    first = caches[0]
    for picture, cache in enumerate(caches):
        for name in dict.fromkeys([*first.arguments, *cache.arguments]):
            if not _equal(first.arguments.get(name), cache.arguments.get(name)):
                raise CacheError(
                    f"pictures 0 and {picture} differ in the pipeline argument {name!r}, which a call takes once: "
                    "draw them in calls of their own"
                )
    source = ", ".join(dict.fromkeys(cache.source for cache in caches))
    return _joined(caches, first.arguments, source, _stack_fields)


def _joined(
    caches: Sequence[TemplateCache],
    arguments: Mapping[str, Any],
    source: str,
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> TemplateCache:
    """Join the fields of caches, anew for each fraction of a run at which some change."""
    changes = sorted({start for cache in caches for start, _ in cache.later})
    later = [(start, join([cache.at(start) for cache in caches])) for start in changes]
    return TemplateCache(join([cache.fields for cache in caches]), arguments, source, later)


def _merge_fields(several: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    known = carriers()
    names = dict.fromkeys(name for fields in several for name in fields)
    return {name: known[name].merge([fields[name] for fields in several if name in fields]) for name in names}


def _stack_fields(pictures: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    known = carriers()
    stacked = {}
    for name in dict.fromkeys(name for fields in pictures for name in fields):
        having = [name in fields for fields in pictures]
        if not all(having) and not hasattr(known[name], "nothing"):
            raise CacheError(
                f"picture {having.index(True)} has {name} and picture {having.index(False)} has none: "
                "draw them in calls of their own"
            )
        stacked[name] = known[name].stack(
            [fields.get(name, getattr(known[name], "nothing", None)) for fields in pictures]
        )
    return stacked


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other)


@contextmanager
def inject(pipe: Any, positive: TemplateCache, negative: TemplateCache) -> Iterator[None]:
    """Let the carriers of both sides act on a pipeline for as long as the context lasts."""
    sides = Sides(
        {POSITIVE: positive.fields, NEGATIVE: negative.fields}, {POSITIVE: positive.later, NEGATIVE: negative.later}
    )
    used = [carrier for name, carrier in carriers().items() if sides.has(name)]
    with ExitStack() as stack:
        if used:
            stack.enter_context(sides.follow(pipe))
        for carrier in used:
            stack.enter_context(carrier.inject(pipe, sides))
        yield
