"""A recipe: everything that a picture is made from. Every PNG carries its own, and a TOML file can hold one."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import importlib_metadata
import tomli_w
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from silkscreen import __version__, registry
from silkscreen.control import Control
from silkscreen.errors import InputError, RecipeError, SilkscreenError
from silkscreen.files import replacing, sha256
from silkscreen.manifest import CONTROLS, Input, PictureFile, check_values

if TYPE_CHECKING:
    from silkscreen.pipeline import TemplatePipeline

KEY = "silkscreen"
"""The text chunk of a PNG that holds its recipe, as JSON."""

FIELDS = {
    field.name: field
    for field in (
        Input("prompt", "text"),
        Input("base", "text", default="flux2-tiny"),
        Input("seed", "integer", default=0),
        Input("steps", "integer", minimum=1, default=None),
        Input("guidance_scale", "number", default=None),
        Input("height", "integer", minimum=16, default=None),
        Input("width", "integer", minimum=16, default=None),
        Input("batch_size", "integer", minimum=1, default=1),
        Input("batch_index", "integer", minimum=0, default=0),
    )
}
"""The plain fields of a recipe, checked as template inputs are."""

_SETTINGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "height": "height",
    "width": "width",
}
"""Fields that the base has defaults for, and the pipeline's arguments that they are."""

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a picture is made from.

    Attributes:
        prompt: what it shows.
        base: id of a base, or a folder in diffusers' layout.
        seed: of its noise.
        steps: denoising steps; the base's default when None, as for the following ones.
        guidance_scale: strength of guidance.
        height, width: in pixels.
        template_inputs: of the positive side, each with its `model_id`; a picture is a `PictureFile`.
        negative_template_inputs: of the negative side; `"default"` takes the templates' own negative values.
        batch_size, batch_index: how many pictures were drawn at once and which it is, from 0, because that decides the
            last bits of its colours.
        made_with: versions of the `libraries` and `templates`, SHA-256 of the `weights`, and how the base was `loaded`;
            for the record.
    """

    prompt: str
    base: str = "flux2-tiny"
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    template_inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    negative_template_inputs: list[dict[str, Any]] | Literal["default"] = "default"
    batch_size: int = 1
    batch_index: int = 0
    made_with: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path = Path()) -> Recipe:
        """Take a recipe as JSON and TOML hold it; nothing heavy is imported or loaded to check it.

        Args:
            data: its fields. A picture is a path, or a table of `path` and `sha256`.
            folder: what paths of pictures are relative to.

        Raises:
            RecipeError: it is no recipe.
            UnknownNameError, UnavailableError, InputError: a field or a template input is wrong.
        """
        if "pictures" in data:
            raise RecipeError(
                f"it is a grid of {len(data['pictures'])} pictures: `silkscreen show` prints the recipe of each, "
                "which a TOML file of its own can hold"
            )
        plain = dict(data)
        positive = _read_inputs(plain.pop("template_inputs", []), folder, "template_inputs")
        negative = plain.pop("negative_template_inputs", "default")
        if negative != "default":
            negative = _read_inputs(negative, folder, "negative_template_inputs")
        made_with = plain.pop("made_with", {})
        if not isinstance(made_with, Mapping) or not all(isinstance(table, Mapping) for table in made_with.values()):
            raise RecipeError("made_with has to be a table of tables: leave it out, it is only for the record")
        recipe = cls(
            **check_values(FIELDS, plain),
            template_inputs=positive,
            negative_template_inputs=negative,
            made_with=made_with,
        )
        if recipe.batch_index >= recipe.batch_size:
            raise InputError(f"batch_index={recipe.batch_index} of batch_size={recipe.batch_size}, from 0")
        return recipe

    @classmethod
    def load(cls, path: Path, **changes: Any) -> Recipe:
        """Read the recipe in a PNG or a TOML file.

        Args:
            path: a file that ends in `.toml`, or a picture.
            **changes: fields that take the place of the file's.

        Raises:
            RecipeError, UnknownNameError, UnavailableError, InputError: see `from_dict`.
        """
        data = read(path)
        try:
            return cls.from_dict({**data, **changes}, path.parent)
        except SilkscreenError as error:
            raise type(error)(f"{path}: {error}") from None

    def to_dict(self, folder: Path = Path()) -> dict[str, Any]:
        """Return what `from_dict` takes, with the paths of pictures relative to a folder."""
        data = {name: value for name, value in vars(self).items() if value is not None and value != {}}
        for name in ("template_inputs", "negative_template_inputs"):
            if data[name] != "default":
                data[name] = _relocate(data[name], folder)
        if self.batch_size == 1:
            del data["batch_size"], data["batch_index"]
        return data

    def save_toml(self, path: Path) -> None:
        """Write the recipe to a TOML file, whole or not at all."""
        with replacing(path) as partial:
            partial.write_text(tomli_w.dumps(self.to_dict(path.parent)), encoding="utf-8")

    @property
    def template_names(self) -> list[str]:
        """The templates it needs, each once, in the order of their inputs."""
        negative = self.negative_template_inputs if self.negative_template_inputs != "default" else []
        return list(dict.fromkeys(given["model_id"] for given in [*self.template_inputs, *negative]))

    def completed(self, pipe: Any, templates: TemplatePipeline) -> Recipe:
        """Return the recipe with the base's settings and what is installed filled in.

        Warns of each library, template, weight file or option of loading that is not what the recipe was made with.

        Raises:
            ContractError: a template has no weights for the base.
        """
        from silkscreen.flux2.loading import base_of, loaded_as

        base = base_of(pipe)
        settings: dict[str, Any] = {
            field: base.call.get(name) for field, name in _SETTINGS.items() if getattr(self, field) is None
        }
        libraries = {"silkscreen": __version__, **{name: importlib_metadata.version(name) for name in _LIBRARIES}}
        for entry in registry.entries(registry.BASES):
            if entry.name == base.id:
                libraries[entry.distribution] = entry.version
        used = {name: templates.find(name) for name in self.template_names}
        made_with = {
            "libraries": libraries,
            "templates": {name: template.origin for name, template in used.items()},
            "weights": {
                f"{name}/{path.name}": sha256(path)
                for name, template in used.items()
                for path in template.weight_files(base.id)
            },
            "loaded": loaded_as(pipe),
        }
        for table, installed in made_with.items():
            for name, now in installed.items():
                before = self.made_with.get(table, {}).get(name, now)
                if before != now:
                    warnings.warn(
                        f"the picture may differ: {name} was {before} when the recipe was made, and is {now} now",
                        stacklevel=2,
                    )
        return dataclasses.replace(self, **settings, made_with=made_with)

    def run(self, pipe: Any, templates: TemplatePipeline) -> Image.Image:
        """Draw the picture: to the bit the same each time, on one machine with one set of versions.

        Args:
            pipe: the base, loaded.
            templates: with all templates that the recipe needs.

        Raises:
            UnknownNameError, InputError, CacheError, PipelineError: see `TemplatePipeline`.
        """
        return run_together([self] * self.batch_size, pipe, templates)[self.batch_index]


def run_together(recipes: Sequence[Recipe], pipe: Any, templates: TemplatePipeline) -> list[Image.Image]:
    """Draw pictures of equal steps, guidance scale and size as one batch.

    Raises:
        RecipeError: the recipes differ in one of these.
        UnknownNameError, InputError, CacheError, PipelineError: see `TemplatePipeline`.
    """
    import torch

    arguments = {name: getattr(recipes[0], field) for field, name in _SETTINGS.items()}
    for recipe in recipes:
        for field in _SETTINGS:
            if getattr(recipe, field) != getattr(recipes[0], field):
                raise RecipeError(f"recipes of one batch differ in {field}: draw them in batches of their own")
    negatives: Any = "default"
    if any(recipe.negative_template_inputs != "default" for recipe in recipes):
        negatives = [
            templates.default_negatives(recipe.template_inputs)
            if recipe.negative_template_inputs == "default"
            else recipe.negative_template_inputs
            for recipe in recipes
        ]
    result = templates(
        pipe,
        prompt=[recipe.prompt for recipe in recipes],
        template_inputs=[recipe.template_inputs for recipe in recipes],
        negative_template_inputs=negatives,
        generator=[torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes],
        **{name: value for name, value in arguments.items() if value is not None},
    )
    pictures: list[Image.Image] = result.images
    return pictures


def save_picture(picture: Image.Image, path: Path, recipes: Recipe | Sequence[Recipe]) -> None:
    """Write a picture with its recipe, or a grid with those of its pictures, whole or not at all."""
    if isinstance(recipes, Recipe):
        data = recipes.to_dict(path.parent)
    else:
        data = {"pictures": [recipe.to_dict(path.parent) for recipe in recipes]}
    chunks = PngInfo()
    chunks.add_itxt(KEY, json.dumps(data, ensure_ascii=False))
    with replacing(path) as partial:
        picture.save(partial, pnginfo=chunks)


def read(path: Path) -> dict[str, Any]:
    """Return the recipe in a PNG or a TOML file as the file holds it, unchecked.

    Raises:
        RecipeError: the file holds none.
    """
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text(encoding="utf-8"))
        with Image.open(path) as picture:
            data = json.loads(picture.info[KEY])
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except KeyError:
        raise RecipeError(f"{path} carries no recipe: PNGs that Silkscreen drew do, unless it was stripped") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} holds no recipe: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: its text chunk {KEY!r} is no JSON object")
    return data


def _read_inputs(given: Any, folder: Path, where: str) -> list[dict[str, Any]]:
    """Check template inputs as files hold them, as far as manifests tell, and fill in the manifests' defaults."""
    listed = [given] if isinstance(given, Mapping) else given
    if not isinstance(listed, list) or not all(isinstance(values, Mapping) for values in listed):
        raise InputError(
            f"{where} has to be a list of template inputs, as [{{'model_id': 'brightness', 'scale': 0.8}}]"
        )
    result = []
    for index, values in enumerate(listed):
        name = values.get("model_id")
        if not isinstance(name, str):
            raise InputError(f"{where}[{index}] has no model_id: name its template")
        manifest = registry.manifest(name)
        try:
            result.append(_read_values(dict(values), manifest.inputs if manifest else None, folder))
        except SilkscreenError as error:
            raise type(error)(f"{where}[{index}] for {name!r}: {error}") from None
    return result


