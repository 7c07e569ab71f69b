"""The page on the field's format: its files are written out and each of its commands is run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from pages import commands, run_each, write_files
from PIL import Image

PAGE = (Path(__file__).parents[2] / "core" / "docs" / "field-format.md").read_text()


def test_each_command_of_the_page_runs(tmp_path: Path) -> None:
    assert write_files(PAGE, tmp_path) == ["also/model.py", "also/README.md"]
    lines = commands(PAGE)
    assert len(lines) == 8
    all_is_seen = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    printed = run_each(lines, tmp_path, **all_is_seen)
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "again.png") as again:
        assert both.size == again.size == (128, 128)
    readme = (tmp_path / "silkscreen-also" / "README.md").read_text()
    assert "apache-2.0" in readme
    assert "Says a second prompt beside the first." in readme
    with (tmp_path / "work" / "run" / "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 64
    asked = re.findall(r"^\| `(\w+)` \|", PAGE.split("## What `check` asks")[1], re.M)
    assert asked == re.findall(r"^ok +(\w+)", printed, re.M)[: len(asked)]


def test_the_page_names_each_kind_of_new_plugin() -> None:
    from silkscreen.authoring.new import KINDS

    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("## A package from nothing")[1].split("##")[0], re.M) == list(KINDS)
