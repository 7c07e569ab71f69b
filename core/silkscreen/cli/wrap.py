"""`silkscreen wrap`: makes an installable plugin of a published folder or repository."""

from __future__ import annotations

from pathlib import Path

import click

from silkscreen.cli.offline_option import offline_option


@click.command("wrap")
@click.argument("source")
@click.option("--name", help="Name of the template.  [default: the folder's or repository's]")
@click.option(
    "--project",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the project is made.  [default: silkscreen-NAME here]",
)
@click.option("--base", "bases", multiple=True, help="Id of a base it is for.  [default: what its model card says]")
@click.option("--copy-weights", is_flag=True, help="Put a repository's weights into the package.")
@click.option("--trust-code", is_flag=True, help="Let its code run, which tells its inputs.")
@offline_option
def command(
    source: str, name: str | None, project: Path | None, bases: tuple[str, ...], copy_weights: bool, trust_code: bool
) -> None:
    """Make an installable plugin of SOURCE, a folder or a repository with a model.py.

    The code is taken as it is; pyproject.toml, README and, where there is none, template.toml are written around it,
    with the inputs of its signature, its licence and its origin. A repository's weights are named by their source.

    \b
    Examples:
      silkscreen wrap my-template --name glow --trust-code
      silkscreen wrap modelscope:DiffSynth-Studio/Template-KleinBase4B-Age --name age --trust-code
      pip install ./silkscreen-age
    """
    from silkscreen.authoring.wrap import wrap

    made = wrap(
        source,
        name=name,
        folder=project,
        bases=bases,
        copy_weights=copy_weights,
        trust_code=trust_code,
        progress=lambda step: click.echo(step, err=True),
    )
    click.echo(f"made {made.folder}")
    click.echo(f"check it: silkscreen check {made.folder} --trust-code")
    click.echo(f"install it: pip install {made.folder}")
