"""How much memory a drawing will take, in each dtype and offload mode, and the first mode that fits a machine.

Nothing is loaded: the base and the templates are run as fake tensors, which have shapes and no content, and what is
alive at each moment is counted. Weights and caches come out exactly; activations without what kernels take for
themselves.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from silkscreen.bases import OFFLOADS, Base, Offload
from silkscreen.cache import TemplateCache, inject, merge
from silkscreen.content import nbytes
from silkscreen.errors import BaseError
from silkscreen.flux2.configuration import MODELS, configuration, construct
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import component_references, default_dtype
from silkscreen.flux2.prepacking import prepackable
from silkscreen.flux2.quantizing import parse_quantize, stored_bytes
from silkscreen.flux2.sides import NEGATIVE, POSITIVE
from silkscreen.lru import LRU
from silkscreen.pipeline import TemplateInput, TemplatePipeline

_PIXELS_A_TOKEN = 16
_TEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is to draw on, in bytes.

    Attributes:
        device: where it is drawn.
        memory: the main memory that is free.
        accelerator: the accelerator's memory that is free; None where it is drawn on the CPU.
    """

    device: torch.device
    memory: int
    accelerator: int | None


@dataclasses.dataclass(frozen=True)
class Need:
    """What a drawing takes in one dtype and offload mode, in bytes.

    Attributes:
        dtype, offload: the mode.
        weights: of the base that are on the device at once, at most.
        templates: likewise, of the templates.
        caches: what the templates made, of both sides, and what is kept of it for the next call.
        activations: of the part of the drawing that takes most, and a copy of weights that is laid out for it.
        device: all that is on the device when most is.
        memory: what the main memory holds beside that; on a CPU, where the device's memory is the main memory, nothing.
    """

    dtype: torch.dtype
    offload: Offload
    weights: int
    templates: int
    caches: int
    activations: int
    device: int
    memory: int

    def lacks(self, machine: Machine) -> int:
        """Return how many bytes a machine has too few; 0 when it fits."""
        if machine.accelerator is None:
            return max(0, self.device + self.memory - machine.memory)
        return max(0, self.device - machine.accelerator) + max(0, self.memory - machine.memory)


def this_machine(device: torch.device) -> Machine:
    """Return what this machine has free now, for drawing on a device."""
    memory = psutil.virtual_memory().available
    if device.type == "cpu":
        return Machine(device, memory, None)
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return Machine(device, memory, int(module.mem_get_info(device)[0]))
    return Machine(device, memory, int(module.recommended_max_memory()))  # Apple's, which shares the main memory


def plan(
    base: Base,
    templates: TemplatePipeline,
    template_inputs: Sequence[TemplateInput] = (),
    negative_template_inputs: Sequence[TemplateInput] | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 1,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    quantize: str | Mapping[str, str] | None = None,
    components: Mapping[str, str | Path] | None = None,
) -> list[Need]:
    """Return what a drawing takes in each dtype and offload mode that its device has, fastest first.

    Args:
        base: the base; nothing is fetched for it.
        templates: with the templates that the inputs name. Their code runs, on fake tensors.
        template_inputs: as in a call.
        negative_template_inputs: the same; by default the templates' negative values.
        width, height: of the picture in pixels; by default the base's.
        batch_size: pictures drawn at once.
        device: where it is to be drawn.
        dtypes: to choose from; by default what suits the device, then the other of float32 and bfloat16.
        quantize, components: as for `load_base`.

    Raises:
        BaseError, UnknownNameError, InputError, CacheError: the base, an option or an input is wrong.
        BaseError: a template needs real values to tell how much it makes.
    """
    quantized = parse_quantize(quantize, device)
    references = component_references(base, components)
    places = {name: reference for name, reference in references.items() if isinstance(reference, Path)}
    configurations = {name: configuration(base, name, places.get(name)) for name in MODELS}
    size = (height or base.call.get("height", 1024), width or base.call.get("width", 1024))
    positive = templates.check_inputs(template_inputs)
    if negative_template_inputs is None:
        negative_template_inputs = () if base.distilled else templates.default_negatives(template_inputs)
    negative = templates.check_inputs(negative_template_inputs, "negative_template_inputs")
    suits = default_dtype(device)
    needs = []
    for dtype in dtypes or sorted((torch.float32, torch.bfloat16), key=lambda each: each != suits):
        drawing = _Drawing(base, configurations, dtype, size, batch_size)
        drawing.run(positive, negative)
        for offload in OFFLOADS:
            unfit = device.type == "cpu" and offload in ("model", "group", "sequential")
            if not unfit and not (quantized and offload in ("sequential", "disk")):
                needs.append(drawing.need(offload, quantized, device))
    return needs


