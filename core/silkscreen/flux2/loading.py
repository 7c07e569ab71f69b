"""Loading a base as a diffusers pipeline, and telling which base a pipeline is."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from silkscreen import registry, weights
from silkscreen.bases import Base, Geometry, find_base, known_bases
from silkscreen.errors import BaseError, PipelineError

_MARK = "_silkscreen_base"


def load_base(
    base: str | Path | Base,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    without: Collection[str] = (),
) -> Any:
    """Load a base.

    Args:
        base: the id of a known base, a folder in diffusers' layout, or a source of one (`hf:owner/repo@revision`).
        dtype: of the weights; by default float32 on a CPU and bfloat16 on an accelerator.
        device: by default the accelerator, or the CPU where there is none.
        without: components that are not loaded, and are None in the pipeline.

    Returns:
        An unmodified diffusers FLUX.2 pipeline.

    Raises:
        UnknownNameError: there is no such base.
        WeightsError: it cannot be fetched.
        BaseError: it cannot be loaded; the component is named.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    base = base if isinstance(base, Base) else describe_base(base)
    kind = {"is_distilled": True} if base.distilled else {}
    pipe = _pipeline_class(base)(**_load_components(base, dtype, without), **kind)
    setattr(pipe, _MARK, base)
    return pipe.to(device)


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


def _load_components(base: Base, dtype: torch.dtype, without: Collection[str]) -> dict[str, Any]:
    import diffusers
    import transformers

    loaders: dict[str, Any] = {
        "transformer": diffusers.Flux2Transformer2DModel,
        "vae": diffusers.AutoencoderKLFlux2,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }
    if base.pipeline == "Flux2Pipeline":
        loaders |= {
            "text_encoder": transformers.Mistral3ForConditionalGeneration,
            "tokenizer": transformers.AutoProcessor,
        }
    else:
        loaders |= {"text_encoder": transformers.Qwen3ForCausalLM, "tokenizer": transformers.AutoTokenizer}
    components: dict[str, Any] = {}
    for name, reference in base.components.items():
        if name in without:
            components[name] = None
            continue
        folder = reference if isinstance(reference, Path) else weights.locate(reference, base.folder)
        options = {"scheduler": {}, "tokenizer": {}, "text_encoder": {"dtype": dtype}}.get(name, {"torch_dtype": dtype})
        try:
            components[name] = loaders[name].from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # whatever diffusers and transformers raise on broken files
            raise BaseError(f"{base.id}: the {name} in {folder} cannot be loaded: {error}") from error
    return components
