"""The structure template, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from silkscreen.architectures.dit import PictureKV


class Structure(PictureKV):
    """Keys and values from an outline drawing, by a copy of the base's transformer."""

    @torch.no_grad()
    def process_inputs(self, pipe: Any, image: Image.Image, prompt: str = "", **kwargs: Any) -> dict[str, torch.Tensor]:
        """Encode the drawing to latents (1, C, H/16, W/16) and the prompt to embeddings (1, L, joint dim)."""
        width, height = (side // 16 * 16 for side in image.size)
        latents = pipe.vae.encode(pipe.preprocess_image(image.crop((0, 0, width, height))))
        embedder = next(unit for unit in pipe.units if type(unit).__name__ == "Flux2Unit_Qwen3PromptEmbedder")
        return {"latents": latents, "prompt_embeds": embedder.process(pipe, prompt)["prompt_embeds"]}

    def forward(self, latents: torch.Tensor, prompt_embeds: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for drawings (B, C, H/16, W/16) and prompts (B, L, joint dim)."""
        return {"kv_cache": self.keys_and_values([latents], prompt_embeds)}


class RowToInputs:
    """Opens the drawing that a dataset row's `template_inputs` name."""

    def __call__(self, image: Any, prompt: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of `process_inputs`."""
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        return {"image": picture.convert("RGB"), "prompt": prompt}


TEMPLATE_MODEL = Structure
TEMPLATE_MODEL_PATH = {
    "flux2-tiny": "flux2-tiny.safetensors",
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "modelscope:DiffSynth-Studio/Template-KleinBase4B-ControlNet:model.safetensors"
    ),
}
TEMPLATE_MODEL_CONFIG = {
    "flux2-tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "joint_attention_dim": 288,
        "in_channels": 64,
        "axes_dims_rope": (8, 8, 8, 8),
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 7680,
    },
}
TEMPLATE_DATA_PROCESSOR = RowToInputs
