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
from accelerate.utils import recursively_apply
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from silkscreen.bases import Base
from silkscreen.carriers import ALIASES, carriers
from silkscreen.carriers.weights import Region
from silkscreen.content import content, nbytes
from silkscreen.control import Control
from silkscreen.errors import CacheError
from silkscreen.files import replacing, sha256
from silkscreen.flux2.guidance import in_one_pass
from silkscreen.flux2.prepacking import weights_prepacked
from silkscreen.flux2.replacing import is_plain
from silkscreen.flux2.rotary import embedded_once
from silkscreen.flux2.sides import BOTH, NEGATIVE, POSITIVE, Fields, Later, Sides, fields_at
from silkscreen.flux2.turns import refused_elsewhere

ConflictPolicy = Literal["error", "first", "last"]

_MOST_BYTES_AS_ONE = 2**26
"""Caches of both sides that are larger belong to passes that are too large to be one."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one template input gave to a cache.

    Attributes:
        template: the template's name.
        version: its distribution and version, or its folder.
        weights: for each file of its weights, by name, where it is, or its SHA-256 in a cache that was loaded.
        inputs: its values, as JSON: a picture by the SHA-256 of its pixels; None when they could not be written so.
        picture: the picture of the batch that it is for; None when all share it.
    """

    template: str
    version: str
    weights: Mapping[str, Path | str]
    inputs: Mapping[str, Any] | None
    picture: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data; the files of weights are read, once, for their SHA-256."""
        hashes = {name: sha256(file) if isinstance(file, Path) else file for name, file in self.weights.items()}
        return {**vars(self), "weights": hashes}

    def __str__(self) -> str:
        inputs = {} if self.inputs is None else self.inputs
        values = [f"{name}={_short(value)}" for name, value in inputs.items()]
        where = [] if self.picture is None else [f"for picture {self.picture}"]
        return " ".join([self.template, f"({self.version})", *where, *values])


@dataclasses.dataclass(frozen=True)
class TemplateCache:
    """What one template returned, or several together.

    Attributes:
        fields: for each carrier's name, its content.
        arguments: arguments for the pipeline's call, by name.
        source: the template or templates it comes from, for messages.
        base: id of the base it was made for; empty for any that it fits.
        parts: what it was composed of.
        later: fields that take the place of these in the course of a run.
    """

    fields: Mapping[str, Any]
    arguments: Mapping[str, Any]
    source: str
    base: str = ""
    parts: tuple[Part, ...] = ()
    later: Later = ()

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
        """Compare the base it was made for, and every carrier's content, with a base.

        Raises:
            CacheError: with everything that does not fit.
        """
        if self.base and self.base != base.id:
            raise CacheError(
                f"the template cache of {self.source!r} was made for the base {self.base}, and this pipeline is "
                f"{base.id}: compose it anew with this pipeline"
            )
        known = carriers()
        several = [self.fields, *(fields for _, fields in self.later)]
        problems = [
            problem for fields in several for name in fields for problem in known[name].check(fields[name], base)
        ]
        if problems:
            raise CacheError("; ".join(f"template {self.source!r}: {problem}" for problem in problems))

    def to(self, device: torch.device, dtype: torch.dtype) -> TemplateCache:
        """Return the cache with its tensors on a device, in a dtype."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype)

        fields, later = recursively_apply(move, (self.fields, self.later))
        return dataclasses.replace(self, fields=fields, later=later)

    def inspect(self) -> str:
        """Return, as lines of text, what it was made of and for, and its carriers with their sizes."""
        known = carriers()
        lines = [str(part) for part in self.parts] or [self.source]
        lines += [f"base {self.base}"] * bool(self.base)
        for name, value in self.fields.items():
            lines.append(f"{name}: {known[name].describe(value)}, {nbytes(value):,} bytes")
        lines += [f"argument {name}: {type(value).__name__}" for name, value in self.arguments.items()]
        return "\n".join(lines)

    def controlled(self, control: Control) -> TemplateCache:
        """Return the cache under a control. Pipeline arguments are not changed by it.

        Raises:
            CacheError: a carrier has no strength or region, or there are only pipeline arguments.
        """
        if not control.changes:
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
        later: list[tuple[float, Fields]] = [(control.end, {})] if control.end < 1 else []
        if control.start > 0:
            fields, later = {}, [(control.start, fields), *later]
        told = {name: content(value) for name, value in control.changes.items()}
        parts = [dataclasses.replace(part, inputs=part.inputs and {**part.inputs, **told}) for part in self.parts]
        return dataclasses.replace(self, fields=fields, later=later, parts=tuple(parts))

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write the carriers, and what they were made of and for, to a safetensors file, whole or not at all.

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
        metadata = {
            "source": self.source,
            "base": self.base,
            "carriers": json.dumps(list(self.fields)),
            "parts": json.dumps([part.to_dict() for part in self.parts]),
        }
        with replacing(path) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: Path | str) -> TemplateCache:
        """Read what `save` wrote.

        Raises:
            CacheError: the file is none, is broken, or needs a carrier that is not installed.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(metadata["carriers"])
            parts = tuple(Part(**part) for part in json.loads(metadata["parts"]))
            source, base = metadata["source"], metadata["base"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{path} is no saved template cache ({type(error).__name__}: {error})") from error
        known = carriers()
        missing = [name for name in names if name not in known]
        if missing:
            raise CacheError(f"{path} holds {', '.join(missing)}: install the plugin that brings this carrier")
        contents: dict[str, dict[str, torch.Tensor]] = {carrier: {} for carrier in names}
        try:
            for name, tensor in tensors.items():
                carrier, _, rest = name.partition("/")
                contents[carrier][rest] = tensor
            fields = {carrier: known[carrier].unflatten(content) for carrier, content in contents.items()}
            for carrier, content in contents.items():
                strange = content.keys() ^ known[carrier].flatten(fields[carrier]).keys()
                if strange:
                    raise KeyError(min(strange))
        except KeyError as error:
            raise CacheError(
                f"{path} is broken: its tensors are not what its carriers consist of, see {error}: save it again"
            ) from error
        return cls(fields, {}, source, base=base, parts=parts)


def merge(caches: Sequence[TemplateCache], policy: ConflictPolicy = "error") -> TemplateCache:
    """Compose caches into one, carrier by carrier, in their order.

    Args:
        caches: what the templates returned.
        policy: what happens when two give the same pipeline argument.

    Raises:
        CacheError: two give the same pipeline argument, and the policy is `error`; or they are for different bases.
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
    return _joined(caches, arguments, source, [part for cache in caches for part in cache.parts], _merge_fields)


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
    parts = [dataclasses.replace(part, picture=n) for n, cache in enumerate(caches) for part in cache.parts]
    return _joined(caches, first.arguments, source, parts, _stack_fields)


