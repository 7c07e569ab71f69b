"""The page on bases, and what the README says of them: each command is run on bases small enough for a test."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from diffusers import Flux2KleinPipeline
from pages import commands
from PIL import Image
from safetensors.torch import load_file, save_file
from silkscreen import load_base
from silkscreen.cli import command_line

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "core" / "docs"

COMMANDS = commands((DOCS / "bases.md").read_text())
PUBLISHED = [line for line in commands((ROOT / "README.md").read_text()) if "black-forest-labs" in line]
ON_A_GPU = re.compile(r"--offload (model|group|sequential)|nf4|--device cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: with `my-base`, a small base of its own, and a transformer in a file."""
    folder = tmp_path_factory.mktemp("docs")
    pipe = load_base("flux2-tiny", device="cpu")
    assert isinstance(pipe, Flux2KleinPipeline)
    pipe.save_pretrained(folder / "my-base")
    weights = load_file(folder / "my-base" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "transformer.safetensors")
    shutil.copytree(folder / "my-base" / "vae", folder / "my-vae")
    shutil.copy(DOCS / "outline.png", folder / "outline.png")
    return folder


@pytest.mark.parametrize("line", [*COMMANDS, *(re.sub("--base \\S+", "--base my-base", line) for line in PUBLISHED)])
def test_each_command_of_the_page_runs(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, *words = shlex.split(line)
    assert program == "silkscreen"
    done = CliRunner().invoke(command_line(), words)
    if ON_A_GPU.search(line):  # the command is right, and says what this machine lacks
        assert "Error: " in done.output
        assert "this is a CPU" in done.output
        return
    assert done.exit_code == 0, done.output
    if "-o" in words:
        with Image.open(words[words.index("-o") + 1]) as picture:
            assert picture.size == (128, 128)


def test_the_page_has_commands_of_each_kind() -> None:
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"bases", "plan", "generate"}
    assert 8 <= len(COMMANDS) <= 20
    assert len(PUBLISHED) == 2
