"""Wrapping: a folder or repository in the field's format becomes the project of an installable plugin."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import importlib_metadata
import tomli_w
from huggingface_hub import metadata_load
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from silkscreen import registry, weights
from silkscreen.authoring.inputs import guessed_inputs
from silkscreen.authoring.project import Project, create_project, import_project, normalised, plan_project
from silkscreen.carriers import ALIASES, carriers
from silkscreen.errors import ProjectError
from silkscreen.files import sha256
from silkscreen.manifest import Input, example_command
from silkscreen.template import Template, find_template

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)

_MODULE = '''\
"""The template of `model.py`, which is as it was published, with weights from where they were published."""

from __future__ import annotations

from {package} import model

TEMPLATE_MODEL = model.TEMPLATE_MODEL
TEMPLATE_MODEL_PATH = {paths!r}
TEMPLATE_MODEL_CONFIG = getattr(model, "TEMPLATE_MODEL_CONFIG", None)
TEMPLATE_DATA_PROCESSOR = getattr(model, "TEMPLATE_DATA_PROCESSOR", None)
'''

_README = """\
# {distribution}

{title}: a template for Silkscreen.

```bash
pip install .
{example}
```

| | |
|---|---|
| origin | {origin} |
| licence | {licence} |
| SHA-256 of the origin's `model.py` | {sha256} |
| weights | {weights} |

{card}"""


def wrap(
    source: str | Path,
    *,
    name: str | None = None,
    folder: Path | None = None,
    bases: Sequence[str] = (),
    copy_weights: bool = False,
    trust_code: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Project:
    """Make a plugin's project of a folder or repository with a `model.py`.

    The code is taken as it is. A `template.toml` is made where there is none, with the inputs of the signature.

    Args:
        source: a folder, or a source such as `modelscope:owner/repo@revision`, which is fetched.
        name: of the template; by default the folder's or repository's.
        folder: of the project; by default `silkscreen-NAME` here.
        bases: ids of the bases it is for; by default those that its model card or manifest names.
        copy_weights: put the weights of a repository into the package, rather than name them by their source. Those of
            a folder always are.
        trust_code: let the code run, which tells its inputs.
        progress: is told what could not be told.

    Raises:
        UntrustedCodeError: `trust_code` is not given.
        ContractError, WeightsError: the folder holds no template, or cannot be had.
        ProjectError: files exist where some would be written; or the source is an installed template.
    """
    for entry in registry.entries(registry.TEMPLATES):
        if str(source) in (entry.name, entry.qualified_name):
            raise ProjectError(f"{source} is installed already, by {entry.distribution}: name a folder or a repository")
    template = find_template(source, trust_code=trust_code)
    model = template.folder / "model.py"
    name = normalised(name or template.name)
    project = plan_project(folder or Path(f"silkscreen-{name}"), name)
    card = _read_card(template.folder)
    by_source = weights.is_source(str(source)) and not copy_weights
    local = [path for path in _references(template) if not weights.is_source(path)]
    files = _files(template.folder, set(local) if by_source else set(), progress)
    if by_source and local:
        project = dataclasses.replace(project, module=f"{project.package.name}.template")
        paths = _moved(getattr(template.module, "TEMPLATE_MODEL_PATH", None), str(source))
        files["template.py"] = _MODULE.format(package=project.package.name, paths=paths)
    inputs = template.inputs
    if template.manifest is None:
        inputs = _told_inputs(template, progress)
        files["template.toml"] = _manifest(template, name, card, bases, inputs)
    origin = str(source) if weights.is_source(str(source)) else template.folder.resolve().name
    licence = str(card.get("license_name") or card.get("license") or "")
    if not licence:
        progress(f"{source} tells no licence: ask its author before you pass the package on")
    title = template.manifest.title if template.manifest else _title(name)
    readme = _README.format(
        distribution=project.distribution,
        title=title,
        example=example_command(name, inputs),
        origin=origin,
        licence=licence or "not told",
        sha256=sha256(model),
        weights="named by source" if by_source else "in the package",
        card=_card_text(template.folder),
    )
    create_project(
        project,
        files,
        beside={"README.md": readme},
        summary=f"{title}, wrapped from {origin}.",
        metadata={"readme": "README.md", **_licence(licence)},
        requires=_imported_distributions(template.folder),
        tool={"origin": origin, "model_sha256": sha256(model), "licence": licence or "not told"},
    )
    import_project(project, trust_code=True)
    return project


def _references(template: Template) -> list[str]:
    """Return the weight paths for all bases."""
    paths = getattr(template.module, "TEMPLATE_MODEL_PATH", None)
    each = paths.values() if isinstance(paths, Mapping) else [paths]
    return [str(path) for some in each for path in (some if isinstance(some, list | tuple) else [some]) if path]


def _moved(paths: Any, source: str) -> Any:
    """Return weight paths with each local one replaced by a source."""
    if isinstance(paths, Mapping):
        return {base_id: _moved(path, source) for base_id, path in paths.items()}
    if isinstance(paths, list | tuple):
        return [_moved(path, source) for path in paths]
    if paths is None or weights.is_source(str(paths)):
        return paths
    joint = "" if source.endswith("/") else "/" if source.count(":") > 1 else ":"
    return f"{source}{joint}{Path(paths).as_posix()}"


def _files(folder: Path, left_out: set[str], progress: Callable[[str], None]) -> dict[str, str | Path]:
    """Return a template folder's files but for hidden ones, its card, pickles and what is left out."""
    files: dict[str, str | Path] = {}
    absent = {(folder / path).resolve() for path in left_out}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in inner.parts):
            continue
        if path.suffix in _PICKLES:
            progress(f"{inner} is left out: a pickle can run any code when it is read")
        elif path.resolve() not in absent and inner.as_posix() != "README.md":
            files[inner.as_posix()] = path.resolve()  # a hub's cache holds links
    return files


