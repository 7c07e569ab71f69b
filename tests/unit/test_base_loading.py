"""Loading a base: its parts from anywhere, checked before they are read, fitted to the machine."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from silkscreen import TemplatePipeline, find_template, load_base
from silkscreen.bases import Base, find_base, known_bases
from silkscreen.errors import BaseError, TrainingError, UnknownNameError
from silkscreen.flux2.checking import check_component, fingerprint
from silkscreen.flux2.configuration import MODELS, configuration, empty_model
from silkscreen.flux2.loading import component_references
from silkscreen.flux2.on_disk import components_on_disk
from silkscreen.flux2.placing import offload_of, place
from silkscreen.flux2.quantizing import parse_quantize
from silkscreen.training.config import TrainingConfig
from silkscreen.training.models import read_components
from small_flux2 import build_pipeline, draw, random_picture
from torchao.utils import TorchAOBaseTensor

CPU = torch.device("cpu")
PUBLISHED = [base_id for base_id in known_bases() if base_id.startswith("black-forest-labs/")]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(saved: Path) -> np.ndarray:
    """Drawn by the base as it is loaded by default; on some CPUs, where weights lie in memory decides the last bits."""
    return draw(loaded(saved))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "base")
    return tmp_path / "base"


def loaded(folder: str | Path, **options: Any) -> Any:
    pipe = load_base(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# -- what the published bases are


@pytest.mark.parametrize("base_id", PUBLISHED)
@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_published_fingerprint_is_that_of_the_known_configuration(base_id: str, name: str) -> None:
    base = find_base(base_id)
    model = empty_model(base, name, configuration(base, name))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert fingerprint(shapes) == base.fingerprints[name]


def test_there_are_four_published_fingerprints() -> None:
    found = {value for base_id in PUBLISHED for value in find_base(base_id).fingerprints.values()}
    assert len(found) == 4


@pytest.mark.parametrize("base_id", PUBLISHED)
def test_the_download_size_is_that_of_all_parameters_in_bfloat16(base_id: str) -> None:
    base = find_base(base_id)
    models = [empty_model(base, name, configuration(base, name)) for name in MODELS]
    parameters = {id(value): value.numel() for model in models for value in model.parameters()}
    assert base.download == pytest.approx(2 * sum(parameters.values()) / 1e9, rel=0.01)


@pytest.mark.parametrize("base_id", PUBLISHED)
def test_the_text_encoder_of_a_published_base_gives_what_its_transformer_takes(base_id: str) -> None:
    base = find_base(base_id)
    encoder: Any = empty_model(base, "text_encoder", configuration(base, "text_encoder"))
    assert 3 * encoder.config.get_text_config().hidden_size == base.geometry.joint_attention_dim


# -- files that are not what they should be


def test_a_file_that_is_cut_short_is_named_before_anything_is_loaded(folder: Path) -> None:
    path = folder / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseError, match=rf"the vae in .*{re.escape(str(path))} is not a whole safetensors file"):
        load_base(folder)


def test_a_renamed_tensor_is_named_with_its_file(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    rewrite(path, lambda tensors: tensors.update(embedder=tensors.pop("x_embedder.weight")))
    with pytest.raises(BaseError) as raised:
        load_base(folder)
    assert f"{path}: unexpected tensor embedder" in str(raised.value)
    assert f"{path}: tensor x_embedder.weight is missing" in str(raised.value)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(BaseError, match=r"model\.norm\.weight has shape \[8\], the model wants \[16\]"):
        load_base(folder)


def test_another_models_file_is_refused(folder: Path) -> None:
    shutil.copy(folder / "vae" / WEIGHTS, folder / "transformer" / WEIGHTS)
    with pytest.raises(BaseError, match=r"(?s)transformer in .* cannot be loaded.*unexpected tensor .* and \d+ more"):
        load_base(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"proj_out.weight": "two.safetensors"}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseError, match=r"there is no .*two\.safetensors: fetch it again"):
        load_base(folder)


def test_a_configuration_of_another_model_is_refused(folder: Path) -> None:
    shutil.copy(folder / "transformer" / "config.json", folder / "vae" / "config.json")
    with pytest.raises(BaseError, match="the configuration of the vae is no AutoencoderKLFlux2's"):
        load_base(folder)


def test_published_tensors_are_reported(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    base = Base(**{**vars(find_base("flux2-tiny")), "id": "like-it"})
    found = check_component(base, "transformer", folder / "transformer").fingerprint
    known = {"like-it": Base(**{**vars(base), "fingerprints": {"transformer": found}})}
    monkeypatch.setattr("silkscreen.flux2.checking.known_bases", lambda: known)
    with caplog.at_level(logging.INFO, logger="silkscreen"):
        load_base(folder)
    assert f"transformer: the tensors of like-it (fingerprint {found})" in caplog.text


# -- parts from elsewhere


def test_a_component_comes_from_another_folder(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "vae", tmp_path / "other")
    pipe = load_base(folder, components={"vae": tmp_path / "other"})
    assert Path(pipe.vae.config._name_or_path) == tmp_path / "other"


def test_an_unknown_component_gets_the_nearest_name(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'transfromer': did you mean 'transformer'"):
        load_base(folder, components={"transfromer": folder})


def test_a_component_that_is_nowhere_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"the vae is to come from .*nothing, which is no folder: name a folder"):
        load_base(folder, components={"vae": tmp_path / "nothing"})


def original_naming(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a transformer's tensors by the names of the original files."""
    renamed = {}
    for old, new in (
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
        ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
        ("single_stream_modulation.linear", "single_stream_modulation.lin"),
        ("proj_out", "final_layer.linear"),
    ):
        renamed[f"{new}.weight"] = tensors[f"{old}.weight"]
    shift, scale = tensors["norm_out.linear.weight"].chunk(2)  # the two libraries have them in turn
    renamed["final_layer.adaLN_modulation.1.weight"] = torch.cat([scale, shift])
    for i in range(2):
        double, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for kind, queries, keys in (("img", "to_{}", ""), ("txt", "add_{}_proj", "added_")):
            parts = [tensors[f"{double}.attn.{queries.format(letter)}.weight"] for letter in "qkv"]
            renamed[f"{new}.{kind}_attn.qkv.weight"] = torch.cat(parts)
            for letter, name in (("q", "query"), ("k", "key")):
                norm = tensors[f"{double}.attn.norm_{keys}{letter}.weight"]
                renamed[f"{new}.{kind}_attn.norm.{name}_norm.scale"] = norm
        for old, name in (
            ("attn.to_out.0", "img_attn.proj"),
            ("attn.to_add_out", "txt_attn.proj"),
            ("ff.linear_in", "img_mlp.0"),
            ("ff.linear_out", "img_mlp.2"),
            ("ff_context.linear_in", "txt_mlp.0"),
            ("ff_context.linear_out", "txt_mlp.2"),
        ):
            renamed[f"{new}.{name}.weight"] = tensors[f"{double}.{old}.weight"]
        single, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        renamed[f"{new}.linear1.weight"] = tensors[f"{single}.to_qkv_mlp_proj.weight"]
        renamed[f"{new}.linear2.weight"] = tensors[f"{single}.to_out.weight"]
        for letter, name in (("q", "query"), ("k", "key")):
            renamed[f"{new}.norm.{name}_norm.scale"] = tensors[f"{single}.norm_{letter}.weight"]
    return {name: value.contiguous() for name, value in renamed.items()}


