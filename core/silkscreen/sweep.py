"""A sweep: pictures of all combinations of a few varied values, as labelled grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from PIL import Image

from silkscreen.errors import InputError, SilkscreenError
from silkscreen.manifest import Input, PictureFile
from silkscreen.recipe import Recipe, run_together
from silkscreen.sheet import contact_sheet

if TYPE_CHECKING:
    from silkscreen.pipeline import TemplatePipeline

MOST_AXES = 3
"""Columns, rows and pages."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A value that a sweep varies.

    Attributes:
        name: what it varies, for the labels.
        field: the recipe's field; `template_inputs` for an input.
        values: the values it takes.
        place: for an input, the index of the template input and the input's name.
    """

    name: str
    field: str
    values: Sequence[Any]
    place: tuple[int, str] | None = None

    def apply(self, data: dict[str, Any], value: Any) -> dict[str, Any]:
        """Return a recipe, as a dict, with one of the values in its place."""
        if self.place is None:
            return {**data, self.field: value}
        index, key = self.place
        inputs = list(data[self.field])
        inputs[index] = {**inputs[index], key: value}
        return {**data, self.field: inputs}

    def label(self, value: Any) -> str:
        """Return how a value is written beside its pictures."""
        if self.field == "prompt":
            return str(value)
        if isinstance(value, PictureFile):
            value = value.path.name
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


def parse_values(spec: Input, text: str) -> list[Any]:
    """Turn what was typed for an input into the values it takes.

    Values are separated by commas, those of text, of lists and of an input whose type is not known by `|`. Numbers may
    also be a range, `START:STOP:COUNT`, both ends included.

    Raises:
        InputError: a value is none of the input's type or out of its range; the whole text is named.
    """
    try:
        if spec.type in ("number", "integer") and not spec.many and ":" in text:
            values = _parse_range(spec, text)
        else:
            separator = "|" if spec.many or spec.type in ("text", "any") else ","
            values = [spec.parse(part) for part in text.split(separator)]
        for value in values:
            spec.check(value)
    except SilkscreenError as error:
        raise type(error)(f"{spec.name}={text}: {error}") from None
    return values


def _parse_range(spec: Input, text: str) -> list[Any]:
    try:
        start_text, stop_text, count_text = text.split(":")
        start, stop, count = float(start_text), float(stop_text), int(count_text)
    except ValueError:
        raise InputError("a range is START:STOP:COUNT, as 0.1:0.9:5") from None
    if count < 2:
        raise InputError(f"a range has at least 2 values, not {count}")
    values = [float(f"{start + (stop - start) * n / (count - 1):.12g}") for n in range(count)]
    return [spec.check(value) for value in values]


def recipes_of(data: dict[str, Any], axes: Sequence[Axis]) -> list[Recipe]:
    """Return a recipe for each combination, the first axis running fastest.

    Args:
        data: what they share, as `Recipe.from_dict` takes it.
        axes: columns, rows and pages.

    Raises:
        InputError: there are no axes, or too many.
        RecipeError, UnknownNameError, UnavailableError, InputError: see `Recipe.from_dict`.
    """
    if not 1 <= len(axes) <= MOST_AXES:
        names = ", ".join(axis.name for axis in axes) or "nothing"
        raise InputError(
            f"a sweep varies 1 to {MOST_AXES} values (columns, rows and pages), this one varies {names}: "
            "give several values to some of them, as scale=0.1:0.9:5 or scale=0.2,0.8"
        )
    recipes = []
    for combination in product(*(axis.values for axis in reversed(axes))):
        one = data
        for axis, value in zip(reversed(axes), combination, strict=True):
            one = axis.apply(one, value)
        recipes.append(Recipe.from_dict(one))
    return recipes


def draw_sweep(
    recipes: Sequence[Recipe], pipe: Any, templates: TemplatePipeline, batch_size: int
) -> Iterator[tuple[int, Recipe, Image.Image]]:
    """Draw pictures, as many at once as can be; give each one's index, recipe and picture when it is drawn.

    Args:
        recipes: completed.
        pipe: the base, loaded.
        templates: with all templates that the recipes need.
        batch_size: how many pictures are drawn at once at most.
    """
    alike: dict[Any, list[int]] = {}
    for index, recipe in enumerate(recipes):
        alike.setdefault((recipe.steps, recipe.guidance_scale, recipe.height, recipe.width), []).append(index)
    for group in alike.values():
        for start in range(0, len(group), batch_size):
            some = group[start : start + batch_size]
            batch = [
                dataclasses.replace(recipes[index], batch_size=len(some), batch_index=place)
                for place, index in enumerate(some)
            ]
            yield from zip(some, batch, run_together(batch, pipe, templates), strict=True)


def grids(pictures: Sequence[Image.Image], axes: Sequence[Axis]) -> list[Image.Image]:
    """Return the labelled grids of pictures in the order of `recipes_of`, one for each value of the third axis."""
    labels = [[axis.label(value) for value in axis.values] for axis in axes] + [[""]] * (MOST_AXES - len(axes))
    columns, rows, pages = labels
    size = len(columns) * len(rows)
    above = [*columns, *[""] * (size - len(columns))]
    return [
        contact_sheet(pictures[n * size : (n + 1) * size], above, len(columns), rows, title)
        for n, title in enumerate(pages)
    ]
