"""Time of `silkscreen list` with 200 plugins installed, against a pluggy host that loads its entry points eagerly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PLUGINS = 200
HOST = """
import sys, pluggy
manager = pluggy.PluginManager("silkscreen")
manager.load_setuptools_entrypoints("silkscreen.templates")
for name, _ in manager.list_name_plugin():
    print(name)
"""


def install(site: Path) -> None:
    for n in range(PLUGINS):
        name = f"fake_{n}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: fake-{n}\nVersion: 1.0\nRequires-Dist: silkscreen>=0.1\n"
        )
        (info / "entry_points.txt").write_text(f"[silkscreen.templates]\nfake{n} = {name}.model\n")
        package = site / name
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "template.toml").write_text('title = "Fake"\n[inputs.scale]\ntype = "number"\n')
        (package / "model.py").write_text("import torch\n\nclass TEMPLATE_MODEL(torch.nn.Module):\n    pass\n")


def timed(words: list[str], site: Path) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(site)}
    )
    return time.perf_counter() - began, done.stdout


def test_listing_200_plugins(tmp_path: Path) -> None:
    install(tmp_path)
    ours, eager = [], []
    for _ in range(6):
        seconds, output = timed([sys.executable, "-m", "silkscreen", "list"], tmp_path)
        assert output.count("fake") >= PLUGINS
        ours.append(seconds)
        seconds, output = timed([sys.executable, "-c", HOST], tmp_path)
        assert output.count("fake") >= PLUGINS
        eager.append(seconds)
    mine, theirs = median(ours[1:]), median(eager[1:])
    print(f"\n{PLUGINS} plugins: silkscreen list {mine:.2f} s, eager host {theirs:.2f} s, ratio {mine / theirs:.2f}")
