"""What is installed: entry points of templates, bases and plugins, read from metadata without importing any of them."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import importlib_metadata
import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from silkscreen.errors import ManifestError, UnavailableError, UnknownNameError
from silkscreen.hooks import PROJECT, new_manager
from silkscreen.manifest import Manifest, read_manifest, unknown_name

TEMPLATES = "silkscreen.templates"
BASES = "silkscreen.bases"
PLUGINS = "silkscreen"
GROUPS = (TEMPLATES, BASES, PLUGINS)

Status = Literal["ok", "conflict", "incompatible", "blocked", "invalid"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry point of one installed distribution.

    Attributes:
        group: one of `GROUPS`.
        name: what callers name it by.
        module: the module or package it points to.
        distribution, version: where it comes from.
        folder: the folder that holds the module; None when it cannot be found.
        manifest: its `template.toml`; None when it has none, or is no template.
        status: `ok`, `conflict`, `incompatible`, `blocked` or `invalid`.
        reason: why the status is not `ok`.
    """

    group: str
    name: str
    module: str
    distribution: str
    version: str
    folder: Path | None = None
    manifest: Manifest | None = None
    status: Status = "ok"
    reason: str = ""

    @property
    def qualified_name(self) -> str:
        """`distribution:name`, which is unique even when the name is not."""
        return f"{self.distribution}:{self.name}"


def entries(group: str) -> list[Entry]:
    """Return every entry of a group, whatever its status, sorted by name."""
    return [entry for entry in _scan() if entry.group == group]


def find(group: str, name: str) -> Entry:
    """Return the entry of a name, or of a `distribution:name`.

    Raises:
        UnknownNameError: there is none; the nearest names are given.
        UnavailableError: there is one, but it cannot be used; its reason is given.
    """
    qualified = ":" in name
    kind = {TEMPLATES: "template", BASES: "base"}.get(group, "plugin")
    candidates = [e for e in entries(group) if name == (e.qualified_name if qualified else e.name)]
    if not candidates:
        known = [e.qualified_name if qualified else e.name for e in entries(group)]
        raise UnknownNameError(unknown_name(kind, name, known))
    usable = ("ok", "conflict") if qualified else ("ok",)
    entry = next((candidate for candidate in candidates if candidate.status in usable), candidates[0])
    if entry.status in usable:
        return entry
    raise UnavailableError(f"{kind} {name!r} ({entry.distribution} {entry.version}) is {entry.status}: {entry.reason}")


def manifest(template: str) -> Manifest | None:
    """Return the manifest of a template, named, a folder or a source, without importing it; None when it has none.

    Raises:
        UnknownNameError, UnavailableError: no template of that name can be used.
        WeightsError: the source cannot be had.
        ManifestError: the folder's is wrong.
    """
    folder = template_folder(template)
    if folder is not None:
        path = folder / "template.toml"
        return read_manifest(path) if path.is_file() else None
    return find(TEMPLATES, template).manifest


def template_folder(template: str) -> Path | None:
    """Return the folder that a template is named by, or its source is fetched to; None when it is named as installed.

    An installed one wins over a folder beside.

    Raises:
        WeightsError: the source cannot be had.
    """
    if is_source(template):
        return fetch(template)
    is_path = "/" in template or (
        (Path(template) / "model.py").is_file() and all(entry.name != template for entry in entries(TEMPLATES))
    )
    return Path(template) if is_path else None


def is_source(reference: str) -> bool:
    """Whether something is named by a source that a plugin registers, as `hf:owner/repo`."""
    return reference.partition(":")[0] in sources() and ":" in reference


def fetch(source: str) -> Path:
    """Return the local copy of what a source names.

    Raises:
        WeightsError: it cannot be had.
    """
    scheme, _, rest = source.partition(":")
    return sources()[scheme](rest)


def sources() -> dict[str, Callable[[str], Path]]:
    """Return the prefixes of sources that plugins register, and what turns the rest into a local file or folder."""
    found: dict[str, Callable[[str], Path]] = {}
    for registered in plugin_manager().hook.register_weight_sources():
        found |= registered
    return found


@cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the one plugin manager, with every installed plugin whose status is `ok` registered.

    A plugin that fails to import is left out with a warning; the others are not harmed.
    """
    manager = new_manager()
    for entry in entries(PLUGINS):
        if entry.status != "ok":
            continue
        try:
            manager.register(importlib.import_module(entry.module), name=entry.qualified_name)
        except Exception as error:  # whatever a stranger's module raises
            import warnings

            warnings.warn(
                f"plugin {entry.qualified_name} is left out: importing {entry.module} raised "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return manager


def rescan() -> None:
    """Forget what is known, so that distributions installed since are seen."""
    _scan.cache_clear()
    plugin_manager.cache_clear()


@cache
def _scan() -> tuple[Entry, ...]:
    found = [entry for distribution in _distributions() for entry in _entries_of(distribution)]
    owners = Counter((entry.group, entry.name) for entry in found if entry.group != PLUGINS)
    found = [_in_conflict(entry, found) if owners[entry.group, entry.name] > 1 else entry for entry in found]
    return tuple(sorted(found, key=lambda entry: (entry.group, entry.name, entry.distribution)))


def _distributions() -> Iterator[importlib_metadata.Distribution]:
    seen = set()
    for distribution in importlib_metadata.distributions():
        try:
            name = canonicalize_name(distribution.name)
        except Exception:  # metadata without a name, as a broken uninstall leaves it
            continue
        if name not in seen:
            seen.add(name)
            yield distribution  # type: ignore[misc]


def _entries_of(distribution: importlib_metadata.Distribution) -> list[Entry]:
    try:
        points = [point for point in distribution.entry_points if point.group in GROUPS]
    except Exception as error:
        text = distribution.read_text("entry_points.txt") or ""
        if "silkscreen" not in text:
            return []
        reason = f"its entry points cannot be read ({error}): reinstall it, or tell its author"
        return [Entry(TEMPLATES, distribution.name, "", distribution.name, "", status="invalid", reason=reason)]
    return [_entry(distribution, point) for point in points]


def _entry(distribution: importlib_metadata.Distribution, point: importlib_metadata.EntryPoint) -> Entry:
    name = distribution.name
    entry = Entry(point.group, point.name, point.value.split(":")[0].strip(), name, "")
    try:
        entry = dataclasses.replace(entry, version=distribution.version, folder=_folder(distribution, entry.module))
        reason = _blocked(entry)
        if reason:
            return dataclasses.replace(entry, status="blocked", reason=reason)
        reason = _incompatible(distribution)
        if reason:
            return dataclasses.replace(entry, status="incompatible", reason=reason)
        if entry.group == TEMPLATES and entry.folder and (entry.folder / "template.toml").is_file():
            return dataclasses.replace(entry, manifest=read_manifest(entry.folder / "template.toml"))
        return entry
    except ManifestError as error:
        return dataclasses.replace(entry, status="invalid", reason=str(error))
    except Exception as error:  # whatever is wrong with one distribution stays its own
        reason = f"its metadata cannot be read ({type(error).__name__}: {error}): reinstall it, or tell its author"
        return dataclasses.replace(entry, status="invalid", reason=reason)


def _in_conflict(entry: Entry, found: list[Entry]) -> Entry:
    if entry.status != "ok":
        return entry
    rivals = [e for e in found if (e.group, e.name) == (entry.group, entry.name) and e.status == "ok" and e != entry]
    if not rivals:
        return entry
    others = ", ".join(rival.distribution for rival in rivals)
    reason = f"{others} claims the same name: uninstall one, or say {entry.qualified_name!r}"
    return dataclasses.replace(entry, status="conflict", reason=reason)


def _blocked(entry: Entry) -> str:
    if canonicalize_name(entry.distribution) == PROJECT:
        return ""
    if os.environ.get("SILKSCREEN_NO_PLUGINS", "0") not in ("", "0"):
        return "SILKSCREEN_NO_PLUGINS is set in the environment"
    blocked = {name.strip() for name in os.environ.get("SILKSCREEN_BLOCK", "").split(",")}
    if blocked & {entry.name, entry.distribution, entry.qualified_name}:
        return "SILKSCREEN_BLOCK in the environment names it"
    return ""


def _incompatible(distribution: importlib_metadata.Distribution) -> str:
    installed = _own_version()
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) != PROJECT or (requirement.marker and not requirement.marker.evaluate()):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"it needs {requirement}, and silkscreen {installed} is installed: upgrade one of them"
    return ""


@cache
def _own_version() -> str:
    from silkscreen import __version__

    return __version__


def _folder(distribution: importlib_metadata.Distribution, module: str) -> Path | None:
    """Return the folder of a distribution's module; an editable install has it elsewhere on the import path."""
    *parents, last = module.split(".")
    for parts in ([*parents, last], parents):
        if parts:
            folder = Path(str(distribution.locate_file("/".join(parts))))
            if folder.is_dir():
                return folder
    return folder_of_module(module)


def folder_of_module(module: str) -> Path | None:
    """Return the folder of the package that is, or holds, a module on the import path, without importing it."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    locations = list((spec.submodule_search_locations if spec else None) or ())
    folders = [Path(location, *parts) for parts in (rest, rest[:-1]) for location in locations]
    return next((folder for folder in folders if folder.is_dir()), None)
