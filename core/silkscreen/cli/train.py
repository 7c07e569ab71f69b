"""`silkscreen train`, and `accelerate launch -m silkscreen.train`: trains a template."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from silkscreen.cli.offline_option import offline_option
from silkscreen.training.config import TrainingConfig


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of `TrainingConfig`, explained by its docstring."""
    described = re.findall(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", TrainingConfig.__doc__ or "", re.MULTILINE)
    helps = {name: " ".join(text.split()) for names, text in described for name in names.split(", ")}
    hints = typing.get_type_hints(TrainingConfig)
    for field in reversed(dataclasses.fields(TrainingConfig)):
        kinds = _kinds(hints[field.name])
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"required": required, "help": helps[field.name][:1].upper() + helps[field.name][1:]}
        if not required:
            options |= {"default": field.default, "show_default": field.default is not None}
        if kinds == [bool]:
            options["is_flag"] = True
        elif isinstance(kinds[0], str):
            options["type"] = click.Choice(kinds)
        else:
            options["type"] = click.Path(path_type=Path) if kinds == [Path] else kinds[0]
        function = click.option(f"--{field.name}", **options)(function)
    return function


def _kinds(hint: Any) -> list[Any]:
    """Return the type of an option, or its choices, without None."""
    flat = [inner for kind in typing.get_args(hint) or (hint,) for inner in (typing.get_args(kind) or (kind,))]
    return [kind for kind in flat if kind is not type(None)]


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make a file's settings the defaults of the options."""
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        from silkscreen.manifest import unknown_name

        raise click.BadParameter(f"{path}: {unknown_name('setting', unknown[0], sorted(known))}")
    context.default_map = {**(context.default_map or {}), **settings}


@click.command("train")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="A TOML file of these options, by their names; what is given on the command line wins.",
)
@_options
@offline_option
def command(**options: Any) -> None:
    """Train a template.

    \b
    Example:
      silkscreen train --base flux2-tiny --template_model_id_or_path brightness \\
          --dataset_metadata_path data/metadata.jsonl --output_path run \\
          --batch_size 32 --num_epochs 10 --learning_rate 1e-3

    A row of the metadata: {"image": "0.png", "prompt": "...", "template_inputs": {"scale": 0.7}}

    On several processes: accelerate launch [ITS OPTIONS] -m silkscreen.train [THESE OPTIONS]
    """
    config = TrainingConfig(**options)

    from silkscreen.training.trainer import train

    train(config)