def _joined(
    caches: Sequence[TemplateCache],
    arguments: Mapping[str, Any],
    source: str,
    parts: Sequence[Part],
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> TemplateCache:
    """Join the fields of caches, anew for each fraction of a run at which some change."""
    changes = sorted({start for cache in caches for start, _ in cache.later})
    later = [(start, join([fields_at(start, cache.fields, cache.later) for cache in caches])) for start in changes]
    fields = join([cache.fields for cache in caches])
    return TemplateCache(fields, arguments, source, _common_base(caches), tuple(parts), later)


def _merge_fields(several: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    known = carriers()
    names = dict.fromkeys(name for fields in several for name in fields)
    return {name: known[name].merge([fields[name] for fields in several if name in fields]) for name in names}


def _stack_fields(pictures: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    known = carriers()
    stacked = {}
    for name in dict.fromkeys(name for fields in pictures for name in fields):
        if not hasattr(known[name], "stack"):
            raise CacheError(f"the carrier {name!r} is for one picture a call: draw them in calls of their own")
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


def _common_base(caches: Sequence[TemplateCache]) -> str:
    bases = dict.fromkeys(cache.base for cache in caches if cache.base)
    if len(bases) > 1:
        raise CacheError(f"caches for different bases ({', '.join(bases)}) have no common use: compose them for one")
    return next(iter(bases), "")


def _short(value: Any) -> str:
    """Return an input as JSON, and a picture or tensor, which is told by its checksum, by kind and size."""
    if isinstance(value, dict) and "sha256" in value:
        return " ".join(str(word) for kind, size in value.items() if kind != "sha256" for word in (kind, *size))
    return json.dumps(value, ensure_ascii=False)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other)


@contextmanager
def inject(pipe: Any, positive: TemplateCache, negative: TemplateCache | None) -> Iterator[None]:
    """Let the carriers of both sides act on a pipeline for as long as the context lasts; None for a side not run."""
    both = _as_one(positive, negative) if negative else None
    every = {POSITIVE: positive, NEGATIVE: negative, BOTH: both}
    made = {side: cache for side, cache in every.items() if cache}
    sides = Sides(
        {side: cache.fields for side, cache in made.items()}, {side: cache.later for side, cache in made.items()}
    )
    used = [carrier for name, carrier in carriers().items() if sides.has(name)]
    with ExitStack() as stack:
        if used:
            stack.enter_context(sides.follow(pipe))
        for carrier in used:
            stack.enter_context(carrier.inject(pipe, sides))
        if used and is_plain(pipe.transformer):
            stack.enter_context(embedded_once(pipe.transformer))
            stack.enter_context(weights_prepacked(pipe.transformer))
            if both:
                stack.enter_context(in_one_pass(pipe, sides))
        if used:
            stack.enter_context(refused_elsewhere(pipe))
        yield


def _as_one(positive: TemplateCache, negative: TemplateCache) -> TemplateCache | None:
    """Return the caches of both sides as that of a batch of two pictures, or None where that is not to be had."""
    if nbytes([positive.fields, negative.fields]) > _MOST_BYTES_AS_ONE:
        return None
    try:
        return stack([dataclasses.replace(cache, arguments={}) for cache in (positive, negative)])
    except CacheError:  # a carrier cannot have it
        return None
