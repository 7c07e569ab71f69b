"""The page on publishing: each of its commands is run, and the README's, against a server on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from hub_server import hubs, variables
from pages import commands
from PIL import Image
from silkscreen import load_base
from silkscreen_tiny import analysis

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "brightness"
TOKEN = "sk-0123456789abcdef"

RUN = """
import shlex, sys
from silkscreen.cli import main
for line in sys.argv[1:]:
    program, *words = shlex.split(line)
    assert program == "silkscreen"
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line} failed")
"""
"""Runs commands in one process, which imports all that they need only once."""


def test_each_command_of_the_page_runs(tmp_path: Path) -> None:
    template = tmp_path / "my-template"
    shutil.copytree(PLUGIN / "src" / "silkscreen_brightness", template, ignore=shutil.ignore_patterns("__*"))
    (template / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Brightness\n")
    load_base("flux2-tiny").save_pretrained(tmp_path / "base")
    lines = commands((ROOT / "core" / "docs" / "publishing.md").read_text())
    lines += [line for line in commands((ROOT / "README.md").read_text()) if "modelscope:" in line]
    assert [shlex.split(line)[1] for line in lines] == ["publish"] * 2 + ["generate"] * 5
    with hubs() as server:
        server.tokens[""] = TOKEN
        server.add("me/my-base", tmp_path / "base")
        files = {path.name: path.read_bytes() for path in template.iterdir()}
        server.add("me/my-template", {})
        server.add("me/my-template", files, "v1.0")
        server.tokens["me/my-template"] = TOKEN  # a private repository
        names = {**variables(server.url, tmp_path / "clients"), "MODELSCOPE_API_TOKEN": TOKEN, "HF_TOKEN": TOKEN}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *lines],
            cwd=tmp_path,
            env={**os.environ, **names},
            capture_output=True,
            text=True,
        )
        shown = done.stdout + done.stderr
        assert done.returncode == 0, shown
        assert server.repos["me/my-template"]["main"].keys() >= files.keys()
        assert len(server.fetched("flux2-tiny.safetensors")) == 2  # one from each hub
    assert f"{server.url}/models/me/my-template" in shown
    assert TOKEN not in shown
    luminance = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            luminance[path.stem] = analysis.mean_luminance(picture)
    assert luminance["dark"] + 0.3 < luminance["again"] < luminance["bright"] - 0.1
    assert luminance["published"] == luminance["bright"]
    assert luminance["dark"] < luminance["plain"]
