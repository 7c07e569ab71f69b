from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from silkscreen import TemplatePipeline, registry
from silkscreen.errors import ContractError, UntrustedCodeError
from silkscreen.template import find_template

Install = Callable[..., Path]

MODEL = """
    import torch

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self, size=2):
            super().__init__()
            self.linear = torch.nn.Linear(size, size)
            self.register_buffer("fixed", torch.full((size,), 7.0), persistent=False)

        def process_inputs(self, pipe, scale, **kwargs):
            return {"scale": scale}

        def forward(self, pipe, scale, **kwargs):
            return {"kv_cache": {}}
"""


def folder_template(folder: Path, after: str = "", model: str = MODEL) -> Path:
    (folder / "model.py").write_text(textwrap.dedent(model) + textwrap.dedent(after))
    return folder


def violations(folder: Path, base_id: str = "flux2-tiny") -> str:
    with pytest.raises(ContractError) as caught:
        find_template(folder, trust_code=True).load(base_id, dtype=torch.float32)
    return str(caught.value)


def test_a_folder_is_refused_until_its_code_is_trusted(tmp_path: Path) -> None:
    folder_template(tmp_path, after="raise RuntimeError('executed')")
    with pytest.raises(UntrustedCodeError, match=r"model\.py \(sha256 [0-9a-f]{64}\).*trust_code=True"):
        find_template(tmp_path)


def test_a_trusted_folder_is_a_template_whose_inputs_are_its_signature(tmp_path: Path) -> None:
    template = find_template(folder_template(tmp_path), trust_code=True)
    assert list(template.inputs) == ["scale"]
    assert template.inputs["scale"].required


def test_an_installed_template_is_imported_and_registered_when_it_is_found(distribution: Install) -> None:
    distribution(
        "fake-one",
        entry_points="[silkscreen.templates]\none = fake_one.model\n",
        files={"model.py": textwrap.dedent(MODEL)},
    )
    assert "fake_one.model" not in sys.modules
    template = find_template("one")
    assert template.origin == "fake-one 1.0"
    assert registry.plugin_manager().is_registered(template.module)


def test_two_templates_of_one_name_are_told_apart_by_their_distributions(distribution: Install) -> None:
    for name in ("fake-one", "fake-two"):
        package = name.replace("-", "_")
        distribution(
            name,
            entry_points=f"[silkscreen.templates]\nsame = {package}.model\n",
            files={"model.py": textwrap.dedent(MODEL)},
        )
    templates = TemplatePipeline(["fake-one:same", "fake-two:same"])
    requests = templates.check_inputs([{"model_id": "fake-two:same", "scale": 1}])
    assert requests[0][0].origin == "fake-two 1.0"


def test_a_module_that_raises_names_its_distribution(distribution: Install) -> None:
    distribution("fake-bad", entry_points="[silkscreen.templates]\nbad = fake_bad.model\n", files={"model.py": "1/0"})
    with pytest.raises(ContractError, match=r"fake-bad 1\.0: importing fake_bad\.model raised ZeroDivisionError"):
        find_template("bad")


def test_every_violation_of_the_contract_is_reported_at_once(tmp_path: Path) -> None:
    folder_template(
        tmp_path,
        model="""
        import torch

        class TEMPLATE_MODEL(torch.nn.Module):
            def process_inputs(self, pipe, model_id):
                return {}

        TEMPLATE_MODEL_PATH = 3
        TEMPLATE_MODEL_CONFIG = [1]
        TEMPLATE_DATA_PROCESSOR = "none"
        """,
    )
    (tmp_path / "template.toml").write_text('title = "x"\n[inputs.scale]\ntype = "number"\n')
    message = violations(tmp_path)
    for part in (
        "process_inputs has to take **kwargs",
        "process_inputs may not have a parameter model_id",
        "no forward method",
        "input 'scale' is no parameter",
        "needs 'model_id'",
        "TEMPLATE_MODEL_PATH has to be",
        "TEMPLATE_MODEL_CONFIG has to be",
        "TEMPLATE_DATA_PROCESSOR has to be",
        str(tmp_path / "model.py"),
    ):
        assert part in message


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc/weights.safetensors", "is absolute"),
        ("C:\\weights.safetensors", "is absolute"),
        ("../weights.safetensors", "leaves"),
        ("none.safetensors", "there is no"),
        ("ftp:owner/repo:file", "unknown source 'ftp'"),
        ("hf:owner", "names nothing on a hub"),
    ],
)
def test_a_weight_path_that_cannot_be_used_is_explained(tmp_path: Path, path: str, problem: str) -> None:
    assert problem in violations(folder_template(tmp_path, after=f"TEMPLATE_MODEL_PATH = {path!r}"))


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04pickle")
    message = violations(folder_template(tmp_path, after="TEMPLATE_MODEL_PATH = 'w.safetensors'"))
    assert f"{tmp_path / 'w.safetensors'} is not a whole safetensors file" in message


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save_file({"linear.weight": torch.zeros(3, 2), "other": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = violations(folder_template(tmp_path, after="TEMPLATE_MODEL_PATH = 'w.safetensors'"))
    assert "linear.weight has shape [3, 2], the model wants [2, 2]" in message
    assert "unexpected tensor other" in message
    assert "tensor linear.bias is missing" in message


def test_a_base_without_weights_is_named_with_those_there_are(tmp_path: Path) -> None:
    folder_template(tmp_path, after="TEMPLATE_MODEL_PATH = {'flux2-tiny': None}")
    assert "no weights for the base 'flux3': it has some for flux2-tiny" in violations(tmp_path, "flux3")


def test_weights_come_from_shards_by_base_in_the_wanted_dtype(tmp_path: Path) -> None:
    save_file({"linear.weight": torch.eye(3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    save_file({"linear.bias": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    folder_template(
        tmp_path,
        after="""
        TEMPLATE_MODEL_PATH = {"mine": ["a.safetensors", "b.safetensors"], "yours": None}
        TEMPLATE_MODEL_CONFIG = {"mine": {"size": 3}}
        """,
    )
    template = find_template(tmp_path, trust_code=True)
    model = template.load("mine", dtype=torch.float32)
    assert torch.equal(model.linear.weight, torch.eye(3))
    assert torch.equal(model.linear.bias, torch.ones(3))
    assert torch.equal(model.fixed, torch.full((3,), 7.0))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert template.load("yours", dtype=torch.float32).linear.weight.shape == (2, 2)


def test_a_constructor_that_cannot_run_without_memory_is_built_plainly(tmp_path: Path) -> None:
    save_file({"start": torch.arange(3.0)}, tmp_path / "w.safetensors")
    model = MODEL.replace(
        "self.linear = torch.nn.Linear(size, size)",
        "self.start = torch.nn.Parameter(torch.zeros(3)); assert self.start.sum().item() == 0",
    )
    folder_template(tmp_path, after="TEMPLATE_MODEL_PATH = 'w.safetensors'", model=model)
    loaded = find_template(tmp_path, trust_code=True).load("flux2-tiny", dtype=torch.float32)
    assert torch.equal(loaded.start, torch.arange(3.0))
