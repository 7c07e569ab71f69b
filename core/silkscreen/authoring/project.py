"""A plugin's project folder: found, read, or made from a template folder."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silkscreen import registry
from silkscreen.errors import ProjectError
from silkscreen.manifest import read_manifest, unknown_name
from silkscreen.template import Template, import_template, require_trust

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = {summary}
requires-python = ">=3.11"
dependencies = {requires}
{metadata}
[project.entry-points."{group}"]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["src/{package}"]
artifacts = ["*.safetensors"]
{tool}"""
"""`artifacts` keeps weights in the wheel where a `.gitignore` keeps them out of the repository."""


@dataclasses.dataclass(frozen=True)
class Project:
    """A project folder, and one template that its `pyproject.toml` declares.

    Attributes:
        folder: the one with the `pyproject.toml`.
        distribution: what pip calls it.
        name: the template's name.
        module: the template's module, as its entry point names it.
        root: the folder that is on the import path, `src` or the project folder itself.
        package: the folder of the module, with its weights and `template.toml`.
    """

    folder: Path
    distribution: str
    name: str
    module: str
    root: Path
    package: Path

    @property
    def module_file(self) -> Path:
        """The file of the template's module."""
        path = self.root.joinpath(*self.module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def entry(self) -> registry.Entry:
        """Return the entry it will have when it is installed.

        Raises:
            ManifestError: its `template.toml` does not parse.
        """
        path = self.package / "template.toml"
        manifest = read_manifest(path) if path.is_file() else None
        return registry.Entry(
            registry.TEMPLATES,
            self.name,
            self.module,
            self.distribution,
            f"in {self.folder}",
            folder=self.package,
            manifest=manifest,
        )


def read_project(folder: Path, name: str | None = None) -> Project:
    """Return the project in a folder with a `pyproject.toml`.

    Args:
        folder: the project folder.
        name: the template that is meant; may be left out when there is one only.

    Raises:
        ProjectError: it declares no template, several, or none of this name; or there is no folder for the module.
    """
    path = folder / "pyproject.toml"
    declared = _declared(folder)
    if not declared:
        raise ProjectError(
            f'{path} declares no template: add [project.entry-points."{registry.TEMPLATES}"] '
            'with NAME = "PACKAGE.model"'
        )
    if name is not None and name not in declared:
        raise ProjectError(f"{path}: {unknown_name('template', name, declared)}")
    if name is None and len(declared) > 1:
        raise ProjectError(f"{path} declares several templates: say which by its name, {' or '.join(declared)}")
    project = declared[name or next(iter(declared))]
    if not project.module_file.is_file():
        raise ProjectError(f"{path} names the module {project.module}: there is no {project.module_file}")
    return project


def project_of(package: Path, name: str | None = None) -> Project | None:
    """Return the project that a template's folder belongs to: the nearest one around it that declares it, or None."""
    package = package.resolve()
    for folder in package.parents:
        for project in _declared(folder).values():
            if project.package.resolve() == package and name in (None, project.name):
                return project
    return None


def plan_project(folder: Path, name: str) -> Project:
    """Return the project of one template that `create_project` will make.

    Args:
        folder: the project folder.
        name: the template's name, made of small letters, digits and hyphens (see `normalised`).
    """
    package = f"silkscreen_{name.replace('-', '_')}"
    return Project(
        folder=folder,
        distribution=f"silkscreen-{name}",
        name=name,
        module=f"{package}.model",
        root=folder / "src",
        package=folder / "src" / package,
    )


def import_project(project: Project, trust_code: bool) -> Template:
    """Import the template of a project, which need not be installed.

    Raises:
        UntrustedCodeError: `trust_code` is not given.
        ContractError: the module cannot be imported or breaks the contract.
        ProjectError: another module of its name was imported before.
    """
    require_trust(project.package, project.module_file, trust_code)
    root = str(project.root.resolve())
    sys.path.insert(0, root)
    try:
        importlib.invalidate_caches()
        template = import_template(project.entry())
    finally:
        sys.path.remove(root)
    if not Path(template.module.__file__ or "").resolve().is_relative_to(root):
        raise ProjectError(
            f"{project.module} was imported from {template.module.__file__} before: use a new process for this one"
        )
    return template


def create_project(
    project: Project,
    files: Mapping[str, str | Path],
    *,
    beside: Mapping[str, str | Path] | None = None,
    summary: str = "",
    metadata: Mapping[str, str | dict[str, str]] | None = None,
    requires: Sequence[str] = (),
    tool: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a project: a `pyproject.toml` for hatchling with its entry point, and a package of the files given.

    Args:
        project: what `plan_project` returned.
        files: the files of the package by their path in it, each a text or a file to copy.
        beside: files of the project folder, likewise.
        summary: what the template does, in a sentence.
        metadata: more keys of `[project]`, such as `readme`.
        requires: what it needs beside Silkscreen.
        tool: keys of `[tool.silkscreen]`.
        overwrite: replace files that exist.

    Raises:
        ProjectError: files exist, and `overwrite` is not given; nothing is written then.
    """
    pyproject = _PYPROJECT.format(
        distribution=project.distribution,
        summary=_toml(summary or f"{project.name}: a Silkscreen template."),
        group=registry.TEMPLATES,
        name=project.name,
        module=project.module,
        package=project.package.name,
        requires=_toml(["silkscreen>=0.1,<1", *requires]),
        metadata="".join(f"{key} = {_toml(value)}\n" for key, value in (metadata or {}).items()),
        tool="\n[tool.silkscreen]\n" * bool(tool)
        + "".join(f"{key} = {_toml(value)}\n" for key, value in (tool or {}).items()),
    )
    contents = {"__init__.py": f'"""The {project.name} template."""\n', **files}
    targets = {
        project.folder / "pyproject.toml": pyproject,
        **{project.package / path: content for path, content in contents.items()},
        **{project.folder / path: content for path, content in (beside or {}).items()},
    }
    existing = [path for path in targets if path.exists()]
    if existing and not overwrite:
        raise ProjectError(
            f"{', '.join(map(str, existing))} would be overwritten: work on {project.folder} itself, name another "
            "project folder, or pass --overwrite"
        )
    for path, content in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_text(content, encoding="utf-8")


def normalised(name: str) -> str:
    """Return a template's name made of small letters, digits and hyphens.

    Raises:
        ProjectError: nothing is left of it.
    """
    result = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("silkscreen-")
    if not result:
        raise ProjectError(f"{name!r} makes no name for a template: choose one of letters, digits and hyphens")
    return result


def _toml(value: str | list[str] | dict[str, str]) -> str:
    """Write a value on one line; TOML has text and lists as JSON does."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def _declared(folder: Path) -> dict[str, Project]:
    """Return the templates that a folder's `pyproject.toml` declares, by name; none where there is no such file."""
    path = folder / "pyproject.toml"
    if not path.is_file():
        return {}
    try:
        project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError) as error:
        raise ProjectError(f"{path}: not a TOML file: {error}") from error
    points = project.get("entry-points", {}).get(registry.TEMPLATES, {})
    return {
        name: _project(folder, project.get("name", ""), name, module.split(":")[0].strip())
        for name, module in points.items()
    }


def _project(folder: Path, distribution: str, name: str, module: str) -> Project:
    *parents, last = module.split(".")
    for root in (folder / "src", folder):
        for parts in ([*parents, last], parents):
            package = root.joinpath(*parts)
            if parts and package.is_dir():
                return Project(folder, distribution, name, module, root, package)
    root = folder / "src"
    return Project(folder, distribution, name, module, root, root.joinpath(*parents))
