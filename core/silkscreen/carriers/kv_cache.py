"""`kv_cache`: keys and values for the attention of each block, appended to the block's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from silkscreen.bases import Base
from silkscreen.carriers.weights import Region, Weights
from silkscreen.errors import CacheError
from silkscreen.flux2.sides import Sides

KV = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, Weights]
"""Keys and values of a block, each (batch, tokens, heads, head size), and weights of the tokens where not all are 1."""


class KVCache:
    """Carries a dict from block name (`double_0`, `single_3`) to (K, V), each (batch, tokens, heads, head size)."""

    name = "kv_cache"
    nothing: Mapping[str, KV] = {}

    def check(self, value: Any, base: Base) -> list[str]:
        """Compare block names, heads, head size and batch with the base."""
        if not isinstance(value, Mapping):
            return [f"kv_cache: expected a dict of block names, got {type(value).__name__}"]
        problems = [problem for block, kv in value.items() for problem in _check_block(block, kv, base)]
        if not problems:
            batches = {kv[0].shape[0] for kv in value.values()} - {1}
            if len(batches) > 1:
                problems.append(f"kv_cache: its blocks differ in batch: {sorted(batches)}")
        return problems

    def merge(self, values: Sequence[Mapping[str, KV]]) -> dict[str, KV]:
        """Concatenate along the tokens, block by block; a block that only some have keeps what it gets."""
        merged: dict[str, KV] = {}
        for block in dict.fromkeys(block for value in values for block in value):
            parts = [value[block] for value in values if block in value]
            batch = max(kv[0].shape[0] for kv in parts)
            key, value = (
                torch.cat([tensor.expand(batch, -1, -1, -1) for tensor in tensors], dim=1)
                for tensors in ([kv[0] for kv in parts], [kv[1] for kv in parts])
            )
            merged[block] = _weighted(key, value, Weights.join([weights_of(kv) for kv in parts]))
        return merged

    def stack(self, values: Sequence[Mapping[str, KV]]) -> dict[str, KV]:
        """Concatenate along the batch, block by block; tokens of weight 0 fill up pictures that have fewer."""
        stacked: dict[str, KV] = {}
        for block in dict.fromkeys(block for value in values for block in value):
            nothing = next(value[block][0] for value in values if block in value)[:1, :0]
            pictures = [value.get(block, (nothing, nothing)) for value in values]
            for picture, kv in enumerate(pictures):
                if kv[0].shape[0] != 1:
                    raise CacheError(
                        f"kv_cache[{block!r}]: picture {picture} has a batch of {kv[0].shape[0]}: it has to be 1"
                    )
            tokens = max(kv[0].shape[1] for kv in pictures)
            key, value = (
                torch.cat([nn.functional.pad(tensor, (0, 0, 0, 0, 0, tokens - tensor.shape[1])) for tensor in tensors])
                for tensors in ([kv[0] for kv in pictures], [kv[1] for kv in pictures])
            )
            stacked[block] = _weighted(key, value, Weights.stack([weights_of(kv) for kv in pictures], tokens))
        return stacked

    def control(self, value: Mapping[str, KV], strength: float, region: Region | None) -> dict[str, KV]:
        """Give all tokens a weight: attention counts e to the power of a token's logit so many times."""
        return {
            block: _weighted(kv[0], kv[1], Weights.of(kv[0].shape[1], strength, region)) for block, kv in value.items()
        }

    def flatten(self, value: Mapping[str, KV]) -> dict[str, torch.Tensor]:
        """Name the tensors `<block>.k` and `<block>.v`.

        Raises:
            CacheError: tokens have weights, which belong to a call.
        """
        if any(len(kv) == 3 for kv in value.values()):
            raise CacheError(
                "kv_cache: its tokens have a strength, a region or pictures without them, which belong to a call: save "
                "the cache of each template input without these"
            )
        return {
            f"{block}.{part}": tensor for block, kv in value.items() for part, tensor in zip("kv", kv[:2], strict=True)
        }

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, KV]:
        """Undo `flatten`."""
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {block: (tensors[f"{block}.k"], tensors[f"{block}.v"]) for block in blocks}

    def describe(self, value: Mapping[str, KV]) -> str:
        """Tell its tokens, which may differ from block to block, and its blocks."""
        tokens = sorted({kv[0].shape[1] for kv in value.values()})
        return f"{' or '.join(map(str, tokens)) or 'no'} tokens in {len(value)} blocks"

    def inject(self, pipe: Any, sides: Sides) -> AbstractContextManager[None]:
        """Replace the attention processors of the pipeline's transformer."""
        from silkscreen.flux2.attention import inject_kv

        return inject_kv(pipe.transformer, sides)


def weights_of(kv: KV) -> Weights:
    """Return the weights of a block's template tokens."""
    return kv[2] if len(kv) == 3 else Weights.of(kv[0].shape[1])


def _weighted(key: torch.Tensor, value: torch.Tensor, weights: Weights) -> KV:
    return (key, value) if weights.plain else (key, value, weights)


def _check_block(block: str, kv: Any, base: Base) -> list[str]:
    where = f"kv_cache[{block!r}]"
    geometry = base.geometry
    if block not in geometry.blocks:
        kind = block.partition("_")[0]
        count = {"double": geometry.num_layers, "single": geometry.num_single_layers}.get(kind)
        has = f"{count} {kind} blocks" if count is not None else f"the blocks {', '.join(geometry.blocks)}"
        return [f"{where}: {base.id} has {has}"]
    if isinstance(kv, tuple) and len(kv) == 3 and isinstance(kv[2], Weights):
        kv = kv[:2]
    if not (isinstance(kv, tuple | list) and len(kv) == 2 and all(isinstance(part, torch.Tensor) for part in kv)):
        return [f"{where}: expected two tensors (K, V), got {type(kv).__name__}"]
    key, value = kv
    wanted = (geometry.num_attention_heads, geometry.attention_head_dim)
    problems = [
        f"{where}: {part} has shape {list(tensor.shape)}, {base.id} wants (batch, tokens, {wanted[0]}, {wanted[1]})"
        for part, tensor in (("K", key), ("V", value))
        if tensor.ndim != 4 or tuple(tensor.shape[2:]) != wanted
    ]
    if not problems and key.shape != value.shape:
        problems.append(f"{where}: K has shape {list(key.shape)} and V {list(value.shape)}: they have to be equal")
    return problems
