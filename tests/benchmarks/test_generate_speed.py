"""Speed of drawing with templates, against the template pipeline of the `diffsynth` package.

Both sides run in one process and by turns, in float32, on the same weights and noise, and what they draw may differ by
2/255; the fastest of a few rounds counts, for what disturbs a call only slows it. A first call is that of a new
template pipeline, whose making counts too; repeated calls have the same prompt and inputs, and other noise. Beside
them stands diffusers without any template. The goals, as a share of the other side's time, are printed with what is
measured, and nothing is asserted of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import LORA_TEMPLATE, VALUE_TEMPLATE, Case, needs_diffsynth, scaled_klein, tiny
from peer import their_pipeline
from safetensors.torch import save_file
from silkscreen import TemplatePipeline, find_template, load_base
from silkscreen.carriers.lora import linear_layers

pytestmark = needs_diffsynth

PROMPT = "a large red circle on a blue background"
GUIDANCE = 3.0

Inputs = list[dict[str, Any]]
Draw = Callable[[int], Sequence[Any]]
"""Returns the pictures of a round, whose number is the seed of their noise."""


@dataclasses.dataclass
class Pair:
    """The pipelines of both sides for a case, and templates for both: their folders."""

    case: Case
    folders: Sequence[Path]
    pixels: int
    steps: int

    def __post_init__(self) -> None:
        self.pipe = load_base(self.case.base, device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.their_pipe = their_pipeline(self.case.components, self.case.text)
        self.their_pipe.dit = self.their_pipe.enable_lora_hot_loading(self.their_pipe.dit)

    def templates(self) -> TemplatePipeline:
        return TemplatePipeline(self.folders, trust_code=True)

    def their_templates(self, **options: Any) -> Any:
        from diffsynth.core import ModelConfig
        from diffsynth.diffusion.template import TemplatePipeline as TheirTemplatePipeline

        configs = [ModelConfig(path=str(folder)) for folder in self.folders]
        return TheirTemplatePipeline(torch.float32, "cpu", configs, **options)

    def ours(self, inputs: Any, negative: Any) -> Draw:
        """Draw with our pipeline: one picture, or one for each list of inputs."""
        templates = self.templates()
        sides = {"template_inputs": inputs, "negative_template_inputs": negative}
        count = len(inputs) if isinstance(inputs[0], list) else 1
        return lambda seed: templates(self.pipe, **sides, **self.arguments(seed, count)).images

    def bare(self, count: int = 1) -> Draw:
        """Draw with diffusers alone."""
        return lambda seed: self.pipe(**self.arguments(seed, count)).images

    def theirs(self, *requests: tuple[Inputs, Inputs]) -> Draw:
        """Draw with their pipeline a picture after the other: each of its own inputs and negative inputs."""
        templates = self.their_templates()

        def draw(seed: int) -> list[Any]:
            return [
                templates(
                    self.their_pipe,
                    template_inputs=inputs,
                    negative_template_inputs=negative,
                    initial_noise=noise.flatten(1).T[None],
                    cfg_scale=GUIDANCE,
                    progress_bar_cmd=iter,
                    **self.settings,
                )
                for (inputs, negative), noise in zip(requests, self.noise(seed, len(requests)), strict=True)
            ]

        return draw

    @property
    def settings(self) -> dict[str, Any]:
        size = {"height": self.pixels, "width": self.pixels}
        return {"prompt": PROMPT, "num_inference_steps": self.steps, **size}

    def arguments(self, seed: int, count: int) -> dict[str, Any]:
        own = {"latents": self.noise(seed, count), "num_images_per_prompt": count, "guidance_scale": GUIDANCE}
        return {**self.settings, **self.case.text, **own}

    def noise(self, seed: int, count: int) -> torch.Tensor:
        shape = (count, self.case.geometry.in_channels, self.pixels // 16, self.pixels // 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_templates(folder: Path, case: Case, count: int, code: str = VALUE_TEMPLATE, **constants: Any) -> list[Path]:
    """Write a template several times, with weights of its own each."""
    constants["TEMPLATE_MODEL_PATH"] = "weights.safetensors"
    folders = []
    for n in range(count):
        path = case.write_template(folder / f"template-{n}", code, **constants)
        torch.manual_seed(n)
        save_file(find_template(path, trust_code=True).construct(case.base).state_dict(), path / "weights.safetensors")
        folders.append(path)
    return folders


def values(scale: float, *indices: int) -> Inputs:
    return [{"model_id": index, "scale": scale} for index in indices]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds, the fastest of some rounds: of the first call of each round, and of the later ones."""

    first: float
    repeated: float


