"""`TemplatePipeline`: loads templates, composes their caches, and drives a base with them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from silkscreen import registry
from silkscreen.bases import Base
from silkscreen.cache import ConflictPolicy, Part, TemplateCache, inject, merge, stack
from silkscreen.content import content, nbytes, random_state
from silkscreen.control import Control
from silkscreen.errors import CacheError, InputError, PipelineError, SilkscreenError, UnknownNameError
from silkscreen.files import state
from silkscreen.flux2.attention import attention_modules
from silkscreen.flux2.context import TemplateContext, keep_prompts
from silkscreen.flux2.loading import base_of
from silkscreen.flux2.turns import in_turn
from silkscreen.lru import LRU
from silkscreen.manifest import CONTROLS, MISSING, check_values, unknown_name
from silkscreen.template import Template, find_template, missing_packages_named

TemplateInput = Mapping[str, Any]
"""The values for one template: `{"model_id": "brightness", "scale": 0.8}`."""

TemplateInputs = Sequence[TemplateInput] | Sequence[Sequence[TemplateInput]]
"""Template inputs that all pictures of a call share, or a list of them for each picture."""


class TemplatePipeline:
    """Several templates, ready to be composed in the calls of any FLUX.2 pipeline.

    What a template made of its inputs is kept, and made anew only when the inputs (pictures by their pixels), its
    weights, or the pipeline's base, dtype, device, VAE or text encoder are others. Nothing is kept when Python's,
    NumPy's or torch's shared generators have moved while it was made: a template that draws at random does so at every
    call. One that depends on anything else (a generator seeded from nowhere, the clock, a file that it reads), or a VAE
    or text encoder whose weights are changed in place, needs `cache_bytes=0`.

    Threads may share it, and a pipeline: calls on one transformer are served one after the other.

    Args:
        templates: names that `silkscreen list` shows, folders with a `model.py`, or `Template` objects.
        trust_code: allow the code in folders to be executed.
        cache_bytes: how much of the templates' results is kept, on the pipeline's device; 0 for none.
        prompt_cache_bytes: how much of embedded prompts is kept, likewise.
        max_loaded_bytes: how much of the templates' weights stays loaded, those used longest ago being dropped first;
            None for no bound. A template's weights are read when it is first used, or used again after that.

    Raises:
        UnknownNameError, UnavailableError, UntrustedCodeError, ContractError: a template cannot be used.
        InputError: two templates have the same name.
    """

    def __init__(
        self,
        templates: str | Path | Template | Sequence[str | Path | Template],
        *,
        trust_code: bool = False,
        cache_bytes: int = 2**30,
        prompt_cache_bytes: int = 2**27,
        max_loaded_bytes: int | None = None,
    ) -> None:
        if isinstance(templates, str | Path | Template):
            templates = [templates]
        self.templates: list[Template] = []
        self._given: list[str] = []
        self._models: LRU[tuple[Any, nn.Module]] = LRU(max_loaded_bytes)
        self._results: LRU[TemplateCache] = LRU(cache_bytes)
        self._prompts: LRU[tuple[torch.Tensor, ...]] = LRU(prompt_cache_bytes)
        self._files: dict[tuple[str, str], list[Path]] = {}
        for template in templates:
            self.add(template, trust_code=trust_code)

    def add(self, template: str | Path | Template, *, trust_code: bool = False) -> None:
        """Take in one more template.

        Raises:
            UnknownNameError, UnavailableError, UntrustedCodeError, ContractError: it cannot be used.
            InputError: there is one of its name.
        """
        found = find_template(template, trust_code=trust_code)
        if found.name in [other.name for other in self.templates]:
            raise InputError(f"template {found.name!r} is named twice: once is enough for any number of inputs")
        self.templates.append(found)
        self._given.append(found.name if isinstance(template, Template) else str(template))

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._given or model_id in [template.name for template in self.templates]

    @in_turn
    def __call__(
        self,
        pipe: Any,
        *,
        template_inputs: TemplateInputs = (),
        negative_template_inputs: TemplateInputs | Literal["default"] | None = None,
        template_cache: TemplateCache | None = None,
        negative_template_cache: TemplateCache | None = None,
        on_conflict: ConflictPolicy = "error",
        seed: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Call a pipeline with the templates' caches in it.

        Args:
            pipe: a diffusers FLUX.2 pipeline. It is left as it was, also when the call fails.
            template_inputs: the values for each template that takes part, with its `model_id`: its name, what it was
                given as, or its index in `templates`. It may be left out when only one is loaded. A template may be
                used more than once.
                Beside a template's own inputs they take `strength`, `start`, `end` and `region`: see `Control`.
                A list of lists gives each prompt its own, or each picture of the batch, in which all pictures of the
                first prompt come first.
            negative_template_inputs: the same for the negative side of guidance, which runs bare when there are none.
                `"default"` takes the positive ones with the negative values of the manifests.
            template_cache: what `compose` made or `TemplateCache.load` read, in the place of `template_inputs`.
            negative_template_cache: the same in the place of `negative_template_inputs`.
            on_conflict: what happens when two templates give the same pipeline argument: `error`, or the `first` or
                `last` one is taken.
            seed: makes a CPU generator of this seed the call's `generator`.
            **arguments: go to the pipeline as they are; where they are left out, the base's own defaults are filled in.

        Returns:
            What the pipeline returns.

        Raises:
            UnknownNameError, InputError: the template inputs are wrong.
            CacheError: a template's cache does not fit the base, or several do not fit together.
            PipelineError: the pipeline cannot be driven by templates.
        """
        base = base_of(pipe)
        attention_modules(pipe.transformer)
        arguments = self._complete(pipe, base, arguments, seed)
        one_sided = _why_one_sided(pipe, arguments)
        positive = _made(pipe, template_cache, template_inputs, arguments, "")
        negative = _made(pipe, negative_template_cache, negative_template_inputs, arguments, "negative_")
        if template_cache and negative_template_inputs == "default":
            raise InputError(
                'negative_template_inputs="default" goes by template_inputs, and template_cache was given instead: '
                "write the negative inputs out, or give a negative_template_cache"
            )
        given: TemplateInputs = () if isinstance(negative_template_inputs, str) else negative_template_inputs or ()
        if (any(_lists(given).values()) or negative) and one_sided:
            raise PipelineError(
                f"negative_template_{'cache has' if negative else 'inputs have'} no effect: {base.id} runs no negative "
                f"side in this call, because {one_sided}: leave it out"
            )
        _warn_of_unknown_words(base, arguments)
        positive = positive or self.compose(
            pipe, template_inputs, on_conflict=on_conflict, repeat=_repeat(template_inputs, arguments)
        )
        if not one_sided:
            if isinstance(negative_template_inputs, str):
                given = [self.default_negatives(some) for some in _lists(template_inputs).values()]
            negative = negative or self.compose(pipe, given, on_conflict=on_conflict, repeat=_repeat(given, arguments))
        arguments |= _pipeline_arguments(pipe, positive, arguments)
        hooks = registry.plugin_manager().hook
        hooks.before_generate(pipe=pipe, arguments=arguments)
        try:
            with keep_prompts(pipe, self._prompts), inject(pipe, positive, negative):
                result = pipe(**arguments)
        except BaseException:
            pipe.maybe_free_model_hooks()  # step caches are emptied: a pipeline sees to it only when its call succeeds
            raise
        hooks.after_generate(pipe=pipe, arguments=arguments, result=result)
        return result

    @in_turn
    @torch.no_grad()
    def compose(
        self, pipe: Any, template_inputs: TemplateInputs, *, on_conflict: ConflictPolicy = "error", repeat: int = 1
    ) -> TemplateCache:
        """Run the templates on their inputs and compose what they return into one cache.

        Args:
            pipe: the pipeline that the templates see.
            template_inputs: those of all pictures; or a list of lists, whose caches are stacked along the batch.
            on_conflict: as in the call.
            repeat: how many pictures in a row each list is for.

        Raises:
            UnknownNameError, InputError: the template inputs are wrong.
            CacheError: a template's cache does not fit the base, or several do not fit together.
        """
        context = TemplateContext(pipe)
        requests = [self.check_inputs(some, where) for where, some in _lists(template_inputs).items()]
        with keep_prompts(pipe, self._prompts):
            caches = [self._compose(context, some, on_conflict) for some in requests]
        return stack([cache for cache in caches for _ in range(repeat)]) if len(caches) > 1 else caches[0]

    def check_inputs(
        self, template_inputs: Sequence[TemplateInput], where: str = "template_inputs"
    ) -> list[tuple[Template, dict[str, Any], Control]]:
        """Return, for each template input, its template, its values, checked and completed, and its control.

        Raises:
            UnknownNameError, InputError: a template or a value is unknown, missing, of another type or out of range;
                the message begins with `where`.
        """
        if isinstance(template_inputs, Mapping):
            template_inputs = [template_inputs]
        requests = []
        for index, given in enumerate(template_inputs):
            values = dict(given)
            template = self.find(values.pop("model_id", None), f"{where}[{index}]")
            controls = {name: values.pop(name) for name in CONTROLS if name in values}
            try:
                control = Control.from_values(controls)
                requests.append((template, check_values(template.inputs, values), control))
            except SilkscreenError as error:
                raise type(error)(f"{where}[{index}] for {template.name!r}: {error}") from None
        return requests

    def default_negatives(self, template_inputs: Sequence[TemplateInput]) -> list[TemplateInput]:
        """Return the inputs that suit the negative side: the same, but with the negative values of the manifests.

        Strength, start, end and region are the same too.

        A template whose manifest gives no negative value has no part in the negative side.
        """
        negatives: list[TemplateInput] = []
        for template, values, control in self.check_inputs(template_inputs):
            changed = {name: spec.negative for name, spec in template.inputs.items() if spec.negative is not MISSING}
            if changed:
                negatives.append({"model_id": template.name, **values, **changed, **control.changes})
        return negatives

    def _compose(
        self,
        context: TemplateContext,
        requests: Sequence[tuple[Template, dict[str, Any], Control]],
        policy: ConflictPolicy,
    ) -> TemplateCache:
        results = [
            self._result(context, template, values).controlled(control)
            for template, values, control in requests
            if control.strength != 0
        ]
        return merge(results, policy)

    def _result(self, context: TemplateContext, template: Template, values: Mapping[str, Any]) -> TemplateCache:
        """Return what a template makes of its values: kept from before, or made now."""
        files = self._weight_files(template, context.base.id)
        inputs: dict[str, Any] | None
        try:
            inputs = {name: content(value) for name, value in values.items()}
        except TypeError:
            inputs = None
        key = (template.name, *map(state, files), context.key, json.dumps(inputs, sort_keys=True))
        kept = self._results.get(key)
        if kept is not None:
            return kept
        model = self._model(template, context, files)
        before = random_state(context.device)
        with missing_packages_named(template.name, template.origin):
            processed = model.process_inputs(pipe=context, **values)  # type: ignore[operator]
            result = model(pipe=context, **processed)
        cache = TemplateCache.from_result(result, template.name)
        cache.check(context.base)
        part = Part(template.name, template.origin, {file.name: file for file in files}, inputs)
        cache = dataclasses.replace(cache, base=context.base.id, parts=(part,))
        if inputs is not None and random_state(context.device) == before:
            self._results.put(key, cache, nbytes([cache.fields, cache.arguments]))
        return cache

    def find(self, model_id: str | int | None, where: str = "template_inputs") -> Template:
        """Return the template that a `model_id` means.

        Raises:
            UnknownNameError, InputError: it means none; the message begins with `where`.
        """
        if model_id in self._given:
            return self.templates[self._given.index(model_id)]
        names = [template.name for template in self.templates]
        if model_id is None:
            if len(self.templates) == 1:
                return self.templates[0]
            raise InputError(f"{where} has no model_id: it is one of {', '.join(names)}")
        if isinstance(model_id, int):
            if not 0 <= model_id < len(names):
                raise UnknownNameError(f"{where}: model_id {model_id} of {len(names)} templates, from 0")
            return self.templates[model_id]
        if model_id not in names:
            raise UnknownNameError(f"{where}: {unknown_name('model_id', str(model_id), names)}")
        return self.templates[names.index(model_id)]

    def _model(self, template: Template, context: TemplateContext, files: Sequence[Path]) -> nn.Module:
        key = (template.name, context.base.id, context.torch_dtype, context.device, context.offload)
        states = tuple(map(state, files))
        loaded = self._models.get(key)
        if loaded is None or loaded[0] != states:
            streamed = context.offload == "disk"
            loaded = (
                states,
                template.load(context.base.id, dtype=context.torch_dtype, device=context.device, streamed=streamed),
            )
            if context.offload in ("none", "disk"):  # the others are for machines that cannot hold two models at once
                self._models.put(key, loaded, nbytes(loaded[1]))
        return loaded[1]

    def _weight_files(self, template: Template, base_id: str) -> list[Path]:
        key = (template.name, base_id)
        if key not in self._files:
            self._files[key] = template.weight_files(base_id)
        return self._files[key]

    @staticmethod
    def _complete(pipe: Any, base: Base, arguments: dict[str, Any], seed: int | None) -> dict[str, Any]:
        accepted = inspect.signature(type(pipe).__call__).parameters
        for name in arguments:
            if name not in accepted:
                raise InputError(f"{type(pipe).__name__}: {unknown_name('argument', name, accepted)}")
        if seed is not None:
            if arguments.get("generator") is not None:
                raise InputError("seed and generator were both given: leave one out")
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        return {**{name: value for name, value in base.call.items() if name in accepted}, **arguments}


