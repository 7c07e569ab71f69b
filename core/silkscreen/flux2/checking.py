"""Whether a component's files hold what its configuration asks for, told by their headers before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from silkscreen import weights
from silkscreen.bases import Base, known_bases
from silkscreen.errors import BaseError, WeightsError
from silkscreen.flux2.configuration import component_classes, configuration, empty_model
from silkscreen.weights import TensorFile

_SHOWN = 5
_SCALES = (".weight_scale", ".scale_weight", ".input_scale", ".scale_input")
"""Ends of the names of numbers that float8 files keep beside their weights; the first two multiply a weight."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A component whose files fit its configuration.

    Attributes:
        name: of the component.
        place: its folder, or its single file.
        config: its configuration.
        model: of that configuration, without memory.
        files: its files, with tensors by the model's names.
        fingerprint: of the tensors' names and shapes.
        converted: the files hold tensors of other names and shapes than the model's, which are converted to these.
    """

    name: str
    place: Path
    config: Mapping[str, Any]
    model: nn.Module
    files: tuple[TensorFile, ...]
    fingerprint: str
    converted: bool

    @property
    def published(self) -> list[str]:
        """Ids of the known bases of whose published weights the tensors' names and shapes are."""
        return [base.id for base in known_bases().values() if base.fingerprints.get(self.name) == self.fingerprint]


def check_component(base: Base, name: str, place: Path) -> Checked:
    """Compare the headers of a component's files with its configuration.

    Args:
        base: the base it is for.
        name: one of `configuration.MODELS`.
        place: its folder in diffusers' layout, or, for a transformer, a single safetensors file.

    Raises:
        BaseError: a file is missing, cut short or another's; file and tensor are named.
    """
    config = configuration(base, name, place)
    model = empty_model(base, name, config)
    try:
        files = [weights.inspect(path) for path in _paths(place)]
    except WeightsError as error:
        raise BaseError(f"{base.id}: the {name} in {place} cannot be loaded: {error}") from error
    if name == "text_encoder":
        files = _named_as_in(model, files)
    held = [file.shapes for file in files]
    if place.is_file():
        files = [_as_in_diffusers(base, name, file) for file in files]
    problems = weights.differences(model, files)
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BaseError(
            f"{base.id}: the {name} in {place} cannot be loaded, its tensors are not those of its configuration:\n"
            f"{shown}{more}\nfetch it again, or name the files of another by components={{{name!r}: ...}} "
            f"or --component {name}=..."
        )
    shapes = {name: shape for file in files for name, shape in file.shapes.items()}
    converted = held != [file.shapes for file in files]
    return Checked(name, place, config, model, tuple(files), fingerprint(shapes), converted)


def fingerprint(shapes: Mapping[str, Iterable[int]]) -> str:
    """Return what tells a set of tensors by names and shapes: an MD5 of both, as it is published for FLUX.2."""
    told = [*shapes, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items())]
    return hashlib.md5(",".join(sorted(told)).encode(), usedforsecurity=False).hexdigest()


def single_file_tensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read a single safetensors file of a transformer, with its float8 weights multiplied by their scales."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    scales = {name: value for name, value in tensors.items() if name.endswith(_SCALES)}
    plain = {name.removeprefix("model.diffusion_model."): value for name, value in _without_scales(tensors).items()}
    for name, scale in scales.items():
        end = next(end for end in _SCALES if name.endswith(end))
        if end in _SCALES[:2]:
            weight = f"{name.removesuffix(end)}.weight".removeprefix("model.diffusion_model.")
            plain[weight] = (plain[weight].to(torch.float32) * scale.to(torch.float32)).to(dtype)
    return plain


def _paths(place: Path) -> list[Path]:
    """Return the safetensors files of a component: the one that `place` is, those its index names, or the only one."""
    if place.is_file():
        return [place]
    indexes = sorted(place.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise WeightsError(f"{indexes[0]} is no index of safetensors files ({error}): fetch it again") from error
        paths = [place / name for name in names]
    else:
        paths = sorted(place.glob("*.safetensors"))[:1]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = missing[0] if missing else f"{place}/*.safetensors"
        raise WeightsError(f"there is no {what}: fetch it again")
    return paths


def _named_as_in(model: Any, files: list[TensorFile]) -> list[TensorFile]:
    """Give the tensors of a text encoder's files the model's names, as transformers does when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    wanted = model.state_dict(keep_vars=True)
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    renamed = []
    for file in files:
        names = {}
        for name in file.shapes:
            new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, wanted)
            names[new] = name
        shapes = {new: file.shapes[name] for new, name in names.items()}
        renamed.append(TensorFile(file.path, shapes, names))
    tied = getattr(model, "_tied_weights_keys", None) or {}
    for copy, source in tied.items():
        if any(copy in file.shapes for file in renamed) or wanted[copy] is not wanted[source]:
            continue
        renamed = [
            TensorFile(file.path, {**file.shapes, copy: file.shapes[source]}, {**file.names, copy: file.names[source]})
            if source in file.shapes
            else file
            for file in renamed
        ]
    return renamed


def _as_in_diffusers(base: Base, name: str, file: TensorFile) -> TensorFile:
    """Give the tensors of a single file in the original naming the names and shapes that diffusers converts them to."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = component_classes(base)[name].__name__
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise BaseError(f"{base.id}: diffusers loads no {name} from a single file: name a folder")
    shapes = {key.removeprefix("model.diffusion_model."): shape for key, shape in _without_scales(file.shapes).items()}
    if "img_in.weight" not in shapes:
        return TensorFile(file.path, shapes)
    held = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        converted = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](checkpoint=held)
    except Exception as error:  # whatever a foreign file's names do to it
        raise BaseError(
            f"{base.id}: {file.path} is no FLUX.2 transformer in the original naming: {type(error).__name__} at {error}"
        ) from error
    return TensorFile(file.path, {key: tuple(value.shape) for key, value in converted.items()})


def _without_scales(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if not name.endswith(_SCALES) and name != "scaled_fp8"}