def by_turns(
    sides: Mapping[str, Callable[[], Draw]], rounds: int, calls: int = 3
) -> tuple[dict[str, Timing], dict[str, np.ndarray]]:
    """Time a few calls of what each side makes anew every round, and return all that it drew in the last round."""
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    drawn: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, make in sides.items():
            ends, pictures = [time.perf_counter()], []
            with contextlib.redirect_stdout(io.StringIO()):  # the other side prints each template that it loads
                draw = make()
                for seed in range(calls):
                    pictures += draw(seed)
                    ends.append(time.perf_counter())
            times[name].append(np.diff(ends).tolist())
            drawn[name] = np.stack([np.asarray(picture, int) for picture in pictures])
    timings = {
        name: Timing(min(each[0] for each in some), min(min(each[1:]) for each in some)) for name, some in times.items()
    }
    return timings, drawn


def report(benchmark: Any, title: str, timings: Mapping[str, Timing], goal: Timing) -> None:
    """Print what was measured, and save it with the benchmark's results."""
    theirs = timings["diffsynth"]
    benchmark.extra_info["threads"] = torch.get_num_threads()
    print(f"\n{title}, float32, {torch.get_num_threads()} threads")
    for name, timing in timings.items():
        shares = {"share first": timing.first / theirs.first, "share repeated": timing.repeated / theirs.repeated}
        benchmark.extra_info[name] = {**dataclasses.asdict(timing), **shares}
        first, repeated = shares.values()
        print(
            f"{name:22} first {timing.first:7.3f} s ({first:.2f}), repeated {timing.repeated:7.3f} s ({repeated:.2f})"
        )
    print(f"goal: {goal.first:.2f} of diffsynth's time first, {goal.repeated:.2f} repeated")
    benchmark.extra_info["goal"] = dataclasses.asdict(goal)


def check_equal(drawn: Mapping[str, np.ndarray], bare: str = "diffusers alone") -> None:
    """Make sure that both sides drew the same pictures, and that the templates had a part in them."""
    difference, effect = (np.abs(drawn["silkscreen"] - drawn[other]).max() for other in ("diffsynth", bare))
    print(f"pictures differ by {difference}/255 at most, from those without templates by {effect}/255")
    assert difference <= 2 < effect


def compare(benchmark: Any, title: str, pair: Pair, goal: Timing, rounds: int, calls: int = 3) -> None:
    """Compare all templates of a pair in one picture with guidance."""
    used = range(len(pair.folders))
    inputs, negative = values(0.8, *used), values(0.2, *used)
    sides = {
        "diffsynth": lambda: pair.theirs((inputs, negative)),
        "silkscreen": lambda: pair.ours(inputs, negative),
        "diffusers alone": pair.bare,
    }
    by_turns({name: make for name, make in sides.items() if name != "silkscreen"}, rounds=1, calls=2)  # warms up
    timings, drawn = by_turns(sides, rounds, calls)
    report(benchmark, title, timings, goal)
    check_equal(drawn)
    benchmark.pedantic(pair.ours(inputs, negative), args=(0,), warmup_rounds=1)


def test_three_value_templates(benchmark: Any, tmp_path: Path) -> None:
    case = tiny(tmp_path / "base")
    pair = Pair(case, write_templates(tmp_path, case, 3), pixels=128, steps=20)
    compare(benchmark, "three value templates, flux2-tiny, 128 x 128, 20 steps", pair, Timing(0.85, 0.65), rounds=3)


