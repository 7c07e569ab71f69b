"""`silkscreen bases`: the FLUX.2 models that can draw."""

from __future__ import annotations

from pathlib import Path

import click

from silkscreen.bases import Base, known_bases, unusable_bases
from silkscreen.cli.table import print_table


@click.command("bases")
@click.argument("folder", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
def command(folder: Path | None) -> None:
    """List the known FLUX.2 bases: defaults, licence, download size, and which are on this disk.

    With a FOLDER in diffusers' layout, tell which base it is, and whether its files are whole and published ones.
    """
    if folder is not None:
        _tell(folder)
        return
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
                "" if base.download is None else f"{base.download:.1f} GB",
                _on_disk(base),
                base.distribution,
            ]
        )
    headings = ["ID", "TITLE", "SIZE", "STEPS", "GUIDANCE", "LICENCE", "DOWNLOAD", "ON DISK", "FROM"]
    print_table(headings, rows)
    for base_id, reason in unusable_bases().items():
        click.echo(f"\n{base_id} cannot be used: {reason}")


def _on_disk(base: Base) -> str:
    from silkscreen.flux2.on_disk import components_on_disk

    found = components_on_disk(base)
    for hub in ("modelscope", "hf"):
        if len(found) < len(base.components) == len(components_on_disk(base, hub)):
            return f"with --hub {hub}"
    if len(found) == len(base.components):
        return "yes"
    return f"only {', '.join(found)}" if found else "no"


def _tell(folder: Path) -> None:
    from silkscreen.flux2.checking import check_component
    from silkscreen.flux2.configuration import MODELS
    from silkscreen.flux2.loading import describe_folder

    base = describe_folder(folder)
    click.echo(f"{base.id}: {base.title}, {base.licence} licence")
    rows = []
    for name in MODELS:
        checked = check_component(base, name, folder / name)
        files = sorted({file.path.name for file in checked.files})
        size = sum((folder / name / file).stat().st_size for file in files)
        published = ", ".join(checked.published) or "none published"
        rows.append([name, str(len(files)), f"{size / 1e9:.2f} GB", checked.fingerprint, published])
    print_table(["COMPONENT", "FILES", "SIZE", "FINGERPRINT", "AS IN"], rows)
