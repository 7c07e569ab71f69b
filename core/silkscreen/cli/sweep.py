"""`silkscreen sweep`: draws all combinations of varied values as a labelled grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silkscreen.cli.base_options import DEFAULT_BASE, BaseOptions, base_options
from silkscreen.cli.generate import check_output
from silkscreen.cli.offline_option import offline_option
from silkscreen.cli.template_option import (
    TemplateCommand,
    bare_negative_option,
    negative_option,
    parse_template,
    split_template,
    template_option,
    trust_code_option,
)
from silkscreen.errors import SilkscreenError


@click.command("sweep", cls=TemplateCommand)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@template_option
@negative_option
@bare_negative_option
@click.option("--seed", metavar="VALUES", help="Seeds of the noise.  [default: 0]")
@click.option("--guidance-scale", metavar="VALUES", help="Strengths of guidance.  [default: the base's]")
@click.option("--steps", metavar="VALUES", help="Numbers of denoising steps.  [default: the base's]")
@click.option("--height", type=click.IntRange(16), help="Height of a picture in pixels.  [default: the base's]")
@click.option("--width", type=click.IntRange(16), help="Width of a picture in pixels.  [default: the base's]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where the grid goes; when three values vary, grid.png becomes grid-1.png, grid-2.png, ...",
)
@click.option("--singles", type=click.Path(path_type=Path, file_okay=False), help="Folder for the single pictures.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Pictures drawn at once; 1 where they cannot be drawn together.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@base_options
@trust_code_option
@offline_option
def command(
    prompts: tuple[str, ...],
    templates: tuple[str, ...],
    negatives: tuple[str, ...],
    bare_negative: bool,
    seed: str | None,
    guidance_scale: str | None,
    steps: str | None,
    height: int | None,
    width: int | None,
    output: Path,
    singles: Path | None,
    batch_size: int,
    overwrite: bool,
    base_options: BaseOptions,
    trust_code: bool,
) -> None:
    """Draw all combinations of up to three varied values as a labelled grid: columns, rows and pages.

    Template inputs, prompt, seed, guidance scale and steps can vary, and take columns, rows and pages in this order.
    Several PROMPTs vary the prompt. VALUES are separated by commas, those of text by |, and START:STOP:COUNT is a range
    of numbers with both ends.

    \b
    Examples:
      silkscreen sweep "a large red circle on a blue background" \\
          -t brightness scale=0.1:0.9:5 -t softrgb R=0.3,0.5,0.7 -o grid.png
      silkscreen sweep "a small red star on a pink background" "a large green square on a blue background" \\
          --seed 1,2,3 --guidance-scale 2:5:4 -o grid.png --singles pictures
    """
    from rich.console import Console
    from rich.progress import track

    from silkscreen.recipe import FIELDS, save_picture
    from silkscreen.sweep import Axis, draw_sweep, grids, parse_values, recipes_of

    base = base_options.base or DEFAULT_BASE
    axes = []
    inputs = []
    for index, option in enumerate(templates):
        name, words = split_template(option)
        inputs.append({"model_id": name})
        for key, (spec, text) in words.items():
            try:
                values = parse_values(spec, text)
            except SilkscreenError as error:
                raise type(error)(f"-t {name}: {error}") from None
            inputs[-1][key] = values[0]
            axes.append(Axis(f"{name} {key}", "template_inputs", values, (index, key)))
    axes.append(Axis("prompt", "prompt", prompts))
    for field, option_text in (("seed", seed), ("guidance_scale", guidance_scale), ("steps", steps)):
        if option_text is not None:
            axes.append(Axis(field.replace("_", " "), field, parse_values(FIELDS[field], option_text)))
    given: dict[str, Any] = {
        "base": base,
        "height": height,
        "width": width,
        "template_inputs": inputs,
        "negative_template_inputs": [parse_template(option) for option in negatives]
        or ([] if bare_negative else "default"),
    }
    data = {name: value for name, value in given.items() if value is not None}
    for axis in axes:
        data = axis.apply(data, axis.values[0])
    axes = [axis for axis in axes if len(axis.values) > 1]
    recipes = recipes_of(data, axes)
    pages = len(axes[2].values) if len(axes) == 3 else 0
    paths = [output.with_stem(f"{output.stem}-{page}") for page in range(1, pages + 1)] or [output]
    check_output(paths, overwrite)
    if singles is not None:
        singles.mkdir(parents=True, exist_ok=True)
        check_output([_single(singles, index) for index in range(len(recipes))], overwrite)

    from silkscreen import TemplatePipeline

    loaded = TemplatePipeline(recipes[0].template_names, trust_code=trust_code)
    loaded.check_inputs(recipes[0].template_inputs)
    click.echo(f"loading {base}", err=True)
    pipe = base_options.load(base, loaded, recipes[0], batch_size=min(batch_size, len(recipes)))
    pipe.set_progress_bar_config(disable=True)
    drawn = {}
    recipes = [recipe.completed(pipe, loaded) for recipe in recipes]
    for index, recipe, picture in track(
        draw_sweep(recipes, pipe, loaded, batch_size),
        description="drawing",
        total=len(recipes),
        console=Console(stderr=True),
    ):
        drawn[index] = (recipe, picture)
        if singles is not None:
            save_picture(picture, _single(singles, index), recipe)
    in_order = [drawn[index] for index in range(len(recipes))]
    size = len(recipes) // len(paths)
    for page, (path, grid) in enumerate(zip(paths, grids([picture for _, picture in in_order], axes), strict=True)):
        save_picture(grid, path, [recipe for recipe, _ in in_order[page * size : (page + 1) * size]])
        click.echo(path)


def _single(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.png"
