"""The proof of a wheel: it is installed into a fresh environment, listed there, and draws a picture.

The fresh environment sees what this interpreter sees, so that nothing is downloaded, but never the template's project:
a file that the wheel lacks is missed. A dependency that is here and that the wheel does not declare is not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from PIL import Image

from silkscreen import registry, weights
from silkscreen.authoring.process import run
from silkscreen.authoring.project import Project
from silkscreen.bases import known_bases
from silkscreen.errors import InputError, PackError, UnknownNameError
from silkscreen.files import sha256
from silkscreen.manifest import Input, unknown_name
from silkscreen.template import Template

PROMPT = "a large red circle on a blue background"
"""What is drawn."""

_LOCATE = """
import json, sys
from importlib.util import find_spec
from silkscreen import registry
entry = registry.find(registry.TEMPLATES, sys.argv[1])
print(json.dumps(find_spec(entry.module).origin))
"""
"""Prints the file of a template's module, which is found and not imported."""


def prove(
    wheel: Path,
    project: Project,
    template: Template,
    base_id: str,
    packed: tuple[str, str],
    inputs: Sequence[str],
    picture: Path | None,
    progress: Callable[[str], None],
) -> Path | None:
    """Install a wheel into a fresh environment and use its template there.

    Args:
        wheel: the wheel.
        project: the project it was built from, which the environment does not see.
        template: the template, for its inputs.
        base_id: the base to draw with; a base that is not on this disk draws nothing.
        packed: the weight file's path in the wheel and its sha256.
        inputs: template inputs, `name=value`; the others take their defaults, or plain values where they have none.
        picture: where to keep the picture.
        progress: is told each step.

    Returns:
        `picture` when it was drawn.

    Raises:
        PackError: the wheel does not install, is not usable, or is not what is used; or drawing fails.
    """
    with tempfile.TemporaryDirectory(prefix="silkscreen-proof-") as folder:
        fresh = Environment(Path(folder).resolve(), project)
        progress("installing it into a fresh environment")
        fresh.install(wheel)
        name = _qualified_name(fresh, project)
        _check_origin(fresh, name, *packed)
        progress(f"installed: {name} is listed as ok, with the weights packed")
        words, missing = _input_words(template, inputs, fresh.folder)
        obstacle = obstacle_to(base_id) or missing
        if obstacle:
            progress(f"nothing is drawn: {obstacle}")
            return None
        progress(f"drawing {PROMPT!r} with {' '.join(['-t', project.name, *words])}")
        drawn = fresh.folder / "proof.png"
        fresh.silkscreen("generate", PROMPT, "--base", base_id, "-t", name, *words, "-o", drawn)
        with Image.open(drawn) as image:
            progress(f"drawn: a picture of {image.width}x{image.height}")
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(drawn, picture)
        return picture


def check_inputs(template: Template, inputs: Sequence[str]) -> None:
    """Check template inputs that were typed as `name=value`.

    Raises:
        UnknownNameError, InputError: the template takes no such input, or it is of another type or out of range.
    """
    for word in inputs:
        name, equals, text = word.partition("=")
        if name not in template.inputs:
            raise UnknownNameError(unknown_name("input", name, template.inputs))
        if not equals:
            raise InputError(f"input {name!r} is given no value: write {name}=VALUE")
        spec = template.inputs[name]
        spec.check(spec.parse(text))


