"""`lora`: low-rank updates of the transformer's linear layers, added to what the layers return.

Shapes: B batch, r rank. A is (r, in) or (B, r, in), B is (out, r) or (B, out, r), and a layer's x becomes
layer(x) + B A x. No weight is read or changed, so that quantized and offloaded layers take updates like any other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import nn

from silkscreen.bases import Base, Geometry
from silkscreen.errors import CacheError, PipelineError
from silkscreen.flux2.sides import Sides

Factors = tuple[torch.Tensor, torch.Tensor]

_KEY = re.compile(
    r"(?:diffusion_model\.|transformer\.)?(?P<module>.+)\.(?:(?P<factor>lora_[AB])(?:\.default)?\.weight|alpha)"
)


class LoRA:
    """Carries a dict of tensors `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r).

    Modules are named as in diffusers' `Flux2Transformer2DModel`. A `<module>.alpha` scales the update by alpha / r.
    """

    name = "lora"

    def check(self, value: Any, base: Base) -> list[str]:
        """Compare module names and shapes with the linear layers of the base's transformer."""
        if not isinstance(value, Mapping):
            return [f"lora: expected a dict of tensors, got {type(value).__name__}"]
        modules, problems = _by_module(value)
        for module, parts in modules.items():
            problems += _check_module(module, parts, base)
        if not problems:
            tensors = [part for parts in modules.values() for name, part in parts.items() if name != "alpha"]
            batches = {tensor.shape[0] for tensor in tensors if tensor.ndim == 3} - {1}
            if len(batches) > 1:
                problems.append(f"lora: its tensors differ in batch: {sorted(batches)}")
        return problems

    def merge(self, values: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack A on rows and B on columns, module by module, so that the update is the sum of the single ones."""
        updates = [_factors(value) for value in values]
        merged = {}
        for module in dict.fromkeys(module for update in updates for module in update):
            a, b = zip(*(update[module] for update in updates if module in update), strict=True)
            merged[f"{module}.lora_A.weight"] = _stack(a, dim=-2)
            merged[f"{module}.lora_B.weight"] = _stack(b, dim=-1)
        return merged

    def stack(self, values: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Give each picture its own factors, all of one rank: zeros fill up a lower rank, or none."""
        updates = [_factors(value) for value in values]
        for picture, update in enumerate(updates):
            for module, (a, b) in update.items():
                batch = max((factor.shape[0] for factor in (a, b) if factor.ndim == 3), default=1)
                if batch != 1:
                    raise CacheError(f"lora[{module!r}]: picture {picture} has a batch of {batch}: it has to be 1")
        stacked = {}
        for module in dict.fromkeys(module for update in updates for module in update):
            present = [update[module] for update in updates if module in update]
            rank = max(a.shape[-2] for a, _ in present)
            a, b = present[0]
            nothing = a.new_zeros(rank, a.shape[-1]), b.new_zeros(b.shape[-2], rank)
            pairs = [update.get(module, nothing) for update in updates]
            stacked[f"{module}.lora_A.weight"] = torch.cat(
                [nn.functional.pad(a.view(1, *a.shape[-2:]), (0, 0, 0, rank - a.shape[-2])) for a, _ in pairs]
            )
            stacked[f"{module}.lora_B.weight"] = torch.cat(
                [nn.functional.pad(b.view(1, *b.shape[-2:]), (0, rank - b.shape[-1])) for _, b in pairs]
            )
        return stacked

    def flatten(self, value: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name the tensors `<module>.lora_A.weight` and `<module>.lora_B.weight`, with alpha multiplied in."""
        return self.merge([value])

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors as they are: they are named as the carrier has them."""
        return dict(tensors)

    def describe(self, value: Mapping[str, Any]) -> str:
        """Tell its rank, which may differ from layer to layer, and its layers."""
        factors = _factors(value)
        ranks = sorted({a.shape[-2] for a, _ in factors.values()})
        return f"rank {' or '.join(map(str, ranks)) or 0} in {len(factors)} layers"

    @contextmanager
    def inject(self, pipe: Any, sides: Sides) -> Iterator[None]:
        """Put a layer with the sides' updates in the place of each linear layer that has any, for the time being.

        It is the layer that changes, not its hooks: compiled code notices a layer of another class, but no new hook.

        Raises:
            PipelineError: a layer to be updated does not run at each step: its projections are fused, or a step cache
                keeps its results.
        """
        transformer = pipe.transformer
        updates = {side: _factors(fields[self.name]) for side, fields in sides.fields.items() if self.name in fields}
        modules = dict.fromkeys(module for update in updates.values() for module in update)
        originals = {module: transformer.get_submodule(module) for module in modules}
        for module in modules:
            if getattr(transformer.get_submodule(module.rpartition(".")[0]), "fused_projections", False):
                raise PipelineError(
                    f"lora: {module} does not run while its projections are fused: "
                    "call pipe.transformer.unfuse_qkv_projections() first"
                )
            hooks = getattr(originals[module], "_diffusers_hook", None)
            if hooks is not None and any(hook._is_stateful for hook in hooks.hooks.values()):
                raise PipelineError(
                    f"lora: {module} keeps its results for other steps, by a step cache: "
                    "call pipe.transformer.disable_cache() first, or let the cache keep those of whole blocks"
                )
        try:
            for module, original in originals.items():
                own = {side: update[module] for side, update in updates.items() if module in update}
                transformer.set_submodule(module, _UpdatedLinear(original, own, sides))
            yield
        finally:
            for module, original in originals.items():
                transformer.set_submodule(module, original)


@cache
def linear_layers(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each linear layer of a FLUX.2 transformer, by name; no memory is taken for weights."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**dataclasses.asdict(geometry))
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


class _UpdatedLinear(nn.Module):
    """A linear layer, with the running side's update added to what it returns."""

    def __init__(self, linear: nn.Module, factors: Mapping[str, Factors], sides: Sides) -> None:
        super().__init__()
        self.linear = linear
        self.factors = factors
        self.sides = sides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        factors = self.factors.get(self.sides.running)
        if factors is None:
            return y
        a, b = factors
        return y + _project(_project(x, a), b).to(y.dtype)


def _project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, ..., in) by a weight (out, in), or by one for each picture of the batch (B, out, in)."""
    weight = weight.to(x.device, x.dtype)
    if weight.ndim == 2:
        return nn.functional.linear(x, weight)
    return torch.einsum("b...i,boi->b...o", x, weight)


def _stack(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; where some are batched, the others are repeated for each picture."""
    batch = max((tensor.shape[0] for tensor in tensors if tensor.ndim == 3), default=None)
    if batch is not None:
        tensors = [tensor.expand(batch, -1, -1) for tensor in tensors]
    return torch.cat(list(tensors), dim)


def _factors(value: Mapping[str, Any]) -> dict[str, Factors]:
    """Return A and B of each module, alpha multiplied into B."""
    modules, problems = _by_module(value)
    if problems:
        raise CacheError("; ".join(problems))
    factors = {}
    for module, parts in modules.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if "alpha" in parts:
            b = b * (torch.as_tensor(parts["alpha"]).reshape(()) / a.shape[-2])
        factors[module] = (a, b)
    return factors


def _by_module(value: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the `lora_A`, `lora_B` and `alpha` of each module, and what is wrong with the keys."""
    modules: dict[str, dict[str, Any]] = {}
    problems = []
    for key, tensor in value.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            problems.append(f"lora[{key!r}]: expected <module>.lora_A.weight, <module>.lora_B.weight or <module>.alpha")
            continue
        parts, part = modules.setdefault(match["module"], {}), match["factor"] or "alpha"
        if part in parts:
            problems.append(f"lora[{key!r}]: the {part} of {match['module']} is there twice, in two spellings")
        parts[part] = tensor
    return modules, problems


def _check_module(module: str, parts: Mapping[str, Any], base: Base) -> list[str]:
    where = f"lora[{module!r}]"
    layers = linear_layers(base.geometry)
    if module not in layers:
        near = get_close_matches(module, layers, n=3, cutoff=0.5)
        named = f"did you mean {' or '.join(map(repr, near))}?" if near else "name it as diffusers does"
        return [f"{where}: {base.id} has no such linear layer: {named}"]
    missing = [part for part in ("lora_A", "lora_B") if part not in parts]
    if missing:
        return [f"{where}: {' and '.join(missing)} missing: an update needs both factors"]
    a, b, alpha = parts["lora_A"], parts["lora_B"], parts.get("alpha", 1.0)
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return [f"{where}: expected two tensors, got {type(a).__name__} and {type(b).__name__}"]
    outputs, inputs = layers[module]
    problems = []
    if a.ndim not in (2, 3) or a.shape[-1] != inputs:
        problems.append(f"{where}: lora_A has shape {list(a.shape)}, {base.id} wants ([batch,] rank, {inputs})")
    if b.ndim not in (2, 3) or b.shape[-2] != outputs:
        problems.append(f"{where}: lora_B has shape {list(b.shape)}, {base.id} wants ([batch,] {outputs}, rank)")
    if not problems and a.shape[-2] != b.shape[-1]:
        problems.append(f"{where}: lora_A has rank {a.shape[-2]} and lora_B {b.shape[-1]}: they have to be equal")
    if not isinstance(alpha, int | float) and not (isinstance(alpha, torch.Tensor) and alpha.numel() == 1):
        problems.append(f"{where}: alpha has to be one number")
    return problems
