"""Speed and memory of training a value template, against the training modules of the `diffsynth` package.

Both sides train the same template on the same base and pictures in float32, each in a process of its own. The goals
are 1.5 times its samples per second at batch 1 against its one-stage task, 2.5 times at our best setting, and no more
memory. The sides run by turns; the fastest of a few rounds counts, for what disturbs a run only slows it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from silkscreen.bases import Geometry
from silkscreen.flux2.loading import describe_base

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffsynth") is None,
    reason="no diffsynth: pip install einops imageio pandas; pip install --no-deps diffsynth",
)

ROWS = 8
ROUNDS = 3
TEMPLATE = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self, dim, length):
        super().__init__()
        self.prefer_value_embedder = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.positional_embedding = nn.Parameter(torch.randn(length, dim))

    def forward(self, value):
        angles = 1000 * value[:, None] * 10000 ** (-torch.arange(128) / 128)
        embedded = self.prefer_value_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded[:, None] + self.positional_embedding

class TEMPLATE_MODEL(nn.Module):
    def __init__(self):
        super().__init__()
        blocks, dim, length = BLOCKS, HEADS * HEAD_DIM, LENGTH
        self.proj_k = nn.ModuleDict({block: Encoder(dim, length) for block in blocks})
        self.proj_v = nn.ModuleDict({block: Encoder(dim, length) for block in blocks})

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"scale": torch.tensor([scale])}

    def forward(self, scale, **kwargs):
        parts = [
            {block: encoder(scale).unflatten(-1, (HEADS, HEAD_DIM)) for block, encoder in encoders.items()}
            for encoders in (self.proj_k, self.proj_v)
        ]
        return {"kv_cache": {block: (parts[0][block], parts[1][block]) for block in parts[0]}}

class TEMPLATE_DATA_PROCESSOR:
    def __call__(self, scale, **kwargs):
        return {"scale": scale}
"""
"""A value template that imports neither side's package."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A base and how it is trained on; `batches` are those of split training."""

    base: str
    components: Path
    geometry: Geometry
    text: dict[str, Any]
    pixels: int
    length: int
    steps: int
    batches: tuple[int, ...]


def tiny(folder: Path) -> Case:
    base = describe_base("flux2-tiny")
    return Case("flux2-tiny", base.folder, base.geometry, dict(base.call), 128, length=8, steps=48, batches=(4, 16))


def scaled_klein(folder: Path) -> Case:
    """Build a random klein 4B whose every part is a twelfth as wide: a transformer of 27 million parameters."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    ignored = shutil.ignore_patterns("transformer", "vae", "text_encoder")
    shutil.copytree(describe_base("flux2-tiny").folder, folder, ignore=ignored)
    geometry = Geometry(5, 20, num_attention_heads=2, attention_head_dim=128, joint_attention_dim=3 * 216)
    transformer = Flux2Transformer2DModel(**dataclasses.asdict(geometry))
    vae = AutoencoderKLFlux2(block_out_channels=(12, 24, 48, 48), norm_num_groups=4)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32,
            hidden_size=216,
            intermediate_size=810,
            num_hidden_layers=36,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=42,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for name, model in (("transformer", transformer), ("vae", vae), ("text_encoder", text_encoder)):
        model.save_pretrained(folder / name)
    text = {"max_sequence_length": 512, "text_encoder_out_layers": (9, 18, 27)}
    return Case(str(folder), folder, geometry, text, 256, length=64, steps=8, batches=(1, 2))


def write_data(folder: Path, case: Case) -> None:
    constants = {
        "BLOCKS": case.geometry.blocks,
        "HEADS": case.geometry.num_attention_heads,
        "HEAD_DIM": case.geometry.attention_head_dim,
        "LENGTH": case.length,
    }
    (folder / "template").mkdir()
    lines = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    (folder / "template" / "model.py").write_text(lines + TEMPLATE)
    rows = []
    for n in range(ROWS):
        Image.new("RGB", (case.pixels, case.pixels), (n * 30, 100, 100)).save(folder / f"{n}.png")
        prompt = "a small red star on a blue background"
        rows.append({"image": f"{n}.png", "prompt": prompt, "template_inputs": {"scale": n / ROWS}})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(folder: Path, case: Case, output: str, **options: Any) -> dict[str, float]:
    plan = {"side": "ours", "task": "sft", "batch": 1, "profile": False, **options}
    plan |= {"folder": str(folder), "output": output, "base": case.base, "components": str(case.components)}
    text = {name: case.text[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    plan |= {"text": text, "steps": case.steps, "repeat": case.steps * plan["batch"] // ROWS}
    program = Path(__file__).with_name("training_run.py")
    done = subprocess.run([sys.executable, program, json.dumps(plan)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.mark.parametrize("make", [tiny, scaled_klein])
def test_training_against_diffsynth(tmp_path: Path, make: Any) -> None:
    case = make(tmp_path / "base")
    write_data(tmp_path, case)
    run(tmp_path, case, "encoded", task="sft:data_process")
    settings = {
        "diffsynth, sft, batch 1": {"side": "theirs"},
        "silkscreen, sft, batch 1": {},
        **{f"silkscreen, sft:train, batch {n}": {"task": "sft:train", "batch": n} for n in case.batches},
    }
    rounds = [{name: run(tmp_path, case, f"{name} {n}", **settings[name]) for name in settings} for n in range(ROUNDS)]
    fastest = {
        name: min((each[name] for each in rounds), key=lambda measured: measured["seconds"]) for name in settings
    }
    theirs = next(iter(fastest.values()))
    print(f"\n{make.__name__}, {case.pixels} x {case.pixels}, float32, {torch.get_num_threads()} threads")
    for name, measured in fastest.items():
        batch = settings[name].get("batch", 1)
        rate, ratio = batch / measured["seconds"], batch * theirs["seconds"] / measured["seconds"]
        print(f"{name:32} {rate:6.2f} samples/s ({ratio:.2f} times), peak {measured['megabytes']:.0f} MB", end=", ")
        print(f"mean loss {measured['loss']:.3f}", end="")
        if "task" in settings[name]:
            products = run(tmp_path, case, f"{name} profiled", profile=True, **settings[name])["products"]
            print(f", matrix products {products / measured['seconds']:.0%} of its time", end="")
        print()
        assert math.isfinite(measured["loss"])
        assert 0.5 < measured["loss"] / theirs["loss"] < 2
