"""The options `-t NAME input=value ...` and `--negative NAME input=value ...`, shared by the commands that draw."""

from __future__ import annotations

import re
from typing import Any

import click

from silkscreen import registry
from silkscreen.errors import InputError, SilkscreenError, UnknownNameError
from silkscreen.manifest import CONTROLS, Input, unknown_name

_OPTIONS = ("-t", "--template", "--negative")
_VALUE = re.compile(r"[^\W\d]\w*=", re.UNICODE)
_JOIN = "\x1f"

template_option = click.option(
    "-t",
    "--template",
    "templates",
    multiple=True,
    metavar="NAME [INPUT=VALUE]...",
    help="A template and its inputs, and its strength, start, end and region; may be repeated.",
)
negative_option = click.option(
    "--negative",
    "negatives",
    multiple=True,
    metavar="NAME [INPUT=VALUE]...",
    help="The same for the negative side of guidance.  [default: the templates' own negative values]",
)
bare_negative_option = click.option("--bare-negative", is_flag=True, help="No templates on the negative side.")
trust_code_option = click.option(
    "--trust-code", is_flag=True, help="Let the code of templates named by a folder or a hub's repository run."
)


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


def split_template(option: str) -> tuple[str, dict[str, tuple[Input, str]]]:
    """Take a folded template option apart, and tell which inputs its words are for.

    Nothing is imported for that: an input of a template that only its code can tell of is of type `any`.

    Args:
        option: what `TemplateCommand` made of `NAME input=value ...`.

    Returns:
        The template's name, and each input with the text of its value, by the input's name.

    Raises:
        UnknownNameError, UnavailableError, InputError: a name is unknown, or an input is given twice.
    """
    name, *words = option.split(_JOIN)
    manifest = registry.manifest(name)
    inputs = manifest.inputs if manifest else None
    known = {**(inputs or {}), **CONTROLS}
    values: dict[str, tuple[Input, str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        if inputs is not None and key not in known:
            raise UnknownNameError(f"-t {name}: {unknown_name('input', key, inputs)}")
        if key in values:
            raise InputError(f"-t {name}: {key} is given twice")
        values[key] = (known.get(key, Input(key, "any")), text)
    return name, values


def parse_template(option: str) -> dict[str, Any]:
    """Turn a folded template option into a template input.

    Raises:
        UnknownNameError, UnavailableError, InputError: a name is unknown, or a value is none of its type.
    """
    name, words = split_template(option)
    values: dict[str, Any] = {"model_id": name}
    for key, (spec, text) in words.items():
        try:
            values[key] = spec.parse(text)
            spec.check(values[key])
        except SilkscreenError as error:
            raise type(error)(f"-t {name}: {error}") from None
    return values
