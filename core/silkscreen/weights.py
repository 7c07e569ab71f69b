"""Where a template's weights are, and how they are read: memory-mapped, into a model that was never allocated twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError, safe_open
from torch import nn

from silkscreen import registry
from silkscreen.errors import WeightsError
from silkscreen.manifest import unknown_name

_BYTES_MAPPED_AT_ONCE = 64 * 2**20
"""A file is mapped anew after so many bytes are converted, so that pages already read do not count as memory in use."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One safetensors file and the shapes of the tensors in it, by name.

    Attributes:
        path: the file.
        shapes: of the tensors, by the model's names.
        names: the file's own names, by the model's, where these are others.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def locate(reference: str, folder: Path) -> Path:
    """Return the local file or folder of a weight path.

    Args:
        reference: a path relative to `folder`, or a source such as `hf:owner/repo@revision:file`.
        folder: the folder of the template's module, or of the base.

    Raises:
        WeightsError: the path is absolute, leaves the folder or does not exist; the source is unknown.
    """
    if is_source(reference):
        if not registry.is_source(reference):
            scheme = reference.partition(":")[0]
            raise WeightsError(f"weight path {reference!r}: {unknown_name('source', scheme, registry.sources())}")
        return registry.fetch(reference)
    path = inside(reference, folder)
    if not path.exists():
        raise WeightsError(f"weight path {reference!r}: there is no {path}")
    return path


def is_source(reference: str) -> bool:
    """Tell a source, `hf:owner/repo:file`, from a path."""
    return ":" in reference and not _is_absolute(reference)


def inside(reference: str, folder: Path) -> Path:
    """Return the path in a folder that a relative weight path names, whether or not it exists.

    Raises:
        WeightsError: the path is absolute or leaves the folder.
    """
    if _is_absolute(reference):
        raise WeightsError(f"weight path {reference!r} is absolute: make it relative to {folder}")
    path = folder / reference
    # by its name: a hub's cache links each file of a folder to where its content is
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        raise WeightsError(f"weight path {reference!r} leaves {folder}: move the file into the folder")
    return path


def inspect(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        WeightsError: the file is no safetensors, or is cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return TensorFile(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): save it again with safetensors"
        ) from error


def differences(model: nn.Module, files: Sequence[TensorFile]) -> list[str]:
    """Return how the tensors of the files differ from those of a model, one sentence each; none when they fit."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    problems = []
    for file in files:
        problems += [f"{file.path}: {name} is also in another file" for name in file.shapes.keys() & found.keys()]
        found |= file.shapes
        problems += [f"{file.path}: unexpected tensor {name}" for name in sorted(file.shapes.keys() - wanted.keys())]
        problems += [
            f"{file.path}: {name} has shape {list(shape)}, the model wants {list(wanted[name])}"
            for name, shape in file.shapes.items()
            if name in wanted and shape != wanted[name]
        ]
    where = ", ".join(str(file.path) for file in files)
    problems += [f"{where}: tensor {name} is missing" for name in sorted(wanted.keys() - found.keys())]
    return problems


def build_empty(construct: Callable[[], nn.Module]) -> nn.Module:
    """Construct a model whose parameters take no memory, where its constructor allows that; a plain one otherwise."""
    try:
        with init_empty_weights(include_buffers=False):
            return construct()
    except Exception:
        return construct()


def load(
    model: nn.Module,
    construct: Callable[[], nn.Module],
    files: Sequence[TensorFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Give an empty model the tensors of the files, which have to fit it; a new one if that leaves it incomplete.

    Tensors that already have the dtype and stay on the CPU are used where they are mapped; others are converted one by
    one, so that memory never holds much more than the weights at the wanted dtype.
    """
    _assign(model, files, dtype, device)
    if any(parameter.is_meta for parameter in model.parameters()):
        model = construct()
        _assign(model, files, dtype, device)
    return model.to(device)


class _Held(OffloadedWeightsLoader):  # type: ignore[misc]
    """Tensors that are read from their files each time; kernels of convolutions come in a memory format."""

    def __init__(self, index: Mapping[str, Mapping[str, str]], kernels: torch.memory_format) -> None:
        super().__init__(index=index)
        self._kernels = kernels

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = super().__getitem__(name)
        return tensor.to(memory_format=self._kernels) if tensor.ndim == 4 else tensor


def stream(
    model: nn.Module,
    files: Sequence[TensorFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: torch.memory_format = torch.preserve_format,
) -> nn.Module:
    """Let an empty model's weights stay in their files, which have to fit it.

    A module's parameters are read, converted and put on the device when it runs, and dropped again: memory never holds
    more than one module's. Parameters are only there while the module that owns them runs. Kernels of convolutions
    come in the memory format `kernels`.
    """
    index = {
        name: {"safetensors_file": str(file.path), "weight_name": file.names.get(name, name)}
        for file in files
        for name in file.shapes
    }
    held = _Held(index, kernels)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    kept = {name for name, _ in model.named_buffers()} & index.keys()  # the others are made by the constructor
    buffers = {name: held[name] for name in kept}
    buffers = {name: value.to(dtype) if value.is_floating_point() else value for name, value in buffers.items()}
    model.load_state_dict(buffers, strict=False, assign=True)
    cpu_offload(model, device, state_dict=held)
    return model


def _is_absolute(reference: str) -> bool:
    return PurePosixPath(reference).is_absolute() or PureWindowsPath(reference).is_absolute()


def _assign(model: nn.Module, files: Sequence[TensorFile], dtype: torch.dtype, device: torch.device) -> None:
    tensors = {name: value for file in files for name, value in _read(file, dtype, device)}
    model.load_state_dict(tensors, strict=False, assign=True)


def _read(file: TensorFile, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    names = list(file.shapes)
    while names:
        mapped = 0
        with safe_open(file.path, framework="pt", device=str(device)) as tensors:
            while names and mapped < _BYTES_MAPPED_AT_ONCE:
                name = names.pop(0)
                value = tensors.get_tensor(name)
                if value.is_floating_point() and value.dtype != dtype:
                    mapped += value.nbytes
                    value = value.to(dtype)
                yield name, value
                del value
