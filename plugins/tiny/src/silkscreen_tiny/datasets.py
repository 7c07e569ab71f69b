"""Data sets for training templates on flux2-tiny: drawn scenes, and what a template is to be told of each.

`python -m silkscreen_tiny.datasets brightness FOLDER` writes pictures and a `metadata.jsonl` into a folder.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import click

from silkscreen_tiny import analysis, scenes


def brightness_inputs(scene: scenes.Scene, folder: Path, name: str) -> dict[str, Any]:
    """Tell the mean luminance of a scene."""
    return {"scale": round(analysis.mean_luminance(scene.draw()), 4)}


def softrgb_inputs(scene: scenes.Scene, folder: Path, name: str) -> dict[str, Any]:
    """Tell the mean of each channel of a scene."""
    return {
        channel: round(float(mean), 4) for channel, mean in zip("RGB", analysis.mean_color(scene.draw()), strict=True)
    }


def structure_inputs(scene: scenes.Scene, folder: Path, name: str) -> dict[str, Any]:
    """Draw the outline of a scene; every other row leaves the prompt to the base, as callers may."""
    scene.outline().save(folder / f"{name}-outline.png")
    return {"image": f"{name}-outline.png", "prompt": scene.prompt if int(name) % 2 else ""}


KINDS = {"brightness": brightness_inputs, "softrgb": softrgb_inputs, "structure": structure_inputs}


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--count", default=3000, show_default=True, help="Number of scenes.")
@click.option("--seed", default=100, show_default=True, help="Seed of the scenes.")
def main(kind: str, folder: Path, count: int, seed: int) -> None:
    """Draw a data set for a template of a KIND into a FOLDER."""
    if (folder / "metadata.jsonl").exists():
        raise click.ClickException(f"{folder} holds a data set: remove it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = islice(scenes.stream(seed, wide_exposure=kind != "structure"), count)
    with click.progressbar(drawn, length=count, label="drawing") as bar:
        lines = []
        for index, scene in enumerate(bar):
            name = f"{index:05d}"
            scene.draw().save(folder / f"{name}.png")
            row = {"image": f"{name}.png", "prompt": scene.prompt}
            lines.append(json.dumps({**row, "template_inputs": KINDS[kind](scene, folder, name)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
