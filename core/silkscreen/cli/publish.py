"""`silkscreen publish`: uploads a template to a hub."""

from __future__ import annotations

from pathlib import Path

import click

from silkscreen.cli.table import print_table


@click.command("publish")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("target", metavar="modelscope:OWNER/REPO|hf:OWNER/REPO")
@click.option("--dry-run", is_flag=True, help="Show the files that would go, and neither check nor send anything.")
@click.option("--name", help="Which template of the project.  [default: its only one]")
@click.option("--base", help="What it is checked on.")
@click.option("--private", is_flag=True, help="Make the repository a private one, if it is made.")
@click.option("--trust-code", is_flag=True, help="Let the template's code run, to check it.")
def command(
    folder: Path,
    target: str,
    dry_run: bool,
    name: str | None,
    base: str | None,
    private: bool,
    trust_code: bool,
) -> None:
    """Upload the template in FOLDER to a hub, in the field's format, after `silkscreen check` has passed.

    FOLDER has a model.py, or is a plugin's project. What goes: model.py, which has to run alone, weights,
    template.toml, licence, and README.md as the model card with the pictures in it. The repository is made when
    there is none.

    The token is that of MODELSCOPE_API_TOKEN or HF_TOKEN, or of `modelscope login` or `hf auth login`.

    \b
    Examples:
      silkscreen publish my-template modelscope:me/my-template --dry-run
      silkscreen publish my-template modelscope:me/my-template --trust-code
      silkscreen generate "a red circle" -t modelscope:me/my-template scale=0.8 --trust-code -o circle.png
    """
    from silkscreen.authoring.publish import plan_publication, publish
    from silkscreen.hub import destination

    destination(target)
    click.echo("reading the files", err=True)
    listing = plan_publication(folder, name).listing()
    print_table(["FILE", "BYTES", "SHA256"], [[path, f"{size:,}", digest] for path, size, digest in listing])
    if dry_run:
        click.echo(f"would go to {target}")
        return
    click.echo("checking it: see silkscreen check", err=True)
    address = publish(folder, target, name=name, base=base, private=private, trust_code=trust_code)
    click.echo(f"published: {address}")
    click.echo(f"use it as: -t {target}")
