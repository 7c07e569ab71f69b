"""`silkscreen bases`: the FLUX.2 models that can draw."""

from __future__ import annotations

import click

from silkscreen.bases import known_bases, unusable_bases
from silkscreen.cli.table import print_table


@click.command("bases")
def command() -> None:
    """List the known FLUX.2 bases, their defaults and licences."""
    rows = []
    for base in known_bases().values():
        call = base.call
        rows.append(
            [
                base.id,
                base.title,
                f"{call.get('width', '?')}x{call.get('height', '?')}",
                str(call.get("num_inference_steps", "?")),
                "none" if base.distilled else str(call.get("guidance_scale", "?")),
                base.licence,
                base.distribution,
            ]
        )
    print_table(["ID", "TITLE", "SIZE", "STEPS", "GUIDANCE", "LICENCE", "FROM"], rows)
    for base_id, reason in unusable_bases().items():
        click.echo(f"\n{base_id} cannot be used: {reason}")
