"""Attention processors that append a template's keys and values to those of a FLUX.2 block.

Shapes: B batch, N tokens, T template tokens, H heads, D head size. Template keys and values are (B or 1, T, H, D); they
come last, after the query-key norm and RoPE, and only keys and values grow: no query sees a token added to its side.
A token of weight w has log w added to its logits; regions weigh the block's own tokens too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    _get_qkv_projections,
)
from torch.nn.functional import silu

from silkscreen.carriers.kv_cache import KV, weights_of
from silkscreen.carriers.weights import Weights
from silkscreen.errors import PipelineError
from silkscreen.flux2.regions import Separation
from silkscreen.flux2.rotary import Rotary, Rotation
from silkscreen.flux2.sides import Sides


class _TemplateProcessor:
    """Runs the block's own processor, or, when there are keys and values for the pass, adds them.

    It holds what is for this pass alone, and no name: compiled code would be made anew for each side, step and block.

    Attributes:
        kv: the template's keys and values for this pass.
        bias: (P, 1 or N, T or N + T), what is added to the logits, for template tokens or for all; None for nothing.
    """

    def __init__(self, original: Any, rotate: Rotation) -> None:
        self.original, self.rotate = original, rotate
        self.kv: tuple[torch.Tensor, torch.Tensor] | None = None
        self.bias: torch.Tensor | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of (B, N, H, D) over the block's own tokens and the template's, flattened to (B, N, H*D)."""
        extra_key, extra_value = (
            extra.to(query.device, query.dtype).expand(query.shape[0], -1, -1, -1) for extra in kv
        )
        if self.bias is not None:
            tokens = key.shape[1] + extra_key.shape[1]
            bias = torch.nn.functional.pad(self.bias, (tokens - self.bias.shape[-1], 0)).unsqueeze(1)
            attention_mask = bias if attention_mask is None else bias + attention_mask
        hidden: torch.Tensor = dispatch_attention_fn(
            query,
            torch.cat([key, extra_key], dim=1),
            torch.cat([value, extra_value], dim=1),
            attn_mask=attention_mask,
            backend=self.original._attention_backend,
            parallel_config=self.original._parallel_config,
        )
        return hidden.flatten(2, 3).to(query.dtype)


class DoubleBlockProcessor(_TemplateProcessor):
    """For the blocks in which picture and text have weights of their own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Return what the block's own processor returns: picture and text tokens."""
        kv = self.kv
        if kv is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        projections = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value, text_query, text_key, text_value = (
            projection.unflatten(-1, (-1, attn.head_dim)) for projection in projections
        )
        query = torch.cat([attn.norm_added_q(text_query), attn.norm_q(query)], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1)
        value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query, key = self.rotate(query, image_rotary_emb), self.rotate(key, image_rotary_emb)
        hidden = self.attend(query, key, value, kv, attention_mask)
        text, picture = hidden.tensor_split([text_query.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(text)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * gated, which keeps nothing for the backward pass but what it is given."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, gated)
        return silu(gate) * gated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,), (gate, gated) = gradients, ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * gated, gate), gradient * silu(gate)


class SingleBlockProcessor(_TemplateProcessor):
    """For the blocks in which picture and text run as one sequence, in parallel with the feed-forward layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Return what the block's own processor returns: tokens."""
        kv = self.kv
        if kv is None:
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        whole = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        own = projected.shape[-1] * attn.inner_dim // whole  # of what this rank holds
        half = (projected.shape[-1] - 3 * own) // 2
        *qkv, gate, gated = projected.split([own, own, own, half, half], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = self.rotate(query, image_rotary_emb), self.rotate(key, image_rotary_emb)
        hidden = self.attend(query, key, value, kv, attention_mask)
        # not by mlp_act_fn: its slices of slices would cost the backward pass a sum of tensors full of zeros
        gated = _SwiGLU.apply(gate, gated)  # type: ignore[no-untyped-call]
        return attn.to_out(torch.cat([hidden, gated], dim=-1))


_PROCESSORS: dict[type, type[_TemplateProcessor]] = {
    Flux2AttnProcessor: DoubleBlockProcessor,
    Flux2ParallelSelfAttnProcessor: SingleBlockProcessor,
}


def attention_modules(transformer: Any) -> dict[str, Any]:
    """Return the attention module of each block, by the block's name (`double_0`, `single_0`, ...).

    Raises:
        PipelineError: it is no FLUX.2 transformer, or its attention processors are not the standard ones.
    """
    try:
        blocks = {f"double_{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}
        blocks |= {f"single_{i}": block.attn for i, block in enumerate(transformer.single_transformer_blocks)}
    except AttributeError as error:
        name = type(transformer).__name__
        raise PipelineError(f"{name} is no FLUX.2 transformer: use a diffusers FLUX.2 pipeline") from error
    for block, attention in blocks.items():
        if type(attention.processor) not in _PROCESSORS:
            name = type(attention.processor).__name__
            known = " and ".join(processor.__name__ for processor in _PROCESSORS)
            raise PipelineError(
                f"block {block} has the attention processor {name}, templates need {known}: "
                "load the pipeline anew, or undo what replaced its processors"
            )
    return blocks


@contextmanager
def inject_kv(transformer: Any, sides: Sides) -> Iterator[None]:
    """Put template processors into a transformer, and the very ones that were there back in the end."""
    values: list[Mapping[str, KV]] = sides.values("kv_cache")
    regional = any(weights_of(kv).regional for value in values for kv in value.values())
    used = {block for value in values for block in value}
    modules = {
        block: attention for block, attention in attention_modules(transformer).items() if regional or block in used
    }
    originals = {block: attention.processor for block, attention in modules.items()}
    rotate = Rotation()
    processors = {block: _PROCESSORS[type(original)](original, rotate) for block, original in originals.items()}
    separation_of = cache(Separation.of)

    @cache
    def bias(
        weights: Weights, separation: Separation | None, text: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if separation is not None:
            return separation.bias(weights, text).to(device, dtype)
        return None if weights.plain else weights.at(None).elsewhere.log().to(device, dtype)

    def select(call: Mapping[str, Any]) -> Mapping[str, Any]:
        current: Mapping[str, KV] = sides.current("kv_cache") or {}
        separation, text = None, 0
        if regional and current:
            weights = tuple(dict.fromkeys(weights_of(kv) for kv in current.values()))
            separation, text = separation_of(weights, sides.picture_ids), call["encoder_hidden_states"].shape[1]
        for block, processor in processors.items():
            kv = current.get(block)
            if separation is not None and kv is None:
                kv = _no_tokens(current)
            processor.kv = kv and kv[:2]
            processor.bias = kv and bias(weights_of(kv), separation, text, kv[0].device, kv[0].dtype)
        return call if separation is None else separation.repeat_text(call)

    try:
        for block, attention in modules.items():
            attention.set_processor(processors[block])
        with sides.watch(select, with_ids=regional):
            yield
    finally:
        for block, attention in modules.items():
            attention.set_processor(originals[block])


def _no_tokens(value: Mapping[str, KV]) -> KV:
    key, value_, *_ = next(iter(value.values()))
    return key[:1, :0], value_[:1, :0]
