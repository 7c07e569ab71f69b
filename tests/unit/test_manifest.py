from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from PIL import Image
from silkscreen.errors import InputError, ManifestError, UnknownNameError
from silkscreen.manifest import Input, check_values, read_manifest

SCALE = Input("scale", "number", minimum=0.0, maximum=1.0, default=0.5)


def written(folder: Path, text: str) -> Path:
    path = folder / "template.toml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_manifest_is_read_whole(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        title = "Brightness"
        bases = ["flux2-tiny"]
        carriers = ["kv_cache"]
        [inputs.scale]
        type = "number"
        minimum = 0
        maximum = 1
        default = 0.5
        negative = 0.25
        """,
    )
    manifest = read_manifest(path)
    assert manifest.title == "Brightness"
    assert manifest.bases == ("flux2-tiny",)
    assert manifest.inputs is not None
    assert manifest.inputs["scale"].negative == 0.25
    assert manifest.inputs["scale"].range == "0 to 1"


def test_every_problem_of_a_manifest_is_reported_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        titel = "Brightness"
        bases = "flux2-tiny"
        [inputs.scale]
        type = "float"
        [inputs.strength]
        type = "number"
        [inputs.amount]
        type = "number"
        maximum = 1
        default = 2
        """,
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    for part in ("titel", "bases", "'float'", "strength", "amount=2 is out of range", str(path)):
        assert part in str(caught.value)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"template.toml: not a TOML file"):
        read_manifest(written(tmp_path, "title = "))


def test_defaults_are_filled_in() -> None:
    assert check_values({"scale": SCALE}, {}) == {"scale": 0.5}


def test_a_whole_number_becomes_a_number() -> None:
    value = check_values({"scale": SCALE}, {"scale": 1})["scale"]
    assert value == 1.0
    assert isinstance(value, float)


def test_an_unknown_input_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown input 'scael': did you mean 'scale'"):
        check_values({"scale": SCALE}, {"scael": 1.0})


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InputError, match=r"'image' .* is missing"):
        check_values({"image": Input("image", "image")}, {})


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_value_out_of_range_gets_the_range(value: float) -> None:
    with pytest.raises(InputError, match="0 to 1"):
        SCALE.check(value)


@pytest.mark.parametrize("value", ["0.5", True, None, [0.5]])
def test_a_value_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="expected a value of type number"):
        SCALE.check(value)


def test_text_is_parsed_by_type(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), "red").save(tmp_path / "a.png")
    assert SCALE.parse("0.25") == 0.25
    assert Input("n", "integer").parse("3") == 3
    assert Input("b", "boolean").parse("yes") is True
    assert Input("many", "number", many=True).parse("1,2") == [1.0, 2.0]
    image = Input("image", "image")
    picture = image.check(image.parse(str(tmp_path / "a.png")))
    assert (picture.mode, picture.size) == ("RGB", (4, 2))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    image = Input("image", "image")
    with pytest.raises(InputError, match=r"a\.png: not a picture"):
        image.check(image.parse(str(tmp_path / "a.png")))
    with pytest.raises(InputError, match="no such file"):
        image.parse(str(tmp_path / "b.png"))


def test_a_picture_that_has_changed_is_refused(tmp_path: Path) -> None:
    image = Input("image", "image")
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    picture = image.parse(str(tmp_path / "a.png"))
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"a\.png: the file has changed, its SHA-256 was {picture.sha256} and is"):
        image.check(picture)


def test_an_optional_input_may_be_left_out_and_is_then_not_given(tmp_path: Path) -> None:
    text = '[inputs.mask]\ntype = "mask"\noptional = {}\n'
    inputs = read_manifest(written(tmp_path, text.format("true"))).inputs
    assert inputs is not None
    assert check_values(inputs, {}) == {}
    with pytest.raises(ManifestError, match=r"\[inputs\.mask\] optional is for inputs that may be left out"):
        read_manifest(written(tmp_path, text.format("false")))


def test_a_picture_is_told_by_its_suffix_where_no_type_tells(tmp_path: Path) -> None:
    spec = Input("drawn", "any")
    Image.new("RGB", (2, 3)).save(tmp_path / "a.png")
    assert spec.check(spec.parse(str(tmp_path / "a.png"))).size == (2, 3)
    assert (spec.parse("0.5"), spec.parse("some words")) == (0.5, "some words")
