"""Checkpoints: the trained tensors alone, as a template's weight file has them; and the full state, to go on from."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from silkscreen.errors import TrainingError
from silkscreen.files import replacing
from silkscreen.manifest import unknown_name

PREFIX = "pipe.template_model."
"""What the field's training script calls the template; names in checkpoints have usually lost it."""

STATE = "state"
"""Folder of full states, in a run's output folder."""

PLACE = "place.json"
"""File of a full state that says where the run was."""


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written ({error}): what was written before it is kept") from error


def load_into(model: nn.Module, path: Path) -> None:
    """Give a model the tensors of a checkpoint.

    Raises:
        TrainingError: it cannot be read, or holds a tensor that the model has not.
    """
    try:
        tensors = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} is no checkpoint: {error}") from error
    wanted = model.state_dict()
    for name, value in tensors.items():
        if name not in wanted:
            raise TrainingError(f"{path}: {unknown_name('tensor', name, wanted)}")
        if value.shape != wanted[name].shape:
            raise TrainingError(f"{path}: {name} is {list(value.shape)}, the model wants {list(wanted[name].shape)}")
    model.load_state_dict(tensors, strict=False)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of steps and epochs in a folder, the oldest first."""
    found = [path for path in folder.glob("*.safetensors") if re.fullmatch(r"(step|epoch)-\d+", path.stem)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def keep_newest(folder: Path, limit: int) -> None:
    """Remove all but the newest so many checkpoints of steps and epochs; 0 keeps all."""
    for path in checkpoints_in(folder)[:-limit] if limit else []:
        path.unlink()


def save_state(accelerator: Any, output: Path, place: Mapping[str, Any]) -> None:
    """Write the full state, whole or not at all, then remove older ones.

    Args:
        accelerator: holds the model, the optimizer, the schedule, the average and the random states.
        output: the run's folder.
        place: where the run is, as plain data; `step` among it.

    Raises:
        TrainingError: it cannot be written; the last one is kept.
    """
    step = place["step"]
    folder = output / STATE / f"step-{step}"
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / PLACE).write_text(json.dumps(place), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"the state of step {step} cannot be written to {folder} ({error}): the last good state is kept"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        for other in (output / STATE).iterdir():
            if other != folder:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def latest_state(output: Path) -> Path | None:
    """Return the folder of a run's newest full state; None when there is none."""
    states = [path for path in (output / STATE).glob("step-*") if path.suffix != ".partial"]
    return max(states, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_place(state: Path) -> dict[str, Any]:
    """Return where the run of a full state was.

    Raises:
        TrainingError: the state is broken.
    """
    try:
        place: dict[str, Any] = json.loads((state / PLACE).read_text(encoding="utf-8"))
        return place
    except (OSError, ValueError) as error:
        raise TrainingError(f"{state} is no full state ({error}): remove it to go on from an earlier one") from error


def check_room(output: Path, needed: int) -> None:
    """Make sure that a run can write what it will have to.

    Args:
        output: the run's folder.
        needed: bytes.

    Raises:
        TrainingError: the folder cannot be written, or its disk has less room.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise TrainingError(f"--output_path {output} cannot be written ({error}): choose another folder") from error
    free = shutil.disk_usage(output).free
    if free < needed:
        raise TrainingError(
            f"--output_path {output} has {free / 1e6:.0f} MB left, and a checkpoint with its state takes about "
            f"{needed / 1e6:.0f} MB: make room, or choose another folder"
        )
