"""Peak memory while a template of 1 GB is loaded, as a multiple of its weights at the target dtype; the goal is 1.2."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MODEL = """
import torch

class TEMPLATE_MODEL(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(16))

    def process_inputs(self, pipe, **kwargs):
        return {}

    def forward(self, **kwargs):
        return {}

TEMPLATE_MODEL_PATH = "weights.safetensors"
"""

PROGRAM = """
import re, sys, torch
from pathlib import Path
from silkscreen import find_template
template = find_template(sys.argv[1], trust_code=True)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = template.load("flux2-tiny", dtype=torch.float32)
total = sum(p.sum().item() for p in model.parameters())  # touches every page
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_peak_memory(tmp_path: Path, stored: torch.dtype) -> None:
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    tensors = {f"layers.{i}.weight": torch.randn(4096, 4096).to(stored) for i in range(16)}
    save_file(tensors, tmp_path / "weights.safetensors")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    ratio = float(done.stdout.split()[-1])
    print(f"\n1 GB template stored as {stored}, loaded as float32: peak {ratio:.2f} times its weights")
    assert ratio <= 1.2
