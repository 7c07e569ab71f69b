"""One training run of the benchmark, ours or the `diffsynth` package's: takes a plan as JSON, prints what it measured.

Plan: `side` (ours or theirs), `folder` with `template` and `metadata.jsonl`, `output` for the run, `base` and its
`components`, `text` (arguments of its pipeline about prompts), `task`, `batch`, `steps` an epoch, `repeat`, `profile`.
The first of two epochs is for warming up: a step's time is the median of the second.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peer import replace_torchvision, their_pipeline
from torch.optim.optimizer import register_optimizer_step_post_hook

PRODUCTS = ("mm", "bmm", "linear", "convolution", "_scaled_dot_product")
"""What names of torch's operators for matrix products contain."""


class Clock:
    """Notes when each step of an optimizer ends, and has the second epoch profiled where there is a profiler."""

    def __init__(self, steps: int, profiler: Any) -> None:
        self.steps, self.profiler = steps, profiler
        self.ends: list[float] = []

    def __call__(self, *step: Any) -> None:
        self.ends.append(time.perf_counter())
        if self.profiler and len(self.ends) == self.steps:
            self.profiler.start()
        elif self.profiler and len(self.ends) == 2 * self.steps - 1:
            self.profiler.stop()


def train_ours(plan: dict[str, Any]) -> None:
    from silkscreen.training.config import TrainingConfig
    from silkscreen.training.trainer import train

    folder = Path(plan["folder"])
    encoded = plan["task"] == "sft:train"
    config = TrainingConfig(
        template_model_id_or_path=str(folder / "template"),
        trust_code=True,
        base=plan["base"],
        task=plan["task"],
        dataset_metadata_path=None if encoded else folder / "metadata.jsonl",
        dataset_base_path=folder / "encoded" if encoded else None,
        output_path=folder / plan["output"],
        dataset_repeat=plan["repeat"],
        batch_size=plan["batch"],
        num_epochs=2,
        max_grad_norm=0,  # the other side has no clipping
        mixed_precision="no",
    )
    train(config)


def train_theirs(plan: dict[str, Any]) -> None:
    replace_torchvision()
    from accelerate import Accelerator
    from diffsynth.core import UnifiedDataset
    from diffsynth.diffusion import DiffusionTrainingModule, FlowMatchSFTLoss, ModelLogger, launch_training_task

    class OneStage(DiffusionTrainingModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            pipe = their_pipeline(Path(plan["components"]), plan["text"])
            self.pipe = self.load_training_template_model(pipe, f"{plan['folder']}/template")
            self.switch_pipe_to_training_mode(self.pipe, "template_model")

        def forward(self, row: dict[str, Any]) -> torch.Tensor:
            picture = row["image"]
            shared = {"input_image": picture, "width": picture.width, "height": picture.height, "cfg_scale": 1}
            shared |= {"embedded_guidance": 1.0, "rand_device": "cpu", "template_inputs": row["template_inputs"]}
            inputs = shared, {"prompt": row["prompt"]}, {"negative_prompt": ""}
            for unit in self.pipe.units:
                inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
            return FlowMatchSFTLoss(self.pipe, **inputs[0], **inputs[1])

    rows = UnifiedDataset(
        plan["folder"],
        f"{plan['folder']}/metadata.jsonl",
        repeat=plan["repeat"],
        data_file_keys=("image",),
        main_data_operator=UnifiedDataset.default_image_operator(plan["folder"]),
    )
    logger = ModelLogger(f"{plan['folder']}/{plan['output']}", "pipe.template_model.", enable_csv_log=True)
    accelerator = Accelerator(cpu=True)
    launch_training_task(accelerator, rows, OneStage(), logger, learning_rate=1e-4, num_workers=0, num_epochs=2)


def losses(output: Path) -> list[float]:
    """Return the losses in a log: of ours step, epoch, loss and more; of theirs step, key, value."""
    (log,) = (output / name for name in ("log.csv", "loss.csv") if (output / name).is_file())
    return [float(line.split(",")[2]) for line in log.read_text().splitlines()[1:]]


def products(profiler: Any) -> float:
    """Return the seconds that matrix products took."""
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(spent for name, spent in own.items() if any(part in name for part in PRODUCTS)) / 1e6


def main(plan: dict[str, Any]) -> dict[str, float]:
    clock = Clock(plan["steps"], torch.profiler.profile() if plan["profile"] else None)
    register_optimizer_step_post_hook(clock)
    {"ours": train_ours, "theirs": train_theirs}[plan["side"]](plan)
    if not clock.ends:
        return {}
    assert len(clock.ends) == 2 * plan["steps"]
    times = clock.ends[plan["steps"] :]
    status = Path("/proc/self/status").read_text()
    measured = {
        "seconds": median(after - before for before, after in itertools.pairwise(times)),
        "megabytes": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024,  # type: ignore[index]
        "loss": mean(losses(Path(plan["folder"], plan["output"]))),
    }
    if clock.profiler:
        measured["products"] = products(clock.profiler) / (plan["steps"] - 1)
    return measured


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
