"""Loading a base as a diffusers pipeline, and telling which base a pipeline is."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from silkscreen import registry, weights
from silkscreen.bases import Base, Geometry, Offload, find_base, known_bases
from silkscreen.errors import BaseError, PipelineError, UnknownNameError
from silkscreen.flux2.checking import Checked, check_component, single_file_tensors
from silkscreen.flux2.configuration import MODELS, component_classes
from silkscreen.flux2.placing import check_offload, place, speed_up
from silkscreen.flux2.quantizing import loading_options, parse_quantize, store_as_float8
from silkscreen.manifest import unknown_name
from silkscreen.weights import stream

_log = logging.getLogger("silkscreen")

_MARK = "_silkscreen_base"
_LOADED = "_silkscreen_loaded"


def load_base(
    base: str | Path | Base,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    hub: Literal["modelscope", "hf"] | None = None,
    revision: str | None = None,
    components: Mapping[str, str | Path] | None = None,
    offload: Offload = "none",
    quantize: str | Mapping[str, str] | None = None,
    compile: bool = False,  # noqa: A002, diffusers' word
    attention_backend: str | None = None,
    without: Collection[str] = (),
) -> Any:
    """Load a base.

    Names and shapes of all tensors are compared with the configuration's before any weights are read. Where they are
    those of published weights, the log says so.

    Args:
        base: the id of a known base, a folder in diffusers' layout, or a source of one (`hf:owner/repo@revision`).
        dtype: that is computed in; by default float32 on a CPU and bfloat16 on an accelerator.
        device: by default the accelerator, or the CPU where there is none.
        hub: where a known base's components are fetched from; by default where its `base.toml` says.
        revision: of the repository that they are fetched from; by default its newest.
        components: parts that come from elsewhere, by name: a folder, a source such as `hf:owner/repo:vae/`, or, for
            the transformer, one safetensors file in diffusers' or in the original naming, float8 ones included.
        offload: where weights are while they do not run: see `placing.place`.
        quantize: `int8`, `fp8` or `nf4` for transformer and text encoder, or one for each by name.
        compile: compile the transformer's blocks.
        attention_backend: one of diffusers' for the transformer, such as `native` or `flash`.
        without: components that are not loaded, and are None in the pipeline.

    Returns:
        A diffusers FLUX.2 pipeline.

    Raises:
        UnknownNameError: there is no such base or component.
        BaseError: it cannot be loaded; component, file and tensor are named. Or an option cannot be followed here.
        WeightsError: a component cannot be found or fetched.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    base = base if isinstance(base, Base) else describe_base(base)
    quantized = parse_quantize(quantize, device)
    check_offload(offload, quantized, device)
    pipeline = _pipeline_class(base)
    references = component_references(base, components, hub, revision)
    places = {name: locate_component(base, name, each) for name, each in references.items() if name not in without}
    checked = {name: check_component(base, name, place) for name, place in places.items() if name in MODELS}
    for name, found in checked.items():
        if found.published:
            _log.info("%s: the tensors of %s (fingerprint %s)", name, ", ".join(found.published), found.fingerprint)
        if found.converted and offload == "disk":
            raise BaseError(
                f"{base.id}: offload disk reads tensors as they are, and those of {found.place} have to be converted: "
                "name a file or folder in diffusers' naming, or another offload mode"
            )
    loaded: dict[str, Any] = dict.fromkeys(base.components)
    for name, place_ in places.items():
        try:
            if name not in checked:
                kind = component_classes(base)[name]
                loaded[name] = kind.from_pretrained(place_, local_files_only=True)
            elif offload == "disk":
                found = checked[name]
                loaded[name] = stream(found.model, found.files, dtype=dtype, device=device, kernels=_kernels(name))
            else:
                loaded[name] = _load_model(base, checked[name], dtype, quantized.get(name))
        except Exception as error:  # whatever diffusers and transformers raise on broken files
            raise BaseError(f"{base.id}: the {name} in {place_} cannot be loaded: {error}") from error
    pipe = pipeline(**loaded, **({"is_distilled": True} if base.distilled else {}))
    setattr(pipe, _MARK, base)
    setattr(
        pipe,
        _LOADED,
        {
            "dtype": str(dtype).removeprefix("torch."),
            "quantize": ", ".join(f"{name} {kind}" for name, kind in quantized.items()) or "none",
            "compile": str(compile).lower(),
            "attention_backend": attention_backend or "default",
            **{name: str(reference) for name, reference in references.items()},
        },
    )
    place(pipe, offload, device)
    if loaded["transformer"] is not None:
        speed_up(pipe, base, compiled=compile, attention_backend=attention_backend)
    return pipe


def component_references(
    base: Base,
    components: Mapping[str, str | Path] | None = None,
    hub: str | None = None,
    revision: str | None = None,
) -> dict[str, str | Path]:
    """Return where each component of a base comes from: what `components` says, or else the base, on a hub's revision.

    Raises:
        UnknownNameError: it has no such component.
        BaseError: a hub or revision is named, and nothing comes from one.
    """
    references = dict(base.components)
    sources = {name for name, reference in references.items() if weights.is_source(str(reference))}
    if (hub or revision) and not sources:
        raise BaseError(f"{base.id} is on this disk: leave hub and revision out")
    for name in sources:
        scheme, _, rest = str(references[name]).partition(":")
        repo, _, path = rest.partition(":")
        repo = f"{repo.partition('@')[0]}@{revision}" if revision else repo
        references[name] = f"{hub or scheme}:{repo}:{path}"
    for name, reference in (components or {}).items():
        if name not in references:
            raise UnknownNameError(f"{base.id}: {unknown_name('component', name, references)}")
        source = weights.is_source(str(reference)) and not Path(reference).exists()
        references[name] = reference if source else Path(reference)
    return references