class Environment:
    """A fresh virtual environment that also sees what this interpreter sees, but for one project.

    Attributes:
        folder: what programs in it are run in.
        python: its interpreter.
        site_packages: where pip installs to.

    Raises:
        PackError: it cannot be made.
    """

    def __init__(self, folder: Path, project: Project) -> None:
        home = folder / "venv"
        try:
            venv.create(home, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise PackError(f"no fresh environment can be made ({error}): install venv, or pass --no-verify") from error
        variables = {"base": str(home), "platbase": str(home)}
        self.folder = folder
        self.site_packages = Path(sysconfig.get_path("purelib", "venv", variables))
        self.python = Path(sysconfig.get_path("scripts", "venv", variables)) / "python"
        hidden = {project.root.resolve(), project.folder.resolve()}
        seen = [Path(path).resolve() for path in sys.path if path]
        lines = [str(path) for path in seen if path.is_dir() and path not in hidden]
        (self.site_packages / "silkscreen-proof.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rivals = [
            entry.qualified_name
            for entry in registry.entries(registry.TEMPLATES)
            if entry.name == project.name
            and canonicalize_name(entry.distribution) != canonicalize_name(project.distribution)
        ]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SILKSCREEN_"))}
        self._variables = {**kept, "SILKSCREEN_BLOCK": ",".join(rivals)}

    def install(self, wheel: Path) -> None:
        """Install a wheel without its dependencies.

        Raises:
            PackError: pip failed.
        """
        options = ["--quiet", "--no-index", "--no-deps", "--ignore-installed"]
        self.run("-m", "pip", "--isolated", "install", *options, wheel.resolve(), problem="the wheel does not install")

    def silkscreen(self, *words: str | Path) -> str:
        """Run a command of `silkscreen` and return what it printed.

        Raises:
            PackError: it failed.
        """
        problem = "the wheel is installed in a fresh environment, but its template does not work there"
        return self.run("-m", "silkscreen", *words, problem=problem)

    def run(self, *words: str | Path, problem: str) -> str:
        """Run the interpreter and return what it printed.

        Raises:
            PackError: it failed; the message begins with `problem`.
        """
        return run([self.python, *words], problem, folder=self.folder, variables=self._variables)


def _qualified_name(fresh: Environment, project: Project) -> str:
    """Return the `distribution:name` that is listed for the wheel's template, whose status has to be ok."""
    wanted = canonicalize_name(project.distribution)
    for entry in json.loads(fresh.silkscreen("list", "--json")):
        if entry["name"] == project.name and canonicalize_name(entry["distribution"]) == wanted:
            if entry["status"] != "ok":
                raise PackError(f"the wheel's template {project.name!r} is {entry['status']}: {entry['reason']}")
            return f"{entry['distribution']}:{project.name}"
    raise PackError(
        f"the wheel declares no template {project.name!r}: its entry point has to be in [project.entry-points."
        f'"{registry.TEMPLATES}"] of {project.folder / "pyproject.toml"}'
    )


def _check_origin(fresh: Environment, name: str, inner: str, digest: str) -> None:
    module = Path(json.loads(fresh.run("-c", _LOCATE, name, problem="the wheel's module is not found")))
    if not module.resolve().is_relative_to(fresh.site_packages):
        raise PackError(f"the wheel is installed, but {name} is imported from {module}: it lacks the module")
    if sha256(fresh.site_packages / inner) != digest:
        raise PackError(f"{inner} is installed with other weights than those packed")


def obstacle_to(base_id: str) -> str:
    """Return why a base cannot draw here without a download; empty when it can."""
    base = known_bases().get(base_id)
    if base is None:
        return f"the base {base_id} is not installed"
    if any(weights.is_source(str(reference)) for reference in base.components.values()):
        return f"the base {base_id} is on a hub, and too large to be fetched for a proof"
    return ""


def _input_words(template: Template, inputs: Sequence[str], folder: Path) -> tuple[list[str], str]:
    """Return the words that give a template its inputs, and what is wrong when a required one has no value."""
    given = dict(word.split("=", 1) for word in inputs)
    words: list[str] = []
    for spec in template.inputs.values():
        value = given.get(spec.name)
        if value is not None and spec.type in ("image", "mask"):
            value = ",".join(str(Path(path).resolve()) for path in value.split(","))
        if value is None and spec.required:
            value = _plain_value(spec, folder)
            if value is None:
                return words, f"its input {spec.name} has no default: give it a value with --input {spec.name}=VALUE"
        if value is not None:
            words.append(f"{spec.name}={value}")
    return words, ""


def _plain_value(spec: Input, folder: Path) -> str | None:
    """Return a value that a required input may have, as it is typed; None when its manifest does not tell."""
    if spec.type in ("image", "mask"):
        path = folder / f"{spec.name}.png"
        Image.new("RGB", (128, 128), "white").save(path)
        return str(path)
    if spec.choices:
        return spec.choices[0]
    if spec.type in ("number", "integer") and spec.minimum is not None and spec.maximum is not None:
        middle = (spec.minimum + spec.maximum) / 2
        return f"{int(middle) if spec.type == 'integer' else middle}"
    return {"text": "", "boolean": "true"}.get(spec.type)
