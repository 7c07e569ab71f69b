"""`silkscreen show FILE`: the recipe in a picture, or what a saved template cache is."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def command(file: Path) -> None:
    """Print the recipe that a picture carries, as TOML, or what is in a saved template cache.

    FILE is a PNG that Silkscreen has drawn, or a .safetensors that `TemplateCache.save` has written. Paths in a recipe
    are relative to its folder.

    \b
    Example:
      silkscreen show circle.png > circle.toml
      silkscreen generate --recipe circle.toml -o again.png
    """
    if file.suffix == ".safetensors":
        from silkscreen import TemplateCache

        click.echo(TemplateCache.load(file).inspect())
        return

    import tomli_w

    from silkscreen.recipe import read

    click.echo(tomli_w.dumps(read(file)), nl=False)