def _read_values(values: dict[str, Any], inputs: Mapping[str, Input] | None, folder: Path) -> dict[str, Any]:
    name = values.pop("model_id")
    known = {**(inputs or {}), **CONTROLS}
    pictures = {
        key: [_picture(key, each, folder) for each in value]
        if isinstance(value, list)
        else _picture(key, value, folder)
        for key, value in values.items()
        if (key in known and known[key].type in ("image", "mask")) or (inputs is None and isinstance(value, Mapping))
    }
    values |= pictures
    controls = {key: values.pop(key) for key in CONTROLS if key in values}
    control = Control.from_values(controls)
    checked = values if inputs is None else check_values(inputs, values)  # else only the template's code can tell
    return {"model_id": name, **checked, **{key: getattr(control, key) for key in controls}, **pictures}


def _picture(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return PictureFile.at(folder / value, key)
    if isinstance(value, Mapping) and value.keys() == {"path", "sha256"}:
        return PictureFile(folder / value["path"], value["sha256"])
    return value


def _relocate(value: Any, folder: Path) -> Any:
    """Return template inputs as files in a folder hold them."""
    if isinstance(value, PictureFile):
        return {"path": Path(os.path.relpath(value.path, folder)).as_posix(), "sha256": value.sha256}
    if isinstance(value, dict):
        return {key: _relocate(each, folder) for key, each in value.items()}
    return [_relocate(each, folder) for each in value] if isinstance(value, list) else value
