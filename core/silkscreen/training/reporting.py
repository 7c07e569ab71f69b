"""What a person sees of a run: sentences, progress, and a line of figures a step."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from silkscreen.files import replacing


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Speaks for all processes of a run.

    Attributes:
        speaks: whether this process does.
    """

    speaks: bool

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self.speaks:
            click.echo(text)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Any]:
        """Show progress; yield what advances it."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        began, samples = time.monotonic(), 0
        with Progress(*columns, disable=not self.speaks) as progress:
            task = progress.add_task(what, total=total, completed=done, figures="")

            def advance(count: int, figures: str = "", seen: int = 0) -> None:
                nonlocal samples
                samples += seen
                pace = f"{samples / (time.monotonic() - began):.1f} samples/s" if samples else ""
                progress.update(task, advance=count, figures=f"{figures}  {pace}".strip())

            yield advance


class Log:
    """`log.csv`: a line a step. A resumed run's goes on after the last step that its state has."""

    FIELDS = ("step", "epoch", "loss", "learning_rate", "validation_loss")

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.FIELDS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, self.FIELDS)

    def write(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        """Write the line of a step."""
        numbers = {name: f"{value:.8g}" for name, value in figures.items()}
        self._writer.writerow({"step": step, "epoch": epoch, **numbers})
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()
