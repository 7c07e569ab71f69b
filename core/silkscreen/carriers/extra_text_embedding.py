"""`extra_text_embedding`: tokens that the transformer reads after those of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from silkscreen.bases import Base
from silkscreen.errors import CacheError
from silkscreen.flux2.sides import Sides


class ExtraTextEmbedding:
    """Carries a tensor (batch, tokens, joint_attention_dim), in the space of the base's prompt embeddings."""

    name = "extra_text_embedding"

    def check(self, value: Any, base: Base) -> list[str]:
        """Compare the size of its tokens with the base."""
        if not isinstance(value, torch.Tensor):
            return [f"extra_text_embedding: expected a tensor, got {type(value).__name__}"]
        wanted = base.geometry.joint_attention_dim
        if value.ndim != 3 or value.shape[2] != wanted:
            shape = list(value.shape)
            return [f"extra_text_embedding: it has shape {shape}, {base.id} wants (batch, tokens, {wanted})"]
        return []

    def merge(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate along the tokens."""
        batch = max(value.shape[0] for value in values)
        return torch.cat([value.expand(batch, -1, -1) for value in values], dim=1)

    def stack(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate along the batch; every picture needs as many tokens as the others."""
        for picture, value in enumerate(values):
            if value.shape[0] != 1:
                raise CacheError(
                    f"extra_text_embedding: picture {picture} has a batch of {value.shape[0]}: it has to be 1"
                )
            if value.shape[1] != values[0].shape[1]:
                raise CacheError(
                    f"extra_text_embedding: picture 0 has {values[0].shape[1]} tokens and picture {picture} has "
                    f"{value.shape[1]}: pictures of one call need as many, so draw these in calls of their own"
                )
        return torch.cat(list(values))

    def flatten(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name the tensor `embedding`."""
        return {"embedding": value}

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Undo `flatten`."""
        return tensors["embedding"]

    def describe(self, value: torch.Tensor) -> str:
        """Tell its tokens."""
        return f"{value.shape[1]} tokens"

    @contextmanager
    def inject(self, pipe: Any, sides: Sides) -> Iterator[None]:
        """Append the running side's tokens to what the transformer is called with."""

        def append(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            extra = sides.current(self.name)
            if extra is None:
                return args, kwargs
            text, ids = kwargs["encoder_hidden_states"], kwargs["txt_ids"]
            extra = extra.to(text.device, text.dtype).expand(text.shape[0], -1, -1)
            longer = {
                "encoder_hidden_states": torch.cat([text, extra], dim=1),
                "txt_ids": torch.cat([ids, _ids_after(ids, extra.shape[1])], dim=-2),
            }
            return args, {**kwargs, **longer}

        hook = pipe.transformer.register_forward_pre_hook(append, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _ids_after(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ids of `count` tokens that follow those of ids (..., tokens, 4): the last coordinate counts on."""
    following = ids[..., -1:, :].repeat_interleave(count, dim=-2)
    following[..., -1] += torch.arange(1, count + 1, device=ids.device, dtype=ids.dtype)
    return following
