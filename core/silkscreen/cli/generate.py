"""`silkscreen generate`: draws pictures with templates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from silkscreen.cli.base_options import BaseOptions, base_options
from silkscreen.cli.offline_option import offline_option
from silkscreen.cli.template_option import (
    TemplateCommand,
    bare_negative_option,
    negative_option,
    parse_template,
    template_option,
    trust_code_option,
)


@click.command("generate", cls=TemplateCommand)
@click.argument("prompt", required=False)
@template_option
@negative_option
@bare_negative_option
@click.option("--seed", type=int, help="Seed of the noise; the n-th picture has this plus n.  [default: 0]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the base's]")
@click.option("--guidance-scale", type=float, help="Strength of guidance.  [default: the base's]")
@click.option("--height", type=click.IntRange(16), help="Height in pixels.  [default: the base's]")
@click.option("--width", type=click.IntRange(16), help="Width in pixels.  [default: the base's]")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, help="Number of pictures.")
@click.option("--like", type=click.Path(path_type=Path), help="A PNG whose recipe is repeated.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A TOML file with the recipe.")
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the recipe to this TOML file.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where the picture goes; with -n 3, out.png becomes out-0.png, out-1.png, out-2.png.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@base_options
@trust_code_option
@offline_option
def command(
    prompt: str | None,
    templates: tuple[str, ...],
    negatives: tuple[str, ...],
    bare_negative: bool,
    seed: int | None,
    steps: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    count: int,
    like: Path | None,
    recipe_file: Path | None,
    save_recipe: Path | None,
    output: Path,
    overwrite: bool,
    base_options: BaseOptions,
    trust_code: bool,
) -> None:
    """Draw PROMPT, under the control of templates.

    Every PNG carries its recipe, which `silkscreen show` prints and --like repeats. What is said beside --like or
    --recipe takes the place of what the recipe says; -t that of all its templates.

    \b
    Examples:
      silkscreen generate "a small green star on a purple background" -o star.png
      silkscreen generate "a large red circle on a blue background" \\
          -t brightness scale=0.8 -t structure image=edges.png -o circle.png
      silkscreen generate "a large red circle on a blue background" \\
          -t brightness scale=0.8 --negative brightness scale=0.3 -n 4 -o circle.png
      silkscreen generate --like circle.png --seed 7 -o other.png
      silkscreen generate "a small green star on a purple background" \\
          -t modelscope:owner/repo scale=0.8 --trust-code -o star.png
      silkscreen generate "a small green star on a purple background" \\
          --base black-forest-labs/FLUX.2-klein-4B --fit -o star.png

    What a template takes: silkscreen info NAME.
    """
    from silkscreen.recipe import Recipe, save_picture

    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(count)]
    check_output([*paths, *([save_recipe] if save_recipe else [])], overwrite)
    given: dict[str, Any] = {
        "prompt": prompt,
        "base": base_options.base,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "template_inputs": [parse_template(option) for option in templates] or None,
        "negative_template_inputs": [parse_template(option) for option in negatives] or ([] if bare_negative else None),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if like and recipe_file:
        raise click.UsageError("--like and --recipe were both given: leave one out")
    source = like or recipe_file
    if source is None and prompt is None:
        raise click.UsageError("say a PROMPT, or give --like or --recipe")
    recipe = Recipe.load(source, **given) if source else Recipe.from_dict(given)

    from silkscreen import TemplatePipeline

    loaded = TemplatePipeline(recipe.template_names, trust_code=trust_code)
    loaded.check_inputs(recipe.template_inputs)
    click.echo(f"loading {recipe.base}", err=True)
    pipe = base_options.load(recipe.base, loaded, recipe)
    recipe = recipe.completed(pipe, loaded)
    for index, path in enumerate(paths):
        one = dataclasses.replace(recipe, seed=recipe.seed + index)
        save_picture(one.run(pipe, loaded), path, one)
        click.echo(path)
    if save_recipe:
        recipe.save_toml(save_recipe)
        click.echo(save_recipe)


def check_output(paths: list[Path], overwrite: bool) -> None:
    """Refuse to write where something is, or where no folder is.

    Raises:
        FileExistsError: a file exists, and `overwrite` is not given.
        click.ClickException: a folder does not exist.
    """
    for path in paths:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another name, or pass --overwrite")
        if not path.parent.is_dir():
            raise click.ClickException(f"there is no folder {path.parent}: make it, or choose another")
