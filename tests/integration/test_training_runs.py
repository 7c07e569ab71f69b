"""Training as users start it: the field's command line, two processes, and a machine that fails at any moment."""

from __future__ import annotations

import csv
import os
import random
import resource
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_template import same, write_dataset, write_template

TRAIN = [sys.executable, "-m", "silkscreen.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def flags(**settings: Any) -> list[str]:
    """Return settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def succeed(words: list[str]) -> str:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it: other numbers of threads round otherwise
    done = subprocess.run(words, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_of_the_field(tmp_path: Path) -> None:
    base = files("silkscreen_tiny")
    template, data = write_template(tmp_path / "glow"), write_dataset(tmp_path / "data", count=2)
    output = succeed(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"),
            *("-m", "silkscreen.train"),
            *("--dataset_base_path", str(data.parent), "--dataset_metadata_path", str(data)),
            *("--extra_inputs", "template_inputs", "--max_pixels", "1048576", "--dataset_repeat", "10"),
            "--model_id_with_origin_paths",
            f"{base}:text_encoder/*.safetensors,{base}:transformer/*.safetensors,"
            f"{base}:vae/diffusion_pytorch_model.safetensors",
            *("--template_model_id_or_path", str(template), "--tokenizer_path", f"{base}:tokenizer/"),
            *("--learning_rate", "1e-4", "--num_epochs", "2", "--remove_prefix_in_ckpt", "pipe.template_model."),
            *("--output_path", str(tmp_path / "out"), "--trainable_models", "template_model"),
            *("--use_gradient_checkpointing", "--find_unused_parameters"),
        ]
    )
    assert f"silkscreen pack {template}" in output
    tensors = load_file(tmp_path / "out" / "epoch-1.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"keys", "values"}
    with (tmp_path / "out" / "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40

    again = tmp_path / "again"
    succeed([*TRAIN, "--config", str(tmp_path / "out" / "config.toml"), "--output_path", str(again)])
    assert same(tmp_path / "out" / "epoch-1.safetensors", again / "epoch-1.safetensors")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "template_model_id_or_path": write_template(tmp_path / "glow"),
        "dataset_metadata_path": write_dataset(tmp_path / "data"),
        "learning_rate": 1e-3,
        "num_epochs": 3,
        "save_steps": 1,
    }


def test_killed_at_any_moment_it_ends_with_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    succeed([*TRAIN, *flags(**settings, output_path=tmp_path / "whole")])
    output, chance = tmp_path / "killed", random.Random(0)
    state, killed = output / "state", 0
    while True:
        process = subprocess.Popen(
            [*TRAIN, *flags(**settings, output_path=output, resume="latest")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if killed < 4:
            writing = killed % 2 == 0
            if _wait_for_write(process, output, in_the_middle=writing):
                time.sleep(0 if writing else chance.random() * 0.3)
                process.send_signal(signal.SIGKILL)
                killed += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert killed >= 2
    assert same(tmp_path / "whole" / "epoch-2.safetensors", output / "epoch-2.safetensors")
    assert not list(state.glob("*.partial"))
    logs = [(folder / "log.csv").read_text() for folder in (tmp_path / "whole", output)]
    assert logs[0] == logs[1]


def _wait_for_write(process: subprocess.Popen[bytes], output: Path, *, in_the_middle: bool) -> bool:
    """Wait until a run writes a state, or has written a new one; false when it ends before."""
    before = set(output.glob("state/*"))
    while process.poll() is None:
        found = set(output.glob("state/*")) - before
        if any((path.suffix == ".partial") == in_the_middle for path in found):
            return True
        time.sleep(0.001)
    return False


def test_a_full_disk_keeps_the_last_good_state(settings: dict[str, Any], tmp_path: Path) -> None:
    succeed([*TRAIN, *flags(**settings, output_path=tmp_path / "whole")])
    output = tmp_path / "full"
    succeed([*TRAIN, *flags(**{**settings, "num_epochs": 1}, output_path=output)])
    good = {path.name: path.read_bytes() for path in (output / "state" / "step-4").iterdir() if path.is_file()}
    resumed = [*TRAIN, *flags(**settings, output_path=output, resume="latest")]
    failed = subprocess.run(
        resumed,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),  # less than Adam's averages
    )
    assert failed.returncode == 1
    assert "the state of step 5 cannot be written" in failed.stderr
    assert "the last good state is kept" in failed.stderr
    assert good == {path.name: path.read_bytes() for path in (output / "state" / "step-4").iterdir() if path.is_file()}
    succeed(resumed)
    assert same(tmp_path / "whole" / "epoch-2.safetensors", output / "epoch-2.safetensors")


def test_two_processes_are_one_with_a_batch_of_two(settings: dict[str, Any], tmp_path: Path) -> None:
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    succeed([*TRAIN, *flags(**settings, output_path=one, batch_size=2)])
    launch = [*TORCHRUN, "-m", "silkscreen.train"]
    succeed([*launch, *flags(**settings, output_path=two, batch_size=1)])
    expected = load_file(one / "epoch-2.safetensors")
    for name, value in load_file(two / "epoch-2.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)

    succeed([*launch, *flags(**{**settings, "num_epochs": 1}, output_path=mixed, batch_size=1)])
    succeed([*TRAIN, *flags(**settings, output_path=mixed, resume="latest")])
    for name, value in load_file(mixed / "epoch-2.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


def test_two_processes_encode_what_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    launch = [*TORCHRUN, "-m", "silkscreen.train"]
    rows = tmp_path / "rows"
    split = {**settings, "task": "sft:data_process", "output_path": rows}
    succeed([*launch, *flags(**split)])
    assert len(list(rows.glob("*.safetensors"))) == 2
    template = settings["template_model_id_or_path"]
    stage = {"task": "sft:train", "dataset_base_path": rows, "template_model_id_or_path": template, "num_epochs": 3}
    succeed([*TRAIN, *flags(**stage, output_path=tmp_path / "split", learning_rate=1e-3)])
    succeed([*TRAIN, *flags(**settings, output_path=tmp_path / "whole")])
    assert same(tmp_path / "split" / "epoch-2.safetensors", tmp_path / "whole" / "epoch-2.safetensors")
