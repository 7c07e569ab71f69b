"""Train the transformer and the text encoder of flux2-tiny: `python train_transformer.py RUN_DIR`.

They are trained together, from random weights, on the latents of its VAE, by flow matching
(https://arxiv.org/abs/2210.02747). Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import checkpoint
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from silkscreen_tiny import scenes
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_vae import build as build_vae
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED = 2
STEPS = 7_000
BATCH = 48
SCENES = 32_000
LEARNING_RATE = 2e-3
TEXT_LENGTH = 16
TEXT_LAYERS = (1, 2, 3)
TEXT_DIM = 96
OBJECT_WEIGHT = 2.0
MASK_BLOCK = 1
MASK_WEIGHT = 0.2

SPECIAL = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = ["a", "on", "background", *scenes.SIZES, *scenes.HUES, *scenes.SHAPES]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that writes a chat of one message as `<|im_start|>...<|im_end|>`."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return tokenizer


def build_text_encoder() -> Qwen3ForCausalLM:
    """Return the untrained text encoder, a Qwen3 of three layers."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(SPECIAL + WORDS),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=len(TEXT_LAYERS),
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_DIM // 4,
            max_position_embeddings=4 * TEXT_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=3,
        )
    )


def build_transformer() -> Flux2Transformer2DModel:
    """Return the untrained transformer: the blocks start as identities (https://arxiv.org/abs/2212.09748)."""
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=len(TEXT_LAYERS) * TEXT_DIM,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for layer in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
        transformer.norm_out,
    ):
        nn.init.zeros_(layer.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class Denoiser(nn.Module):
    """The two trained parts: predicts the velocity of noisy latents under a tokenized prompt.

    Half-way up, a linear head also reads the shape's mask off the image tokens. It is thrown away after training, but
    teaches the blocks below it early where the shape is and what it is (https://arxiv.org/abs/2410.06940).
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.transformer = build_transformer()
        self.mask_head = nn.Linear(self.transformer.inner_dim, 16)
        self.transformer.single_transformer_blocks[MASK_BLOCK].register_forward_hook(self._read_mask)

    def _read_mask(self, block: nn.Module, inputs: tuple[()], hidden: torch.Tensor) -> None:
        self.mask = self.mask_head(F.layer_norm(hidden[:, TEXT_LENGTH:], hidden.shape[-1:]))

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map latents (B, 64, 8, 8), sigma (B,) and token ids (B, TEXT_LENGTH) to velocities and mask logits.

        Returns:
            Velocities (B, 64 tokens, 64), and logits of the mask (B, 64 tokens, 16), 4 by 4 in each token.
        """
        encoded = self.text_encoder.model(
            input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        text = torch.cat([encoded.hidden_states[layer] for layer in TEXT_LAYERS], dim=-1)
        velocity = self.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(latents),
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(latents),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text),
            return_dict=False,
        )[0]
        return velocity, self.mask


def load_vae(run_dir: Path) -> AutoencoderKLFlux2:
    """Return the trained VAE; its latent statistics are not set yet."""
    vae = build_vae()
    average = checkpoint.Average(vae, decay=0.0)
    if not checkpoint.load(run_dir / "vae.safetensors", vae, average):
        raise SystemExit(f"{run_dir} holds no trained VAE: run train_vae.py first")
    average.copy_to(vae)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """Map pictures (B, 3, H, W) in [-1, 1] to patchified, not yet normalised latents (B, 64, H/16, W/16)."""
    return Flux2KleinPipeline._patchify_latents(vae.encode(pictures).latent_dist.mode().contiguous())


