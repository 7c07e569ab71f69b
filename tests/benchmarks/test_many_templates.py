"""Ten templates used in turn, loaded lazily, against the template pipeline of the `diffsynth` package.

Both sides compose the same value templates in float32, one after the other, round after round. The goal is 0.2 of its
time once each has been used; the first round, and rounds with new values, are told beside it. On flux2-tiny the other
side reads and runs a template in 8 ms, and finding the device and dtype that a pipeline runs in takes diffusers 2 ms.
What all templates together draw from the same noise may differ by 2/255.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from silkscreen import TemplatePipeline, find_template, load_base
from test_training_speed import Case, scaled_klein, tiny, write_data
from training_run import replace_torchvision, their_pipeline

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffsynth") is None,
    reason="no diffsynth: pip install einops imageio pandas; pip install --no-deps diffsynth",
)

TEMPLATES = 10
ROUNDS = 5
REPEATS = 3
STEPS = 4
PROMPT = "a large red circle on a blue background"

Compose = Callable[[list[Mapping[str, Any]]], Any]


def write_templates(folder: Path, case: Case) -> list[Path]:
    """Write the value template of the training benchmark ten times, with weights of its own each."""
    folders = []
    for n in range(TEMPLATES):
        (folder / f"{n}").mkdir()
        write_data(folder / f"{n}", case)
        path = (folder / f"{n}" / "template").rename(folder / f"template-{n}")
        torch.manual_seed(n)
        tensors = find_template(path, trust_code=True).construct(case.base).state_dict()
        save_file(tensors, path / "weights.safetensors")
        with (path / "model.py").open("a") as module:
            module.write('\nTEMPLATE_MODEL_PATH = "weights.safetensors"\n')
        folders.append(path)
    return folders


def inputs(scale: float, *indices: int) -> list[Mapping[str, Any]]:
    return [{"model_id": index, "scale": scale} for index in indices or range(TEMPLATES)]


def seconds(make: Callable[[], Compose], step: float = 0.0) -> list[float]:
    """Return how long each round took: the fastest of a few repeats, each with nothing loaded at first.

    The value changes by `step` from round to round.
    """
    repeats = []
    for _ in range(REPEATS):
        compose, times = make(), []
        for turn in range(ROUNDS):
            start = time.perf_counter()
            for index in range(TEMPLATES):
                compose(inputs(step * turn, index))
            times.append(time.perf_counter() - start)
        repeats.append(times)
    return min(repeats, key=sum)


@pytest.mark.parametrize("make", [tiny, scaled_klein])
@torch.no_grad()
def test_ten_templates_in_turn_against_diffsynth(tmp_path: Path, make: Any) -> None:
    replace_torchvision()
    from diffsynth.core import ModelConfig
    from diffsynth.diffusion.template import TemplatePipeline as TheirTemplatePipeline

    case = make(tmp_path / "base")
    paths = [str(folder) for folder in write_templates(tmp_path, case)]
    pipe = load_base(case.base, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    theirs = their_pipeline({"components": str(case.components), "text": case.text})
    noise_unit = next(unit for unit in theirs.units if type(unit).__name__ == "Flux2Unit_NoiseInitializer")
    noise_unit.process = lambda pipe, initial_noise, **_: {"noise": initial_noise}  # its own has 128 channels

    def our_templates() -> TemplatePipeline:
        return TemplatePipeline(paths, trust_code=True)

    def their_templates() -> Any:
        configs = [ModelConfig(path=path) for path in paths]
        return TheirTemplatePipeline(torch.float32, "cpu", configs, lazy_loading=True)

    def our_compose() -> Compose:
        templates = our_templates()
        return lambda given: templates.compose(pipe, given)

    def their_compose() -> Compose:
        templates = their_templates()
        return lambda given: templates.call_single_side(theirs, given)

    tokens = case.pixels // 16
    shape = (1, case.geometry.in_channels, tokens, tokens)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sides = {"template_inputs": inputs(0.8), "negative_template_inputs": inputs(0.2)}
    settings = {"prompt": PROMPT, "height": case.pixels, "width": case.pixels, "num_inference_steps": STEPS}
    ours_alone = {name: case.text[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    ours_alone |= {"guidance_scale": 3.0, "latents": noise}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each template that it loads
        their_seconds = seconds(their_compose)
        drawn = their_templates()(
            theirs,
            **settings,
            **sides,
            cfg_scale=3.0,
            initial_noise=noise.flatten(2).transpose(1, 2),
            progress_bar_cmd=iter,
        )
    our_seconds, with_new_values = seconds(our_compose), seconds(our_compose, 1 / ROUNDS)
    ours, bare = (our_templates()(pipe, **settings, **ours_alone, **given).images[0] for given in (sides, {}))
    difference, effect = (np.abs(np.asarray(ours, int) - np.asarray(other, int)).max() for other in (drawn, bare))
    print(f"\n{make.__name__}, float32, {torch.get_num_threads()} threads: pictures differ by {difference}/255 at most")
    rows = {"diffsynth": their_seconds, "silkscreen": our_seconds, "silkscreen, new values": with_new_values}
    for name, (first, *later) in rows.items():
        share = sum(later) / sum(their_seconds[1:])
        print(f"{name:22} {1000 * first:4.0f} ms the first round, then {1000 * median(later):4.0f} ms ({share:.2f})")
    assert difference <= 2 < effect