@pytest.mark.parametrize("naming", ["diffusers", "original", "original with a prefix"])
def test_a_transformer_comes_from_a_single_file(folder: Path, drawn: np.ndarray, tmp_path: Path, naming: str) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    if naming != "diffusers":
        prefix = "model.diffusion_model." if "prefix" in naming else ""
        tensors = {f"{prefix}{name}": value for name, value in original_naming(tensors).items()}
    save_file(tensors, tmp_path / "one.safetensors")
    (folder / "transformer" / WEIGHTS).unlink()
    pipe = loaded(folder, components={"transformer": tmp_path / "one.safetensors"})
    np.testing.assert_allclose(draw(pipe), drawn, atol=1e-5)


def test_float8_weights_of_a_single_file_are_multiplied_by_their_scales(folder: Path, tmp_path: Path) -> None:
    tensors = original_naming(load_file(folder / "transformer" / WEIGHTS))
    name = "double_blocks.0.img_mlp.0"
    scale = tensors[f"{name}.weight"].abs().max() / 448
    small = (tensors[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": small, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(())}
    save_file(tensors, tmp_path / "one.safetensors")
    pipe = loaded(folder, components={"transformer": tmp_path / "one.safetensors"})
    weight = pipe.transformer.transformer_blocks[0].ff.linear_in.weight
    torch.testing.assert_close(weight, small.float() * scale, rtol=0, atol=0)
    assert weight.dtype == torch.float32


def test_a_single_file_in_diffusers_naming_stays_in_its_file(folder: Path, drawn: np.ndarray) -> None:
    path = folder / "transformer" / WEIGHTS
    pipe = loaded(folder, components={"transformer": path}, offload="disk")
    np.testing.assert_array_equal(draw(pipe), drawn)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())


def test_a_single_file_in_the_original_naming_cannot_stay_in_its_file(folder: Path, tmp_path: Path) -> None:
    save_file(original_naming(load_file(folder / "transformer" / WEIGHTS)), tmp_path / "one.safetensors")
    with pytest.raises(BaseError, match=r"those of .*one\.safetensors have to be converted: name a file or folder"):
        load_base(folder, components={"transformer": tmp_path / "one.safetensors"}, offload="disk")


def test_a_single_file_without_a_tensor_is_refused_with_its_name(folder: Path, tmp_path: Path) -> None:
    tensors = original_naming(load_file(folder / "transformer" / WEIGHTS))
    del tensors["single_blocks.1.linear2.weight"]
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(BaseError, match=r"one\.safetensors: tensor single_transformer_blocks\.1\.attn\.to_out\.weight"):
        load_base(folder, components={"transformer": tmp_path / "one.safetensors"})


def test_hub_and_revision_say_where_a_known_base_is_fetched_from() -> None:
    base = find_base("black-forest-labs/FLUX.2-klein-4B")
    references = component_references(base, {"vae": "hf:owner/repo:vae/"}, hub="hf", revision="abc")
    assert references["transformer"] == "hf:black-forest-labs/FLUX.2-klein-4B@abc:transformer/"
    assert references["vae"] == "hf:owner/repo:vae/"


def test_a_base_on_this_disk_has_no_revision() -> None:
    with pytest.raises(BaseError, match="flux2-tiny is on this disk: leave hub and revision out"):
        load_base("flux2-tiny", revision="abc")


# -- where weights are


def test_a_base_that_was_saved_is_the_very_one_when_loaded(saved: Path, drawn: np.ndarray) -> None:
    built, pipe = build_pipeline(), loaded(saved)
    for name in MODELS:
        weights = getattr(pipe, name).state_dict()
        assert weights.keys() == getattr(built, name).state_dict().keys()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(built, name).state_dict().items())
    np.testing.assert_allclose(draw(built), drawn, atol=1e-5)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_draws_the_same_picture(saved: Path, drawn: np.ndarray, offload: Any) -> None:
    pipe, built = loaded(saved), build_pipeline()
    built.vae.to(memory_format=torch.channels_last)
    place(pipe, offload, CPU)
    moved = offload == "model"  # its weights are copied, and lie in memory as those of a base that was just built
    np.testing.assert_array_equal(draw(pipe), draw(built) if moved else drawn)
    assert offload_of(pipe) == offload