def test_three_value_templates_on_a_larger_base(benchmark: Any, tmp_path: Path) -> None:
    case = scaled_klein(tmp_path / "base")
    pair = Pair(case, write_templates(tmp_path, case, 3), pixels=512, steps=4)
    title = "three value templates, 27 M parameters, 512 x 512, 4 steps"
    compare(benchmark, title, pair, Timing(1.0, 1.0), rounds=1, calls=2)


def test_lora(benchmark: Any, tmp_path: Path) -> None:
    case = tiny(tmp_path / "base")
    folders = write_templates(tmp_path, case, 1, LORA_TEMPLATE, RANK=16, LAYERS=linear_layers(case.geometry))
    pair = Pair(case, folders, pixels=128, steps=20)
    compare(benchmark, "LoRA of rank 16 over all linear layers, flux2-tiny", pair, Timing(0.8, 0.8), rounds=3)


def test_sixteen_pictures_of_sixteen_inputs(benchmark: Any, tmp_path: Path) -> None:
    """The other side has no batches: it draws one after the other."""
    case, count = tiny(tmp_path / "base"), 16
    pair = Pair(case, write_templates(tmp_path, case, 3), pixels=128, steps=20)
    requests = [(values(n / count, 0, 1, 2), values(0.5, 0, 1, 2)) for n in range(count)]
    inputs, negative = ([request[side] for request in requests] for side in (0, 1))
    sides = {
        "diffsynth": lambda: pair.theirs(*requests),
        "silkscreen": lambda: pair.ours(inputs, negative),
        "diffusers alone": lambda: pair.bare(count),
    }
    timings, drawn = by_turns(sides, rounds=2, calls=2)
    report(benchmark, f"{count} pictures of {count} inputs, flux2-tiny", timings, Timing(0.65, 0.65))
    check_equal(drawn)
    benchmark.pedantic(pair.ours(inputs, negative), args=(0,), warmup_rounds=1)


@pytest.mark.parametrize("make", [tiny, scaled_klein])
def test_ten_templates_in_turn(benchmark: Any, tmp_path: Path, make: Callable[[Path], Case]) -> None:
    """What is timed is composing, round after round of all ten, loaded lazily: the drawing is that of the others.

    On flux2-tiny the other side reads and runs a template in 8 ms, and finding the device and dtype that a pipeline
    runs in takes diffusers 2 ms.
    """
    case, count = make(tmp_path / "base"), 10
    pair = Pair(case, write_templates(tmp_path, case, count), pixels=128, steps=4)

    @torch.no_grad()
    def in_turn(compose: Callable[[Inputs], Any], step: float = 0.0) -> Draw:
        def compose_each(turn: int) -> list[Any]:
            for index in range(count):
                compose(values(0.1 + step * turn, index))
            return [0]

        return compose_each

    def ours(step: float = 0.0) -> Draw:
        templates = pair.templates()
        return in_turn(lambda given: templates.compose(pair.pipe, given), step)

    def theirs() -> Draw:
        templates = pair.their_templates(lazy_loading=True)
        return in_turn(torch.no_grad()(lambda given: templates.call_single_side(pair.their_pipe, given)))

    sides = {"diffsynth": theirs, "silkscreen": ours, "silkscreen, new values": lambda: ours(0.1)}
    timings, _ = by_turns(sides, rounds=3, calls=5)
    report(benchmark, f"composing ten templates in turn, {make.__name__}", timings, Timing(0.2, 0.2))
    inputs, negative = (values(scale, *range(count)) for scale in (0.8, 0.2))
    makers = {
        "diffsynth": lambda: pair.theirs((inputs, negative)),
        "silkscreen": lambda: pair.ours(inputs, negative),
        "diffusers alone": pair.bare,
    }
    check_equal(by_turns(makers, rounds=1, calls=2)[1])
    benchmark.pedantic(ours(), args=(0,), warmup_rounds=1)
