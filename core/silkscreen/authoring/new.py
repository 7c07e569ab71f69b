"""New plugins: a project that passes `silkscreen check` at once, and trains on flux2-tiny."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from silkscreen.architectures.dit import starting_weights
from silkscreen.authoring.check import TINY, UNTRAINED
from silkscreen.authoring.project import Project, create_project, import_project, normalised, plan_project
from silkscreen.errors import UnknownNameError
from silkscreen.files import replacing
from silkscreen.flux2.loading import load_base
from silkscreen.manifest import example_command, unknown_name
from silkscreen.template import Template

_SOURCES = Path(__file__).parent / "kinds"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of template: the data set of `silkscreen_tiny.datasets` it learns from, and how fast."""

    dataset: str
    learning_rate: str


KINDS: Mapping[str, _Kind] = {
    "value": _Kind("brightness", "2e-3"),
    "image": _Kind("structure", "1e-3"),
    "lora": _Kind("brightness", "2e-3"),
    "text": _Kind("brightness", "2e-3"),
}


def new(name: str, kind: str, *, folder: Path | None = None) -> Project:
    """Write a plugin's project.

    Args:
        name: of the template.
        kind: `value` and `image` give keys and values from a number and from a picture, `lora` updates layers, `text`
            adds tokens to the prompt.
        folder: of the project; by default `silkscreen-NAME` here.

    Raises:
        UnknownNameError: there is no such kind.
        ProjectError: files exist where some would be written, or the name is none.
    """
    if kind not in KINDS:
        raise UnknownNameError(unknown_name("kind", kind, KINDS))
    name = normalised(name)
    project = plan_project(folder or Path(f"silkscreen-{name}"), name)
    words = {
        **vars(KINDS[kind]),
        "title": name.replace("-", " ").capitalize(),
        "package": project.package.name,
        "distribution": project.distribution,
    }
    manifest = _filled(f"{kind}.toml", words)
    create_project(
        project,
        {"model.py": _SOURCES / f"{kind}.py", "template.toml": manifest},
        beside={
            "tests/test_template.py": _SOURCES / "checked.py",
            "training/train.sh": _filled("train.sh", words),
            "README.md": "",  # its example is told by the template
        },
        summary=tomllib.loads(manifest)["summary"],
        metadata={"readme": "README.md"},
    )
    (project.folder / "training" / "train.sh").chmod(0o755)
    template = import_project(project, trust_code=True)
    _write_start(template, kind)
    words["example"] = example_command(name, template.inputs)
    (project.folder / "README.md").write_text(_filled("README.md", words), encoding="utf-8")
    return project


def _write_start(template: Template, kind: str) -> None:
    """Write the weights that training starts from, marked as untrained."""
    if kind == "image":
        tensors = starting_weights(load_base(TINY).transformer)
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            tensors = dict(template.construct(TINY).state_dict())
    with replacing(template.folder / template.weight_paths(TINY)[0]) as partial:
        save_file(tensors, partial, {UNTRAINED: "made by `silkscreen new`"})


def _filled(source: str, words: Mapping[str, str]) -> str:
    """Return a text file of `kinds` with each `{{word}}` in it replaced."""
    text = (_SOURCES / source).read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"{{{{{word}}}}}", value)
    return text
