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
from typing import Any, NamedTuple

import torch
from torch import nn

from silkscreen.bases import Base, Geometry
from silkscreen.carriers.weights import Placed, Region, Weights
from silkscreen.errors import CacheError, PipelineError
from silkscreen.flux2.sides import Call, Sides

_KEY = re.compile(
    r"(?:diffusion_model\.|transformer\.)?(?P<module>.+)\."
    r"(?:(?P<factor>lora_[AB])(?:\.default)?\.weight|(?P<other>alpha|weights))"
)

_TOKENS = re.compile(
    r"single_transformer_blocks\..+|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\..+)|x_embedder|proj_out"
)
"""Layers that take the picture's tokens, alone or after those of the text."""


class LoRA:
    """Carries a dict of tensors `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r).

    Modules are named as in diffusers' `Flux2Transformer2DModel`. A `<module>.alpha` scales the update by alpha / r.
    Where the update of a module has a region, `<module>.weights` holds the weights of its ranks.
    """

    name = "lora"
    nothing: Mapping[str, Any] = {}

    def check(self, value: Any, base: Base) -> list[str]:
        """Compare module names and shapes with the linear layers of the base's transformer."""
        if not isinstance(value, Mapping):
            return [f"lora: expected a dict of tensors, got {type(value).__name__}"]
        modules, problems = _by_module(value)
        for module, parts in modules.items():
            problems += _check_module(module, parts, base)
        if not problems:
            tensors = [
                part for parts in modules.values() for name, part in parts.items() if name in ("lora_A", "lora_B")
            ]
            batches = {tensor.shape[0] for tensor in tensors if tensor.ndim == 3} - {1}
            if len(batches) > 1:
                problems.append(f"lora: its tensors differ in batch: {sorted(batches)}")
        return problems

    def merge(self, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack A on rows and B on columns, module by module, so that the update is the sum of the single ones."""
        updates = [_updates(value) for value in values]
        merged: dict[str, Any] = {}
        for module in dict.fromkeys(module for update in updates for module in update):
            parts = [update[module] for update in updates if module in update]
            merged |= _Update(
                _stack([part.a for part in parts], dim=-2),
                _stack([part.b for part in parts], dim=-1),
                Weights.join([part.weights for part in parts]),
            ).named(module)
        return merged

    def stack(self, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Give each picture its own factors, all of one rank: zeros fill up a lower rank, or none."""
        updates = [_updates(value) for value in values]
        for picture, update in enumerate(updates):
            for module, (a, b, _) in update.items():
                batch = max((factor.shape[0] for factor in (a, b) if factor.ndim == 3), default=1)
                if batch != 1:
                    raise CacheError(f"lora[{module!r}]: picture {picture} has a batch of {batch}: it has to be 1")
        stacked: dict[str, Any] = {}
        for module in dict.fromkeys(module for update in updates for module in update):
            present = [update[module] for update in updates if module in update]
            rank = max(a.shape[-2] for a, _, _ in present)
            a, b, _ = present[0]
            nothing = _Update(a.new_zeros(rank, a.shape[-1]), b.new_zeros(b.shape[-2], rank), Weights.of(rank))
            parts = [update.get(module, nothing) for update in updates]
            padded = [part.padded(rank) for part in parts]
            stacked |= _Update(
                torch.cat([part.a for part in padded]),
                torch.cat([part.b for part in padded]),
                Weights.stack([part.weights for part in padded], rank),
            ).named(module)
        return stacked

    def control(self, value: Mapping[str, Any], strength: float, region: Region | None) -> dict[str, Any]:
        """Scale the update, and leave it to the picture's tokens in a region.

        With a region, layers that do not take the picture's tokens (those of the text alone, of the time and of the
        modulation) get no update.

        Raises:
            CacheError: there is a region, and none of the layers takes the picture's tokens.
        """
        controlled: dict[str, Any] = {}
        for module, (a, b, _) in _updates(value).items():
            if region is None:
                controlled |= _Update(a, b * strength, Weights.of(a.shape[-2])).named(module)
            elif _TOKENS.fullmatch(module):
                controlled |= _Update(a, b, Weights.of(a.shape[-2], strength, region)).named(module)
        if value and not controlled:
            raise CacheError("lora: none of its layers takes the picture's tokens: leave region out")
        return controlled

    def flatten(self, value: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name the tensors `<module>.lora_A.weight` and `<module>.lora_B.weight`, with alpha multiplied in.

        Raises:
            CacheError: an update has a region, which belongs to a call.
        """
        merged = self.merge([value])
        if any(key.endswith(".weights") for key in merged):
            raise CacheError(
                "lora: it has a region, which belongs to a call: save the cache of each template input without it"
            )
        return merged

    def unflatten(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors as they are: they are named as the carrier has them."""
        return dict(tensors)

    def describe(self, value: Mapping[str, Any]) -> str:
        """Tell its rank, which may differ from layer to layer, and its layers."""
        updates = _updates(value)
        ranks = sorted({update.a.shape[-2] for update in updates.values()})
        return f"rank {' or '.join(map(str, ranks)) or 0} in {len(updates)} layers"

    @contextmanager
    def inject(self, pipe: Any, sides: Sides) -> Iterator[None]:
        """Put a layer with the sides' updates in the place of each linear layer that has any, for the time being.

        It is the layer that changes, not its hooks: compiled code notices a layer of another class, but no new hook.

        Raises:
            PipelineError: a layer to be updated does not run at each step: its projections are fused, or a step cache
                keeps its results.
        """
        transformer = pipe.transformer
        updates = {id(value): _updates(value) for value in sides.values(self.name)}
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
        layers = {module: _UpdatedLinear(original) for module, original in originals.items()}

        @cache
        def placed(weights: Weights, ids: torch.Tensor | None, device: torch.device) -> Placed:
            return weights.at(ids).map(lambda tensor: tensor.to(device))

        def select(call: Call) -> Call:
            update = updates.get(id(sides.current(self.name)), {})
            for module, layer in layers.items():
                a, b, weights = update.get(module, (None, None, None))
                layer.factors = None if a is None or b is None else (a, b)
                layer.weights = None
                if a is not None and weights is not None and not weights.plain:
                    layer.weights = placed(weights, sides.picture_ids, a.device)
            return call

        try:
            for module, layer in layers.items():
                transformer.set_submodule(module, layer)
            regional = any(part.weights.regional for update in updates.values() for part in update.values())
            with sides.watch(select, with_ids=regional):
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


class _Update(NamedTuple):
    """The update of a module: A, B with alpha in it, and the weights of the ranks."""

    a: torch.Tensor
    b: torch.Tensor
    weights: Weights

    def padded(self, rank: int) -> _Update:
        """Return that of one picture, batched, with zeros up to a rank."""
        missing = rank - self.a.shape[-2]
        return _Update(
            nn.functional.pad(self.a.view(1, *self.a.shape[-2:]), (0, 0, 0, missing)),
            nn.functional.pad(self.b.view(1, *self.b.shape[-2:]), (0, missing)),
            Weights.join([self.weights, Weights.of(missing)]),
        )

    def named(self, module: str) -> dict[str, Any]:
        """Return it as the carrier holds it."""
        named: dict[str, Any] = {f"{module}.lora_A.weight": self.a, f"{module}.lora_B.weight": self.b}
        return named if self.weights.plain else {**named, f"{module}.weights": self.weights}


class _UpdatedLinear(nn.Module):
    """A linear layer, with an update added to what it returns.

    Attributes:
        factors: A and B for this pass.
        weights: of the ranks, for tokens; None when all are 1.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self.weights: Placed | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if self.factors is None:
            return y
        a, b = self.factors
        low = _project(x, a)
        if self.weights is not None:
            low = low * self.weights.over(x.shape[1]).to(low.device, low.dtype)
        if low.dtype != y.dtype:
            return y + _project(low, b).to(y.dtype)
        b = b.to(y.device, y.dtype)
        in_place = not torch.is_grad_enabled()  # y is ours alone
        if b.ndim == 2:
            rows, low = y.flatten(0, -2), low.flatten(0, -2)
            added = rows.addmm_(low, b.T) if in_place else rows.addmm(low, b.T)
        else:
            rows, low, b = _by_picture(y), _by_picture(low), b.expand(len(y), -1, -1)
            added = rows.baddbmm_(low, b.mT) if in_place else rows.baddbmm(low, b.mT)
        return added.view_as(y)


def _project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, ..., in) by a weight (out, in), or by one for each picture of the batch (B, out, in)."""
    weight = weight.to(x.device, x.dtype)
    if weight.ndim == 2:
        return nn.functional.linear(x, weight)
    product = torch.bmm(_by_picture(x), weight.mT.expand(len(x), -1, -1))
    return product.view(*x.shape[:-1], -1)


def _by_picture(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1, x.shape[-1])


def _stack(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; where some are batched, the others are repeated for each picture."""
    batch = max((tensor.shape[0] for tensor in tensors if tensor.ndim == 3), default=None)
    if batch is not None:
        tensors = [tensor.expand(batch, -1, -1) for tensor in tensors]
    return torch.cat(list(tensors), dim)


def _updates(value: Mapping[str, Any]) -> dict[str, _Update]:
    """Return the update of each module."""
    modules, problems = _by_module(value)
    if problems:
        raise CacheError("; ".join(problems))
    updates = {}
    for module, parts in modules.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if "alpha" in parts:
            b = b * (torch.as_tensor(parts["alpha"]).reshape(()) / a.shape[-2])
        updates[module] = _Update(a, b, parts.get("weights", Weights.of(a.shape[-2])))
    return updates


def _by_module(value: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the `lora_A`, `lora_B`, `alpha` and `weights` of each module, and what is wrong with the keys."""
    modules: dict[str, dict[str, Any]] = {}
    problems = []
    for key, tensor in value.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            problems.append(f"lora[{key!r}]: expected <module>.lora_A.weight, <module>.lora_B.weight or <module>.alpha")
            continue
        parts, part = modules.setdefault(match["module"], {}), match["factor"] or match["other"]
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
    if not isinstance(parts.get("weights", Weights.of(1)), Weights):
        problems.append(f"{where}: weights are given by the call: leave them out")
    return problems
