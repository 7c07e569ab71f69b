"""Writes FLUX.2-klein-base-4B and templates for it at full size, with random weights: `write_base.py FOLDER`.

Geometry and names are those of the published weights, in bfloat16, so that loading, memory and time can be measured
without them. A model is on the meta device, and its tensors are drawn as they are written: memory holds one shard.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich.progress import track
from safetensors.torch import save_file
from silkscreen import find_template
from silkscreen.bases import find_base
from silkscreen.flux2.configuration import MODELS, component_classes, configuration, empty_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

BASE_ID = "black-forest-labs/FLUX.2-klein-base-4B"
TEMPLATES = ("brightness", "structure")
SHARD = 2 * 2**30
"""Bytes of a shard at most."""


def write_base(folder: Path) -> None:
    """Write the base into a folder in diffusers' layout."""
    base = find_base(BASE_ID)
    index = {"_class_name": base.pipeline, "is_distilled": base.distilled}
    for name, kind in component_classes(base).items():
        library = "diffusers" if kind.__module__.startswith("diffusers") else "transformers"
        index[name] = [library, kind.__name__]
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    component_classes(base)["scheduler"](use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    tokenizer().save_pretrained(folder / "tokenizer")
    for name in MODELS:
        model = empty_model(base, name, configuration(base, name))
        (folder / name / "config.json").write_text(json.dumps(_config(model)))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_weights(model, folder / name, stem, tied=getattr(model, "_tied_weights_keys", None) or {})


def write_templates(folder: Path) -> None:
    """Write a template folder for each of `TEMPLATES`: the plugin's own code, and random weights."""
    for name in TEMPLATES:
        with init_empty_weights(include_buffers=False):
            model = find_template(name).construct(BASE_ID)
        (folder / name).mkdir()
        files = write_weights(model, folder / name, "model", tied={})
        (folder / name / "model.py").write_text(
            f"from silkscreen_{name}.model import TEMPLATE_DATA_PROCESSOR, TEMPLATE_MODEL, TEMPLATE_MODEL_CONFIG\n"
            f"TEMPLATE_MODEL_PATH = { ({BASE_ID: files})!r}\n"
        )


def write_weights(model: nn.Module, folder: Path, stem: str, tied: Mapping[str, str]) -> list[str]:
    """Write random weights for an empty model in shards, with their index; return the shards' names."""
    wanted = {name: value for name, value in model.state_dict().items() if name not in tied}
    shards = list(_shards(wanted))
    placed = {}
    for number, names in enumerate(track(shards, description=folder.name), start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: drawn(name, wanted[name]) for name in names}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return sorted(set(placed.values()))


def drawn(name: str, like: torch.Tensor) -> torch.Tensor:
    """Return random values for a tensor: ones for norms and variances, small numbers for the rest."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.ndim == 1:
        return (torch.zeros if "mean" in name or "bias" in name else torch.ones)(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words: only the number of tokens, which the pipeline pads to 512, costs time."""
    words = ["[pad]", "[unk]", "a", "large", "red", "circle", "on", "blue", "background"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[pad]", unk_token="[unk]")
    fast.chat_template = "{{ messages[-1]['content'] }}"
    return fast


def _config(model: nn.Module) -> dict[str, object]:
    config = model.config
    if hasattr(config, "to_dict"):
        return {**config.to_dict(), "architectures": [type(model).__name__]}
    return {**dict(config), "_class_name": type(model).__name__}


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, value in tensors.items():
        if names and size + 2 * value.numel() > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * value.numel()
    yield names


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_base(target / "klein-base-4B")
    write_templates(target)
