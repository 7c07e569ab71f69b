from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from silkscreen import TemplatePipeline, load_base, registry
from silkscreen.cli import command_line
from silkscreen.errors import InputError, RecipeError, UnknownNameError
from silkscreen.files import sha256
from silkscreen.recipe import Recipe, read, run_together

PROMPT = "a large red circle on a blue background"
QUICK = ("--steps", "2")


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(command_line(), [str(word) for word in words])


def generate(*words: str | Path) -> None:
    done = run("generate", *words)
    assert done.exit_code == 0, done.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_carries_everything_it_is_made_from(folder: Path) -> None:
    generate(PROMPT, "-t", "brightness", "scale=0.7", "--seed", "3", *QUICK, "-o", "a.png")
    with Image.open("a.png") as picture:
        recipe = json.loads(picture.text["silkscreen"])
    made_with = recipe.pop("made_with")
    assert recipe == {
        "prompt": PROMPT,
        "base": "flux2-tiny",
        "seed": 3,
        "steps": 2,
        "guidance_scale": 3.0,
        "height": 128,
        "width": 128,
        "template_inputs": [{"model_id": "brightness", "scale": 0.7}],
        "negative_template_inputs": "default",
    }
    entry = registry.find(registry.TEMPLATES, "brightness")
    assert made_with["templates"] == {"brightness": f"silkscreen-brightness {entry.version}"}
    assert entry.folder is not None
    weights = sha256(entry.folder / "flux2-tiny.safetensors")
    assert made_with["weights"] == {"brightness/flux2-tiny.safetensors": weights}
    assert made_with["libraries"].keys() >= {"silkscreen", "silkscreen-tiny", "torch", "diffusers", "transformers"}


def test_a_picture_is_repeated_to_the_bit(folder: Path) -> None:
    generate(PROMPT, "-t", "brightness", "scale=0.7", "--seed", "3", *QUICK, "-o", "a.png", "--save-recipe", "a.toml")
    generate("--like", "a.png", "-o", "b.png")
    generate("--recipe", "a.toml", "-o", "c.png")
    (folder / "d.toml").write_text(run("show", "a.png").output)
    generate("--recipe", "d.toml", "-o", "d.png")
    assert len({Path(name).read_bytes() for name in ("a.png", "b.png", "c.png", "d.png")}) == 1


def test_what_is_said_beside_a_recipe_wins(folder: Path) -> None:
    generate(PROMPT, "-t", "brightness", "scale=0.7", "--seed", "3", *QUICK, "-o", "a.png")
    generate("--like", "a.png", "--seed", "4", "-t", "softrgb", "R=0.8", "-o", "b.png")
    changed = read(Path("b.png"))
    assert (changed["prompt"], changed["seed"], changed["steps"]) == (PROMPT, 4, 2)
    assert changed["template_inputs"] == [{"model_id": "softrgb", "R": 0.8, "G": 0.5, "B": 0.5}]
    generate(PROMPT, "-t", "softrgb", "R=0.8", "--seed", "4", *QUICK, "-o", "c.png")
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("c.png")))


def test_each_of_several_pictures_has_a_recipe_of_its_own(folder: Path) -> None:
    generate(PROMPT, "-n", "2", "--seed", "5", *QUICK, "-o", "a.png")
    assert [read(Path(f"a-{n}.png"))["seed"] for n in (0, 1)] == [5, 6]
    generate("--like", "a-1.png", "-o", "b.png")
    assert Path("b.png").read_bytes() == Path("a-1.png").read_bytes()


def test_pictures_among_the_inputs_are_found_from_the_recipe_and_have_to_be_the_same(folder: Path) -> None:
    for name in ("inputs", "outputs"):
        (folder / name).mkdir()
    outline = Image.new("RGB", (128, 128))
    outline.paste("white", (30, 30, 90, 90))
    outline.save("inputs/edges.png")
    generate(PROMPT, "-t", "structure", "image=inputs/edges.png", *QUICK, "-o", "outputs/a.png")
    given = read(Path("outputs/a.png"))["template_inputs"][0]["image"]
    assert given == {"path": "../inputs/edges.png", "sha256": sha256(Path("inputs/edges.png"))}
    generate("--like", "outputs/a.png", "-o", "outputs/b.png", "--save-recipe", "a.toml")
    generate("--recipe", "a.toml", "-o", "outputs/c.png")
    assert len({Path(f"outputs/{name}.png").read_bytes() for name in "abc"}) == 1

    Image.new("RGB", (128, 128)).save("inputs/edges.png")
    done = run("generate", "--like", "outputs/a.png", "-o", "outputs/d.png")
    assert done.exit_code == 1
    assert (
        "outputs/a.png: template_inputs[0] for 'structure': image=outputs/../inputs/edges.png: the file has changed"
        in (" ".join(done.output.split()))
    )
    generate("--like", "outputs/a.png", "-t", "structure", "image=inputs/edges.png", "-o", "outputs/d.png")