def _told_inputs(template: Template, progress: Callable[[str], None]) -> dict[str, Input]:
    """Return the inputs whose types the signature tells; none when it does not tell that of one that is required."""
    guessed = guessed_inputs(template.module.TEMPLATE_MODEL)
    untold = [name for name, spec in guessed.items() if spec.type == "any"]
    if untold:
        progress(f"types that the signature does not tell: {', '.join(untold)}; add them to template.toml")
    if any(guessed[name].required for name in untold):
        return {}
    return {name: spec for name, spec in guessed.items() if name not in untold}


def _manifest(
    template: Template, name: str, card: Mapping[str, Any], bases: Sequence[str], inputs: Mapping[str, Input]
) -> str:
    named = card.get("base_model") or []
    wanted = list(bases or template.bases or ([named] if isinstance(named, str) else named))
    code = ast.parse((template.folder / "model.py").read_text(encoding="utf-8"))
    words = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    known = carriers()
    held = list(dict.fromkeys(ALIASES.get(word, word) for word in words if ALIASES.get(word, word) in known))
    data: dict[str, Any] = {"title": _title(name), "summary": f"{_title(name)}, as published.", "bases": wanted}
    data["carriers"] = held
    if inputs:
        data["inputs"] = {name: {"type": spec.type, **_default(spec)} for name, spec in inputs.items()}
    return tomli_w.dumps(data)


def _default(spec: Input) -> dict[str, Any]:
    """Return what a manifest says of an input that may be left out; TOML has no None."""
    if spec.required:
        return {}
    return {"optional": True} if spec.default is None else {"default": spec.default}


def _title(name: str) -> str:
    return name.replace("-", " ").capitalize()


def _read_card(folder: Path) -> Mapping[str, Any]:
    """Return the front matter of a folder's model card; nothing when it has none."""
    path = folder / "README.md"
    return (metadata_load(path) or {}) if path.is_file() else {}


def _card_text(folder: Path) -> str:
    path = folder / "README.md"
    if not path.is_file():
        return ""
    return f"What follows is the origin's own.\n\n{_FRONT_MATTER.sub('', path.read_text(encoding='utf-8'))}"


def _licence(licence: str) -> dict[str, str | dict[str, str]]:
    """Return a licence as `pyproject.toml` has it: an SPDX expression where it is one."""
    if not licence:
        return {}
    try:
        return {"license": canonicalize_license_expression(licence)}
    except InvalidLicenseExpression:
        return {"license": {"text": licence}}


def _imported_distributions(folder: Path) -> list[str]:
    """Return what a folder's code imports beyond what Silkscreen brings."""
    packages: set[str] = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                packages.add(node.module.partition(".")[0])
    owners = importlib_metadata.packages_distributions()
    brought = {re.split(r"[^\w-]", line)[0].lower() for line in importlib_metadata.requires("silkscreen") or ()}
    needed = {owners.get(package, [package])[0].lower() for package in packages - set(sys.stdlib_module_names)}
    return sorted(needed - brought - {"silkscreen"})
