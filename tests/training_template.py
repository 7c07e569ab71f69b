"""A small template in the field's format, and a small data set, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

MODEL = """
import torch

BLOCKS = ["double_0", "double_1", "single_0", "single_1", "single_2", "single_3"]


class Glow(torch.nn.Module):
    def __init__(self, tokens=2, heads=6, head_dim=32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (1, tokens, heads, head_dim)
        self.keys = torch.nn.ParameterDict({b: torch.randn(shape, generator=generator) for b in BLOCKS})
        self.values = torch.nn.ParameterDict({b: 0.1 * torch.randn(shape, generator=generator) for b in BLOCKS})
        self.eye = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, 16), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
        self.eye.requires_grad_(False)
        with torch.no_grad():
            for value in self.eye.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)

    @torch.no_grad()
    def process_inputs(self, pipe, scale, image=None, **kwargs):
        return {"scale": torch.tensor([[[[float(scale)]]]])}

    def forward(self, scale, **kwargs):
        seen = self.eye(scale.expand(-1, 3, 16, 16)).mean(dim=1, keepdim=True)
        size = scale + seen
        return {"kv_cache": {b: (self.keys[b].expand(len(scale), -1, -1, -1), self.values[b] * size) for b in BLOCKS}}


class Processor:
    def __call__(self, scale):
        return {"scale": scale}


TEMPLATE_MODEL = Glow
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = Processor
"""


def write_template(folder: Path, code: str = MODEL) -> Path:
    """Write the template into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(code)
    return folder


def write_dataset(folder: Path, count: int = 4, size: tuple[int, int] = (128, 128)) -> Path:
    """Write plain pictures and their metadata into a folder, and return the metadata's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        Image.new("RGB", size, (n * 255 // count, 100, 100)).save(folder / f"{n}.png")
        prompt = "a small red star on a blue background"
        rows.append({"image": f"{n}.png", "prompt": prompt, "template_inputs": {"scale": n / count}})
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
