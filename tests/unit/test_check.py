"""What `silkscreen check` finds in plugins that are broken, each in its own ways."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import importlib_metadata
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from silkscreen.authoring.check import Finding, check
from silkscreen.authoring.project import create_project, plan_project
from silkscreen.cli import command_line
from silkscreen.errors import UnknownNameError, UntrustedCodeError

Checked = dict[str, Finding]
GOOD = [
    "import",
    "contract",
    "weights",
    "base",
    "cache",
    "manifest",
    "deterministic",
    "batch",
    "sizes",
    "gradient",
    "example",
]
SIMPLE = """
    import torch

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.Parameter(torch.ones(1, 2, 6, 32))

        @torch.no_grad()
        def process_inputs(self, pipe, scale=0.5, **kwargs):
            return {"scale": torch.tensor([[[[scale]]]])}

        def forward(self, scale, **kwargs):
            value = self.values * scale
            return {"kv_cache": {"single_0": (value, value)}}
"""
MANIFEST = """
    title = "Broken"
    summary = "Is broken."
    bases = ["flux2-tiny"]
    carriers = ["kv_cache"]
    [inputs.scale]
    type = "number"
    minimum = 0.0
    maximum = 1.0
    default = 0.5
"""


def write(folder: Path, model: str, manifest: str | None = MANIFEST) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(textwrap.dedent(model))
    if manifest is not None:
        (folder / "template.toml").write_text(textwrap.dedent(manifest))
    return folder


def checked(target: str | Path) -> Checked:
    return {finding.name: finding for finding in check(target, trust_code=True)}


def failed(findings: Checked) -> list[str]:
    return [name for name, finding in findings.items() if not finding.passed]


def test_a_good_plugin_passes_every_question_and_tells_its_sizes() -> None:
    result = CliRunner().invoke(command_line(), ["check", "softrgb", "--json"])
    assert result.exit_code == 0, result.output
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert list(findings) == GOOD
    assert all(finding["passed"] and not finding["cure"] for finding in findings.values())
    assert findings["cache"]["detail"] == f"kv_cache: 12 tokens in 6 blocks, {12 * 192 * 2 * 6 * 4:,} bytes"
    assert "flux2-tiny: 180 tensors" in findings["weights"]["detail"]
    assert findings["example"]["detail"].startswith("silkscreen generate 'a large red circle on a blue background' -t ")


@pytest.fixture(scope="module")
def reaching(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """A folder whose import reaches out, and whose contract and manifest are broken."""
    model = """
        import os, socket, subprocess, torch

        def attempt(reach):
            try:
                reach()
            except Exception:
                pass

        attempt(lambda: socket.create_connection(("127.0.0.1", 9)))
        attempt(lambda: subprocess.run(["true"]))
        attempt(lambda: os.system("true"))

        class TEMPLATE_MODEL(torch.nn.Module):
            def process_inputs(self, pipe, speed, **kwargs):
                return {}
    """
    return checked(write(tmp_path_factory.mktemp("broken") / "reaching", model))


def test_an_import_that_reaches_out_is_found_by_file_and_line_also_where_it_hides_its_errors(reaching: Checked) -> None:
    detail = reaching["import"].detail
    for event, line in (("socket.getaddrinfo", 10), ("subprocess.Popen", 11), ("os.system", 12)):
        assert f"{event} by line {line} of" in detail
    assert "process_inputs" in reaching["import"].cure


def test_a_broken_contract_and_a_broken_manifest_are_told_apart_and_end_the_check(reaching: Checked) -> None:
    assert failed(reaching) == list(reaching) == ["import", "contract", "manifest"]
    assert "has no forward method" in reaching["contract"].detail
    assert "'speed', which the manifest does not list" in reaching["manifest"].detail


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """A project that draws at random, does not use a parameter, and says other things than its code does."""
    model = """
        import torch
        from .size import SIZE

        class TEMPLATE_MODEL(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.used = torch.nn.Parameter(torch.randn(1, 2, *SIZE))
                self.cut_off = torch.nn.Parameter(torch.ones(1, 2, *SIZE))

            @torch.no_grad()
            def process_inputs(self, pipe, prompt="a", scale=0.4, **kwargs):
                assert prompt, "no prompt"
                return {"scale": torch.tensor([[[[scale]]]])}

            def forward(self, scale, **kwargs):
                value = (self.used + self.cut_off.detach()) * scale
                return {"kv_cache": {"single_0": (value, value)}}
    """
    manifest = MANIFEST.replace("kv_cache", "lora") + '[inputs.prompt]\ntype = "text"\n'
    project = plan_project(tmp_path_factory.mktemp("broken") / "silkscreen-careless", "careless")
    texts = {"model.py": model, "template.toml": manifest, "size.py": "SIZE = (6, 32)"}
    create_project(project, {name: textwrap.dedent(text) for name, text in texts.items()})
    return checked(project.folder)


def test_what_the_manifest_says_is_compared_with_the_code_and_with_what_it_returns(careless: Checked) -> None:
    assert not careless["manifest"].passed
    assert "the default of scale is 0.5, and 0.4 in process_inputs" in careless["manifest"].detail
    assert "its carriers are ['lora'], and forward returned ['kv_cache']" in careless["manifest"].detail


def test_weights_that_are_drawn_anew_at_each_load_are_not_deterministic(careless: Checked) -> None:
    assert not careless["deterministic"].passed
    assert "weight file" in careless["deterministic"].cure


def test_a_trainable_tensor_that_no_gradient_reaches_is_named(careless: Checked) -> None:
    assert careless["gradient"].detail == "no gradient reaches cut_off"
    assert "requires_grad_(False)" in careless["gradient"].cure


def test_an_example_command_that_fails_is_found_in_a_project_that_is_not_installed(careless: Checked) -> None:
    assert not careless["example"].passed
    assert "-t careless scale=0.8 prompt=" in careless["example"].detail
    assert "no prompt" in careless["example"].detail


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """A folder without a manifest, for square pictures, one at a time."""
    model = """
        import torch

        class TEMPLATE_MODEL(torch.nn.Module):
            def process_inputs(self, pipe, image, **kwargs):
                assert image.width == image.height, "square pictures only"
                return {"mean": pipe.preprocess_image(image).mean().reshape(1)}

            def forward(self, mean, **kwargs):
                value = torch.ones(1, 2, 6, 32) * mean.item()
                return {"kv_cache": {"single_0": (value, value)}}
    """
    return checked(write(tmp_path_factory.mktemp("broken") / "lonely", model, manifest=None))


def test_a_folder_without_a_manifest_is_tried_with_inputs_told_from_its_signature(lonely: Checked) -> None:
    assert lonely["cache"].passed
    assert lonely["deterministic"].passed
    assert "nothing in it is trainable" in lonely["gradient"].detail
    assert lonely["example"].passed
    assert "there is no template.toml" in lonely["manifest"].detail


def test_a_forward_that_takes_no_batch_is_not_safe_in_batches(lonely: Checked) -> None:
    assert not lonely["batch"].passed
    assert "do not go through forward as a batch" in lonely["batch"].detail
    assert "first dimension" in lonely["batch"].cure


def test_a_template_for_one_size_fails_at_another(lonely: Checked) -> None:
    assert lonely["sizes"].detail == "AssertionError: square pictures only"


def test_two_pictures_that_depend_on_each_other_are_not_safe_in_batches(tmp_path: Path) -> None:
    model = SIMPLE.replace(
        "value = self.values * scale", "self.n = getattr(self, 'n', 0) + 1; value = self.values * self.n"
    )
    findings = checked(write(tmp_path / "counting", model))
    assert "drawn in one call differ by up to 0." in findings["batch"].detail


def test_weights_that_are_missing_incomplete_or_cut_short_are_named_for_each_base(tmp_path: Path) -> None:
    paths = {"flux2-tiny": "a.safetensors", "flux2-other": "b.safetensors", "flux2-third": "c.safetensors"}
    folder = write(tmp_path / "heavy", f"{textwrap.dedent(SIMPLE)}\nTEMPLATE_MODEL_PATH = {paths}")
    save_file({"others": torch.zeros(2)}, folder / "a.safetensors")
    (folder / "c.safetensors").write_bytes(b"short")
    findings = checked(folder)
    detail = findings["weights"].detail
    assert "flux2-tiny" in detail
    assert "unexpected tensor others" in detail
    assert "tensor values is missing" in detail
    assert f"flux2-other: weight path 'b.safetensors': there is no {folder / 'b.safetensors'}" in detail
    assert "c.safetensors is not a whole safetensors file" in detail
    assert "silkscreen pack" in findings["weights"].cure
    assert "bases are ['flux2-tiny'], and TEMPLATE_MODEL_PATH has" in findings["manifest"].detail
    assert list(findings) == ["import", "contract", "weights", "manifest"]


def test_a_pickle_beside_the_weights_is_found_and_the_command_ends_with_1(tmp_path: Path) -> None:
    folder = write(tmp_path / "pickled", SIMPLE)
    (folder / "model.pt").write_bytes(b"\x80\x04")
    result = CliRunner().invoke(command_line(), ["check", str(folder), "--trust-code"])
    assert result.exit_code == 1
    assert f"FAIL weights        model.pt in {folder}" in result.output
    assert "cure: save weights by safetensors" in result.output


def test_a_template_for_bases_that_are_not_here_says_so(tmp_path: Path) -> None:
    klein = "black-forest-labs/FLUX.2-klein-base-4B"
    findings = checked(write(tmp_path / "large", SIMPLE, MANIFEST.replace("flux2-tiny", klein)))
    assert f"it is for no base on this disk: the base {klein} is on a hub" in findings["base"].detail
    assert "--base" in findings["base"].cure


def test_a_folder_is_not_checked_until_its_code_is_trusted(tmp_path: Path) -> None:
    folder = write(tmp_path / "strange", "raise RuntimeError")
    with pytest.raises(UntrustedCodeError, match="sha256"):
        check(folder)
    with pytest.raises(UnknownNameError, match="unknown template 'brightnes'"):
        check("brightnes")


def test_pytest_has_a_test_for_each_finding(tmp_path: Path) -> None:
    points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    project = plan_project(tmp_path / "plugin", "untitled")
    create_project(project, {"model.py": textwrap.dedent(SIMPLE), "template.toml": "title = 3"})
    (tmp_path / "pytest.ini").write_text("[pytest]\nsilkscreen_check = plugin\n")
    installed = importlib_metadata.entry_points(group="pytest11")
    plugin = [] if "silkscreen" in installed.names else ["-p", points["pytest11"]["silkscreen"]]
    words = [sys.executable, "-m", "pytest", *plugin, "--silkscreen-check", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "silkscreen check plugin: manifest" in done.stdout
    assert "title has to be text" in done.stdout
    assert "cure: change template.toml" in done.stdout
