"""The `diffsynth` package on our bases: its pipeline with their weights, and what stands in for torchvision."""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps


def their_pipeline(folder: Path, text: Mapping[str, Any]) -> Any:
    """Build its pipeline of its classes, with the weights of the base in a folder.

    `text` has the arguments of our pipeline about prompts.
    """
    replace_torchvision()
    from diffsynth.models.flux2_dit import Flux2DiT
    from diffsynth.models.flux2_vae import Flux2VAE
    from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen3Model

    def load(kind: Any, name: str) -> Any:
        config = json.loads((folder / name / "config.json").read_text())
        config["num_groups"] = config.get("norm_num_groups")
        known = inspect.signature(kind).parameters
        model = kind(**{key: value for key, value in config.items() if key in known})
        model.load_state_dict(load_file(folder / name / "diffusion_pytorch_model.safetensors"))
        return model

    pipe = Flux2ImagePipeline(device="cpu", torch_dtype=torch.float32)
    pipe.dit = load(Flux2DiT, "transformer")
    pipe.vae = load(Flux2VAE, "vae")
    pipe.text_encoder_qwen3 = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    pipe.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    embedder = next(unit for unit in pipe.units if type(unit).__name__ == "Flux2Unit_Qwen3PromptEmbedder")
    embedder.hidden_states_layers = text["text_encoder_out_layers"]
    length = text["max_sequence_length"]
    embedder.encode_prompt = functools.partial(embedder.encode_prompt, max_sequence_length=length)
    noise = next(unit for unit in pipe.units if type(unit).__name__ == "Flux2Unit_NoiseInitializer")
    noise.process = lambda pipe, initial_noise, **_: {"noise": initial_noise}  # its own reshapes to 128 channels
    return pipe


def replace_torchvision() -> None:
    """Put into the place of torchvision, where it is not installed, the little that this path calls of it."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    functional = types.SimpleNamespace(
        resize=lambda picture, size, interpolation: picture.resize(size[::-1], interpolation),
        center_crop=lambda picture, size: ImageOps.fit(picture, size[::-1]),
    )
    modes = types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR)
    stub: Any = types.ModuleType("torchvision")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    stub.transforms = types.SimpleNamespace(functional=functional, InterpolationMode=modes)
    sys.modules["torchvision"] = stub
