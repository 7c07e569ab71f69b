"""What a template sees as `pipe`: the parts of a pipeline that templates of the field use, by the field's names."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any
from weakref import ref

import torch
from diffusers import Flux2KleinPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image

from silkscreen.bases import Base
from silkscreen.content import content, nbytes
from silkscreen.errors import InputError
from silkscreen.flux2.loading import base_of
from silkscreen.flux2.placing import offload_of
from silkscreen.flux2.replacing import method_replaced
from silkscreen.lru import LRU

TEXT_OPTIONS = ("max_sequence_length", "text_encoder_out_layers")
"""Arguments of a pipeline's call that say how a prompt is encoded."""


class TemplateContext:
    """The `pipe` of `process_inputs` and `forward`.

    Attributes:
        base: the base that is driven.
        torch_dtype, device: what the template should compute in and on.
        offload: where the base's weights are while they do not run.
        tokenizer, text_encoder: the base's own.
        vae: its VAE, whose `encode` gives latents as the transformer takes them.
        units: helpers that templates of the field look up by class name.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.base: Base = base_of(pipe)
        self.torch_dtype: torch.dtype = pipe.transformer.dtype
        self.device: torch.device = torch.device(get_module_execution_device(pipe.transformer))
        self.offload = offload_of(pipe)
        self.vae = _Encoder(pipe)
        self.units = [Flux2Unit_Qwen3PromptEmbedder()]

    @cached_property
    def key(self) -> Hashable:
        """What tells it from a context in which a template may return something else."""
        parts = ("vae", "text_encoder", "tokenizer")
        return self.base.id, self.torch_dtype, self.device, *(_identity(self._pipe, part) for part in parts)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._pipe.tokenizer

    @property
    def text_encoder(self) -> Any:
        """The base's text encoder."""
        return self._pipe.text_encoder

    def load_models_to_device(self, names: Sequence[str]) -> None:
        """Do nothing: diffusers and accelerate place the models."""

    def make_room(self) -> None:
        """Let models that are offloaded one by one leave the device, as a pipeline does when its call ends.

        The text encoder makes room for itself only at the start of a drawing.
        """
        if self.offload == "model":
            self._pipe.maybe_free_model_hooks()

    def preprocess_image(self, image: Image.Image) -> torch.Tensor:
        """Return a picture as (1, 3, H, W) in [-1, 1]."""
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        picture = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)
        return (picture.to(self.device, torch.float32) / 127.5 - 1).to(self.torch_dtype)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a prompt's embeddings (B, L, joint_attention_dim) and text ids (B, L, 4), as the base takes them."""
        options = {name: self.base.call[name] for name in TEXT_OPTIONS if name in self.base.call}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with torch.no_grad():
            embeds, ids = self._pipe.encode_prompt(prompts, device=self.device, **options)
        return embeds.to(self.torch_dtype), ids


@contextmanager
def keep_prompts(pipe: Any, kept: LRU[tuple[torch.Tensor, ...]]) -> Iterator[None]:
    """Let a pipeline take embeddings of prompts that it has encoded before from `kept`, as long as the context lasts.

    The prompts of a list are encoded one by one: how many are encoded at once would decide the last bits.
    """
    original = pipe.encode_prompt
    parameters = signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        call = parameters.bind(*args, **kwargs)
        call.apply_defaults()
        options = dict(call.arguments)
        if options.get("prompt_embeds") is not None:
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        prompts, count = options.pop("prompt"), options.pop("num_images_per_prompt")
        prompts = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        where = {"device": str(options["device"] or pipe._execution_device)}
        parts = [_identity(pipe, part) for part in ("text_encoder", "tokenizer")]
        encoded = {}
        for prompt in dict.fromkeys(prompts):
            key = (json.dumps(content({**options, **where, "prompt": prompt})), *parts)
            found = kept.get(key)
            if found is None:
                found = original(prompt=[prompt or ""], num_images_per_prompt=1, **options)
                kept.put(key, found, nbytes(found))
            encoded[prompt] = found
        every = zip(*(encoded[prompt] for prompt in prompts), strict=True)
        return tuple(torch.cat(tensors).repeat_interleave(count, dim=0) for tensors in every)

    with method_replaced(pipe, "encode_prompt", encode_prompt):
        yield


def _identity(pipe: Any, part: str) -> Hashable:
    """Tell a part of a pipeline from any other: neither is kept alive by it, nor equal to one made after its end."""
    component = getattr(pipe, part, None)
    if component is None:
        return None
    first = next(component.parameters(), None) if isinstance(component, torch.nn.Module) else None
    return ref(component), None if first is None else first.dtype


class _Encoder:
    """The VAE's `encode` as templates of the field know it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to patchified, normalised latents (B, 4 channels, H/16, W/16).

        Raises:
            InputError: height or width is no multiple of 16.
        """
        height, width = image.shape[-2:]
        if height % 16 or width % 16:
            raise InputError(f"a picture of {width}x{height} cannot be encoded: crop or scale it to multiples of 16")
        vae = self._pipe.vae
        with torch.no_grad():
            moments = vae.encode(image.to(get_module_execution_device(vae), vae.dtype)).latent_dist.mode()
            latents = Flux2KleinPipeline._patchify_latents(moments)
            mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
            variance = vae.bn.running_var.view(1, -1, 1, 1).to(latents.device, latents.dtype)
            result: torch.Tensor = (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        return result


class Flux2Unit_Qwen3PromptEmbedder:  # noqa: N801, the field looks it up by this name
    """Encodes a prompt; found in `pipe.units` by its class name."""

    def process(self, pipe: TemplateContext, prompt: str) -> Mapping[str, torch.Tensor]:
        """Return `prompt_embeds` (1, L, joint_attention_dim) and `text_ids` (1, L, 4)."""
        embeds, ids = pipe.encode_prompt(prompt)
        return {"prompt_embeds": embeds, "text_ids": ids}
