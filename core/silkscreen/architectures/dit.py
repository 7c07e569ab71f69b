"""The DiT-variant template: a copy of the transformer looks at a picture, and its keys and values are the cache.

The architecture of the field's ControlNet, Edit and Upscaler templates for FLUX.2-klein-base-4B, whose tensor names it
keeps. The copy runs once, at timestep 0, over the tokens of a prompt and of the pictures; each block's post-RoPE keys
and values are collected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward, Flux2Modulation, Flux2PosEmbed
from torch import nn

KV = tuple[torch.Tensor, torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]

_TIMESTEP_CHANNELS = 256


class _Attention(nn.Module):
    """What both kinds of block share: heads, normed queries and keys, RoPE, attention."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """Split (B, N, H*D) into (B, N, H, D)."""
        return x.reshape(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, KV]:
        """Attention over (B, N, H, D); returns (B, N, H*D) and the keys, after RoPE, and values."""
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        hidden = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        # A view would keep the whole projection that it is part of as long as the cache.
        return hidden.transpose(1, 2).flatten(2), (key, value.contiguous())


class DoubleBlock(_Attention):
    """A block in which picture and text have weights of their own."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(num_heads)
        head_dim = dim // num_heads
        self.img_to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.img_norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.img_norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.img_to_out = nn.Linear(dim, dim, bias=False)
        self.img_ff = Flux2FeedForward(dim, dim, mult=mlp_ratio)
        self.txt_to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.txt_norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.txt_norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.txt_to_out = nn.Linear(dim, dim, bias=False)
        self.txt_ff = Flux2FeedForward(dim, dim, mult=mlp_ratio)

    def forward(
        self, img: torch.Tensor, txt: torch.Tensor, img_mod: torch.Tensor, txt_mod: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, KV]:
        """Map picture (B, N, C) and text (B, L, C) tokens to their successors and the block's keys and values."""
        img_attention_mod, (img_ff_shift, img_ff_scale, img_ff_gate) = Flux2Modulation.split(img_mod, 2)
        txt_attention_mod, (txt_ff_shift, txt_ff_scale, txt_ff_gate) = Flux2Modulation.split(txt_mod, 2)
        (img_shift, img_scale, img_gate), (txt_shift, txt_scale, txt_gate) = img_attention_mod, txt_attention_mod
        img_q, img_k, img_v = map(self.heads, self.img_to_qkv(_modulated(img, img_shift, img_scale)).chunk(3, dim=-1))
        txt_q, txt_k, txt_v = map(self.heads, self.txt_to_qkv(_modulated(txt, txt_shift, txt_scale)).chunk(3, dim=-1))
        hidden, kv = self.attend(
            torch.cat([self.txt_norm_q(txt_q), self.img_norm_q(img_q)], dim=1),
            torch.cat([self.txt_norm_k(txt_k), self.img_norm_k(img_k)], dim=1),
            torch.cat([txt_v, img_v], dim=1),
            rotary,
        )
        txt_hidden, img_hidden = hidden.tensor_split([txt.shape[1]], dim=1)
        img = img + img_gate * self.img_to_out(img_hidden)
        txt = txt + txt_gate * self.txt_to_out(txt_hidden)
        img = img + img_ff_gate * self.img_ff(_modulated(img, img_ff_shift, img_ff_scale))
        txt = txt + txt_ff_gate * self.txt_ff(_modulated(txt, txt_ff_shift, txt_ff_scale))
        return img, txt, kv


class SingleBlock(_Attention):
    """A block in which picture and text run as one sequence, attention in parallel with the feed-forward layer."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(num_heads)
        head_dim, mlp_dim = dim // num_heads, int(dim * mlp_ratio)
        self.sizes = [3 * dim, mlp_dim, mlp_dim]
        self.to_qkv_mlp_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.Linear(dim + mlp_dim, dim, bias=False)

    def forward(self, x: torch.Tensor, mod: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, KV]:
        """Map tokens (B, N, C) to their successors and the block's keys and values."""
        shift, scale, gate = Flux2Modulation.split(mod, 1)[0]
        qkv, mlp_gate, mlp = self.to_qkv_mlp_proj(_modulated(x, shift, scale)).split(self.sizes, dim=-1)
        query, key, value = map(self.heads, qkv.chunk(3, dim=-1))
        hidden, kv = self.attend(self.norm_q(query), self.norm_k(key), value, rotary)
        return x + gate * self.to_out(torch.cat([hidden, F.silu(mlp_gate) * mlp], dim=-1)), kv


