"""What is published of a template, and how it is sent by both hubs' clients."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import Fault, Hubs, hubs, variables
from huggingface_hub import ModelCard
from modelscope_hub import set_default_config
from PIL import Image
from safetensors.torch import save_file
from silkscreen import TemplatePipeline
from silkscreen.authoring.publish import plan_publication
from silkscreen.cli import command_line
from silkscreen.errors import PublishError
from small_flux2 import CALL

README = "---\nlicense: mit\ntags:\n- light\n---\n# Constant\n\n![A picture](picture.png) ![Elsewhere](../secret.png)\n"
TOKEN = "sk-0123456789abcdef"

SEND = """
import os, sys, traceback
from pathlib import Path
from silkscreen import hub
try:
    print(hub.send(sys.argv[1], Path(sys.argv[2]), licence="mit", private=True, message="Publish"))
except Exception:
    traceback.print_exc()
"""


@pytest.fixture
def folder(constant_folder: Path) -> Path:
    """A template in the field's format, with weights and everything that goes with it, and what does not."""
    (constant_folder / "weights").mkdir()
    save_file(
        {"key": torch.full((1, 2, 2, 16), 3.0), "value": torch.full((1, 2, 2, 16), 5.0)},
        constant_folder / "weights" / "small.safetensors",
    )
    with (constant_folder / "model.py").open("a") as file:
        file.write('\nTEMPLATE_MODEL_PATH = "weights/small.safetensors"\n')
    (constant_folder / "template.toml").write_text('title = "Constant"\nbases = ["small", "owner/base"]\n')
    (constant_folder / "README.md").write_text(README)
    (constant_folder / "LICENSE").write_text("MIT")
    Image.new("RGB", (2, 2)).save(constant_folder / "picture.png")
    Image.new("RGB", (2, 2)).save(constant_folder.parent / "secret.png")
    (constant_folder / ".env").write_text(TOKEN)
    (constant_folder / "__pycache__").mkdir()
    (constant_folder / "__pycache__" / "model.pyc").write_bytes(b"")
    return constant_folder


@pytest.fixture
def server() -> Iterator[Hubs]:
    with hubs() as state:
        state.tokens[""] = TOKEN
        yield state


@pytest.fixture
def send(server: Hubs, tmp_path: Path) -> Callable[..., str]:
    """Send a folder in a process of its own, and return all that it printed."""

    def run(target: str, folder: Path, **given: str) -> str:
        environment = {**os.environ, **variables(server.url, tmp_path / "clients"), **given}
        command = [sys.executable, "-c", SEND, target, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


def run(*words: object) -> Result:
    return CliRunner().invoke(command_line(), [str(word) for word in words])


def test_a_dry_run_lists_files_sizes_and_checksums_and_asks_nobody(folder: Path, server: Hubs) -> None:
    shown = run("publish", folder, "modelscope:me/constant", "--dry-run")
    rows = {row[0]: row[1:] for row in map(str.split, shown.stdout.splitlines()) if len(row) == 3}
    assert rows.keys() == {
        "FILE",
        "LICENSE",
        "README.md",
        "model.py",
        "picture.png",
        "template.toml",
        "weights/small.safetensors",
    }
    for name in rows.keys() - {"FILE", "README.md"}:
        data = (folder / name).read_bytes()
        assert rows[name] == [f"{len(data):,}", hashlib.sha256(data).hexdigest()]
    assert "would go to modelscope:me/constant" in shown.output
    assert server.requests == []


def test_the_card_keeps_its_front_matter_and_gets_what_hubs_look_for(folder: Path) -> None:
    card = ModelCard(plan_publication(folder).card)
    assert card.data.license == "mit"
    assert card.data.tags == ["light", "silkscreen", "flux2", "template"]
    assert card.data.base_model == ["owner/base"]
    assert card.text.endswith(README.partition("\n---\n")[2])


def test_a_project_is_published_in_the_fields_format(tmp_path: Path) -> None:
    package = tmp_path / "src" / "silkscreen_one"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "code.py").write_text("import torch\n")
    (package / "weights" / "w.safetensors").write_bytes(b"w")
    (tmp_path / "README.md").write_text("# One\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "silkscreen-one"\nlicense = "Apache-2.0"\n'
        '[project.entry-points."silkscreen.templates"]\none = "silkscreen_one.code"\n'
    )
    plan = plan_publication(tmp_path)
    assert plan.files == {"model.py": package / "code.py", "weights/w.safetensors": package / "weights/w.safetensors"}
    assert ModelCard(plan.card).data.license == plan.licence == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("README.md", "# Constant\n", "does not say the licence"),
        ("README.md", None, "write what the template does"),
        ("model.py", None, "name a folder with a model.py"),
        ("model.py", "from .other import x\n", "line 1, imports .other, which is not there"),
        ("model.py", "import torch\nimport beside\n", "line 2, imports beside, which is not there"),
    ],
)
def test_what_cannot_be_published_is_told(folder: Path, name: str, text: str | None, problem: str) -> None:
    (folder / "beside.py").write_text("")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(PublishError, match=problem):
        plan_publication(folder)


