"""`silkscreen list`: the templates that are installed."""

from __future__ import annotations

import json
from typing import Any

import click

from silkscreen import registry
from silkscreen.cli.table import print_table


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(as_json: bool) -> None:
    """List the installed templates and whether each can be used."""
    entries = registry.entries(registry.TEMPLATES)
    if as_json:
        click.echo(json.dumps([_as_dict(entry) for entry in entries], indent=2))
        return
    if not entries:
        click.echo("No templates are installed. Install one, for example: pip install silkscreen-brightness")
        return
    rows = []
    for entry in entries:
        facts = _as_dict(entry)
        name = entry.qualified_name if entry.status == "conflict" else entry.name
        rows.append(
            [name, entry.version, facts["title"], ", ".join(facts["bases"]), ", ".join(facts["carriers"]), entry.status]
        )
    print_table(["NAME", "VERSION", "TITLE", "BASES", "CARRIERS", "STATUS"], rows)
    for entry in entries:
        if entry.reason:
            click.echo(f"\n{entry.qualified_name} is {entry.status}: {entry.reason}")


def _as_dict(entry: registry.Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "title": manifest.title if manifest else "",
        "summary": manifest.summary if manifest else "",
        "bases": list(manifest.bases) if manifest else [],
        "carriers": list(manifest.carriers) if manifest else [],
        "status": entry.status,
        "reason": entry.reason,
    }
