"""`silkscreen batch FILE`: draws a picture for each row of a file."""

from __future__ import annotations

from pathlib import Path

import click

from silkscreen.cli.base_options import DEFAULT_BASE, BaseOptions, base_options
from silkscreen.cli.offline_option import offline_option
from silkscreen.cli.template_option import trust_code_option


@click.command("batch")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--seed", type=int, default=0, show_default=True, help="A row without a seed has this plus its index, from 0."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the pictures, 000000.png for the first row.",
)
@click.option("--overwrite", is_flag=True, help="Replace pictures that have another recipe than their row's.")
@base_options
@trust_code_option
@offline_option
def command(file: Path, seed: int, output: Path, overwrite: bool, base_options: BaseOptions, trust_code: bool) -> None:
    """Draw a picture for each row of FILE, a JSON object a line.

    Pictures that are there are not drawn again, so a batch that was stopped goes on where it was. Rows that fail are
    listed in report.jsonl next to the pictures, the others are drawn, and the exit status is 1.

    \b
    A row has a prompt, and may have any other part of a recipe:
      {"prompt": "a large red circle on a blue background", "seed": 7, "steps": 20,
       "guidance_scale": 3, "height": 128, "width": 128,
       "template_inputs": [{"model_id": "brightness", "scale": 0.8},
                           {"model_id": "structure", "image": "edges.png"}],
       "negative_template_inputs": [{"model_id": "brightness", "scale": 0.3}]}

    Paths are relative to FILE's folder. --base is for rows that name none, the other options of a base are for all, and
    --fit goes by the first row to be drawn with a base.

    On several devices: torchrun --nproc-per-node 2 -m silkscreen.batch FILE -o DIR
    """
    from silkscreen.batch import REPORT, draw_batch

    failures = draw_batch(
        file,
        output,
        base=base_options.base or DEFAULT_BASE,
        load=base_options.load,
        seed=seed,
        overwrite=overwrite,
        trust_code=trust_code,
    )
    if failures:
        raise click.ClickException(f"{len(failures)} row{'s' * (len(failures) > 1)} failed: {output / REPORT} says why")
