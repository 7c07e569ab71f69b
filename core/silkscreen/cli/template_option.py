"""The options `-t NAME input=value ...` and `--negative NAME input=value ...`, shared by the commands that draw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from silkscreen.errors import InputError, SilkscreenError, UnknownNameError
from silkscreen.manifest import Input, unknown_name

_OPTIONS = ("-t", "--template", "--negative")
_VALUE = re.compile(r"[^\W\d]\w*=", re.UNICODE)
_JOIN = "\x1f"


class TemplateCommand(click.Command):
    """A command whose template options take a name and then any number of `input=value`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Fold each template option and its values into one word before click sees them."""
        folded: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            folded.append(word)
            if word in _OPTIONS and rest:
                parts = [rest.pop(0)]
                while rest and _VALUE.match(rest[0]):
                    parts.append(rest.pop(0))
                folded.append(_JOIN.join(parts))
        return super().parse_args(ctx, folded)


def parse_template(option: str, inputs_of: Mapping[str, Mapping[str, Input]]) -> dict[str, Any]:
    """Turn a folded template option into a template input.

    Args:
        option: what `TemplateCommand` made of `NAME input=value ...`.
        inputs_of: the inputs of each template, by its name.

    Raises:
        UnknownNameError, InputError: a name is unknown, or a value is none of its type.
    """
    name, *words = option.split(_JOIN)
    inputs = inputs_of[name]
    values: dict[str, Any] = {"model_id": name}
    for word in words:
        key, _, text = word.partition("=")
        if key not in inputs:
            raise UnknownNameError(f"-t {name}: {unknown_name('input', key, inputs)}")
        if key in values:
            raise InputError(f"-t {name}: {key} is given twice")
        try:
            values[key] = inputs[key].check(inputs[key].parse(text))
        except SilkscreenError as error:
            raise type(error)(f"-t {name}: {error}") from None
    return values


def template_names(options: Sequence[str]) -> list[str]:
    """Return the names in folded template options, each once, in their order."""
    return list(dict.fromkeys(option.split(_JOIN)[0] for option in options))
