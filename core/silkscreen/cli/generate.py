"""`silkscreen generate`: draws pictures with templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silkscreen import registry
from silkscreen.cli.template_option import TemplateCommand, parse_template, template_names


@click.command("generate", cls=TemplateCommand)
@click.argument("prompt")
@click.option("--base", default="flux2-tiny", show_default=True, help="Id of a base, or a folder in diffusers' layout.")
@click.option(
    "-t",
    "--template",
    "templates",
    multiple=True,
    metavar="NAME [INPUT=VALUE]...",
    help="A template and its inputs; may be repeated.",
)
@click.option(
    "--negative",
    "negatives",
    multiple=True,
    metavar="NAME [INPUT=VALUE]...",
    help="The same for the negative side of guidance.  [default: the templates' own negative values]",
)
@click.option("--bare-negative", is_flag=True, help="No templates on the negative side.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the base's]")
@click.option("--guidance-scale", type=float, help="Strength of guidance.  [default: the base's]")
@click.option("--height", type=click.IntRange(16), help="Height in pixels.  [default: the base's]")
@click.option("--width", type=click.IntRange(16), help="Width in pixels.  [default: the base's]")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, help="Number of pictures.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where the picture goes; with -n 3, out.png becomes out-0.png, out-1.png, out-2.png.",
)
@click.option("--overwrite", is_flag=True, help="Replace pictures that exist.")
@click.option("--trust-code", is_flag=True, help="Let the code of templates named by a folder run.")
def command(
    prompt: str,
    base: str,
    templates: tuple[str, ...],
    negatives: tuple[str, ...],
    bare_negative: bool,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    count: int,
    output: Path,
    overwrite: bool,
    trust_code: bool,
) -> None:
    """Draw PROMPT, under the control of templates.

    \b
    Examples:
      silkscreen generate "a small green star on a purple background" -o star.png
      silkscreen generate "a large red circle on a blue background" \\
          -t brightness scale=0.8 -t structure image=edges.png -o circle.png
      silkscreen generate "a large red circle on a blue background" \\
          -t brightness scale=0.8 --negative brightness scale=0.3 -n 4 -o circle.png

    What a template takes: silkscreen info NAME.
    """
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(count)]
    for path in paths:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another name, or pass --overwrite")
        if not path.parent.is_dir():
            raise click.ClickException(f"there is no folder {path.parent}: make it, or choose another")
    names = template_names([*templates, *negatives])
    early = {name: inputs for name in names if (inputs := _manifest_inputs(name)) is not None}
    for option in (*templates, *negatives):
        if template_names([option])[0] in early:
            parse_template(option, early)  # before anything heavy is imported or loaded

    from silkscreen import TemplatePipeline, load_base

    loaded = TemplatePipeline(names, trust_code=trust_code)
    inputs_of = {name: template.inputs for name, template in zip(names, loaded.templates, strict=True)}
    ids = {name: index for index, name in enumerate(names)}

    def requests(options: tuple[str, ...]) -> list[dict[str, Any]]:
        parsed = [parse_template(option, inputs_of) for option in options]
        return [{**values, "model_id": ids[values["model_id"]]} for values in parsed]

    click.echo(f"loading {base}", err=True)
    pipe = load_base(base)
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    negative: Any = requests(negatives) if negatives else None if bare_negative else "default"
    result = loaded(
        pipe,
        prompt=prompt,
        template_inputs=requests(templates),
        negative_template_inputs=negative,
        seed=seed,
        num_images_per_prompt=count,
        **{name: value for name, value in given.items() if value is not None},
    )
    for path, picture in zip(paths, result.images, strict=True):
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        picture.save(partial)
        partial.replace(path)
        click.echo(path)


def _manifest_inputs(name: str) -> Any:
    """Return the inputs a name's manifest lists; None when only its code can tell."""
    if "/" in name or (Path(name) / "model.py").is_file():
        return None
    manifest = registry.find(registry.TEMPLATES, name).manifest
    return manifest.inputs if manifest else None
