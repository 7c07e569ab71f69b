from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from silkscreen.cli import command_line
from silkscreen.errors import InputError
from silkscreen.manifest import Input
from silkscreen.recipe import read
from silkscreen.sweep import parse_values

PROMPT = "a large red circle on a blue background"
OTHER = "a small green star on a pink background"
SCALE = Input("scale", "number", minimum=0.0, maximum=1.0)


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(command_line(), [str(word) for word in words])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=int)


@pytest.mark.parametrize(
    ("spec", "text", "values"),
    [
        (SCALE, "0.1:0.9:5", [0.1, 0.3, 0.5, 0.7, 0.9]),
        (SCALE, "0.3,0.5", [0.3, 0.5]),
        (SCALE, "0.5", [0.5]),
        (Input("n", "integer"), "1:9:3", [1, 5, 9]),
        (Input("b", "boolean"), "yes,no", [True, False]),
        (Input("c", "choice", choices=("red", "blue")), "red,blue", ["red", "blue"]),
        (Input("t", "text"), "a, b|c", ["a, b", "c"]),
        (Input("many", "number", many=True), "1,2|3", [[1.0, 2.0], [3.0]]),
    ],
)
def test_values_are_read_by_type(spec: Input, text: str, values: list[Any]) -> None:
    assert parse_values(spec, text) == values


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        (SCALE, "0.5:1.5:3", r"scale=0\.5:1\.5:3: scale=1\.5 is out of range: it goes from 0 to 1"),
        (SCALE, "0.5,7", r"scale=0\.5,7: scale=7\.0 is out of range"),
        (SCALE, "0:1", "a range is START:STOP:COUNT"),
        (SCALE, "0:1:1", "at least 2 values, not 1"),
        (SCALE, "0.5,high", "expected a value of type number"),
        (Input("n", "integer"), "1:2:3", r"n=1:2:3: n=1\.5: expected a value of type integer"),
        (Input("c", "choice", choices=("red", "blue")), "red,green", "choose one of red, blue"),
    ],
)
def test_wrong_values_are_named(spec: Input, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_values(spec, text)


def test_all_combinations_are_in_one_labelled_grid() -> None:
    axes = ["-t", "brightness", "scale=0.2,0.5,0.8", "-t", "softrgb", "R=0.3,0.7"]
    done = run("sweep", PROMPT, *axes, "--steps", "2", "-o", "grid.png", "--singles", "single", "--batch-size", "4")
    assert done.exit_code == 0, done.output
    grid = pixels("grid.png")
    recipes = read(Path("grid.png"))["pictures"]
    asked = [(r["template_inputs"][0]["scale"], r["template_inputs"][1]["R"]) for r in recipes]
    assert asked == [(0.2, 0.3), (0.5, 0.3), (0.8, 0.3), (0.2, 0.7), (0.5, 0.7), (0.8, 0.7)]
    height, width, _ = grid.shape
    gap = 6
    left, top = width - 3 * (128 + gap), height - 2 * (128 + gap)
    for index, recipe in enumerate(recipes):
        path = Path("single") / f"{index:03d}.png"
        assert read(path) == recipe
        y, x = (top + index // 3 * (128 + gap), left + index % 3 * (128 + gap))
        assert np.array_equal(grid[y : y + 128, x : x + 128], pixels(path))
    for column in range(3):
        assert (grid[:top, left + column * (128 + gap) :][:, :128] < 128).any(), "the column has a label"
    for row in range(2):
        assert (grid[top + row * (128 + gap) :, :left][:128] < 128).any(), "the row has a label"


def test_a_single_picture_of_a_sweep_can_be_repeated_and_is_the_one_drawn_alone() -> None:
    words = ["-t", "brightness", "scale=0.2,0.8", "--seed", "5,6", "--steps", "2", "--singles", "single"]
    assert run("sweep", PROMPT, *words, "-o", "grid.png", "--batch-size", "3").exit_code == 0
    assert run("generate", "--like", "single/001.png", "-o", "single/again.png").exit_code == 0
    assert Path("single/again.png").read_bytes() == Path("single/001.png").read_bytes()
    alone = ["-t", "brightness", "scale=0.8", "--seed", "5", "--steps", "2"]
    assert run("generate", PROMPT, *alone, "-o", "alone.png").exit_code == 0
    assert np.abs(pixels("alone.png") - pixels("single/001.png")).max() <= 2


def test_a_third_axis_has_pages() -> None:
    words = ["--seed", "1,2", "--guidance-scale", "2:3:2", "--steps", "2"]
    done = run("sweep", PROMPT, OTHER, *words, "-o", "grid.png")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path().glob("*.png")) == ["grid-1.png", "grid-2.png"]
    for page, scale in ((1, 2.0), (2, 3.0)):
        recipes = read(Path(f"grid-{page}.png"))["pictures"]
        asked = [(r["prompt"], r["seed"], r["guidance_scale"]) for r in recipes]
        assert asked == [(PROMPT, 1, scale), (OTHER, 1, scale), (PROMPT, 2, scale), (OTHER, 2, scale)]


def test_steps_and_pictures_can_vary() -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (128, 128), "black" if name == "a.png" else "white").save(name)
    words = ["-t", "structure", "image=a.png,b.png", "--steps", "1,2", "-o", "grid.png"]
    done = run("sweep", PROMPT, *words)
    assert done.exit_code == 0, done.output
    recipes = read(Path("grid.png"))["pictures"]
    asked = [(r["template_inputs"][0]["image"]["path"], r["steps"]) for r in recipes]
    assert asked == [("a.png", 1), ("b.png", 1), ("a.png", 2), ("b.png", 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-t", "brightness", "scale=0.1:1.9:3"], "-t brightness: scale=0.1:1.9:3: scale=1.9 is out of range"),
        (["-t", "brightness", "scale=0.3"], "this one varies nothing"),
        (
            ["-t", "softrgb", "R=0,1", "G=0,1", "B=0,1", "--seed", "1,2"],
            "this one varies softrgb R, softrgb G, softrgb B, seed",
        ),
        (["--steps", "0,2"], "steps=0,2: steps=0 is out of range"),
    ],
)
def test_a_wrong_sweep_is_explained_before_anything_is_loaded(words: list[str], message: str) -> None:
    done = run("sweep", PROMPT, *words, "-o", "grid.png")
    assert done.exit_code == 1
    assert message in done.output
    assert "loading" not in done.output


def test_a_grid_is_not_overwritten_unasked() -> None:
    Path("grid.png").write_text("precious")
    done = run("sweep", PROMPT, "--seed", "1,2", "-o", "grid.png")
    assert done.exit_code == 1
    assert Path("grid.png").read_text() == "precious"
