"""Which base, from where, and how it is fitted to the machine: options shared by the commands that draw."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from silkscreen.bases import OFFLOADS, Base
from silkscreen.recipe import FIELDS, Recipe

if TYPE_CHECKING:
    import torch

    from silkscreen.pipeline import TemplatePipeline

DEFAULT_BASE: str = FIELDS["base"].default


@dataclasses.dataclass(frozen=True)
class BaseOptions:
    """What a command was told about its base.

    Attributes:
        base: id or folder; None when it was not said.
        dtype, device, hub, revision, offload, quantize, compile, attention_backend, components: as for `load_base`.
        fit: choose dtype and offload mode by what the machine has free.
    """

    base: str | None
    dtype: str | None
    device: str | None
    hub: str | None
    revision: str | None
    offload: str | None
    quantize: str | Mapping[str, str] | None
    compile: bool
    attention_backend: str | None
    components: Mapping[str, str]
    fit: bool

    def load(
        self,
        base: str,
        templates: TemplatePipeline,
        recipe: Recipe,
        *,
        batch_size: int = 1,
        device: torch.device | str | None = None,
    ) -> Any:
        """Load a base for drawings.

        Args:
            base: id or folder.
            templates: that take part.
            recipe: of the drawing that takes most memory.
            batch_size: how many pictures are drawn at once.
            device: where it is drawn when none was said.

        Raises:
            UnknownNameError, BaseError, WeightsError: see `load_base`.
            BaseError: nothing fits the machine.
        """
        from silkscreen.flux2.loading import default_device, describe_base, load_base

        place = self.torch_device or default_device() if device is None else self.torch_device or device
        found = describe_base(base)
        dtype, offload = self.torch_dtype, self.offload or "none"
        if self.fit:
            dtype, offload = self._fitting(found, templates, recipe, batch_size, place)
            click.echo(f"{str(dtype).removeprefix('torch.')}, offload {offload}: fits", err=True)
        with _log_shown():
            return load_base(
                found,
                dtype=dtype,
                device=place,
                hub=self.hub,  # type: ignore[arg-type]
                revision=self.revision,
                components=self.components,
                offload=offload,  # type: ignore[arg-type]
                quantize=self.quantize,
                compile=self.compile,
                attention_backend=self.attention_backend,
            )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch's."""
        import torch

        dtype: torch.dtype | None = getattr(torch, self.dtype) if self.dtype else None
        return dtype

    @property
    def torch_device(self) -> torch.device | None:
        """The device as torch's.

        Raises:
            click.BadParameter: there is no such device.
        """
        import torch

        try:
            return torch.empty(0, device=self.device).device if self.device else None
        except (RuntimeError, AssertionError) as error:
            raise click.BadParameter(f"--device {self.device}: {str(error).splitlines()[0]}") from error

    def _fitting(
        self, base: Base, templates: TemplatePipeline, recipe: Recipe, batch_size: int, device: torch.device | str
    ) -> tuple[torch.dtype, str]:
        import torch

        from silkscreen.plan import first_fit, plan, this_machine

        click.echo(f"planning what of {base.id} fits", err=True)
        negative = recipe.negative_template_inputs
        needs = plan(
            base,
            templates,
            recipe.template_inputs,
            None if negative == "default" else negative,
            width=recipe.width,
            height=recipe.height,
            batch_size=batch_size,
            device=torch.device(device),
            dtypes=[self.torch_dtype] if self.torch_dtype else None,
            quantize=self.quantize,
            components=self.components,
        )
        need = first_fit(needs, this_machine(torch.device(device)))
        return need.dtype, need.offload


def base_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a base, as its argument `base_options`."""

    @functools.wraps(function)
    def with_options(**arguments: Any) -> Any:
        fields = {field.name: arguments.pop(field.name) for field in dataclasses.fields(BaseOptions)}
        options = BaseOptions(**fields)
        if options.fit and options.offload:
            raise click.UsageError("--fit chooses the offload mode: leave --offload or --fit out")
        return function(**arguments, base_options=options)

    decorated: Callable[..., Any] = with_options
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


@contextmanager
def _log_shown() -> Iterator[None]:
    """Show what is logged while a base is loaded, as whose published tensors its files hold."""
    log = logging.getLogger("silkscreen")
    before, shown = log.level, logging.Handler()
    shown.emit = lambda record: click.echo(record.getMessage(), err=True)  # type: ignore[method-assign]
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(before)


def parse_quantize(context: click.Context, parameter: click.Parameter, words: Sequence[str]) -> Any:
    """Return the kind for all of a base's components, or one for each that is named."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    return _pairs(words, "write one KIND for all, or COMPONENT=KIND for each") or None


def parse_components(context: click.Context, parameter: click.Parameter, words: Sequence[str]) -> dict[str, str]:
    """Return what `NAME=REF` says for each component."""
    return _pairs(words, "write COMPONENT=FOLDER, COMPONENT=SOURCE or transformer=FILE")


def _pairs(words: Sequence[str], cure: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (name and separator and value):
            raise click.BadParameter(f"{word!r}: {cure}")
        if name in pairs:
            raise click.BadParameter(f"{name} is given twice: {cure}")
        pairs[name] = value
    return pairs


_OPTIONS = [
    click.option(
        "--base", help=f"Id of a base, a folder in diffusers' layout, or hf:owner/repo.  [default: {DEFAULT_BASE}]"
    ),
    click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME=REF",
        callback=parse_components,
        help="Take a part of the base from a folder or a source, the transformer also from a single safetensors file.",
    ),
    click.option("--hub", type=click.Choice(["modelscope", "hf"]), help="Where a known base is fetched from."),
    click.option("--revision", help="Revision of the repository that a known base is fetched from."),
    click.option(
        "--offload",
        type=click.Choice(OFFLOADS),
        help="Where weights are while they do not run: on the device (none), in the main memory by model, block "
        "(group) or layer (sequential), or in their files (disk).  [default: none]",
    ),
    click.option(
        "--quantize",
        multiple=True,
        metavar="[COMPONENT=]KIND",
        callback=parse_quantize,
        help="Weights at fewer bits, int8, fp8 or nf4: of transformer and text_encoder, or of the one that is named.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What is computed in.  [default: float32 on a CPU, else bfloat16]",
    ),
    click.option("--device", help="Where it is computed, as cuda:1 or cpu.  [default: the accelerator, else the CPU]"),
    click.option("--fit", is_flag=True, help="Choose dtype and offload mode by what the machine has free."),
    click.option("--compile", is_flag=True, help="Compile the transformer's blocks: slow once, then faster."),
    click.option("--attention-backend", help="One of diffusers' attention backends, as native, flash or sage."),
]
