"""`template.toml`: what a template is and which inputs it takes, told without importing it."""

from __future__ import annotations

import dataclasses
import enum
import math
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from silkscreen.errors import InputError, ManifestError, UnknownNameError
from silkscreen.files import sha256

INPUT_TYPES = ("number", "integer", "boolean", "text", "choice", "image", "mask", "any")
"""Types of template inputs. `any` is for inputs read from a signature, which does not tell; no manifest may use it."""


EXAMPLE_PROMPT = "a large red circle on a blue background"
"""What example commands draw: every base knows its words."""


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What ends the name of a picture, where an input's type does not tell that it takes one."""


class _Missing(enum.Enum):
    MISSING = "no value"


MISSING: Any = _Missing.MISSING
"""Stands where a value could be and there is none."""


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """A picture that a file holds.

    Attributes:
        path: where it is.
        sha256: checksum of the file, in hexadecimal; a file of another content is not opened.
    """

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path, name: str) -> PictureFile:
        """Take the picture at a path for an input.

        Raises:
            InputError: there is no such file.
        """
        if not path.is_file():
            raise InputError(f"{name}={path}: no such file")
        return cls(path, sha256(path))

    def open(self, name: str, mode: str) -> Any:
        """Return the picture, upright and in Pillow's `mode`, for an input.

        Raises:
            InputError: the file is gone, has changed, or is no picture.
        """
        from PIL import Image, ImageOps

        now = self.at(self.path, name).sha256
        if now != self.sha256:
            raise InputError(
                f"{name}={self.path}: the file has changed, its SHA-256 was {self.sha256} and is {now}: "
                "put the old one back, or give another picture"
            )
        try:
            with Image.open(self.path) as picture:
                return ImageOps.exif_transpose(picture).convert(mode)
        except OSError as error:
            raise InputError(f"{name}={self.path}: not a picture that Pillow reads ({error})") from error


@dataclasses.dataclass(frozen=True)
class Input:
    """One value that a template takes.

    Attributes:
        name: the parameter of `process_inputs`.
        type: one of `INPUT_TYPES`.
        many: takes a list of such values.
        minimum, maximum: inclusive bounds of a number or integer.
        choices: what a choice chooses from.
        default: the value when the caller gives none; `MISSING` makes the input required.
        negative: the value that suits the negative side; `MISSING` when that is the positive side's.
        help: what it does, in a few words.
    """

    name: str
    type: str
    many: bool = False
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    default: Any = MISSING
    negative: Any = MISSING
    help: str = ""

    @property
    def required(self) -> bool:
        """Whether the caller has to give a value."""
        return self.default is MISSING

    @property
    def range(self) -> str:
        """The values it takes, for people: `0 to 1`, `red, green or blue`, or nothing."""
        if self.choices:
            return " | ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"at least {self.minimum:g}"
        if self.maximum is not None:
            return f"at most {self.maximum:g}"
        return ""

    @property
    def example(self) -> str:
        """A value as it may be typed on a command line."""
        if self.type in ("image", "mask"):
            return f"{self.name}.png"
        if self.type == "number" and self.minimum is not None and self.maximum is not None:
            return f"{self.minimum + 0.8 * (self.maximum - self.minimum):g}"
        if self.choices:
            return self.choices[0]
        if not self.required and self.default not in ("", None):
            return str(self.default).lower()
        if self.type in ("number", "integer"):
            bound = self.minimum if self.minimum is not None else self.maximum
            return "1" if bound is None else f"{bound:g}"
        return "true" if self.type == "boolean" else '""'

    def parse(self, text: str) -> Any:
        """Turn what was typed on a command line into a value.

        A picture is named by its path. A list is separated by commas.

        Raises:
            InputError: it is no such value.
        """
        if self.many:
            return [dataclasses.replace(self, many=False).parse(part) for part in text.split(",")]
        if self.type in ("number", "integer"):
            try:
                return int(text) if self.type == "integer" else float(text)
            except ValueError:
                raise self._mismatch(text) from None
        if self.type == "boolean":
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if text.lower() not in words:
                raise self._mismatch(text)
            return words[text.lower()]
        if self.type in ("image", "mask"):
            return PictureFile.at(Path(text), self.name)
        if self.type == "any":
            if Path(text).suffix.lower() in PICTURE_SUFFIXES:
                return PictureFile.at(Path(text), self.name)
            try:
                return tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                return text
        return text

    def check(self, value: Any) -> Any:
        """Return the value, made exact in type and a picture opened, or say what is wrong with it.

        Raises:
            InputError: the value is of another type or out of range.
        """
        if self.many:
            values = value if isinstance(value, list | tuple) else [value]
            return [dataclasses.replace(self, many=False).check(each) for each in values]
        if self.type in ("number", "integer"):
            return self._check_number(value)
        if self.type == "boolean" and not isinstance(value, bool):
            raise self._mismatch(value)
        if self.type in ("text", "choice") and not isinstance(value, str):
            raise self._mismatch(value)
        if self.type == "choice" and value not in self.choices:
            raise InputError(f"{self.name}={value!r}: choose one of {', '.join(self.choices)}")
        if self.type in ("image", "mask"):
            from PIL import Image

            if isinstance(value, PictureFile):
                return value.open(self.name, "L" if self.type == "mask" else "RGB")
            if not isinstance(value, Image.Image):
                raise self._mismatch(value)
        if self.type == "any" and isinstance(value, PictureFile):
            return value.open(self.name, "RGB")
        return value

    def _check_number(self, value: Any) -> float | int:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self._mismatch(value)
        number = float(value)
        low = self.minimum is not None and number < self.minimum
        high = self.maximum is not None and number > self.maximum
        if low or high or not math.isfinite(number):
            raise InputError(f"{self.name}={value!r} is out of range: it goes from {self.range}")
        if self.type == "number":
            return number
        if not number.is_integer():
            raise self._mismatch(value)
        return int(number)

    def _mismatch(self, value: Any) -> InputError:
        kind = {"image": "a picture (PIL.Image)", "mask": "a mask picture (PIL.Image)", "any": "a value"}
        wanted = kind.get(self.type, f"a value of type {self.type}")
        return InputError(f"{self.name}={value!r}: expected {wanted}, got {type(value).__name__}")


