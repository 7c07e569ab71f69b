"""`silkscreen info NAME`: what a template does and takes."""

from __future__ import annotations

import math
from pathlib import Path

import click

from silkscreen import registry
from silkscreen.cli.table import print_table
from silkscreen.manifest import MISSING, example_command


@click.command("info")
@click.argument("name")
def command(name: str) -> None:
    """Show a template's inputs with types, ranges and defaults, its weights, and an example command.

    NAME is one that `silkscreen list` shows.
    """
    entry = registry.find(registry.TEMPLATES, name)
    manifest = entry.manifest
    click.secho(f"{entry.name} {entry.version}  ({entry.distribution})", bold=True)
    if manifest is None:
        click.echo("It has no template.toml: its inputs are read from its code when it is used.")
    else:
        click.echo(f"{manifest.title}: {manifest.summary}")
        click.echo(f"bases:    {', '.join(manifest.bases) or 'not said'}")
        click.echo(f"carriers: {', '.join(manifest.carriers) or 'not said'}")
    inputs = list((manifest.inputs or {}).values()) if manifest else []
    if inputs:
        click.echo("\ninputs:")
        rows = [
            [
                spec.name,
                spec.type + (" list" if spec.many else ""),
                spec.range,
                _value(spec.default),
                _value(spec.negative),
                spec.help,
            ]
            for spec in inputs
        ]
        print_table(["NAME", "TYPE", "RANGE", "DEFAULT", "NEGATIVE", "WHAT IT DOES"], rows)
    if entry.folder is not None:
        click.echo("\nweights:")
        for path in sorted(entry.folder.rglob("*.safetensors")):
            click.echo(f"  {path.relative_to(entry.folder)}  {path.stat().st_size / 1e6:.1f} MB, {_parameters(path)}")
    click.echo(f"\nexample:\n  {example_command(entry.name, {spec.name: spec for spec in inputs})}")


def _value(value: object) -> str:
    return "" if value is MISSING or value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _parameters(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return f"{sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()):,} parameters"  # noqa: SIM118
    except SafetensorError:
        return "not a whole safetensors file"
