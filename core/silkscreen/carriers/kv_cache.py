"""`kv_cache`: keys and values for the attention of each block, appended to the block's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from silkscreen.bases import Base
from silkscreen.errors import CacheError
from silkscreen.flux2.sides import Sides

KV = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """Carries a dict from block name (`double_0`, `single_3`) to (K, V), each (batch, tokens, heads, head size)."""

    name = "kv_cache"

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
            batch = max(key.shape[0] for key, _ in parts)
            key, value = (
                torch.cat([part.expand(batch, -1, -1, -1) for part in tensors], dim=1)
                for tensors in zip(*parts, strict=True)
            )
            merged[block] = (key, value)
        return merged

    def stack(self, values: Sequence[Mapping[str, KV]]) -> dict[str, KV]:
        """Concatenate along the batch, block by block; every picture needs as many tokens in a block as the others."""
        blocks = dict.fromkeys(block for value in values for block in value)
        for block in blocks:
            shapes = [tuple(value[block][0].shape[:2]) if block in value else (1, 0) for value in values]
            for picture, (batch, tokens) in enumerate(shapes):
                if batch != 1:
                    raise CacheError(f"kv_cache[{block!r}]: picture {picture} has a batch of {batch}: it has to be 1")
                if tokens != shapes[0][1]:
                    raise CacheError(
                        f"kv_cache[{block!r}]: picture 0 has {shapes[0][1]} template tokens and picture {picture} has "
                        f"{tokens}: pictures of one call need as many, so draw these in calls of their own"
                    )
        return {
            block: (torch.cat([value[block][0] for value in values]), torch.cat([value[block][1] for value in values]))
            for block in blocks
        }

    def flatten(self, value: Mapping[str, KV]) -> dict[str, torch.Tensor]:
        """Name the tensors `<block>.k` and `<block>.v`."""
        return {f"{block}.{part}": tensor for block, kv in value.items() for part, tensor in zip("kv", kv, strict=True)}

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, KV]:
        """Undo `flatten`."""
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {block: (tensors[f"{block}.k"], tensors[f"{block}.v"]) for block in blocks}

    def describe(self, value: Mapping[str, KV]) -> str:
        """Tell its tokens, which may differ from block to block, and its blocks."""
        tokens = sorted({key.shape[1] for key, _ in value.values()})
        return f"{' or '.join(map(str, tokens)) or 'no'} tokens in {len(value)} blocks"

    def inject(self, pipe: Any, sides: Sides) -> AbstractContextManager[None]:
        """Replace the attention processors of the pipeline's transformer."""
        from silkscreen.flux2.attention import inject_kv

        return inject_kv(pipe.transformer, sides)


def _check_block(block: str, kv: Any, base: Base) -> list[str]:
    where = f"kv_cache[{block!r}]"
    geometry = base.geometry
    if block not in geometry.blocks:
        kind = block.partition("_")[0]
        count = {"double": geometry.num_layers, "single": geometry.num_single_layers}.get(kind)
        has = f"{count} {kind} blocks" if count is not None else f"the blocks {', '.join(geometry.blocks)}"
        return [f"{where}: {base.id} has {has}"]
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
