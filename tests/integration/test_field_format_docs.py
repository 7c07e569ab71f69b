"""The page on the field's format: its files are written out and each of its commands is run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

from PIL import Image

PAGE = (Path(__file__).parents[2] / "core" / "docs" / "field-format.md").read_text()


def test_each_command_of_the_page_runs(tmp_path: Path) -> None:
    files = re.findall(r"^`(also/\S+)`\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S)
    assert [name for name, _ in files] == ["also/model.py", "also/README.md"]
    for name, text in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "seen.pth").write_text("\n".join(path for path in sys.path if path) + "\n")
    (programs / "silkscreen").write_text(f"#!{programs}/python\nfrom silkscreen.cli import main\nmain()\n")
    (programs / "silkscreen").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept |= {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # all that is needed is seen
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 8
    printed = ""
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**kept, "PATH": f"{programs}:{kept['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed += done.stdout
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
