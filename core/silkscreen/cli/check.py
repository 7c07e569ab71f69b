"""`silkscreen check`: asks of a template what a reviewer would."""

from __future__ import annotations

import dataclasses
import json

import click

from silkscreen.cli.offline_option import offline_option


@click.command("check")
@click.argument("target", metavar="PLUGIN_OR_FOLDER")
@click.option("--base", help="Id or folder of the base to draw with.  [default: flux2-tiny, or one it is for]")
@click.option("--trust-code", is_flag=True, help="Let the code in a folder run.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@offline_option
def command(target: str, base: str | None, trust_code: bool, as_json: bool) -> None:
    """Ask of a template everything that a reviewer would, and say how to cure what is wrong.

    PLUGIN_OR_FOLDER is an installed template, a project folder, or a folder with a model.py. Asked are the contract,
    the manifest against the code, whether weights are safetensors and complete, whether importing it stays off the
    network and starts no program, whether it is deterministic, safe in batches and draws at two sizes, whether a
    gradient reaches every trainable tensor, the size of its cache, and whether the example of `silkscreen info` runs.

    \b
    Examples:
      silkscreen check brightness
      silkscreen check ./silkscreen-glow --trust-code
      silkscreen check ./glow --trust-code --json

    The exit status is 1 when anything failed.
    """
    from silkscreen.authoring.check import Finding, check

    def show(finding: Finding) -> None:
        if as_json:
            return
        mark = click.style("ok  ", fg="green") if finding.passed else click.style("FAIL", fg="red")
        click.echo(f"{mark} {finding.name:<14} {finding.detail}")
        if finding.cure:
            click.echo(f"{'':19} cure: {finding.cure}")

    findings = check(target, base=base, trust_code=trust_code, progress=show)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if not all(finding.passed for finding in findings):
        raise SystemExit(1)
