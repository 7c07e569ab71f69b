from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from PIL import Image
from silkscreen.batch import draw_batch
from silkscreen.cli import command_line
from silkscreen.recipe import read

QUICK = {"steps": 2}
ROWS: list[dict[str, Any]] = [
    {"prompt": "a large red circle on a blue background", **QUICK},
    {"prompt": "a small green star on a pink background", "seed": 70, **QUICK},
    {
        "prompt": "a large yellow square on a purple background",
        "template_inputs": [{"model_id": "brightness", "scale": 0.8}],
        "negative_template_inputs": [{"model_id": "brightness", "scale": 0.3}],
        **QUICK,
    },
    {"prompt": "a large pink triangle on a green background", "guidance_scale": 1.0, **QUICK},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(command_line(), [str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_row_becomes_a_picture_that_can_be_repeated_alone(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    done = run("batch", rows, "-o", tmp_path / "out", "--seed", "40")
    assert done.exit_code == 0, done.output
    assert sorted(contents(tmp_path / "out")) == [f"{row:06d}.png" for row in range(4)]
    assert [read(tmp_path / "out" / f"{row:06d}.png")["seed"] for row in range(4)] == [40, 70, 42, 43]
    again = tmp_path / "out" / "again.png"
    assert run("generate", "--like", tmp_path / "out" / "000002.png", "-o", again).exit_code == 0
    assert again.read_bytes() == (tmp_path / "out" / "000002.png").read_bytes()


def test_what_is_done_is_skipped_and_what_is_another_is_kept(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[:2])
    assert draw_batch(rows, tmp_path / "out") == []
    first = tmp_path / "out" / "000000.png"
    before = first.stat().st_mtime_ns
    write(rows, [ROWS[0], {**ROWS[1], "seed": 71}])
    old = (tmp_path / "out" / "000001.png").read_bytes()
    failures = draw_batch(rows, tmp_path / "out")
    assert [failure["row"] for failure in failures] == [1]
    assert "exists with another recipe" in failures[0]["reason"]
    assert (tmp_path / "out" / "000001.png").read_bytes() == old
    assert draw_batch(rows, tmp_path / "out", overwrite=True) == []
    assert read(tmp_path / "out" / "000001.png")["seed"] == 71
    assert first.stat().st_mtime_ns == before
    assert not (tmp_path / "out" / "report.jsonl").exists()


def test_rows_that_fail_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    Image.new("RGB", (128, 128)).save(tmp_path / "edges.png")
    rows = tmp_path / "rows.jsonl"
    good = {**ROWS[0], "template_inputs": {"model_id": "structure", "image": "edges.png"}}
    bad: list[Any] = [
        "not a row",
        {"prompt": "a red star", "stpes": 2},
        {**ROWS[0], "template_inputs": {"model_id": "structure", "image": "none.png"}},
        {**ROWS[0], "template_inputs": {"model_id": "brightness", "scale": 7}},
        {**ROWS[0], "base": "no-base"},
    ]
    rows.write_text("\n".join(["{", "", *map(json.dumps, [*bad, good])]))
    done = run("batch", rows, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "6 rows failed" in done.output
    assert sorted(contents(tmp_path / "out")) == ["000006.png", "report.jsonl"]
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert [(failure["row"], failure["line"]) for failure in report] == [(0, 1), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)]
    reasons = [failure["reason"] for failure in report]
    for reason, part in zip(
        reasons,
        ["JSONDecodeError", "JSON object", "'stpes': did you mean 'steps'", "no such file", "out of range", "no-base"],
        strict=True,
    ):
        assert part in reason


def test_a_killed_batch_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{**row, "steps": 8} for row in ROWS])
    command = [sys.executable, "-m", "silkscreen.batch", str(rows), "-o", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "000001.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len([name for name in contents(tmp_path / "killed") if name.startswith("0")]) < 4
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert draw_batch(rows, tmp_path / "whole") == []
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_processes_share_the_rows(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.mkdir()
    (witness / "model.py").write_text(
        f"""
import os, pathlib, torch

class TEMPLATE_MODEL(torch.nn.Module):
    def process_inputs(self, pipe, row, **kwargs):
        pathlib.Path({str(tmp_path)!r}, f"row {{row}} by {{os.environ.get('RANK')}}").touch()
        return {{}}

    def forward(self, pipe, **kwargs):
        return {{}}
"""
    )
    inputs = [{"template_inputs": {"model_id": str(witness), "row": row}} for row in range(4)]
    bad = [{"prompt": 3}, {}]
    rows = write(tmp_path / "rows.jsonl", [*({**row, **given} for row, given in zip(ROWS, inputs, strict=True)), *bad])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "silkscreen.batch", str(rows), "-o", str(tmp_path / "shared"), "--trust-code"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "2 rows failed" in done.stderr
    by = sorted(path.name for path in tmp_path.glob("row *"))
    assert by == ["row 0 by 0", "row 1 by 1", "row 2 by 0", "row 3 by 1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: other numbers of threads round otherwise
    try:
        assert [failure["row"] for failure in draw_batch(rows, tmp_path / "one", trust_code=True)] == [4, 5]
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 5