def locate_component(base: Base, name: str, reference: str | Path) -> Path:
    """Return the local folder or file of a component, fetched if need be.

    Raises:
        BaseError: there is none.
        WeightsError: it cannot be fetched.
    """
    if isinstance(reference, Path):
        if reference.is_dir() or (name == "transformer" and reference.is_file()):
            return reference
        kinds = "a folder or a safetensors file" if name == "transformer" else "a folder"
        raise BaseError(f"{base.id}: the {name} is to come from {reference}, which is no {kinds[2:]}: name {kinds}")
    return weights.locate(reference, base.folder)


def describe_base(base: str | Path) -> Base:
    """Return the base of an id, in a folder, or of a source such as `modelscope:owner/repo`, which is fetched.

    Raises:
        UnknownNameError: there is no such base.
        WeightsError: the source cannot be had.
        BaseError: the folder is not in diffusers' layout.
    """
    if registry.is_source(str(base)):
        return describe_folder(_fetch(str(base)))
    return describe_folder(Path(base)) if Path(base).is_dir() else find_base(str(base))


def base_of(pipe: Any) -> Base:
    """Return the base that a pipeline is: the one it was loaded as, or the known one its transformer is like.

    Raises:
        PipelineError: its transformer is no FLUX.2's.
    """
    marked = getattr(pipe, _MARK, None)
    if isinstance(marked, Base):
        return marked
    try:
        geometry = Geometry.from_config(pipe.transformer.config)
    except (AttributeError, TypeError) as error:
        name = type(pipe).__name__
        raise PipelineError(
            f"{name} is no FLUX.2 pipeline: templates need one of diffusers' Flux2 pipelines"
        ) from error
    return _like(geometry, type(pipe).__name__, bool(pipe.config.get("is_distilled", False)))


def loaded_as(pipe: Any) -> dict[str, str]:
    """Return the options that a pipeline was loaded with and its pictures depend on; none for one not loaded here."""
    return dict(getattr(pipe, _LOADED, {}))


def describe_folder(folder: Path) -> Base:
    """Return the base in a folder of diffusers' layout, told by its configuration files.

    Raises:
        BaseError: the folder is not in that layout.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        base = _like(Geometry.from_config(config), index["_class_name"], index.get("is_distilled", False))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseError(
            f"{folder} is no base in diffusers' layout ({error}): "
            "it needs a model_index.json and a folder for each component"
        ) from error
    names = [name for name, value in index.items() if isinstance(value, list)]
    return Base(**{**vars(base), "components": {name: name for name in names}, "folder": folder})


def default_device() -> torch.device:
    """Return the accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return float32 for a CPU, where half precision is slow, and bfloat16 for an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def describe_transformer(folder: Path) -> Base:
    """Return the known base whose transformer is like the one in a folder, or a base of its own.

    Raises:
        BaseError: there is no FLUX.2 transformer in the folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _like(Geometry.from_config(config), "Flux2KleinPipeline", False)
    except (OSError, ValueError, TypeError) as error:
        raise BaseError(f"{folder} holds no FLUX.2 transformer in diffusers' layout: {error}") from error


def _fetch(source: str) -> Path:
    """Fetch a base's components, and nothing else that a repository has, and return its folder."""
    inside = source if ":" in source.partition(":")[2] else f"{source}:"
    index = registry.fetch(f"{inside}model_index.json")
    for name, value in json.loads(index.read_text(encoding="utf-8")).items():
        if isinstance(value, list):
            registry.fetch(f"{inside}{name}/")
    return index.parent


def _like(geometry: Geometry, pipeline: str, distilled: bool) -> Base:
    alike = [base for base in known_bases().values() if base.geometry == geometry]
    alike.sort(key=lambda base: base.distilled != distilled)
    if alike:
        return alike[0]
    return Base(
        id="unknown",
        title=f"a FLUX.2 of {geometry.num_layers} + {geometry.num_single_layers} blocks",
        licence="unknown",
        pipeline=pipeline,
        distilled=distilled,
        components={},
        geometry=geometry,
        call={},
        vocabulary=(),
        folder=Path(),
        distribution="",
    )


def _pipeline_class(base: Base) -> Any:
    import diffusers

    try:
        return getattr(diffusers, base.pipeline)
    except AttributeError:
        raise BaseError(f"{base.id}: diffusers {diffusers.__version__} has no pipeline {base.pipeline!r}") from None


def _load_model(base: Base, checked: Checked, dtype: torch.dtype, quantized: str | None) -> Any:
    kind = component_classes(base)[checked.name]
    options = loading_options(checked.name, quantized, dtype)
    if checked.place.is_file():
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(dict(checked.config) | {"_class_name": kind.__name__}))
            tensors = single_file_tensors(checked.place, dtype)
            model = kind.from_single_file(tensors, config=folder, torch_dtype=dtype, **options)
    else:
        named = {"dtype" if checked.name == "text_encoder" else "torch_dtype": dtype}
        model = kind.from_pretrained(checked.place, local_files_only=True, **named, **options)
    if quantized == "fp8":
        store_as_float8(model, dtype)
    elif quantized is None:
        model.to(memory_format=_kernels(checked.name))
    return model


def _kernels(component: str) -> torch.memory_format:
    """Return the memory format that a component's convolutions compute in: the VAE's take a third less time in it."""
    return torch.channels_last if component == "vae" else torch.preserve_format