def _why_one_sided(pipe: Any, arguments: Mapping[str, Any]) -> str:
    """Return why the call runs no negative side, as `do_classifier_free_guidance` of diffusers tells it, or nothing."""
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        return f"{type(pipe).__name__} has no classifier-free guidance"
    if pipe.config.get("is_distilled", False):
        return "it is distilled"
    scale = arguments.get("guidance_scale", inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)
    return "" if scale > 1 else f"guidance_scale is {scale}, and guidance begins above 1"


def _lists(template_inputs: Any) -> dict[str, Sequence[TemplateInput]]:
    """Return the list of template inputs that all pictures share, or that of each, by where it is, for messages."""
    if isinstance(template_inputs, Mapping):
        template_inputs = [template_inputs]
    kinds = {isinstance(each, Mapping) for each in template_inputs or ()}
    if len(kinds) > 1:
        raise InputError("template_inputs mixes inputs with lists of inputs: give each picture a list of its own")
    if kinds == {False}:
        return {f"template_inputs[{n}]": some for n, some in enumerate(template_inputs)}
    return {"template_inputs": template_inputs or ()}


def _made(
    pipe: Any, cache: TemplateCache | None, template_inputs: Any, arguments: Mapping[str, Any], side: str
) -> TemplateCache | None:
    """Return a made cache where and as the transformer computes, or refuse it when it does not suit the call."""
    if cache is None:
        return None
    if template_inputs:
        raise InputError(f"{side}template_inputs and {side}template_cache were both given: leave one out")
    cache.check(base_of(pipe))
    pictures = [part.picture for part in cache.parts if part.picture is not None]
    prompts, count = _pictures(arguments)
    if pictures and max(pictures) + 1 != prompts * count:
        raise InputError(
            f"{side}template_cache was made for {max(pictures) + 1} pictures, and the call draws {prompts * count}: "
            "compose it with as many lists of inputs, or with one that all pictures share"
        )
    return cache.to(pipe._execution_device, pipe.transformer.dtype)


