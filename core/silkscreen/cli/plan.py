"""`silkscreen plan`: whether a drawing fits the machine, and how."""

from __future__ import annotations

import re
from typing import Any

import click

from silkscreen import registry
from silkscreen.cli.base_options import DEFAULT_BASE, BaseOptions, base_options
from silkscreen.cli.table import print_table
from silkscreen.cli.template_option import (
    TemplateCommand,
    bare_negative_option,
    negative_option,
    parse_template,
    template_option,
    trust_code_option,
)
from silkscreen.manifest import Input


def _parse_size(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or any(int(side) < 16 or int(side) % 16 for side in match.groups()):
        raise click.BadParameter(f"{text!r}: write WIDTHxHEIGHT in multiples of 16, as 1024x768")
    return int(match[1]), int(match[2])


@click.command("plan", cls=TemplateCommand)
@template_option
@negative_option
@bare_negative_option
@click.option("--size", callback=_parse_size, metavar="WxH", help="Of the picture in pixels.  [default: the base's]")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, help="Pictures drawn at once.")
@base_options
@trust_code_option
def command(
    templates: tuple[str, ...],
    negatives: tuple[str, ...],
    bare_negative: bool,
    size: tuple[int, int] | None,
    count: int,
    base_options: BaseOptions,
    trust_code: bool,
) -> None:
    """Show how much memory a drawing takes, in each dtype and offload mode, and the first mode that fits.

    Nothing is loaded or fetched: base and templates run on tensors without content. An input that is not given has its
    default; a picture that is not given is as large as the one drawn. Weights and caches are exact.

    \b
    Examples:
      silkscreen plan --base black-forest-labs/FLUX.2-klein-base-4B -t brightness -t structure --size 1024x1024
      silkscreen plan --base black-forest-labs/FLUX.2-dev --quantize fp8 --dtype bfloat16

    --fit of the commands that draw chooses the mode that is shown.
    """
    if base_options.offload:
        raise click.UsageError("plan compares all offload modes: leave --offload out")
    from rich.console import Console

    from silkscreen import TemplatePipeline
    from silkscreen.flux2.loading import default_device, describe_base
    from silkscreen.plan import first_fit, plan, this_machine

    base = describe_base(base_options.base or DEFAULT_BASE)
    width, height = size or (base.call.get("width", 1024), base.call.get("height", 1024))
    positive = [_completed(parse_template(option), (width, height)) for option in templates]
    negative = [_completed(parse_template(option), (width, height)) for option in negatives]
    loaded = TemplatePipeline([*dict.fromkeys(each["model_id"] for each in positive + negative)], trust_code=trust_code)
    device = base_options.torch_device or default_device()
    with Console(stderr=True).status("planning"):
        needs = plan(
            base,
            loaded,
            positive,
            negative or ([] if bare_negative else None),
            width=width,
            height=height,
            batch_size=count,
            device=device,
            dtypes=[base_options.torch_dtype] if base_options.torch_dtype else None,
            quantize=base_options.quantize,
            components=base_options.components,
        )
    machine = this_machine(device)
    columns = [
        "DTYPE",
        "OFFLOAD",
        "WEIGHTS",
        "TEMPLATES",
        "CACHES",
        "ACTIVATIONS",
        str(device).upper(),
        "MEMORY",
        "FITS",
    ]
    rows = []
    for need in needs:
        parts = (need.weights, need.templates, need.caches, need.activations, need.device, need.memory)
        lacks = need.lacks(machine)
        fits = f"{_size_text(lacks)} too few" if lacks else "yes"
        rows.append([str(need.dtype).removeprefix("torch."), need.offload, *map(_size_text, parts), fits])
    print_table(columns, rows)
    accelerator = "" if machine.accelerator is None else f", of {device} {_size_text(machine.accelerator)}"
    click.echo(f"\nfree of the main memory: {_size_text(machine.memory)}{accelerator}")
    fitting = first_fit(needs, machine)
    click.echo(f"fits: --dtype {str(fitting.dtype).removeprefix('torch.')} --offload {fitting.offload}")


def _completed(given: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return a template input with a stand-in for each value that is needed and was not given."""
    manifest = registry.manifest(given["model_id"])
    specs = (manifest.inputs if manifest else None) or {}
    missing = {name: spec for name, spec in specs.items() if spec.required and name not in given}
    return {**given, **{name: _stand_in(spec, size) for name, spec in missing.items()}}


def _stand_in(spec: Input, size: tuple[int, int]) -> Any:
    from PIL import Image

    values: dict[str, Any] = {
        "image": Image.new("RGB", size),
        "mask": Image.new("L", size),
        "text": "",
        "boolean": False,
    }
    if spec.type == "choice":
        value: Any = spec.choices[0]
    elif spec.type in ("number", "integer"):
        value = next((bound for bound in (spec.minimum, spec.maximum) if bound is not None), 0)
    else:
        value = values[spec.type]
    return [value] if spec.many else value


def _size_text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
