"""Encoded rows on the disk: what does not depend on trained weights, in safetensors shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from silkscreen.errors import TrainingError
from silkscreen.files import replacing

INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
"""A shard is written as soon as it is so large."""


class StoreError(TrainingError):
    """Encoded rows cannot be written."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A row, encoded: everything about it that does not depend on trained weights.

    Attributes:
        latents: (1, C, H/16, W/16), patchified and normalised.
        prompt_embeds: (1, L, joint_attention_dim).
        text_ids: (1, L, 4).
        processed: what `process_inputs` returned.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    text_ids: torch.Tensor
    processed: Mapping[str, Any]

    def to(self, device: torch.device) -> Example:
        """Return the example on a device."""
        moved = {field.name: _moved(getattr(self, field.name), device) for field in dataclasses.fields(self)}
        return Example(**moved)


class ExampleStore:
    """Examples by row number, in a folder.

    A shard appears whole or not at all, so that a killed run loses only the rows since its last shard.

    Args:
        folder: where the shards are; made if there is none.
        about: what the examples were made of; a folder that holds others is refused.
        process: number of this process; each writes shards of its own.

    Raises:
        TrainingError: the folder holds examples of something else; each difference is named.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self.process = process
        self._places: dict[int, tuple[Path, Any]] = {}
        self._waiting: dict[int, tuple[Any, dict[str, torch.Tensor]]] = {}
        self._shards: set[str] = set()
        self._open: dict[Path, Any] = {}
        found = read_index(folder)
        if found is None:
            if process == 0:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / INDEX) as partial:
                    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        else:
            different = [
                f"{name} {found.get(name)!r}, this run {value!r}"
                for name, value in about.items()
                if found.get(name) != value
            ]
            if different:
                raise TrainingError(
                    f"{folder} holds rows encoded for something else: it has {'; '.join(different)}. "
                    "Encode them anew into another folder"
                )
        self.refresh()

    def __contains__(self, row: int) -> bool:
        return row in self._places or row in self._waiting

    def __getitem__(self, row: int) -> Example:
        if row in self._waiting:
            form, tensors = self._waiting[row]
            return Example(**{name: _restored(form[name], f"{row}/{name}", tensors.__getitem__) for name in form})
        path, form = self._places[row]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        read = self._open[path].get_tensor
        return Example(**{name: _restored(form[name], f"{row}/{name}", read) for name in form})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open shards: a data worker opens its own."""
        return {**vars(self), "_open": {}}

    def refresh(self) -> None:
        """See the shards that other processes have written."""
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if path.name in self._shards:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    forms = json.loads((file.metadata() or {})["rows"])
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise TrainingError(f"{path} is no shard of encoded rows ({error}): remove it") from error
            self._shards.add(path.name)
            self._places |= {int(row): (path, form) for row, form in forms.items() if int(row) not in self._places}

    def add(self, row: int, example: Example) -> None:
        """Keep an example; it is on the disk after the next `flush`, or as soon as a shard is full.

        Raises:
            TrainingError: `process_inputs` returned something that is neither a tensor nor plain data.
            StoreError: a full shard cannot be written; its rows still wait.
        """
        if row in self:
            return
        self._waiting[row] = flatten(example, row)
        if sum(t.nbytes for _, kept in self._waiting.values() for t in kept.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard.

        Raises:
            StoreError: it cannot be written; it still waits.
        """
        if not self._waiting:
            return
        first = min(self._waiting)
        path = self.folder / f"rows-{first:06d}-{len(self._waiting)}-{self.process}.safetensors"
        tensors = {name: tensor for _, kept in self._waiting.values() for name, tensor in kept.items()}
        forms = {row: form for row, (form, _) in self._waiting.items()}
        try:
            with replacing(path) as partial:
                save_file(tensors, partial, {"rows": json.dumps(forms)})
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.folder} cannot be written ({error}): make room, and start again") from error
        self._shards.add(path.name)
        self._places |= {row: (path, form) for row, form in forms.items()}
        self._waiting.clear()


def flatten(example: Example, row: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the form of an example, which is plain data, and its tensors by name.

    Raises:
        TrainingError: `process_inputs` returned something that is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    form = {
        field.name: _flattened(getattr(example, field.name), f"{row}/{field.name}", tensors)
        for field in dataclasses.fields(example)
    }
    return form, tensors


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return what the examples in a folder were made of; None where there are none.

    Raises:
        TrainingError: the folder's index is broken.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise TrainingError(f"{path} is broken ({error}): encode the rows anew into another folder") from error


def _flattened(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Put the tensors of a value into `tensors`, and return its form: plain data."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": True}
    if isinstance(value, Mapping):
        return {"dict": {key: _flattened(each, f"{name}/{key}", tensors) for key, each in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flattened(each, f"{name}/{i}", tensors) for i, each in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TrainingError(
        f"process_inputs returned {name.split('/', 2)[-1]!r}, a {type(value).__name__}, which cannot be kept: "
        "return tensors and plain data, or train with --no_cache"
    )


def _restored(form: Any, name: str, tensor: Callable[[str], torch.Tensor]) -> Any:
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensor(name)
    if kind == "dict":
        return {key: _restored(each, f"{name}/{key}", tensor) for key, each in content.items()}
    if kind in ("list", "tuple"):
        values = [_restored(each, f"{name}/{i}", tensor) for i, each in enumerate(content)]
        return values if kind == "list" else tuple(values)
    return content


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