def _repeat(template_inputs: TemplateInputs, arguments: Mapping[str, Any]) -> int:
    """Return how many pictures each list is for: all pictures of a prompt follow each other in a pipeline's batch."""
    lists = len(_lists(template_inputs))
    prompts, count = _pictures(arguments)
    if lists not in (1, prompts, prompts * count):
        wanted = f"{prompts}, one for each prompt" + (f", or {prompts * count}, one for each picture" * (count > 1))
        raise InputError(f"template_inputs has {lists} lists: give {wanted}")
    return count if lists == prompts else 1


def _pictures(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many prompts a call has, and how many pictures it draws of each."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    return prompts, arguments.get("num_images_per_prompt") or 1


def _pipeline_arguments(pipe: Any, cache: TemplateCache, given: Mapping[str, Any]) -> Mapping[str, Any]:
    accepted = inspect.signature(type(pipe).__call__).parameters
    for name in cache.arguments:
        if name not in accepted:
            raise CacheError(
                f"template {cache.source!r} returned {name!r}, which is neither a carrier nor an argument of "
                f"{type(pipe).__name__}: use a pipeline that takes it, or install the plugin that brings the carrier"
            )
        if given.get(name) is not None:
            raise CacheError(
                f"template {cache.source!r} gives the argument {name!r}, and so does the call: leave one out"
            )
    return cache.arguments


def _warn_of_unknown_words(base: Base, arguments: Mapping[str, Any]) -> None:
    if not base.vocabulary:
        return
    prompt = arguments.get("prompt") or ""
    text = prompt if isinstance(prompt, str) else " ".join(prompt)
    unknown = [word for word in re.findall(r"\w+", text.lower()) if word not in base.vocabulary]
    if unknown:
        warnings.warn(
            f"{base.id} does not know {', '.join(dict.fromkeys(unknown))}; it knows {', '.join(base.vocabulary)}",
            stacklevel=4,
        )