def first_fit(needs: Sequence[Need], machine: Machine) -> Need:
    """Return the first that fits a machine.

    Raises:
        BaseError: none does; the one that lacks least is named.
    """
    for need in needs:
        if not need.lacks(machine):
            return need
    nearest = min(needs, key=lambda need: need.lacks(machine))
    raise BaseError(
        f"no mode fits: {str(nearest.dtype).removeprefix('torch.')} with offload {nearest.offload} lacks least, "
        f"{nearest.lacks(machine) / 1e9:.1f} GB of memory: draw smaller pictures, use fewer templates, or free memory"
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside it, and how many there were at most.

    Attributes:
        live: bytes alive now.
        peak: bytes alive at most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of the storages that are new after it."""
        known = {_memory(tensor)[0] for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key, owner, size = _memory(tensor)
            if key not in known and key not in self._seen:
                self._add(key, owner, size)
        return result

    def _add(self, key: int, owner: Any, size: int) -> None:
        def forget(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(owner, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A part of a drawing: which model of the base or template runs, and what its activations take at most."""

    model: nn.Module
    component: str
    activations: int
    with_caches: bool


class _Drawing:
    """One drawing in fake tensors, in one dtype."""

    def __init__(
        self,
        base: Base,
        configurations: Mapping[str, Mapping[str, Any]],
        dtype: torch.dtype,
        size: tuple[int, int],
        batch: int,
    ) -> None:
        self.base, self.dtype, self.size, self.batch = base, dtype, size, batch
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with self.fake:
            with _default_dtype(dtype):  # fake parameters cannot be converted later
                self.models = {name: construct(base, name, config) for name, config in configurations.items()}
            self.pipe = getattr(diffusers, base.pipeline)(scheduler=scheduler, tokenizer=None, **self.models)
        self.text_tokens = base.call.get("max_sequence_length", _TEXT_TOKENS)
        self.phases: list[_Phase] = []
        self.templates: dict[str, nn.Module] = {}
        self.caches = 0

    @torch.no_grad()
    def run(self, positive: Sequence[Any], negative: Sequence[Any]) -> None:
        """Run each part of the drawing once."""
        with self.fake:
            self._phase("text_encoder", self._encode, with_caches=False)
            caches = self._compose(positive, negative)
            with inject(self.pipe, *caches):
                self._phase("transformer", self._predict, with_caches=True)
            self._phase("vae", self._decode, with_caches=True)

    def need(self, offload: Offload, quantized: Mapping[str, str], device: torch.device) -> Need:
        """Return what it takes in an offload mode."""
        held = {name: stored_bytes(model, quantized.get(name), self.dtype) for name, model in self.models.items()}
        templates = {name: stored_bytes(model, None, self.dtype) for name, model in self.templates.items()}
        everything = offload == "none"
        packed = 0
        if self.templates and everything and device.type == "cpu" and "transformer" not in quantized:
            packed = nbytes([layer.weight for layer in prepackable(self.models["transformer"])])

        def on_device(phase: _Phase) -> tuple[int, int]:
            """Return the bytes of the base's and of the templates' weights that are on the device in a phase."""
            if everything:
                return sum(held.values()), sum(templates.values())
            own = phase.component in self.templates
            kind = None if own else quantized.get(phase.component)
            part = _part_on_device(phase.model, "none" if own and offload != "disk" else offload, kind, self.dtype)
            return (0, part) if own else (part, 0)

        def activations(phase: _Phase) -> int:
            return phase.activations + (packed if phase.with_caches else 0)

        def total(phase: _Phase) -> int:
            return sum(on_device(phase)) + activations(phase) + (self.caches if phase.with_caches else 0)

        most = max(self.phases, key=total)
        base_weights, template_weights = on_device(most)
        plain = {name: stored_bytes(model, None, self.dtype) for name, model in self.models.items()}
        loading = max(plain[name] - held[name] for name in held)  # quantized once it is there
        beside = 0 if device.type == "cpu" or offload == "disk" else sum(held.values()) + loading
        caches = self.caches if most.with_caches else 0
        return Need(self.dtype, offload, base_weights, template_weights, caches, activations(most), total(most), beside)

    def _phase(self, component: str, run: Callable[[], Any], *, with_caches: bool) -> None:
        with _counted() as counted:
            run()
        self.phases.append(_Phase(self.models[component], component, counted.peak, with_caches))

    def _encode(self) -> None:
        tokens = torch.zeros(self.batch, self.text_tokens, dtype=torch.long)
        self.models["text_encoder"](input_ids=tokens, output_hidden_states=True, use_cache=False)

    def _compose(self, positive: Sequence[Any], negative: Sequence[Any]) -> tuple[TemplateCache, TemplateCache]:
        context = _FakeContext(self.pipe, self.base, self.text_tokens)
        kept: LRU[TemplateCache] = LRU(2**30)
        merged = []
        for side in (positive, negative):
            results = []
            for template, values, control in side:
                if template.name not in self.templates:
                    with _default_dtype(self.dtype):
                        self.templates[template.name] = template.construct(self.base.id).eval()
                model = self.templates[template.name]
                try:
                    with _counted() as counted:
                        processed = model.process_inputs(pipe=context, **values)  # type: ignore[operator]
                        result = TemplateCache.from_result(model(pipe=context, **processed), template.name)
                except Exception as error:  # whatever a stranger's code does with values that are not there
                    raise BaseError(
                        f"template {template.name!r}: how much it makes cannot be told without real values "
                        f"({type(error).__name__}: {error}): plan without it, and add what it takes"
                    ) from error
                kept.put(len(self.phases), result, nbytes(result.fields))
                beside = counted.peak - _unique_bytes(result.fields)  # what it makes is counted as a cache
                self.phases.append(_Phase(model, template.name, beside, with_caches=True))
                if control.strength != 0:
                    results.append(result)
            merged.append(merge(results))
        alive = [*(value for value, _ in kept._kept.values()), *merged]
        self.caches = _unique_bytes([cache.fields for cache in alive] + [cache.arguments for cache in alive])
        return merged[0], merged[1]

    def _predict(self) -> None:
        geometry, (height, width) = self.base.geometry, self.size
        rows, columns = height // _PIXELS_A_TOKEN, width // _PIXELS_A_TOKEN
        transformer: Any = self.models["transformer"]
        kind = type(self.pipe)
        latents = torch.empty(self.batch, geometry.in_channels, rows, columns, dtype=self.dtype)
        prompt = torch.empty(self.batch, self.text_tokens, geometry.joint_attention_dim, dtype=self.dtype)
        call = {
            "hidden_states": kind._pack_latents(latents),
            "timestep": torch.ones(self.batch, dtype=self.dtype),
            "guidance": torch.ones(self.batch) if geometry.guidance_embeds else None,
            "encoder_hidden_states": prompt,
            "txt_ids": kind._prepare_text_ids(prompt),
            "img_ids": kind._prepare_latent_ids(latents),
            "return_dict": False,
        }
        guided = not self.base.distilled and hasattr(kind, "do_classifier_free_guidance")
        for side in (POSITIVE, NEGATIVE, POSITIVE) if guided else (POSITIVE,):  # the last may be a pass of both
            with transformer.cache_context(side):
                transformer(**call)

    def _decode(self) -> None:
        vae: Any = self.models["vae"]
        height, width = self.size
        shape = self.batch, vae.config.latent_channels, 2 * height // _PIXELS_A_TOKEN, 2 * width // _PIXELS_A_TOKEN
        vae.decode(torch.empty(shape, dtype=self.dtype), return_dict=False)


class _FakeContext(TemplateContext):
    """What templates see as `pipe` while nothing is real: prompts have shapes alone."""

    def __init__(self, pipe: Any, base: Base, text_tokens: int) -> None:
        super().__init__(pipe)
        self.base, self._text_tokens = base, text_tokens

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings and ids of the right shapes."""
        count = 1 if isinstance(prompt, str) else len(prompt)
        shape = count, self._text_tokens, self.base.geometry.joint_attention_dim
        return torch.empty(shape, dtype=self.torch_dtype), torch.empty(count, self._text_tokens, 4)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _counted() -> Iterator[LiveBytes]:
    gc.collect()
    counted = LiveBytes()
    with counted:
        yield counted


def _part_on_device(model: nn.Module, offload: Offload, quantized: str | None, dtype: torch.dtype) -> int:
    """Return the bytes of a model's weights that are on the device at once while it runs."""
    if offload in ("none", "model"):
        return stored_bytes(model, quantized, dtype)
    blocks = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    if offload == "group" and blocks and isinstance(model, diffusers.Flux2Transformer2DModel):
        sizes = [stored_bytes(block, quantized, dtype) for block in blocks]
        return stored_bytes(model, quantized, dtype) - sum(sizes) + max(sizes)
    return max(nbytes([*module.parameters(recurse=False)]) for module in model.modules())


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> tuple[int, Any, int]:
    """Return what tells a tensor's memory, the object that it lives as long as, and its bytes."""
    if tensor.layout != torch.strided:  # laid out for matrix products: it has no storage that others could share
        return id(tensor), tensor, tensor.numel() * tensor.itemsize
    storage = tensor.untyped_storage()
    return storage._cdata, storage, storage.nbytes()


def _unique_bytes(value: Any) -> int:
    """Return the bytes of the storages of tensors, each once."""
    return sum({key: size for key, _, size in map(_memory, _tensors(value))}.values())
