"""Rows of a data set: read, checked, ordered, and turned into what a template and a base take in."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from silkscreen.errors import TrainingError
from silkscreen.manifest import Input, unknown_name

PIXELS_A_TOKEN = 16

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the metadata: a picture, its prompt, and the template inputs that describe it."""

    line: int
    image: Path
    prompt: str
    template_inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizing:
    """How large pictures become.

    Attributes:
        max_pixels: pictures above it are scaled down.
        height, width: the size, multiples of 16; by default the picture's own.
    """

    max_pixels: int
    height: int | None = None
    width: int | None = None

    def size_for(self, width: int, height: int) -> Size:
        """Return the size that a picture of some size gets, in multiples of 16."""
        if self.height is not None and self.width is not None:
            return self.width, self.height
        scale = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        wide, high = (max(1, int(side * scale) // PIXELS_A_TOKEN) * PIXELS_A_TOKEN for side in (width, height))
        return wide, high


def read_rows(
    metadata: Path, base_path: Path | None = None, file_keys: Sequence[str] = ("image",)
) -> tuple[list[Row], list[str]]:
    """Read a metadata file.

    Args:
        metadata: a `.jsonl`, `.json` or `.csv`.
        base_path: what paths are relative to, by default the metadata's folder; also those among the template inputs,
            which are the strings that name a file there.
        file_keys: columns that name files.

    Returns:
        The good rows, and for each bad one a sentence with its line and what is wrong with it.

    Raises:
        TrainingError: the file cannot be read.
    """
    root = base_path or metadata.parent
    rows, problems = [], []
    for line, record in _records(metadata):
        problem = _problem(record, root, file_keys)
        if problem:
            problems.append(f"{metadata}:{line}: {problem}")
            continue
        inputs = record.get("template_inputs") or {}
        rows.append(
            Row(line, root / record["image"], record["prompt"], {key: _located(v, root) for key, v in inputs.items()})
        )
    return rows, problems


def load_picture(path: Path, sizing: Sizing) -> Image.Image:
    """Open a picture upright, on white where it is transparent, scaled to cover the size it gets and centre-cropped."""
    with Image.open(path) as opened:
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    return ImageOps.fit(picture, sizing.size_for(*picture.size), Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A row whose picture is read and whose template inputs have passed the template's data processor."""

    row: int
    picture: Image.Image
    prompt: str
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Reads rows, in the data workers.

    Attributes:
        rows: the rows.
        sizing: of the pictures.
        processor: makes the template's data processor; None where it has none.
        inputs: what the template's `process_inputs` takes.
        seed: of what a processor draws at random; it depends on epoch and row besides.
    """

    rows: Sequence[Row]
    sizing: Sizing
    processor: Callable[[], Any] | None
    inputs: dict[str, Input]
    seed: int

    def prepare(self, number: int, epoch: int) -> Prepared:
        """Read a row.

        Raises:
            Exception: whatever Pillow or the template's processor raises.
            TrainingError: the processor's result is not what `process_inputs` takes.
        """
        row = self.rows[number]
        seed_all(self.seed, epoch, number)
        values = self.processor()(**row.template_inputs) if self.processor else row.template_inputs
        return Prepared(number, load_picture(row.image, self.sizing), row.prompt, self._checked(values))

    def _checked(self, values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise TrainingError(f"the data processor returned {type(values).__name__}, not a dict of process_inputs")
        for name in values:
            if name not in self.inputs:
                raise TrainingError(f"process_inputs: {unknown_name('parameter', name, self.inputs)}")
        missing = [name for name, spec in self.inputs.items() if spec.required and name not in values]
        if missing:
            raise TrainingError(f"process_inputs needs {', '.join(missing)}, which the row does not give")
        return values


class _Check(Dataset[tuple[Size, str]]):
    """Tries every row: the size its picture gets, and what is wrong with it."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation

    def __len__(self) -> int:
        return len(self.preparation.rows)

    def __getitem__(self, number: int) -> tuple[Size, str]:
        try:
            return self.preparation.prepare(number, 0).picture.size, ""
        except Exception as error:  # whatever a picture or a processor raises
            reason = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
            return (0, 0), reason


def check_rows(preparation: Preparation, workers: int) -> Iterator[tuple[Size, str]]:
    """Yield, for each row in order, the size its picture gets and what is wrong with it (empty: nothing)."""
    loader = DataLoader(_Check(preparation), batch_size=None, num_workers=workers)
    for size, problem in loader:
        yield (int(size[0]), int(size[1])), problem


def batches(sizes: Sequence[Size], batch_size: int, repeat: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the items of each step of an epoch, in an order that depends on seed and epoch alone.

    An item is one of `repeat` showings of a row: item `i` shows row `i % len(sizes)`. Every batch is full: the last one
    of each size is filled up from the beginning of its size.

    Args:
        sizes: of each row's picture; a batch holds one size only.
        batch_size: items a step, on all processes together.
        repeat: times each row is seen.
        seed, epoch: of the order.
    """
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
    buckets: dict[Size, list[int]] = {}
    made = []
    for item in torch.randperm(len(sizes) * repeat, generator=generator).tolist():
        bucket = buckets.setdefault(sizes[item % len(sizes)], [])
        bucket.append(item)
        if len(bucket) % batch_size == 0:
            made.append(bucket[-batch_size:])
    for bucket in buckets.values():
        left = len(bucket) % batch_size
        if left:
            made.append([bucket[i % len(bucket)] for i in range(len(bucket) - left, len(bucket) - left + batch_size)])
    return made


def draw_seed(*numbers: int | str) -> int:
    """Return a seed that depends on numbers such as run, epoch and row, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def seed_all(*numbers: int | str) -> None:
    """Seed Python's, NumPy's and torch's generators by numbers such as run, epoch and row."""
    seed = draw_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # it would look for every kind of device at each step
        torch.default_generator.manual_seed(seed)


def _records(metadata: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = metadata.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{metadata} cannot be read: {error}") from error
    if metadata.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        for record in reader:
            inputs = record.get("template_inputs")
            yield reader.line_num, {**record, "template_inputs": _parsed(inputs) if inputs else {}}
    elif metadata.suffix == ".json":
        parsed = _parsed(text)
        if not isinstance(parsed, list):
            raise TrainingError(f"{metadata} has to be a list of rows")
        yield from enumerate(parsed, start=1)
    else:
        for line, row in enumerate(text.splitlines(), start=1):
            if row.strip():
                yield line, _parsed(row)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"


def _problem(record: Any, root: Path, file_keys: Sequence[str]) -> str:
    if not isinstance(record, dict):
        return record if isinstance(record, str) else "a row has to be an object"
    if not isinstance(record.get("prompt"), str):
        return "it has no prompt"
    if not isinstance(record.get("image"), str):
        return "it has no image"
    if not isinstance(record.get("template_inputs") or {}, dict):
        inputs = record["template_inputs"]
        return inputs if isinstance(inputs, str) else "template_inputs has to be an object"
    for key in ("image", *file_keys):
        value = record.get(key)
        if isinstance(value, str) and value and not (root / value).is_file():
            return f"there is no file {root / value}"
    try:
        with Image.open(root / record["image"]):
            return ""
    except OSError:
        return f"{root / record['image']} is not a picture that Pillow reads"


def _located(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_located(each, root) for each in value]
    if isinstance(value, str) and value and (root / value).is_file():
        return str(root / value)
    return value