def test_what_does_not_pass_the_check_is_not_sent(
    folder: Path, server: Hubs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {**variables(server.url, tmp_path / "clients"), "MODELSCOPE_API_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    set_default_config(None)
    (folder / "model.py").write_text("TEMPLATE_MODEL = None\n")
    refused = run("publish", folder, "modelscope:me/constant", "--trust-code")
    assert refused.exit_code == 1
    assert "does not pass `silkscreen check`, and is not published:\n  - contract: " in refused.output
    assert server.requests == []
    assert "pass trust_code=True" in run("publish", folder, "modelscope:me/constant").output
    set_default_config(None)


@pytest.mark.parametrize("target", ["me/constant", "hf:me", "hf:me/constant@v1", "ftp:me/constant", "hf:me/constant:x"])
def test_a_target_that_is_no_repository_is_refused(folder: Path, target: str) -> None:
    assert "write modelscope:owner/repo or hf:owner/repo" in run("publish", folder, target, "--dry-run").output


@pytest.mark.parametrize(("scheme", "variable"), [("modelscope", "MODELSCOPE_API_TOKEN"), ("hf", "HF_TOKEN")])
def test_what_is_sent_is_fetched_again_and_draws_the_same(
    scheme: str,
    variable: str,
    folder: Path,
    server: Hubs,
    send: Callable[..., str],
    small_pipe: object,
    tmp_path: Path,
) -> None:
    target = f"{scheme}:me/constant"
    plan_publication(folder).write(tmp_path / "staging")
    send(target, folder / "weights", **{variable: TOKEN})  # a first time, so that there is a repository
    server.repos["me/constant"]["main"].pop("small.safetensors")
    assert f"{server.url}/" in send(target, tmp_path / "staging", **{variable: TOKEN})
    sent = server.repos["me/constant"]["main"]
    assert {name: data for name, data in sent.items() if not name.startswith(".")} == {
        path.relative_to(tmp_path / "staging").as_posix(): path.read_bytes()
        for path in (tmp_path / "staging").rglob("*")
        if path.is_file()
    }
    private = {"Visibility": 1, "License": "mit"} if scheme == "modelscope" else {"visibility": "private"}
    assert private.items() <= server.made["me/constant"].items()
    environment = {**os.environ, **variables(server.url, tmp_path / "clients")}
    fetch = "import sys; from silkscreen import registry; print(registry.fetch(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", fetch, target], env=environment, capture_output=True, text=True)
    fetched = Path(done.stdout.strip())
    pictures = [
        TemplatePipeline([each], trust_code=True)(
            small_pipe, prompt="red", seed=0, template_inputs=[{"scale": 2.0}], **CALL
        ).images
        for each in (folder, fetched)
    ]
    assert fetched != folder
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(("scheme", "variable"), [("modelscope", "MODELSCOPE_API_TOKEN"), ("hf", "HF_TOKEN")])
@pytest.mark.parametrize("where", ["", "commit"])
def test_the_token_is_shown_nowhere_when_sending_is_refused(
    scheme: str, variable: str, where: str, folder: Path, server: Hubs, send: Callable[..., str]
) -> None:
    server.faults = [Fault(where, 403, times=99)]
    verbose = {"MODELSCOPE_LOG_LEVEL": "DEBUG", "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
    shown = send(f"{scheme}:me/constant", folder, **{variable: TOKEN}, **verbose)
    assert f"silkscreen.errors.PermissionDeniedError: {scheme}:me/constant: " in shown
    assert "refused, you said Bearer ***" in shown
    assert TOKEN not in shown


def test_without_a_token_nothing_is_sent(folder: Path, server: Hubs, send: Callable[..., str]) -> None:
    shown = send("hf:me/constant", folder)
    assert "nobody is logged in: set HF_TOKEN or log in with `hf auth login`" in shown
    assert server.requests == []
