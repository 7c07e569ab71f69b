"""Bases that both sides of a benchmark run on, and a value template for them that imports neither side's package."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from silkscreen.bases import Geometry
from silkscreen.flux2.loading import describe_base

needs_diffsynth = pytest.mark.skipif(
    importlib.util.find_spec("diffsynth") is None,
    reason="no diffsynth: pip install einops imageio modelscope pandas; pip install --no-deps diffsynth",
)

VALUE_TEMPLATE = """
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

LORA_TEMPLATE = """
import torch
from torch import nn

class TEMPLATE_MODEL(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ParameterList(torch.randn(RANK, inputs) / inputs**0.5 for _, inputs in LAYERS.values())
        self.b = nn.ParameterList(torch.randn(outputs, RANK) / 10 / RANK**0.5 for outputs, _ in LAYERS.values())

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"scale": torch.tensor(scale)}

    def forward(self, scale, **kwargs):
        factors = {f"{layer}.lora_A.weight": a for layer, a in zip(LAYERS, self.a)}
        return {"lora": factors | {f"{layer}.lora_B.weight": scale * b for layer, b in zip(LAYERS, self.b)}}
"""
"""Updates all linear layers of the transformer, by as much as its value says."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A base, arguments of its pipeline about prompts, and how many tokens a value template for it has."""

    base: str
    components: Path
    geometry: Geometry
    text: dict[str, Any]
    length: int

    def write_template(self, folder: Path, code: str = VALUE_TEMPLATE, **constants: Any) -> Path:
        """Write a template in the field's format, with the base's sizes as constants before its code."""
        constants |= {
            "BLOCKS": self.geometry.blocks,
            "HEADS": self.geometry.num_attention_heads,
            "HEAD_DIM": self.geometry.attention_head_dim,
            "LENGTH": self.length,
        }
        folder.mkdir(parents=True)
        (folder / "model.py").write_text("".join(f"{name} = {value!r}\n" for name, value in constants.items()) + code)
        return folder


def tiny(folder: Path) -> Case:
    base = describe_base("flux2-tiny")
    text = {name: base.call[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    return Case("flux2-tiny", base.folder, base.geometry, text, length=8)


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
    return Case(str(folder), folder, geometry, text, length=64)
