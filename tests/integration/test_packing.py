"""A template folder is trained, packed, installed and used; a wheel that only works beside its project is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from silkscreen.authoring.project import read_project
from silkscreen.authoring.proof import Environment
from silkscreen_tiny import analysis

MODEL = """
import torch

BLOCKS = ["double_0", "double_1", "single_0", "single_1", "single_2", "single_3"]


class Glow(torch.nn.Module):
    def __init__(self, tokens=4, heads=6, head_dim=32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (1, tokens, heads, head_dim)
        self.keys = torch.nn.ParameterDict({b: torch.randn(shape, generator=generator) for b in BLOCKS})
        self.values = torch.nn.ParameterDict({b: torch.zeros(shape) for b in BLOCKS})
        self.centre = torch.nn.Linear(1, 1).requires_grad_(False)
        self.centre.weight.fill_(2.0)
        self.centre.bias.fill_(-1.0)

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"scale": torch.tensor([[scale]])}

    def forward(self, scale, **kwargs):
        size = self.centre(scale)[:, :, None, None]
        return {"kv_cache": {b: (self.keys[b].expand(len(scale), -1, -1, -1), self.values[b] * size) for b in BLOCKS}}


TEMPLATE_MODEL = Glow
TEMPLATE_MODEL_PATH = "model.safetensors"
"""
MANIFEST = """
title = "Glow"
summary = "Sets how bright the picture is."
bases = ["flux2-tiny"]
carriers = ["kv_cache"]
[inputs.scale]
type = "number"
minimum = 0.0
maximum = 1.0
negative = 0.5
"""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template folder in the field's format, with a checkpoint of all but its frozen part in `run`."""
    folder = tmp_path_factory.mktemp("pack") / "glow"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "template.toml").write_text(MANIFEST)
    data = folder.parent / "data"
    for words in (
        ("silkscreen_tiny.datasets", "brightness", data, "--count", "128"),
        (
            *("silkscreen", "train", "--template_model_id_or_path", folder, "--trust_code"),
            *("--dataset_metadata_path", data / "metadata.jsonl", "--output_path", folder / "run"),
            *("--batch_size", "8", "--dataset_repeat", "4", "--learning_rate", "3e-2", "--weight_decay", "0"),
        ),
    ):
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_trained_template_is_packed_and_its_control_works_where_the_wheel_is_installed(
    trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "run" / "epoch-0.safetensors"
    done = run("silkscreen", "pack", trained, checkpoint, "--trust-code", "--proof", tmp_path / "proof.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 tensors of" in done.stdout
    assert "2 as the model's constructor makes them" in done.stdout
    with Image.open(tmp_path / "proof.png") as proof:
        assert proof.size == (128, 128)
    project = read_project(trained.parent / "silkscreen-glow")
    (wheel,) = (project.folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.startswith("silkscreen_glow-")}
        archive.extract("silkscreen_glow/model.safetensors", tmp_path)
    names = {"__init__.py", "model.py", "model.safetensors", "template.toml"}
    assert files == {f"silkscreen_glow/{name}" for name in names}
    packed = load_file(tmp_path / "silkscreen_glow" / "model.safetensors")
    assert packed["centre.weight"].item() == 2
    assert all(torch.equal(packed[name], value.bfloat16()) for name, value in load_file(checkpoint).items())

    fresh = Environment(tmp_path, project)
    fresh.install(wheel)
    assert "glow" in {entry["name"] for entry in json.loads(fresh.silkscreen("list", "--json"))}

    def brightness(scale: float) -> float:
        path = tmp_path / f"{scale}.png"
        prompt = "a small yellow star on a purple background"
        fresh.silkscreen("generate", prompt, "-t", "glow", f"scale={scale}", "--steps", "6", "-o", path)
        with Image.open(path) as picture:
            return analysis.mean_luminance(picture)

    assert brightness(0.9) > brightness(0.1) + 0.07


def test_a_wheel_that_lacks_a_module_of_its_project_fails_the_proof(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "glow"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "template.toml").write_text(MANIFEST)
    checkpoint = trained / "run" / "epoch-0.safetensors"
    done = run("silkscreen", "pack", folder, checkpoint, "--trust-code", "--no-verify")
    assert done.returncode == 0, done.stdout + done.stderr
    project = read_project(tmp_path / "silkscreen-glow")
    (wheel,) = (project.folder / "dist").glob("*.whl")
    wheel.unlink()
    weights = project.package / "model.safetensors"
    before = weights.read_bytes()

    (project.root / "beside.py").write_text(MODEL)
    (project.package / "model.py").write_text("from beside import *\n")
    monkeypatch.setenv("PYTHONPATH", str(project.root), prepend=os.pathsep)  # as an editable install would have it
    done = run("silkscreen", "pack", project.folder, checkpoint, "--trust-code", "--overwrite", "--dtype", "float32")
    assert done.returncode == 1
    assert "its template does not work there" in done.stderr
    assert "it imports beside, which is not installed" in done.stderr
    assert not list((project.folder / "dist").iterdir())
    assert weights.read_bytes() == before