def test_differences_from_what_is_installed_are_told(folder: Path) -> None:
    generate(PROMPT, "-t", "brightness", "scale=0.7", *QUICK, "-o", "a.png")
    recipe = Recipe.load(Path("a.png"))
    tables = {name: dict(table) for name, table in recipe.made_with.items()}
    tables["libraries"]["torch"] = "1.0"
    tables["templates"]["brightness"] = "silkscreen-brightness 0.0.1"
    tables["weights"]["brightness/flux2-tiny.safetensors"] = "abc"
    tables["loaded"]["quantize"] = "transformer fp8"
    old = Recipe.from_dict({**recipe.to_dict(), "made_with": tables})
    with pytest.warns(UserWarning) as warned:
        old.completed(load_base("flux2-tiny"), TemplatePipeline("brightness"))
    messages = [str(warning.message) for warning in warned]
    for name, before, now in (
        ("torch", "1.0", recipe.made_with["libraries"]["torch"]),
        ("brightness", "silkscreen-brightness 0.0.1", recipe.made_with["templates"]["brightness"]),
        ("brightness/flux2-tiny.safetensors", "abc", recipe.made_with["weights"]["brightness/flux2-tiny.safetensors"]),
        ("quantize", "transformer fp8", "none"),
    ):
        assert f"the picture may differ: {name} was {before} when the recipe was made, and is {now} now" in messages
    assert len(messages) == 4


def test_pictures_drawn_together_are_those_drawn_alone_and_repeat_to_the_bit() -> None:
    pipe = load_base("flux2-tiny")
    pipe.set_progress_bar_config(disable=True)
    templates = TemplatePipeline(["brightness", "softrgb"])
    recipes = [
        Recipe(
            PROMPT,
            seed=seed,
            steps=2,
            template_inputs=[{"model_id": "brightness", "scale": scale}],
            batch_size=3,
            batch_index=index,
        )
        for index, (seed, scale) in enumerate([(0, 0.2), (1, 0.8), (2, 0.5)])
    ]
    together = [np.asarray(picture, dtype=int) for picture in run_together(recipes, pipe, templates)]
    for recipe, picture in zip(recipes, together, strict=True):
        assert np.array_equal(picture, np.asarray(recipe.run(pipe, templates)))
        alone = Recipe(**{**vars(recipe), "batch_size": 1, "batch_index": 0}).run(pipe, templates)
        assert np.abs(picture - np.asarray(alone)).max() <= 2
    with pytest.raises(RecipeError, match="differ in steps"):
        run_together([recipes[0], Recipe(PROMPT)], pipe, templates)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, InputError, "'prompt' .* is missing"),
        ({"prompt": "p", "sedd": 1}, UnknownNameError, "'sedd': did you mean 'seed'"),
        ({"prompt": "p", "steps": 0}, InputError, "steps=0 is out of range"),
        ({"prompt": "p", "seed": "one"}, InputError, "seed='one': expected a value of type integer"),
        ({"prompt": "p", "template_inputs": 3}, InputError, "has to be a list of template inputs"),
        ({"prompt": "p", "template_inputs": [{"scale": 1}]}, InputError, r"template_inputs\[0\] has no model_id"),
        ({"prompt": "p", "template_inputs": {"model_id": "brigthness"}}, UnknownNameError, "did you mean 'brightness'"),
        (
            {"prompt": "p", "template_inputs": [{"model_id": "brightness", "scale": 2}]},
            InputError,
            r"template_inputs\[0\] for 'brightness': scale=2 is out of range: it goes from 0 to 1",
        ),
        ({"prompt": "p", "batch_index": 1}, InputError, "batch_index=1 of batch_size=1"),
        ({"pictures": [{}, {}]}, RecipeError, "grid of 2 pictures"),
    ],
)
def test_a_wrong_recipe_is_explained(data: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.from_dict(data)


def test_a_file_without_a_recipe_is_named(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save("plain.png")
    (folder / "broken.toml").write_text("prompt = ")
    (folder / "text.png").write_text("no picture")
    for name, message in (
        ("plain.png", "plain.png carries no recipe"),
        ("broken.toml", "broken.toml holds no recipe"),
        ("text.png", "text.png holds no recipe"),
        ("none.png", "none.png: there is no such file"),
    ):
        done = run("show", name)
        assert done.exit_code == 1
        assert message in done.output


def test_a_recipe_is_not_overwritten_unasked(folder: Path) -> None:
    (folder / "a.toml").write_text("precious")
    done = run("generate", PROMPT, "-o", "a.png", "--save-recipe", "a.toml")
    assert done.exit_code == 1
    assert "a.toml exists" in done.output
    assert (folder / "a.toml").read_text() == "precious"


def test_a_template_in_a_folder_is_part_of_a_recipe(folder: Path) -> None:
    (folder / "mine").mkdir()
    model = """
import torch

class TEMPLATE_MODEL(torch.nn.Module):
    def process_inputs(self, pipe, amount=1.0, **kwargs):
        return {"amount": amount}

    def forward(self, pipe, amount, **kwargs):
        return {"kv_cache": {"single_0": (torch.ones(1, 1, 6, 32), torch.full((1, 1, 6, 32), float(amount)))}}
"""
    (folder / "mine" / "model.py").write_text(model)
    generate(PROMPT, "-t", "./mine", "amount=3", "--trust-code", *QUICK, "-o", "a.png")
    generate("--like", "a.png", "--trust-code", "-o", "b.png")
    assert read(Path("a.png"))["template_inputs"] == [{"model_id": "./mine", "amount": 3}]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert "sha256" in run("generate", "--like", "a.png", "-o", "c.png").output
    assert (
        "unknown input 'amuont'"
        in run("generate", PROMPT, "-t", "./mine", "amuont=3", "--trust-code", "-o", "c.png").output
    )
