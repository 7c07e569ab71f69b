"""Rows of a data set: read, checked, and turned into what a training step needs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from silkscreen.errors import TrainingError

PIXELS_A_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the metadata: a picture, its prompt, and the template inputs that describe it."""

    line: int
    image: Path
    prompt: str
    template_inputs: dict[str, Any]


def read_rows(metadata: Path, base_path: Path | None = None) -> list[Row]:
    """Read a metadata file and check every row of it.

    Paths are relative to `base_path`, by default the metadata's folder; also those among the template inputs, which are
    the strings that name a file there.

    Raises:
        TrainingError: with every bad row, its line and what is wrong with it.
    """
    root = base_path or metadata.parent
    rows, problems = [], []
    for line, record in _records(metadata):
        problem = _problem(record, root)
        if problem:
            problems.append(f"{metadata}:{line}: {problem}")
            continue
        inputs = record.get("template_inputs") or {}
        rows.append(
            Row(line, root / record["image"], record["prompt"], {key: _located(v, root) for key, v in inputs.items()})
        )
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise TrainingError(f"{len(problems)} bad rows: mend or remove them\n{shown}{more}")
    if not rows:
        raise TrainingError(f"{metadata} has no rows")
    return rows


def load_picture(path: Path, *, max_pixels: int, height: int | None = None, width: int | None = None) -> Image.Image:
    """Open a picture upright, on white where it is transparent, scaled to cover the size it gets and centre-cropped.

    Args:
        path: the picture.
        max_pixels: pictures above it are scaled down.
        height, width: the size, multiples of 16; by default the picture's own.
    """
    with Image.open(path) as opened:
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    if height is None or width is None:
        scale = min(1.0, math.sqrt(max_pixels / (picture.width * picture.height)))
        width, height = (max(1, int(side * scale) // PIXELS_A_TOKEN) * PIXELS_A_TOKEN for side in picture.size)
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def batches(sizes: list[tuple[int, int]], batch_size: int, repeat: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the row numbers of each step of an epoch, in an order that depends on seed and epoch alone.

    Args:
        sizes: of each row's picture; a batch holds one size only.
        batch_size: rows a step.
        repeat: times each row is seen.
        seed, epoch: of the order.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(sizes) * repeat, generator=generator) % len(sizes)
    waiting: dict[tuple[int, int], list[int]] = {}
    for row in order.tolist():
        bucket = waiting.setdefault(sizes[row], [])
        bucket.append(row)
        if len(bucket) == batch_size:
            yield waiting.pop(sizes[row])
    yield from waiting.values()


def _records(metadata: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = metadata.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{metadata} cannot be read: {error}") from error
    if metadata.suffix == ".csv":
        for line, record in enumerate(csv.DictReader(text.splitlines()), start=2):
            inputs = record.get("template_inputs")
            yield line, {**record, "template_inputs": _parsed(inputs) if inputs else {}}
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


def _problem(record: Any, root: Path) -> str:
    if not isinstance(record, dict):
        return record if isinstance(record, str) else "a row has to be an object"
    if not isinstance(record.get("prompt"), str):
        return "it has no prompt"
    if not isinstance(record.get("image"), str):
        return "it has no image"
    if not isinstance(record.get("template_inputs") or {}, dict):
        return "template_inputs has to be an object"
    try:
        with Image.open(root / record["image"]):
            return ""
    except FileNotFoundError:
        return f"there is no file {root / record['image']}"
    except OSError:
        return f"{root / record['image']} is not a picture that Pillow reads"


def _located(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_located(each, root) for each in value]
    if isinstance(value, str) and value and (root / value).is_file():
        return str(root / value)
    return value
