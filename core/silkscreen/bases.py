"""The known bases: FLUX.2 models described by a `base.toml` each, read without importing or loading anything."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from silkscreen import registry
from silkscreen.errors import ManifestError, SilkscreenError, UnknownNameError
from silkscreen.manifest import unknown_name

Offload = Literal["none", "model", "group", "sequential", "disk"]
"""Where a base's weights are while they do not run: on the device, in the main memory by model, block or layer, or in
their files."""

OFFLOADS: tuple[Offload, ...] = get_args(Offload)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shape of a FLUX.2 transformer, as its diffusers configuration names it."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    in_channels: int = 128
    guidance_embeds: bool = False

    @property
    def blocks(self) -> list[str]:
        """Names of the transformer's blocks, `double_0` to `single_N`, in the order they run."""
        return [f"double_{i}" for i in range(self.num_layers)] + [f"single_{i}" for i in range(self.num_single_layers)]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Read it from a transformer's configuration; keys of no concern are passed over."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})


@dataclasses.dataclass(frozen=True)
class Base:
    """A base: what a `base.toml` says.

    Attributes:
        id: its name, `flux2-tiny` or `black-forest-labs/FLUX.2-klein-4B`.
        title, licence: for people.
        pipeline: name of the diffusers pipeline class.
        distilled: made for few steps without guidance.
        components: for each part of the pipeline a folder, relative to `folder`, or a source (`hf:owner/repo:path/`);
            a `Path` is taken as it is.
        geometry: of its transformer.
        call: arguments of the pipeline's call that suit it.
        vocabulary: every word it knows, for a base that knows few; empty for none such.
        folder: where its `base.toml` is.
        distribution: the distribution that brings it.
        configurations: of the text encoder and the VAE, as far as they are not their classes' defaults; used where no
            component's own `config.json` is on the disk.
        download: gigabytes of all components.
        fingerprints: what tells the published weights of a component, by its name.
    """

    id: str
    title: str
    licence: str
    pipeline: str
    distilled: bool
    components: Mapping[str, str | Path]
    geometry: Geometry
    call: Mapping[str, Any]
    vocabulary: tuple[str, ...]
    folder: Path
    distribution: str
    configurations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    download: float | None = None
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)


def known_bases() -> dict[str, Base]:
    """Return every base that can be used, by id."""
    return {base_id: base for base_id, base in _scan().items() if isinstance(base, Base)}


def unusable_bases() -> dict[str, str]:
    """Return the bases that are installed but cannot be used, with the reason for each."""
    return {base_id: reason for base_id, reason in _scan().items() if isinstance(reason, str)}


def find_base(base_id: str) -> Base:
    """Return the base of an id.

    Raises:
        UnknownNameError: there is none; the nearest ids are named.
    """
    bases = known_bases()
    if base_id in bases:
        return bases[base_id]
    if base_id in unusable_bases():
        raise UnknownNameError(f"base {base_id!r} cannot be used: {unusable_bases()[base_id]}")
    raise UnknownNameError(unknown_name("base", base_id, bases))


def read_base(base_id: str, folder: Path, distribution: str) -> Base:
    """Read the `base.toml` in a folder.

    Raises:
        ManifestError: it is missing, is no TOML or lacks something.
    """
    path = folder / "base.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return Base(
            id=base_id,
            title=data["title"],
            licence=data["licence"],
            pipeline=data["pipeline"],
            distilled=data.get("distilled", False),
            components=data["components"],
            geometry=Geometry(**data["transformer"]),
            call=data.get("call", {}),
            vocabulary=tuple(data.get("vocabulary", ())),
            folder=folder,
            distribution=distribution,
            configurations={name: data[name] for name in ("text_encoder", "vae") if name in data},
            download=data.get("download"),
            fingerprints=data.get("fingerprints", {}),
        )
    except KeyError as error:
        raise ManifestError(f"{path}: {error.args[0]} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise ManifestError(f"{path}: {error}") from error


def rescan() -> None:
    """Forget what is known, so that bases and other distributions installed since are seen."""
    registry.rescan()
    _scan.cache_clear()


@cache
def _scan() -> dict[str, Base | str]:
    """Read every base once: entry points first, then what hooks add."""
    bases: dict[str, Base | str] = {}
    for entry in registry.entries(registry.BASES):
        if entry.status != "ok" or entry.folder is None:
            bases[entry.name] = f"{entry.distribution} is {entry.status}: {entry.reason or 'its folder is not found'}"
        else:
            bases[entry.name] = _read(entry.name, entry.folder, entry.distribution)
    for registered in registry.plugin_manager().hook.register_bases():
        for base_id, package in registered.items():
            folder = registry.folder_of_module(package)
            missing = f"package {package} is not found"
            bases[base_id] = _read(base_id, folder, package.split(".")[0]) if folder else missing
    return bases


def _read(base_id: str, folder: Path, distribution: str) -> Base | str:
    try:
        return read_base(base_id, folder, distribution)
    except SilkscreenError as error:
        return str(error)
