"""The tutorial: its files are written out and each of its commands is run, in an environment of its own."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from pages import commands, run_each, write_files
from PIL import Image
from silkscreen_tiny import analysis

DOCS = Path(__file__).parents[2] / "core" / "docs"


def test_each_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    tutorial = (DOCS / "training.md").read_text().split("# Reference")[0]
    assert write_files(tutorial, tmp_path)
    lines = commands(tutorial)
    assert [shlex.split(line)[:2] for line in lines][1:4] == [
        ["silkscreen", "train"],
        ["silkscreen", "pack"],
        ["pip", "install"],
    ]
    run_each(lines, tmp_path)
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
