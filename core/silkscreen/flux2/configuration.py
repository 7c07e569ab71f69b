"""What a base's components are: their classes and configurations, and models of them that take no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from silkscreen.bases import Base
from silkscreen.errors import BaseError
from silkscreen.weights import is_source

MODELS = ("transformer", "text_encoder", "vae")
"""The components that have weights."""


def component_classes(base: Base) -> dict[str, Any]:
    """Return the class of each component of a base's pipeline."""
    import diffusers
    import transformers

    if base.pipeline == "Flux2Pipeline":
        text = {
            "text_encoder": transformers.Mistral3ForConditionalGeneration,
            "tokenizer": transformers.AutoProcessor,
        }
    else:
        text = {"text_encoder": transformers.Qwen3ForCausalLM, "tokenizer": transformers.AutoTokenizer}
    return {
        "transformer": diffusers.Flux2Transformer2DModel,
        "vae": diffusers.AutoencoderKLFlux2,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        **text,
    }


def configuration(base: Base, name: str, place: Path | None = None) -> Mapping[str, Any]:
    """Return the configuration of a model of a base.

    Args:
        base: the base.
        name: one of `MODELS`.
        place: the model's folder, whose `config.json` is read; for a file or None that of the base's own folder, or, if
            there is none on this disk, what its `base.toml` says.

    Raises:
        BaseError: the file cannot be read.
    """
    if place is None or place.is_file():
        own = base.components.get(name, "")
        place = own if isinstance(own, Path) else base.folder / own if own and not is_source(own) else None
    if place is not None:
        path = place / "config.json"
        try:
            config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BaseError(
                f"{base.id}: {path} cannot be read ({error}): a component is a folder in diffusers' layout, "
                "with weights and a config.json"
            ) from error
        return config
    return vars(base.geometry) if name == "transformer" else base.configurations.get(name, {})


def construct(base: Base, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a new model of a base with random weights.

    Raises:
        BaseError: the configuration is another kind of model's, or none.
    """
    kind = component_classes(base)[name]
    said = config.get("_class_name") or (config.get("architectures") or [kind.__name__])[0]
    try:
        if said != kind.__name__:
            raise TypeError(f"it is of a {said}")
        if name != "text_encoder":
            model: nn.Module = kind.from_config(dict(config))
            return model
        encoder: Any = kind(kind.config_class.from_dict(dict(config)))
        encoder.tie_weights()
        return encoder  # type: ignore[no-any-return]
    except (TypeError, ValueError, KeyError) as error:
        raise BaseError(f"{base.id}: the configuration of the {name} is no {kind.__name__}'s: {error}") from error


def empty_model(base: Base, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a model of a base whose parameters take no memory.

    Raises:
        BaseError: the configuration is another kind of model's, or none.
    """
    with init_empty_weights(include_buffers=False):
        model = construct(base, name, config)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]  # registering empty parameters undoes it
    return model.eval().requires_grad_(False)
