"""The rows of a run: which are good, which it learns from, and which it holds out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from silkscreen.bases import Base
from silkscreen.errors import TrainingError
from silkscreen.template import Template, inputs_from_signature
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import Preparation, Size, Sizing, check_rows, draw_seed, read_rows
from silkscreen.training.encoding import about, about_models
from silkscreen.training.reporting import Reporter
from silkscreen.training.store import read_index


@dataclasses.dataclass(frozen=True)
class Rows:
    """What there is to learn from.

    Attributes:
        sizes: of each row's picture.
        shown: numbers of the rows that are learned from.
        held_out: numbers of those that the loss is told on.
        about: what the encoded rows depend on, as plain data.
        preparation: reads the rows; None where they are encoded already.
    """

    sizes: list[Size]
    shown: list[int]
    held_out: list[int]
    about: dict[str, Any]
    preparation: Preparation | None


def rows_of(config: TrainingConfig, base: Base, template: Template, reporter: Reporter) -> Rows:
    """Return the rows that a run's settings name.

    Raises:
        TrainingError: there are none, or some are bad and not to be skipped: each is listed with its line and reason.
    """
    if config.task == "sft:train":
        return _encoded(config, base, template)
    return _checked(config, base, template, reporter)


def _encoded(config: TrainingConfig, base: Base, template: Template) -> Rows:
    """Return the rows that an earlier run has encoded."""
    assert config.dataset_base_path is not None
    found = read_index(config.dataset_base_path)
    if found is None:
        raise TrainingError(f"{config.dataset_base_path} holds no encoded rows: run --task sft:data_process first")
    sizes: list[Size] = [(width, height) for width, height in found["sizes"]]
    shown, held_out = _split(config, len(sizes))
    return Rows(sizes, shown, held_out, about_models(config, base, template), None)


def _checked(config: TrainingConfig, base: Base, template: Template, reporter: Reporter) -> Rows:
    """Read each row once, and return the good ones; those of a metadata file for validation are held out."""
    assert config.dataset_metadata_path is not None
    extra = config.validation_metadata_path
    keys = [key.strip() for key in config.data_file_keys.split(",") if key.strip()]
    rows, problems = read_rows(config.dataset_metadata_path, config.dataset_base_path, keys)
    more, worse = read_rows(extra, config.dataset_base_path, keys) if extra else ([], [])
    count, problems = len(rows), problems + worse
    preparation = Preparation(
        rows=[*rows, *more],
        sizing=Sizing(config.max_pixels, config.height, config.width),
        processor=template.data_processor,
        inputs=inputs_from_signature(template.module.TEMPLATE_MODEL),
        seed=config.seed,
    )
    good = []
    with reporter.progress("checking", len(preparation.rows)) as advance:
        for number, (size, problem) in enumerate(check_rows(preparation, config.dataset_num_workers)):
            path = config.dataset_metadata_path if number < count else extra
            if problem:
                problems.append(f"{path}:{preparation.rows[number].line}: {problem}")
            else:
                good.append((number, size))
            advance(1)
    _report(problems, config, reporter)
    count = sum(number < count for number, _ in good)
    if not count:
        raise TrainingError(f"{config.dataset_metadata_path} has no rows to train on")
    kept = [preparation.rows[number] for number, _ in good]
    sizes = [size for _, size in good]
    shown, held_out = _split(config, count)
    return Rows(
        sizes,
        shown,
        [*held_out, *range(count, len(sizes))],
        about(config, base, template, kept, sizes),
        dataclasses.replace(preparation, rows=kept),
    )


def _report(problems: Sequence[str], config: TrainingConfig, reporter: Reporter) -> None:
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:20])
    more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
    message = f"{len(problems)} bad row{'s' * (len(problems) > 1)}\n{shown}{more}"
    if config.bad_rows == "stop":
        raise TrainingError(f"{message}\nmend or remove them, or go on without them by --bad_rows skip")
    reporter.say(f"going on without {message}")


def _split(config: TrainingConfig, count: int) -> tuple[list[int], list[int]]:
    """Share rows out at random between those that are learned from and those that are held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(draw_seed(config.seed, "split"))).tolist()
    held = round(count * config.validation_split) if config.validation_split else 0
    if config.validation_split and not 0 < held < count:
        raise TrainingError(f"--validation_split {config.validation_split} of {count} rows leaves a side without any")
    return sorted(order[held:]), sorted(order[:held])
