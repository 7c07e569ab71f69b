"""The tutorial: its files are written out and each of its commands is run, in an environment of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from silkscreen_tiny import analysis

DOCS = Path(__file__).parents[2] / "core" / "docs"


def test_each_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    tutorial = (DOCS / "training.md").read_text().split("# Reference")[0]
    for name, text in re.findall(r"^`(glow/\S+)`\n\n```\w+\n(.*?)^```", tutorial, re.M | re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "seen.pth").write_text("\n".join(path for path in sys.path if path) + "\n")
    (programs / "silkscreen").write_text(f"#!{programs}/python\nfrom silkscreen.cli import main\nmain()\n")
    (programs / "silkscreen").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    commands = re.findall(r"^```bash\n(.*?)^```", tutorial, re.M | re.S)
    lines = [line for block in commands for line in block.splitlines()]
    assert [shlex.split(line)[:2] for line in lines][1:4] == [
        ["silkscreen", "train"],
        ["silkscreen", "pack"],
        ["pip", "install"],
    ]
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**kept, "PATH": f"{programs}:{kept['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    with Image.open(tmp_path / "bright.png") as bright, Image.open(tmp_path / "dark.png") as dark:
        assert analysis.mean_luminance(bright) > analysis.mean_luminance(dark) + 0.1


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_gpu", "NO", 1),
        ("eight_gpus", "MULTI_GPU", 8),
        ("several_nodes", "MULTI_GPU", 32),
        ("fsdp2", "FSDP", 8),
        ("zero3", "DEEPSPEED", 8),
    ],
)
def test_accelerate_reads_the_configurations(name: str, kind: str, processes: int) -> None:
    config = load_config_from_file(str(DOCS / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == (kind, processes)
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert name != "zero3" or config.deepspeed_config["zero_stage"] == 3