CONTROLS = {
    spec.name: spec
    for spec in (
        Input("strength", "number", minimum=0.0, default=1.0, help="how strongly it acts: 0 off, 1 as trained"),
        Input("start", "number", minimum=0.0, maximum=1.0, default=0.0, help="the fraction of the steps it acts from"),
        Input("end", "number", minimum=0.0, maximum=1.0, default=1.0, help="the fraction of the steps it acts until"),
        Input("region", "mask", default=None, help="where it acts, white on black; everywhere without it"),
    )
}
"""What template inputs take beside the template's own inputs; see `silkscreen.control`."""

RESERVED_NAMES = ("model_id", "pipe", *CONTROLS)
"""Names that mean the same for every template; no input may use them."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a template says about itself.

    Attributes:
        title, summary: for people.
        bases: ids of the bases it was trained for; empty when it does not say.
        carriers: names of the carriers its cache holds.
        inputs: its inputs by name; None when it does not say, and they are read from the code.
    """

    title: str
    summary: str = ""
    bases: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()
    inputs: Mapping[str, Input] | None = None


def read_manifest(path: Path) -> Manifest:
    """Read a `template.toml`.

    Raises:
        ManifestError: with everything that is wrong in it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not a TOML file: {error}") from error
    problems: list[str] = []
    known = {"title", "summary", "bases", "carriers", "inputs"}
    problems += [f"unknown key {key!r}: known are {', '.join(sorted(known))}" for key in data.keys() - known]
    for key in ("title", "summary"):
        if not isinstance(data.get(key, ""), str):
            problems.append(f"{key} has to be text")
    for key in ("bases", "carriers"):
        if not _is_list_of_text(data.get(key, [])):
            problems.append(f"{key} has to be a list of text")
    tables = data.get("inputs")
    inputs: dict[str, Input] | None = None
    if tables is not None and not isinstance(tables, dict):
        problems.append("inputs has to be a table, one [inputs.NAME] for each input")
    elif tables is not None:
        inputs = {name: _read_input(name, table, problems) for name, table in tables.items()}
    if problems:
        raise ManifestError(f"{path}: " + "; ".join(problems))
    return Manifest(
        title=data.get("title", ""),
        summary=data.get("summary", ""),
        bases=tuple(data.get("bases", ())),
        carriers=tuple(data.get("carriers", ())),
        inputs=inputs,
    )


def check_values(inputs: Mapping[str, Input], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values against inputs and fill in defaults.

    Raises:
        UnknownNameError: a value has no input; the nearest one is named.
        InputError: a value is missing, of another type or out of range.
    """
    for name in values:
        if name not in inputs:
            raise UnknownNameError(unknown_name("input", name, inputs))
    checked = {}
    for name, spec in inputs.items():
        if name in values:
            checked[name] = spec.check(values[name])
        elif spec.required:
            raise InputError(f"input {name!r} ({spec.type}) is missing: {spec.help or 'give it a value'}")
        elif spec.default is not None:
            checked[name] = spec.default
    return checked


def example_command(template: str, inputs: Mapping[str, Input]) -> str:
    """Return a command that draws with a template; its pictures are files of the inputs' names."""
    words = [f"{spec.name}={spec.example}" for spec in inputs.values()]
    return " ".join(["silkscreen generate", repr(EXAMPLE_PROMPT), "-t", template, *words, "-o picture.png"])


def unknown_name(kind: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Return the message for a name nobody goes by: the nearest known ones, or all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {kind} {name!r}: known are {', '.join(names) or 'none'}"


def _read_input(name: str, table: Any, problems: list[str]) -> Input:
    where = f"[inputs.{name}]"
    if not isinstance(table, dict):
        problems.append(f"{where} has to be a table")
        return Input(name, "text")
    known = {field.name for field in dataclasses.fields(Input)} - {"name"} | {"optional"}
    problems += [f"{where} unknown key {key!r}: known are {', '.join(sorted(known))}" for key in table.keys() - known]
    if name in RESERVED_NAMES:
        problems.append(f"{where} may not have this name, which means the same for every template: rename the input")
    elif not name.isidentifier():
        problems.append(f"{where} may not have this name: it is no identifier")
    if table.get("type") not in INPUT_TYPES[:-1]:
        problems.append(f"{where} type is {table.get('type')!r}: it has to be one of {', '.join(INPUT_TYPES[:-1])}")
        return Input(name, "text")
    if table["type"] == "choice" and not (table.get("choices") and _is_list_of_text(table["choices"])):
        problems.append(f"{where} a choice needs choices, a list of text")
        return Input(name, "text")
    given = {key: value for key, value in table.items() if key in known - {"optional"}}
    if table.get("optional") is True:
        given.setdefault("default", None)
    elif "optional" in table:
        problems.append(f"{where} optional is for inputs that may be left out: make it true, or leave it out")
    result = Input(name, **{**given, "choices": tuple(given.get("choices", ()))})
    for key in ("minimum", "maximum"):
        bound = table.get(key)
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float)):
            problems.append(f"{where} {key} has to be a number")
            return Input(name, "text")
    for key in ("default", "negative"):
        if key in table:
            try:
                result.check(table[key])
            except InputError as error:
                problems.append(f"{where} {key}: {error}")
    return result


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
