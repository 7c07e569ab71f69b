"""Random FLUX.2 pipelines small enough for a test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "max_sequence_length": 6,
    "text_encoder_out_layers": (1, 2),
    "output_type": "np",
}
"""Arguments of the pipeline's call that suit it."""


def build_pipeline(pipeline: type = Flux2KleinPipeline, single_blocks: int = 2, **config: Any) -> Any:
    """Return a pipeline of random weights, the same at every call."""
    torch.manual_seed(0)
    dev = pipeline is Flux2Pipeline
    words = Tokenizer(WordLevel({"[pad]": 0, "[unk]": 1, "red": 2, "blue": 3}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    tokenizer.chat_template = f"{{{{ messages[-1]['content']{'[0].text' if dev else ''} }}}} red"
    pipe = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            mid_block_add_attention=False,
            sample_size=32,
        ),
        text_encoder=_text_encoder(dev),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=single_blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=dev,
        ),
        **config,
    )
    pipe.text_encoder.eval()
    pipe.vae.eval()
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(dev: bool) -> Any:
    size = {
        "vocab_size": 4,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not dev:
        return Qwen3ForCausalLM(Qwen3Config(**size))
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", **size},
            vision_config={"model_type": "pixtral", "image_size": 16, "patch_size": 8, **sight},
            image_token_index=3,
        )
    )


SHAPES = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.1.attn.to_out.0": (32, 32),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (288, 32),
    "single_transformer_blocks.0.attn.to_out": (32, 128),
    "single_transformer_blocks.1.attn.to_out": (32, 128),
}
"""(out, in) of some linear layers of its transformer."""


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    """Return a normal random tensor, the same for the same seed and shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_lora(seed: int, *modules: str, rank: int = 2, batch: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Return random A and B for modules of `SHAPES`, or for all of them."""
    factors = {}
    for index, module in enumerate(modules or SHAPES):
        outputs, inputs = SHAPES[module]
        factors[f"{module}.lora_A.weight"] = random_tensor(1000 * seed + 2 * index, *batch, rank, inputs) / 4
        factors[f"{module}.lora_B.weight"] = random_tensor(1000 * seed + 2 * index + 1, *batch, outputs, rank) / 4
    return factors


def random_kv(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random keys and values of 3 tokens for all of its blocks."""
    blocks = ("double_0", "double_1", "single_0", "single_1")
    pairs = [random_tensor(1000 * seed + index, 2, 1, 3, 2, 16) for index in range(4)]
    return {block: (key, 2 * value) for block, (key, value) in zip(blocks, pairs, strict=True)}


def random_picture(seed: int) -> Image.Image:
    """Return a picture of 64 x 64, which is the least that a pipeline takes."""
    return Image.fromarray((random_tensor(seed, 64, 64, 3).sigmoid() * 255).to(torch.uint8).numpy())


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    """Return the pictures of a call with seed 0, as `templates(pipe, seed=0, prompt="red", **CALL)` makes it."""
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(**{**CALL, "prompt": "red", "generator": generator, **arguments}).images)
