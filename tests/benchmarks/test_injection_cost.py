"""What injecting k value templates costs, against what their keys and values cost in attention alone.

The bare pipeline, the injected one and attention alone run in one process and by turns, in float32, with guidance and
templates on both sides; prompts are encoded before, and latents are not decoded. The fastest of the turns counts, for
what disturbs one only slows it; at one thread its CPU time, which other programs hardly change. To reach: no more than
1.1 times the bare pipeline's time and what attention takes longer. Where the time goes is printed for the largest k.
Nothing is asserted of a time, only that the templates had an effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, scaled_klein, tiny
from diffusers.models.attention_dispatch import dispatch_attention_fn
from silkscreen import load_base
from silkscreen.cache import TemplateCache, inject, merge

COUNTS = (1, 2, 4, 8, 16)
SETTINGS = {tiny: (128, 8, 10), scaled_klein: (256, 1, 3)}
"""Pixels, steps and turns for each base."""

KINDS = {
    "matrix products": ("mm", "bmm", "linear", "convolution"),
    "attention": ("_scaled_dot_product",),
    "joining": ("aten::cat",),
}
"""What names of torch's operators contain."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Drawing:
    """Draws latents on a base, bare or with k template-token sets, or runs its attention alone."""

    def __init__(self, case: Case, pixels: int, steps: int) -> None:
        self.case, self.geometry, self.steps = case, case.geometry, steps
        self.pipe = load_base(case.base, device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        text, size = case.text["max_sequence_length"], pixels // 16
        self.tokens = text + size * size
        self.passes = 2 * steps
        torch.manual_seed(0)
        embeds = torch.randn(2, 1, text, self.geometry.joint_attention_dim)
        self.arguments: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        self.arguments |= {"height": pixels, "width": pixels, "num_inference_steps": steps, "guidance_scale": 3.0}
        self.arguments |= {"latents": torch.randn(1, self.geometry.in_channels, size, size), "output_type": "latent"}
        self.caches = [TemplateCache({"kv_cache": self.random_kv()}, {}, "random") for _ in range(max(COUNTS))]

    def random_kv(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        shape = (2, 1, self.case.length, self.geometry.num_attention_heads, self.geometry.attention_head_dim)
        return {block: tuple(torch.randn(shape).unbind()) for block in self.geometry.blocks}

    def bare(self) -> torch.Tensor:
        drawn: torch.Tensor = self.pipe(**self.arguments).images
        return drawn

    def injected(self, count: int) -> Callable[[], torch.Tensor]:
        merged = merge(self.caches[:count])

        def draw() -> torch.Tensor:
            with inject(self.pipe, merged, merged):
                return self.bare()

        return draw

    def attention(self, count: int) -> Callable[[], None]:
        """Return what runs as many attentions as a drawing has, over tokens as long."""
        lengths = (self.tokens, *[self.tokens + count * self.case.length] * 2)
        shape = (self.geometry.num_attention_heads, self.geometry.attention_head_dim)
        query, key, value = (torch.randn(1, length, *shape) for length in lengths)

        @torch.no_grad()
        def attend() -> None:
            for _ in range(self.passes * len(self.geometry.blocks)):
                dispatch_attention_fn(query, key, value)

        return attend


def by_turns(sides: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return the fewest seconds of each side; the first turn warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns + 1):
        for name, side in sides.items():
            began = clock()
            side()
            times[name].append(clock() - began)
    return {name: min(some[1:]) for name, some in times.items()}


def where_time_goes(side: Callable[[], Any]) -> str:
    """Return the shares of kinds of operators in what a side takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        side()
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {
        kind: sum(spent for name, spent in own.items() if any(part in name for part in parts)) / sum(own.values())
        for kind, parts in KINDS.items()
    }
    shares["the rest"] = 1 - sum(shares.values())
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())


@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("make", [tiny, scaled_klein])
def test_cost_of_injecting(tmp_path: Path, make: Callable[[Path], Case], count: int) -> None:
    pixels, steps, turns = SETTINGS[make]
    drawing = Drawing(make(tmp_path / "base"), pixels, steps)
    with threads(count):
        injected = {k: drawing.injected(k) for k in COUNTS}
        sides: dict[str, Callable[[], Any]] = {"bare": drawing.bare}
        sides |= {f"injected {k}": draw for k, draw in injected.items()}
        sides |= {f"attention {k}": drawing.attention(k) for k in (0, *COUNTS)}
        spent = by_turns(sides, turns)
        print(f"\n{make.__name__}, {drawing.tokens} tokens and {drawing.case.length} a template, {count} threads")
        print(f"bare {spent['bare']:.3f} s, its attention {spent['attention 0'] / spent['bare']:.0%} of it")
        for k in COUNTS:
            more = spent[f"attention {k}"] - spent["attention 0"]
            whole, added = spent[f"injected {k}"], spent[f"injected {k}"] - spent["bare"]
            print(f"{k:2} templates: {whole / spent['bare']:.3f} of the bare time", end=", ")
            print(f"{whole / (spent['bare'] + more):.3f} of it with the attention over their tokens", end=" ")
            print(f"(added {added / spent['bare']:+.1%}, attention alone {more / spent['bare']:+.1%})")
        print("bare:", where_time_goes(drawing.bare))
        print(f"{k} templates:", where_time_goes(injected[k]))
    assert (injected[1]() - drawing.bare()).abs().max() > 1e-3