def test_a_loaded_base_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    """Its VAE is laid out in channels_last, in which safetensors would not take it."""
    pipe = loaded(saved)
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    pipe.save_pretrained(tmp_path / "again")
    for name in MODELS:
        (file,) = (saved / name).glob("*.safetensors")
        assert (tmp_path / "again" / name / file.name).read_bytes() == file.read_bytes()


def test_weights_stay_in_their_files_with_offload_disk(saved: Path, drawn: np.ndarray) -> None:
    pipe = loaded(saved, offload="disk")
    np.testing.assert_array_equal(draw(pipe), drawn)
    models = (pipe.transformer, pipe.text_encoder, pipe.vae)
    assert all(parameter.is_meta for model in models for parameter in model.parameters())


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_text_encoder_whose_embedding_is_its_head_too_is_whole(folder: Path, tmp_path: Path, offload: Any) -> None:
    pipe = loaded(folder)
    config = type(pipe.text_encoder.config)(**{**pipe.text_encoder.config.to_dict(), "tie_word_embeddings": True})
    pipe.register_modules(text_encoder=type(pipe.text_encoder)(config).eval())
    pipe.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "text_encoder" / "model.safetensors")
    np.testing.assert_array_equal(draw(loaded(tmp_path / "tied", offload=offload)), draw(pipe))


def test_weights_in_files_are_computed_with_in_the_dtype_that_is_asked_for(saved: Path) -> None:
    at_once = draw(loaded(saved, dtype=torch.bfloat16))
    np.testing.assert_array_equal(draw(loaded(saved, dtype=torch.bfloat16, offload="disk")), at_once)


def test_templates_stay_in_their_files_too_and_draw_the_same() -> None:
    edges = random_picture(0).resize((128, 128))
    inputs = [{"model_id": "brightness", "scale": 0.8}, {"model_id": "structure", "image": edges}]
    call = {"prompt": "a large red circle on a blue background", "seed": 0, "num_inference_steps": 2}
    at_once, streamed = (
        TemplatePipeline(["brightness", "structure"])(
            loaded("flux2-tiny", offload=offload), template_inputs=inputs, negative_template_inputs="default", **call
        ).images[0]
        for offload in ("none", "disk")
    )
    np.testing.assert_array_equal(np.asarray(at_once), np.asarray(streamed))