def encode_scenes(vae: AutoencoderKLFlux2, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents (N, 64, 8, 8) of drawn scenes and their masks (N, 64 tokens, 16), 0..1, kept in a file."""
    if not path.exists():
        latents, masks, began = [], [], time.monotonic()
        drawn = scenes.stream(SEED)
        for done in range(0, SCENES, 64):
            batch = list(islice(drawn, 64))
            pictures = np.stack([np.asarray(scene.draw()) for scene in batch])
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            latents.append(encode(vae, pixels.float() / 127.5 - 1))
            mask = np.stack([np.asarray(scene.mask()) for scene in batch])
            cells = mask.reshape(-1, 8, 4, 4, 8, 4, 4).mean(axis=(3, 6)).transpose(0, 1, 3, 2, 4)
            masks.append(torch.from_numpy(cells.reshape(-1, 64, 16) / 255).float())
            if done % 6400 == 0:
                print(f"encoded {done}/{SCENES} scenes, {time.monotonic() - began:.0f} s", flush=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.cat(latents).float(), "masks": torch.cat(masks)}, partial)
        partial.replace(path)
    kept = load_file(path)
    return kept["latents"], kept["masks"]


def set_statistics(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> None:
    """Store the mean and variance by which FLUX.2 normalises latents."""
    vae.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def normalise(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Bring patchified latents to mean 0 and variance 1."""
    mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon (https://kellerjordan.github.io/posts/muon) for the matrices between, AdamW for all the rest.

    At the same step and rate, Muon's loss was 5 to 8 % below AdamW's.
    """
    inner = {
        name: value
        for name, value in model.named_parameters()
        if value.ndim == 2 and any(part in name for part in ("blocks.", "layers.", "modulation"))
    }
    outer = [value for name, value in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(inner.values(), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def learning_rate(step: int) -> float:
    """Warm up over 200 steps, then fall linearly to zero."""
    return LEARNING_RATE * min(1.0, (step + 1) / 200) * (1 - step / STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16, on CPUs that multiply it fast")
    parser.add_argument("--compile", action="store_true", help="compile the model, where a C++ compiler is at hand")
    args = parser.parse_args()

    vae = load_vae(args.run_dir)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
        latents, masks = encode_scenes(vae, args.run_dir / "latents.safetensors")
    prompts = [scene.prompt for scene in islice(scenes.stream(SEED), SCENES)]
    set_statistics(vae, latents)
    latents = normalise(vae, latents)
    vae.save_pretrained(args.run_dir / "vae")

    tokenizer = build_tokenizer()
    tokens = tokenizer(
        [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False) for p in [*prompts, ""]],
        padding="max_length",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )
    torch.manual_seed(SEED)
    model = Denoiser()
    denoise = torch.compile(model) if args.compile else model
    average = checkpoint.Average(model, decay=0.999)
    optimizers = build_optimizers(model)
    start = checkpoint.load(args.run_dir / "transformer.safetensors", model, average, *optimizers)
    print(f"{sum(p.numel() for p in model.transformer.parameters())} parameters in the transformer", flush=True)
    began, losses = time.monotonic(), []
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(SEED * 1_000_000 + step)
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        # Where the shape goes is settled at very high noise; half of the sampler's shifted schedule lies there too.
        sigma = torch.sigmoid(1.8 + 1.5 * torch.randn(BATCH, generator=generator))
        blend = sigma.view(-1, 1, 1, 1)
        texts = torch.where(torch.rand(BATCH, generator=generator) < 0.1, len(prompts), rows)
        # Plain matrix products: torch's fused attention is slow in the backward pass of such short sequences.
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity, mask = denoise(
                (1 - blend) * latents[rows] + blend * noise,
                sigma,
                tokens["input_ids"][texts],
                tokens["attention_mask"][texts],
            )
        target = Flux2KleinPipeline._pack_latents(noise - latents[rows])
        errors = (velocity.float() - target).square().mean(dim=-1)
        weights = 1 + (OBJECT_WEIGHT - 1) * masks[rows].mean(dim=-1)
        loss = (weights * errors).sum() / weights.sum()
        mask_loss = F.binary_cross_entropy_with_logits(mask.float(), masks[rows])
        loss = loss + MASK_WEIGHT * mask_loss
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.step()
        average.update(model, step)
        losses.append((errors.detach().mean().item(), mask_loss.item()))
        if (step + 1) % 100 == 0 or step + 1 == STEPS:
            checkpoint.save(args.run_dir / "transformer.safetensors", step + 1, model, average, *optimizers)
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"step {step + 1}/{STEPS}  loss {np.mean(losses, axis=0)[0]:.4f}  mask {np.mean(losses, axis=0)[1]:.4f}"
                f"  {pace:.3f} s/step  {pace * (STEPS - step - 1) / 60:.0f} min left",
                flush=True,
            )
            losses.clear()


if __name__ == "__main__":
    main()
