"""Templates and bases on a hub are used by their sources, after the code is trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import Hubs, hubs, variables
from modelscope_hub import set_default_config
from silkscreen import TemplatePipeline, load_base, registry
from silkscreen.cli import command_line
from silkscreen.errors import BaseError, NoSuchFileError, UntrustedCodeError
from silkscreen.recipe import Recipe
from silkscreen.template import find_template
from silkscreen.training.config import TrainingConfig
from silkscreen.training.trainer import train
from small_flux2 import CALL, build_pipeline

MANIFEST = b'title = "Constant"\n[inputs.scale]\ntype = "number"\ndefault = 1.0\nmaximum = 2.0\n'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant_folder: Path) -> Iterator[Hubs]:
    with hubs() as state:
        for name, value in variables(state.url, tmp_path / "clients").items():
            monkeypatch.setenv(name, value)
        set_default_config(None)
        code = (constant_folder / "model.py").read_bytes()
        state.add("owner/constant", {"model.py": code, "template.toml": MANIFEST})
        state.add("owner/constant", {"model.py": code.replace(b"self.value * scale", b"self.value * -scale")}, "v2")
        state.add("owner/several", {"one/constant/model.py": code})
        yield state
    set_default_config(None)


def run(*words: str) -> Result:
    return CliRunner().invoke(command_line(), list(words))


def test_the_code_of_a_repository_runs_only_when_it_is_trusted(server: Hubs) -> None:
    digest = hashlib.sha256(server.repos["owner/constant"]["main"]["model.py"]).hexdigest()
    with pytest.raises(UntrustedCodeError) as refusal:
        TemplatePipeline(["modelscope:owner/constant"])
    assert f"/owner--constant/snapshots/master/model.py (sha256 {digest})" in str(refusal.value)


def test_a_repository_draws_as_the_folder_does(server: Hubs, small_pipe: object, constant_folder: Path) -> None:
    pictures = []
    for template in ("modelscope:owner/constant", constant_folder):
        templates = TemplatePipeline([template], trust_code=True)
        inputs = [{"model_id": "constant", "scale": 2.0}]
        pictures.append(templates(small_pipe, prompt="red", seed=0, template_inputs=inputs, **CALL).images)
    bare = TemplatePipeline([])(small_pipe, prompt="red", seed=0, **CALL).images
    assert np.array_equal(*pictures)
    assert np.abs(pictures[0] - bare).max() > 1e-3


def test_a_template_goes_by_its_source_and_by_the_last_part_of_its_name(server: Hubs) -> None:
    source, part = "modelscope:owner/constant@v2", "modelscope:owner/several:one/constant/"
    template = find_template(source, trust_code=True)
    assert (template.name, template.origin) == ("constant", source)
    assert find_template(part, trust_code=True).name == "constant"
    loaded = TemplatePipeline([source], trust_code=True)
    assert loaded.find(source) is loaded.find("constant") is loaded.find(0)


def test_a_pinned_revision_has_its_own_code(server: Hubs, small_pipe: object) -> None:
    caches = [
        TemplatePipeline([source], trust_code=True).compose(small_pipe, [{"scale": 1.5}])
        for source in ("modelscope:owner/constant", "modelscope:owner/constant@v2")
    ]
    (_, main), (_, pinned) = (cache.fields["kv_cache"]["single_1"] for cache in caches)
    assert torch.equal(main, torch.full_like(main, 1.5))
    assert torch.equal(pinned, -main)


def test_the_inputs_of_a_repository_are_known_before_its_code_runs(server: Hubs, tmp_path: Path) -> None:
    assert registry.manifest("modelscope:owner/constant").inputs["scale"].maximum == 2.0
    words = ("-o", str(tmp_path / "x.png"))
    unknown = run("generate", "red", "-t", "modelscope:owner/constant", "scales=1", *words)
    assert "unknown input 'scales': did you mean 'scale'?" in unknown.output
    untrusted = run("generate", "red", "-t", "modelscope:owner/constant", "scale=1", *words)
    assert "model.py (sha256" in untrusted.output
    assert "--trust-code" in untrusted.output


def test_the_code_that_is_trusted_is_shown_with_its_checksum(server: Hubs, tmp_path: Path) -> None:
    digest = hashlib.sha256(server.repos["owner/constant"]["main"]["model.py"]).hexdigest()
    words = ("-t", "modelscope:owner/constant", "--trust-code", "--base", "none", "-o", str(tmp_path / "x.png"))
    shown = run("generate", "red", *words).output
    assert f"/owner--constant/snapshots/master/model.py (sha256 {digest})" in shown


def test_a_command_stays_offline(server: Hubs, tmp_path: Path) -> None:
    words = ("generate", "red", "-t", "modelscope:owner/constant", "scale=1", "-o", str(tmp_path / "x.png"))
    assert "is not on this disk" in run(*words, "--offline").output
    assert server.requests == []
    assert "executes the code" in run(*words).output
    asked = len(server.requests)
    assert "executes the code" in run(*words, "--offline").output
    assert len(server.requests) == asked


def test_weights_are_read_from_a_repository(server: Hubs, tmp_path: Path, small_pipe: object) -> None:
    from safetensors.torch import save_file

    weights = {"key": torch.full((1, 2, 2, 16), 3.0), "value": torch.full((1, 2, 2, 16), 5.0)}
    save_file(weights, tmp_path / "weights.safetensors")
    server.add("owner/weights", {"of/base.safetensors": (tmp_path / "weights.safetensors").read_bytes()})
    files = server.repos["owner/constant"]["main"]
    files["model.py"] += b'\nTEMPLATE_MODEL_PATH = "modelscope:owner/weights:of/base.safetensors"\n'
    cache = TemplatePipeline(["modelscope:owner/constant"], trust_code=True).compose(small_pipe, [{"scale": 2.0}])
    key, value = cache.fields["kv_cache"]["single_1"]
    assert torch.equal(key, torch.full_like(key, 3.0))
    assert torch.equal(value, torch.full_like(value, 10.0))


def test_a_recipe_records_the_source(server: Hubs, small_pipe: object) -> None:
    source = "modelscope:owner/constant@v2"
    recipe = Recipe.from_dict({"prompt": "red", "template_inputs": {"model_id": source, "scale": 0.5}})
    completed = recipe.completed(small_pipe, TemplatePipeline(recipe.template_names, trust_code=True))
    assert completed.made_with["templates"] == {source: source}


def test_training_runs_the_code_of_a_repository_only_when_it_is_trusted(server: Hubs, tmp_path: Path) -> None:
    settings = {"dataset_metadata_path": tmp_path / "none.jsonl", "output_path": tmp_path / "run"}
    with pytest.raises(UntrustedCodeError, match="executes the code"):
        train(TrainingConfig(template_model_id_or_path="modelscope:owner/constant", **settings))


def test_a_base_is_loaded_from_a_repository_without_what_is_not_of_it(server: Hubs, tmp_path: Path) -> None:
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "all-in-one.safetensors").write_bytes(b"twice the size")
    server.add("owner/base", tmp_path / "base")
    loaded = load_base("modelscope:owner/base")
    for name in ("transformer", "vae", "text_encoder"):
        wanted, found = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    assert server.fetched("all-in-one.safetensors") == []
    asked = len(server.requests)
    load_base("modelscope:owner/base")
    assert len(server.requests) == asked


def test_a_repository_that_is_no_base_is_told(server: Hubs) -> None:
    with pytest.raises(NoSuchFileError, match=r"there is no model_index.json in owner/constant"):
        load_base("modelscope:owner/constant")
    server.add("owner/odd", {"model_index.json": b'{"_class_name": "Flux2KleinPipeline"}'})
    with pytest.raises(BaseError, match="no base in diffusers' layout"):
        load_base("modelscope:owner/odd")
