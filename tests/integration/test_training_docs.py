"""The tutorial: its files are written out and each of its commands is run, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

DOCS = Path(__file__).parents[2] / "core" / "docs"


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
