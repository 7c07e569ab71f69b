"""A template's inputs where no manifest tells of them, and values that inputs may have."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from silkscreen.manifest import Input
from silkscreen.template import Template, inputs_from_signature

PROMPTS = ("a large red circle on a blue background", "a small yellow star on a purple background")
"""Prompts that every base knows the words of."""

_WORDS = {"mask": ("mask",), "image": ("image", "picture", "photo"), "text": ("prompt", "text", "caption")}
"""What names of parameters tell of their types."""

_NUMBERS = ("age", "amount", "b", "g", "r", "scale", "value", "weight")
"""Names of parameters that published templates take numbers by."""

_ANNOTATIONS = {"bool": "boolean", "int": "integer", "float": "number", "str": "text", "Image": "image"}
_DEFAULTS = {bool: "boolean", int: "number", float: "number", str: "text"}  # 1 is as often meant as 1.0


def inputs_of(template: Template) -> dict[str, Input]:
    """Return a template's inputs: the manifest's, or those of its signature with their types guessed."""
    if template.manifest is not None and template.manifest.inputs is not None:
        return dict(template.manifest.inputs)
    return guessed_inputs(template.module.TEMPLATE_MODEL)


def guessed_inputs(model: type) -> dict[str, Input]:
    """Return the inputs that a model's `process_inputs` takes, typed by annotation, default or name.

    One that none of these tells of, or that could have any value, stays of type `any`.
    """
    parameters = inspect.signature(model.process_inputs).parameters  # type: ignore[attr-defined]
    return {name: _guessed(spec, parameters[name].annotation) for name, spec in inputs_from_signature(model).items()}


def _guessed(spec: Input, annotation: Any) -> Input:
    told = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    told = told.removesuffix(" | None").rpartition(".")[2]
    kind = _ANNOTATIONS.get(told) or _DEFAULTS.get(type(spec.default)) or ""
    if not kind or kind == "image":
        named = [kind for kind, words in _WORDS.items() if any(word in spec.name.lower() for word in words)]
        kind = named[0] if named else kind or ("number" if spec.name.lower() in _NUMBERS else "")
    known = {"default": spec.default} if type(spec.default) in _DEFAULTS else {}
    if spec.default is None and kind in ("image", "mask", "text"):
        return Input(spec.name, kind, default=None)
    if not kind or (not spec.required and not known):
        return spec
    return Input(spec.name, kind, **known)


def plain_values(inputs: Mapping[str, Input], size: tuple[int, int], variant: int) -> dict[str, Any]:
    """Return a value for each input.

    Args:
        inputs: the inputs, by name.
        size: width and height of pictures.
        variant: 0 or 1, of which each gives most inputs another value.
    """
    return {
        name: spec.default if spec.type == "any" and not spec.required else _value(spec, size, variant)
        for name, spec in inputs.items()
    }


def _value(spec: Input, size: tuple[int, int], variant: int) -> Any:
    if spec.many:
        return [_value(Input(**{**vars(spec), "many": False}), size, variant)]
    if spec.type in ("image", "mask"):
        drawn = np.zeros((size[1], size[0], 3), np.uint8)
        drawn[size[1] // 4 : size[1] // 2, size[0] // (3 + variant) :] = (255, 255 - 100 * variant, 255)
        return Image.fromarray(drawn).convert("L" if spec.type == "mask" else "RGB")
    if spec.choices:
        return spec.choices[-variant]
    if spec.type == "text":
        return PROMPTS[variant]
    if spec.type == "boolean":
        return not variant
    low = spec.minimum if spec.minimum is not None else 0.0 if spec.maximum is None else spec.maximum - 1
    high = spec.maximum if spec.maximum is not None else low + 1
    value = low + (0.8 - 0.5 * variant) * (high - low)
    return round(value) if spec.type == "integer" else value
