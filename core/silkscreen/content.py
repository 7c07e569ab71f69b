"""What values are by their content, how many bytes they take, and whether chance had a part in them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image


def content(value: Any) -> Any:
    """Return JSON data that is equal for values of equal content only; pixels and numbers are told by a SHA-256.

    Raises:
        TypeError: the value is, or holds, something other than plain data, pictures, arrays and tensors.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [content(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [content(each) for each in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: content(each) for key, each in value.items()}}
    if isinstance(value, Image.Image):
        pixels = value.convert("RGBA") if value.mode in ("P", "PA") else value  # a palette's colours count too
        return {"picture": [value.mode, *value.size], "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": [str(value.dtype), *value.shape], "sha256": hashlib.sha256(numbers).hexdigest()}
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return {"array": [str(value.dtype), *value.shape], "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    raise TypeError(f"a {type(value).__name__} cannot be told by its content")


def nbytes(value: Any) -> int:
    """Return the bytes of the tensors, arrays and pictures in a value."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.nbytes
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, torch.nn.Module):
        return nbytes([*value.parameters(), *value.buffers()])
    if isinstance(value, Mapping):
        return nbytes(list(value.values()))
    return sum(map(nbytes, value)) if isinstance(value, list | tuple) else 0


def random_state(device: torch.device) -> Hashable:
    """Return the state of Python's, NumPy's and torch's generators, which every draw from one of them changes."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        states.append(module.get_rng_state() if device.type == "mps" else module.get_rng_state(device))
    numpy: Any = np.random.get_state(legacy=False)
    words, position = numpy["state"]["key"].tobytes(), numpy["state"]["pos"]
    drawn = tuple(state.cpu().numpy().tobytes() for state in states)
    return random.getstate(), words, position, numpy["has_gauss"], numpy["gauss"], drawn
