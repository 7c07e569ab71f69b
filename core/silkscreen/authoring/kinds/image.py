"""A template that takes a picture, in the field's module format."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from silkscreen.architectures.dit import PictureKV


class Picture(PictureKV):
    """Keys and values for every block, from a picture that a copy of the base's transformer looks at."""

    @torch.no_grad()
    def process_inputs(self, pipe: Any, image: Image.Image, prompt: str = "", **kwargs: Any) -> dict[str, torch.Tensor]:
        """Encode the picture to latents (1, C, H/16, W/16) and the prompt to embeddings (1, L, joint dim)."""
        width, height = (side // 16 * 16 for side in image.size)
        latents = pipe.vae.encode(pipe.preprocess_image(image.crop((0, 0, width, height))))
        embedder = next(unit for unit in pipe.units if type(unit).__name__ == "Flux2Unit_Qwen3PromptEmbedder")
        return {"latents": latents, "prompt_embeds": embedder.process(pipe, prompt)["prompt_embeds"]}

    def forward(self, latents: torch.Tensor, prompt_embeds: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the template cache for pictures (B, C, H/16, W/16) and prompts (B, L, joint dim)."""
        return {"kv_cache": self.keys_and_values([latents], prompt_embeds)}


class RowToInputs:
    """Opens the picture that a dataset row's `template_inputs` name."""

    def __call__(self, image: str, prompt: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of `process_inputs`."""
        return {"image": Image.open(image).convert("RGB"), "prompt": prompt}


TEMPLATE_MODEL = Picture
TEMPLATE_MODEL_PATH = {"flux2-tiny": "flux2-tiny.safetensors"}
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
}
TEMPLATE_DATA_PROCESSOR = RowToInputs
