"""A new plugin of each kind passes the check as it is made, and learns."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from silkscreen.authoring.check import check
from silkscreen.authoring.new import KINDS, new
from silkscreen.authoring.project import project_of
from silkscreen.cli import command_line
from silkscreen.errors import ProjectError, UnknownNameError

CARRIERS = {"value": "kv_cache", "image": "kv_cache", "lora": "lora", "text": "extra_text_embedding"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def project(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project, made by the command."""
    folder = tmp_path_factory.mktemp("new") / "project"
    words = ["new", f"fresh {kind}", "--kind", kind, "--project", str(folder)]
    result = CliRunner().invoke(command_line(), words)
    assert result.exit_code == 0, result.output
    return folder


def test_it_passes_the_check_at_once_and_is_told_to_be_untrained(project: Path, kind: str) -> None:
    findings = {finding.name: finding for finding in check(project, trust_code=True)}
    assert [finding for finding in findings.values() if not finding.passed] == []
    assert findings["cache"].detail.startswith(CARRIERS[kind])
    assert "untrained" in findings["weights"].detail
    assert f"-t fresh-{kind} " in findings["example"].detail
    assert findings["example"].detail in (project / "README.md").read_text()


def test_its_training_runs_and_the_loss_on_its_rows_falls(project: Path, kind: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    words = ["silkscreen_tiny.datasets", KINDS[kind].dataset, str(data), "--count", "12"]
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {"python": [], "silkscreen": ["-m", "silkscreen"]}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {" ".join([sys.executable, *words])} "$@"\n')
        (programs / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    flags = ["--batch_size", "4", "--num_epochs", "1", "--dataset_repeat", "10", "--validation_steps", "5"]
    flags += ["--validation_split", "0", "--validation_metadata_path", str(data / "metadata.jsonl")]
    done = subprocess.run(
        [project / "training" / "train.sh", tmp_path, *flags], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "run" / "log.csv").open() as file:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0], losses


def test_its_own_test_runs_the_check(tmp_path: Path) -> None:
    project = new("own", "value", folder=tmp_path)
    (project.package / "flux2-tiny.safetensors").write_bytes(b"cut short")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Finding(name='weights'" in done.stdout


def test_a_project_in_the_way_is_kept(tmp_path: Path) -> None:
    project = new("twice", "text", folder=tmp_path)
    with safe_open(project.package / "flux2-tiny.safetensors", framework="pt") as file:
        assert "untrained" in file.metadata()
    assert project_of(project.package) == project
    (project.package / "model.py").write_text("precious")
    with pytest.raises(ProjectError, match="would be overwritten"):
        new("twice", "text", folder=tmp_path)
    assert (project.package / "model.py").read_text() == "precious"
    with pytest.raises(UnknownNameError, match="unknown kind 'txt': did you mean 'text'"):
        new("other", "txt", folder=tmp_path / "other")