class PictureKV(nn.Module):
    """Maps a prompt and pictures to keys and values for each block of a base, by a copy of its transformer.

    Args:
        num_layers, num_single_layers, num_attention_heads, attention_head_dim, joint_attention_dim, in_channels: the
            base's geometry.
        axes_dims_rope, rope_theta, mlp_ratio: as in the base's transformer configuration.
    """

    def __init__(
        self,
        num_layers: int,
        num_single_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        joint_attention_dim: int,
        in_channels: int = 128,
        axes_dims_rope: Sequence[int] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        mlp_ratio: float = 3.0,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = Flux2PosEmbed(theta=rope_theta, axes_dim=list(axes_dims_rope))
        self.time_guidance_embed = nn.ModuleDict(
            {
                "timestep_embedder": nn.Sequential(
                    nn.Linear(_TIMESTEP_CHANNELS, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False)
                )
            }
        )
        self.double_stream_modulation_img = Flux2Modulation(dim, mod_param_sets=2)
        self.double_stream_modulation_txt = Flux2Modulation(dim, mod_param_sets=2)
        self.single_stream_modulation = Flux2Modulation(dim, mod_param_sets=1)
        self.img_embedder = nn.Linear(in_channels, dim, bias=False)
        self.txt_embedder = nn.Linear(joint_attention_dim, dim, bias=False)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, bias=False)
        self.proj_out = nn.Linear(dim, in_channels, bias=False)
        # In the published files too, but of no effect, and so not to be trained: only keys and values leave this copy.
        last = self.single_transformer_blocks[-1]
        for unused in (self.norm_out, self.proj_out, last.norm_q, last.to_out):
            unused.requires_grad_(False)

    def keys_and_values(self, latents: Sequence[torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, KV]:
        """Collect each block's keys and values.

        Args:
            latents: a picture each, (B, C, H/16, W/16), patchified and normalised; the n-th gets the time coordinate
                10 (n + 1).
            prompt_embeds: (B, L, joint_attention_dim).

        Returns:
            For each block, keys and values (B, L + tokens of the pictures, heads, head size).
        """
        device, dtype = prompt_embeds.device, self.img_embedder.weight.dtype
        ids = [_ids(range(1), range(1), range(1), range(prompt_embeds.shape[1]))]
        ids += [
            _ids([10 * (n + 1)], range(latent.shape[-2]), range(latent.shape[-1]), range(1))
            for n, latent in enumerate(latents)
        ]
        rotary = self.pos_embed(torch.cat(ids).to(device))
        # The sinusoidal embedding of timestep 0: cosines, all 1, then sines, all 0.
        sinusoids = torch.cat([torch.ones(1, _TIMESTEP_CHANNELS // 2), torch.zeros(1, _TIMESTEP_CHANNELS // 2)], dim=-1)
        time = self.time_guidance_embed["timestep_embedder"](sinusoids.to(device, dtype))
        img_mod, txt_mod = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        single_mod = self.single_stream_modulation(time)
        img = self.img_embedder(torch.cat([latent.flatten(2).transpose(1, 2) for latent in latents], dim=1).to(dtype))
        txt = self.txt_embedder(prompt_embeds.to(dtype))
        cache: dict[str, KV] = {}
        for i, block in enumerate(self.transformer_blocks):
            img, txt, cache[f"double_{i}"] = block(img, txt, img_mod, txt_mod, rotary)
        x = torch.cat([txt, img], dim=1)
        for i, block in enumerate(self.single_transformer_blocks):
            x, cache[f"single_{i}"] = block(x, single_mod, rotary)
        return cache


def from_transformer(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a diffusers FLUX.2 transformer's tensors to a `PictureKV`'s: the usual start of its training."""
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        for old, new in _RENAMES:
            name = name.replace(old, new)
        if name.startswith("single_transformer_blocks."):
            name = name.replace(".attn.", ".")
        name = name.replace(".attn.norm_", ".img_norm_")
        renamed[name] = value
    for name in [name for name in renamed if ".attn.to_q." in name or ".attn.add_q_proj." in name]:
        query, key, value = (
            renamed.pop(name.replace("to_q", f"to_{x}").replace("add_q_proj", f"add_{x}_proj")) for x in "qkv"
        )
        fused = name.replace("attn.to_q", "img_to_qkv").replace("attn.add_q_proj", "txt_to_qkv")
        renamed[fused] = torch.cat([query, key, value])
    return renamed


def starting_weights(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights from which the training of a `PictureKV` starts: a transformer's, but for values of zero.

    The base has never seen such pictures: with values of its own it would be misled so badly that the first thing
    learned is to turn the keys away, after which nothing else is.
    """
    weights = from_transformer(transformer.state_dict())
    for name, value in weights.items():
        if "to_qkv" in name:  # queries, keys and values by rows, and in single blocks the feed-forward layer after them
            weights[name] = value.clone()
            weights[name][2 * value.shape[1] : 3 * value.shape[1]] = 0
    return weights


_RENAMES = (
    ("timestep_embedder.linear_1", "timestep_embedder.0"),
    ("timestep_embedder.linear_2", "timestep_embedder.2"),
    ("x_embedder", "img_embedder"),
    ("context_embedder", "txt_embedder"),
    ("attn.to_out.0", "img_to_out"),
    ("attn.to_add_out", "txt_to_out"),
    ("attn.norm_added_q", "txt_norm_q"),
    ("attn.norm_added_k", "txt_norm_k"),
    (".ff.", ".img_ff."),
    (".ff_context.", ".txt_ff."),
)


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def _ids(*axes: Sequence[int]) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in axes))
