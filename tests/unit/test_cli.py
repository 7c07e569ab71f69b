from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from silkscreen.cli import command_line

Install = Callable[..., Path]

MANIFEST = """
title = "Fake"
summary = "Does nothing."
bases = ["flux2-tiny"]
carriers = ["kv_cache"]
[inputs.scale]
type = "number"
minimum = 0.0
maximum = 1.0
default = 0.5
negative = 0.25
help = "how much"
"""


@pytest.fixture
def run(distribution: Install) -> Callable[..., Any]:
    distribution(
        "fake-one",
        entry_points="[silkscreen.templates]\none = fake_one.model\n",
        files={"template.toml": MANIFEST, "model.py": "1/0"},
    )
    return lambda *words: CliRunner().invoke(command_line(), list(words))


def test_list_shows_what_is_installed(run: Callable[..., Any]) -> None:
    line = next(line for line in run("list").output.splitlines() if line.startswith("one "))
    assert line.split() == ["one", "1.0", "Fake", "flux2-tiny", "kv_cache", "ok"]


def test_list_prints_json_for_programs(run: Callable[..., Any]) -> None:
    entry = next(entry for entry in json.loads(run("list", "--json").output) if entry["name"] == "one")
    assert entry["distribution"] == "fake-one"
    assert entry["carriers"] == ["kv_cache"]
    assert entry["status"] == "ok"


def test_info_shows_inputs_and_an_example(run: Callable[..., Any]) -> None:
    output = run("info", "one").output
    assert "Fake: Does nothing." in output
    assert any(line.split()[:6] == ["scale", "number", "0", "to", "1", "0.5"] for line in output.splitlines())
    assert "-t one scale=0.8" in output


def test_bases_lists_the_published_ones(run: Callable[..., Any]) -> None:
    output = run("bases").output
    for base in ("klein-4B", "klein-base-4B", "klein-9B", "klein-base-9B", "dev"):
        assert f"black-forest-labs/FLUX.2-{base}" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "onne"], "unknown template 'onne': did you mean 'one'"),
        (
            ["generate", "p", "-o", "x.png", "-t", "one", "scael=1"],
            "-t one: unknown input 'scael': did you mean 'scale'",
        ),
        (["generate", "p", "-o", "x.png", "-t", "one", "scale=2"], "scale=2.0 is out of range: it goes from 0 to 1"),
        (["generate", "p", "-o", "x.png", "-t", "one", "scale=high"], "expected a value of type number"),
        (["generate", "p", "-o", "nowhere/x.png"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_explained_before_anything_is_loaded(
    run: Callable[..., Any], words: list[str], message: str
) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert message in result.output


def test_a_picture_is_not_overwritten_unasked(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("precious")
    result = run("generate", "p", "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 1
    assert "exists: choose another name, or pass --overwrite" in result.output
    assert (tmp_path / "x.png").read_text() == "precious"


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["info", "brightness"],
        ["bases"],
        ["--help"],
        ["generate", "--help"],
        ["batch", "--help"],
        ["sweep", "--help"],
        ["pack", "--help"],
        ["show", "recipe.toml"],
    ],
)
def test_looking_around_imports_neither_torch_nor_a_plugin(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('prompt = "a red star"\ntemplate_inputs = [{ model_id = "brightness" }]\n')
    program = (
        "import sys\nfrom silkscreen.cli import command_line\n"
        f"command_line().main({words!r}, standalone_mode=False)\n"
        "heavy = [m for m in sys.modules if m in ('torch', 'diffusers') or m.startswith('silkscreen_')]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
