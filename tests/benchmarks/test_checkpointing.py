"""How much memory gradient checkpointing saves: the peak of a training process with and without it, in one run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training_template import write_dataset, write_template

PROGRAM = """
import re, sys
from pathlib import Path
from silkscreen.cli import main
try:
    main(["train", *sys.argv[1:]])
finally:
    print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""Not `ru_maxrss`, which a child process inherits from its parent."""


def peak_megabytes(*flags: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True)
    assert "trained" in done.stdout, done.stdout + done.stderr
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.parametrize("size", [256])
def test_memory_with_gradient_checkpointing(tmp_path: Path, size: int) -> None:
    template, data = write_template(tmp_path / "glow"), write_dataset(tmp_path / "data", count=16, size=(size, size))
    common = [
        *("--template_model_id_or_path", str(template), "--dataset_metadata_path", str(data)),
        *("--batch_size", "16", "--dataset_repeat", "2"),
    ]
    plain = peak_megabytes(*common, "--output_path", str(tmp_path / "plain"))
    saved = peak_megabytes(*common, "--output_path", str(tmp_path / "saved"), "--use_gradient_checkpointing")
    print(f"\npeak memory, 16 pictures of {size} x {size} a step: {plain:.0f} MB, with checkpointing {saved:.0f} MB")
    assert saved < plain
