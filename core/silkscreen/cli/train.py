"""`silkscreen train`: trains a template."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from silkscreen.training.config import TrainingConfig


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of `TrainingConfig`, explained by its docstring."""
    described = re.findall(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", TrainingConfig.__doc__ or "", re.MULTILINE)
    helps = {name: " ".join(text.split()) for names, text in described for name in names.split(", ")}
    hints = typing.get_type_hints(TrainingConfig)
    for field in reversed(dataclasses.fields(TrainingConfig)):
        kinds = [kind for kind in typing.get_args(hints[field.name]) or (hints[field.name],) if kind is not type(None)]
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


@click.command("train")
@_options
def command(**options: Any) -> None:
    """Train a template.

    \b
    Example:
      silkscreen train --template_model_id_or_path brightness \\
          --dataset_metadata_path data/metadata.jsonl --output_path run \\
          --batch_size 32 --num_epochs 10 --learning_rate 1e-3

    A row of the metadata: {"image": "0.png", "prompt": "...", "template_inputs": {"scale": 0.7}}
    """
    config = TrainingConfig(**options)

    from silkscreen.training.trainer import train

    click.echo(f"trained: {train(config)}")
