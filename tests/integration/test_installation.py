"""Wheels, a fresh environment, and what a user does in it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import write_files
from PIL import Image

ROOT = Path(__file__).parents[2]
PROMPT = "a large red circle on a blue background"


def run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh virtual environment with the wheels of the core, the tiny base and a template."""
    folder = tmp_path_factory.mktemp("environment")
    for project in (".", "plugins/tiny", "plugins/brightness"):
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT / project)
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / "bin"
    wheels = sorted((folder / "dist").glob("*.whl"))
    assert len(wheels) == 3
    run(binaries / "pip", "install", "-q", "-c", ROOT / "tests" / "constraints.txt", "hatchling", *wheels)
    return binaries


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's plugin, written out file by file."""
    folder = tmp_path_factory.mktemp("example")
    assert len(write_files((ROOT / "README.md").read_text(), folder)) == 3
    return folder / "silkscreen-constant"


def listed(environment: Path) -> dict[str, Any]:
    return {entry["name"]: entry for entry in json.loads(run(environment / "silkscreen", "list", "--json"))}


def test_a_user_installs_lists_composes_and_uninstalls(environment: Path, example: Path, tmp_path: Path) -> None:
    run(environment / "pip", "install", "-q", "--no-deps", "--no-build-isolation", example)
    assert {name: entry["status"] for name, entry in listed(environment).items()} == {
        "brightness": "ok",
        "constant": "ok",
    }
    assert "flux2-tiny" in run(environment / "silkscreen", "bases")

    def draw(name: str, *words: str) -> np.ndarray[Any, Any]:
        run(environment / "silkscreen", "generate", PROMPT, *words, "--steps", "4", "-o", tmp_path / name)
        return np.asarray(Image.open(tmp_path / name), dtype=float)

    plain = draw("plain.png")
    constant = draw("constant.png", "-t", "constant", "amount=3")
    both = draw("both.png", "-t", "constant", "amount=3", "-t", "brightness", "scale=0.9")
    assert plain.shape == (128, 128, 3)
    assert np.abs(constant - plain).max() > 8
    assert np.abs(both - constant).max() > 8

    run(environment / "pip", "uninstall", "-q", "-y", "silkscreen-brightness")
    assert set(listed(environment)) == {"constant"}
    gone = subprocess.run([environment / "silkscreen", "info", "brightness"], capture_output=True, text=True)
    assert gone.returncode == 1
    assert "unknown template 'brightness'" in gone.stderr
