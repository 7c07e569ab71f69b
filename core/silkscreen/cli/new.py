"""`silkscreen new`: writes the project of a plugin to begin with."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("new")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["value", "image", "lora", "text"]),
    default="value",
    show_default=True,
    help="Keys and values from a number or from a picture, an update of layers, or more tokens in the prompt.",
)
@click.option(
    "--project",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the project is made.  [default: silkscreen-NAME here]",
)
def command(name: str, kind: str, project: Path | None) -> None:
    """Write a plugin called NAME: code, manifest, tests, and a training that runs on a laptop.

    It passes `silkscreen check` as it is. Its weights are a beginning, and have learned nothing yet.

    \b
    Examples:
      silkscreen new glow
      silkscreen new outline --kind image --project work/outline
    """
    from silkscreen.authoring.new import new

    made = new(name, kind, folder=project)
    click.echo(f"made {made.folder}")
    click.echo(f"check it: silkscreen check {made.folder} --trust-code")
    click.echo(f"train it: {made.folder}/training/train.sh work")
    click.echo(f"install it: pip install -e {made.folder}")