def test_a_streamed_templates_parameters_are_in_no_memory() -> None:
    model = find_template("structure").load("flux2-tiny", dtype=torch.float32, streamed=True)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
def test_a_cpu_has_nothing_to_offload_from(saved: Path, offload: Any) -> None:
    with pytest.raises(BaseError, match=rf"offload {offload}: .* this is a CPU: use disk"):
        load_base(saved, offload=offload, device="cpu")


# -- how weights are stored, and what is computed with them


def test_float8_storage_draws_nearly_the_same_picture(saved: Path, drawn: np.ndarray) -> None:
    pipe = loaded(saved, quantize="fp8")
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert pipe.text_encoder.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert 0 < np.abs(draw(pipe) - drawn).max() < 0.05


def test_integer_weights_draw_nearly_the_same_picture(saved: Path, drawn: np.ndarray) -> None:
    pipe = loaded(saved, quantize="int8")
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q.weight, TorchAOBaseTensor)
    assert isinstance(pipe.text_encoder.model.layers[0].mlp.up_proj.weight, TorchAOBaseTensor)
    assert 0 < np.abs(draw(pipe) - drawn).max() < 0.05


def test_one_component_is_quantized_alone(saved: Path) -> None:
    pipe = loaded(saved, quantize={"text_encoder": "fp8"})
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named_with_its_command(kind: str, package: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BaseError, match=rf"{kind} needs the package {package}: pip install 'silkscreen\[quantize\]'"):
        parse_quantize(kind, torch.device("cuda"))


@pytest.mark.parametrize(
    ("quantize", "problem"),
    [
        ("int4", "quantize transformer: .*'int4'"),
        ({"vae": "fp8"}, "quantize: .*'vae'"),
        ("nf4", "this is a CPU: use fp8 or int8"),
    ],
)
def test_what_cannot_be_quantized_is_refused(saved: Path, quantize: Any, problem: str) -> None:
    with pytest.raises(BaseError, match=problem):
        load_base(saved, quantize=quantize, device="cpu")


def test_quantized_weights_do_not_stay_in_their_files(saved: Path) -> None:
    with pytest.raises(BaseError, match="offload disk does not go with quantized weights"):
        load_base(saved, quantize="fp8", offload="disk")


def test_an_attention_backend_is_used(saved: Path, drawn: np.ndarray) -> None:
    pipe = loaded(saved, attention_backend="_native_math")
    try:
        processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
        assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
        np.testing.assert_allclose(draw(pipe), drawn, atol=1e-5)
    finally:
        pipe.transformer.set_attention_backend("native")  # diffusers makes the last one the default of all models


def test_an_unknown_attention_backend_is_refused(saved: Path) -> None:
    with pytest.raises(BaseError, match="attention backend 'flsh' cannot be used"):
        load_base(saved, attention_backend="flsh")


def test_the_repeated_blocks_are_compiled(saved: Path) -> None:
    pipe = load_base(saved, compile=True)
    assert isinstance(pipe.transformer, Flux2Transformer2DModel)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.transformer_blocks)


# -- in training


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig(template_model_id_or_path="brightness", dataset_metadata_path=Path("x.jsonl"), **settings)


def test_training_takes_no_float8_weights() -> None:
    with pytest.raises(TrainingError, match=r"--quantize fp8 saves nothing here.*: use int8 or nf4"):
        config(quantize="fp8")


def test_training_takes_components_from_elsewhere() -> None:
    assert read_components("vae=my-vae, transformer=one.safetensors") == {
        "vae": "my-vae",
        "transformer": "one.safetensors",
    }
    assert read_components(None) == {}


def test_components_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(TrainingError, match="--components 'vae': write NAME=FOLDER"):
        read_components("vae")


# -- which bases are there


def test_a_base_in_a_package_is_on_this_disk_and_a_published_one_is_not(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    tiny = find_base("flux2-tiny")
    assert components_on_disk(tiny) == list(tiny.components)
    assert components_on_disk(find_base("black-forest-labs/FLUX.2-dev")) == []


def test_what_is_in_the_cache_of_modelscope_is_on_this_disk(tmp_path: Path) -> None:
    for part in ("vae", "tokenizer"):
        folder = tmp_path / "models" / "black-forest-labs--FLUX.2-klein-9B" / "snapshots" / "master" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    command = [sys.executable, "-m", "silkscreen", "bases"]
    environment = {**os.environ, "MODELSCOPE_CACHE": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    listed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    (line,) = (line for line in listed.splitlines() if "FLUX.2-klein-9B" in line)
    assert "34.7 GB   only tokenizer, vae" in line
