"""Checkpoints: the trained tensors alone, under the names that the template's weight file has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from silkscreen.errors import TrainingError
from silkscreen.manifest import unknown_name


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)


def load_into(model: nn.Module, path: Path) -> None:
    """Give a model the tensors of a checkpoint.

    Raises:
        TrainingError: it cannot be read, or holds a tensor that the model has not.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} is no checkpoint: {error}") from error
    wanted = model.state_dict()
    for name, value in tensors.items():
        if name not in wanted:
            raise TrainingError(f"{path}: {unknown_name('tensor', name, wanted)}")
        if value.shape != wanted[name].shape:
            raise TrainingError(f"{path}: {name} is {list(value.shape)}, the model wants {list(wanted[name].shape)}")
    model.load_state_dict(tensors, strict=False)
