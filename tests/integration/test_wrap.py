"""A published folder becomes a wheel that is installed and used; a repository's weights are named by their source."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from silkscreen.authoring.check import check
from silkscreen.authoring.project import read_project
from silkscreen.authoring.proof import Environment
from silkscreen.authoring.wrap import wrap
from silkscreen.cli import command_line
from silkscreen.errors import ProjectError, UntrustedCodeError
from silkscreen.files import sha256

MODEL = """
    import json
    from pathlib import Path

    import torch
    import yaml

    class Tone(torch.nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.values = torch.nn.Parameter(torch.zeros(1, tokens, 6, 32))
            self.settings = json.loads((Path(__file__).parent / "settings.json").read_text())

        @torch.no_grad()
        def process_inputs(self, pipe, scale, prompt: str = "", steps=3, image=None, **kwargs):
            return {"scale": torch.full((1, 1, 1, 1), float(scale), device=pipe.device)}

        def forward(self, scale, **kwargs):
            value = self.values * scale * self.settings["gain"]
            return {"kv_cache": {"single_0": (value, value)}}

    TEMPLATE_MODEL = Tone
    TEMPLATE_MODEL_PATH = "model.safetensors"
    TEMPLATE_MODEL_CONFIG = {"tokens": 2}
"""
CARD = """\
---
license: apache-2.0
base_model:
  - flux2-tiny
tags: [template]
---
# Tone, the original

Its author's words.
"""


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    (folder / "settings.json").write_text('{"gain": 2}')
    (folder / "README.md").write_text(CARD)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    generator = torch.Generator().manual_seed(0)
    save_file({"values": 2 * torch.randn(1, 2, 6, 32, generator=generator)}, folder / "model.safetensors")
    return folder


def test_a_folder_is_wrapped_built_installed_and_used(tmp_path: Path) -> None:
    source, project_folder = write(tmp_path / "Published Tone"), tmp_path / "made"
    words = ["wrap", str(source), "--name", "tone", "--project", str(project_folder), "--trust-code"]
    result = CliRunner().invoke(command_line(), words)
    assert result.exit_code == 0, result.output
    assert "optimizer.pt is left out" in result.output
    project = read_project(project_folder)
    assert sorted(path.name for path in project.package.iterdir() if path.is_file()) == [
        "__init__.py", "model.py", "model.safetensors", "settings.json", "template.toml",
    ]  # fmt: skip
    assert (project.package / "model.py").read_bytes() == (source / "model.py").read_bytes()
    manifest = tomllib.loads((project.package / "template.toml").read_text())
    assert manifest["inputs"] == {
        "scale": {"type": "number"},
        "prompt": {"type": "text", "default": ""},
        "steps": {"type": "number", "default": 3},
        "image": {"type": "image", "optional": True},
    }
    assert (manifest["bases"], manifest["carriers"]) == (["flux2-tiny"], ["kv_cache"])
    pyproject = tomllib.loads((project_folder / "pyproject.toml").read_text())
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert pyproject["project"]["dependencies"] == ["silkscreen>=0.1,<1", "pyyaml"]
    digest = sha256(source / "model.py")
    origin = {"origin": "Published Tone", "model_sha256": digest, "licence": "apache-2.0"}
    assert pyproject["tool"]["silkscreen"] == origin
    readme = (project_folder / "README.md").read_text()
    assert all(text in readme for text in (digest, "apache-2.0", "Its author's words.", "-t tone scale=1"))
    assert "tags:" not in readme

    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, project_folder]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh = Environment(tmp_path, project)
    fresh.install(next(tmp_path.glob("*.whl")))
    assert "tone" in {entry["name"] for entry in json.loads(fresh.silkscreen("list", "--json"))}
    pictures = []
    for scale in (0, 1):
        path = tmp_path / f"{scale}.png"
        prompt = "a large red circle on a blue background"
        fresh.silkscreen("generate", prompt, "-t", "tone", f"scale={scale}", "--steps", "2", "-o", path)
        pictures.append(Image.open(path).tobytes())
    assert pictures[0] != pictures[1]


def test_a_repositorys_weights_are_named_by_source_or_copied(
    tmp_path: Path, distribution: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = write(tmp_path / "shelf:owner" / "tone")
    plugin = f"""
        from pathlib import Path
        from silkscreen.hooks import hookimpl

        @hookimpl
        def register_weight_sources():
            return {{"shelf": lambda rest: Path({str(repository)!r}) / rest.partition(":")[2]}}
    """
    distribution("fake-shelf", entry_points="[silkscreen]\nshelf = fake_shelf.hooks\n", files={"hooks.py": plugin})
    project = wrap("shelf:owner/tone", name="by source", folder=tmp_path / "thin", trust_code=True)
    assert not list(project.folder.rglob("*.safetensors"))
    assert "TEMPLATE_MODEL_PATH = 'shelf:owner/tone:model.safetensors'" in (project.package / "template.py").read_text()
    assert tomllib.loads((project.folder / "pyproject.toml").read_text())["tool"]["silkscreen"]["origin"] == (
        "shelf:owner/tone"
    )
    thick = wrap("shelf:owner/tone", name="copied", folder=tmp_path / "thick", copy_weights=True, trust_code=True)
    copied = thick.package / "model.safetensors"
    assert copied.read_bytes() == (repository / "model.safetensors").read_bytes()
    for made in (project, thick):
        failed = [finding for finding in check(made.folder, trust_code=True) if not finding.passed]
        assert failed == []


def test_nothing_is_wrapped_without_trust_over_other_files_or_twice(tmp_path: Path) -> None:
    source = write(tmp_path / "tone")
    with pytest.raises(UntrustedCodeError, match="sha256"):
        wrap(source, folder=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "pyproject.toml").write_text("precious")
    with pytest.raises(ProjectError, match="would be overwritten"):
        wrap(source, folder=tmp_path / "made", trust_code=True)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["pyproject.toml"]
    with pytest.raises(ProjectError, match="brightness is installed already, by silkscreen-brightness"):
        wrap("brightness")
