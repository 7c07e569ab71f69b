from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from silkscreen.cache import TemplateCache, inject
from silkscreen.errors import TrainingError
from silkscreen.flux2 import prepacking
from silkscreen.flux2.loading import describe_base
from silkscreen.training import objective
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import draw_seed
from silkscreen.training.store import Example, ExampleStore, StoreError
from silkscreen.training.trainer import _Run, train
from silkscreen.training.validation import probes
from training_template import MODEL, same, write_dataset, write_template
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "template_model_id_or_path": str(write_template(tmp_path / "glow")),
        "dataset_metadata_path": write_dataset(tmp_path / "data"),
        "output_path": tmp_path / "run",
        "batch_size": 2,
        "num_epochs": 2,
        "learning_rate": 1e-2,
    }


def run(settings: dict[str, Any], **more: Any) -> Path:
    return train(TrainingConfig(**{**settings, **more}))


def losses(folder: Path) -> list[str]:
    with (folder / "log.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def test_only_what_is_named_is_trained_and_all_else_is_as_it_was(settings: dict[str, Any]) -> None:
    trainer = _Run(TrainingConfig(**settings, trainable_models="template_model.values"))
    modules = (trainer.pipe.transformer, trainer.pipe.vae, trainer.pipe.text_encoder, trainer.model)
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    checkpoint = load_file(trainer.train())
    after = [module.state_dict() for module in modules]
    changed = {name for b, a in zip(before, after, strict=True) for name in b if not torch.equal(b[name], a[name])}
    assert set(checkpoint) == changed == {name for name in before[-1] if name.startswith("values.")}


def test_frozen_modules_of_the_constructor_stay_frozen_and_in_eval_mode(settings: dict[str, Any]) -> None:
    trainer = _Run(TrainingConfig(**settings))
    assert not any(module.training for module in trainer.model.eye.modules())
    assert trainer.model.training
    assert not any(name.startswith("eye") for name in load_file(trainer.train()))


def test_an_unknown_part_is_an_error_that_lists_the_parts(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"template_model has no 'valves'; it has keys, values, eye"):
        run(settings, trainable_models="template_model.valves")


@pytest.mark.parametrize("timesteps", [(0, 1000), (400, 401), (0, 200)])
def test_a_step_is_the_naive_objective(settings: dict[str, Any], timesteps: tuple[int, int]) -> None:
    shares = {"min_timestep_boundary": timesteps[0] / 1000, "max_timestep_boundary": timesteps[1] / 1000}
    trainer = _Run(TrainingConfig(**settings, **shares))
    trainer.prepared = trainer.model
    assert trainer.rows.preparation is not None
    example = trainer.encoder.encode(trainer.rows.preparation.prepare(1, 0), 0)
    value = trainer._learn([example], [1], 0)
    generator = torch.Generator().manual_seed(draw_seed(0, 0, 1))
    i = int(torch.randint(*timesteps, (1,), generator=generator))
    noise = torch.randn(example.latents.shape, generator=generator)
    sigma = objective.sigmas()[i]
    noisy = (1 - sigma) * example.latents + sigma * noise
    pack = trainer.pipe._pack_latents
    cache = trainer.model(**example.processed)["kv_cache"]
    with inject(trainer.pipe, TemplateCache({"kv_cache": cache}, {}, ""), TemplateCache({}, {}, "")):
        velocity = trainer.pipe.transformer(
            hidden_states=pack(noisy),
            encoder_hidden_states=example.prompt_embeds,
            timestep=sigma[None],
            img_ids=trainer.pipe._prepare_latent_ids(noisy),
            txt_ids=example.text_ids,
            return_dict=False,
        )[0]
    naive = objective.weights()[i] * (velocity - pack(noise - example.latents)).square().mean()
    assert value.item() == pytest.approx(naive.item(), abs=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(settings: dict[str, Any]) -> None:
    gradients = []
    checkpointing = {"use_gradient_checkpointing": True}
    for more in ({}, checkpointing, {"use_gradient_checkpointing_offload": True}, checkpointing | {"offload": "disk"}):
        trainer = _Run(TrainingConfig(**settings, **more))
        trainer.prepared = trainer.model
        trainer.enable_checkpointing()
        assert trainer.rows.preparation is not None
        trainer._learn([trainer.encoder.encode(trainer.rows.preparation.prepare(1, 0), 0)], [1], 0)
        assert trainer.pipe.transformer.is_gradient_checkpointing == bool(more)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient is not None and gradient.abs().max() > 0
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=0)


def test_workers_and_the_cache_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = run(settings)
    assert not (tmp_path / "run" / "cache").exists()
    for name, more in (("workers", {"dataset_num_workers": 2}), ("uncached", {"no_cache": True})):
        assert same(plain, run(settings, output_path=tmp_path / name, **more)), name
        assert losses(tmp_path / "run") == losses(tmp_path / name)


def test_a_base_that_stays_in_its_files_teaches_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointing = settings | {"use_gradient_checkpointing": True}
    in_files = run(checkpointing, offload="disk", output_path=tmp_path / "disk")
    prepacked = run(checkpointing)
    monkeypatch.setattr(prepacking, "LARGEST", 0)
    assert same(in_files, run(checkpointing, output_path=tmp_path / "plain"))
    for name, value in load_file(prepacked).items():
        torch.testing.assert_close(value, load_file(in_files)[name], atol=1e-4, rtol=0)


def test_a_base_of_integer_weights_teaches_nearly_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    for kind in (None, "int8"):
        run(settings, output_path=tmp_path / str(kind), quantize=kind)
    plain, quantized = ([float(loss) for loss in losses(tmp_path / kind)] for kind in ("None", "int8"))
    assert quantized != plain
    assert quantized == pytest.approx(plain, rel=0.05)


def test_a_step_is_the_one_of_the_named_optimizer(settings: dict[str, Any], tmp_path: Path) -> None:
    """The first step of Adam is the same for every decay of the mean square, the second is not."""
    settings |= {"num_epochs": 1, "dataset_repeat": 1, "customized_optimizer": "torch.optim.Adam"}
    checkpoints = {
        beta2: load_file(run(settings, output_path=tmp_path / str(beta2), adam_beta2=beta2, weight_decay=0.0))
        for beta2 in (None, 0.999, 0.5)
    }
    assert all(torch.equal(value, checkpoints[0.999][name]) for name, value in checkpoints[None].items())
    assert not any(torch.equal(value, checkpoints[0.5][name]) for name, value in checkpoints[None].items())


def test_an_optimizer_that_cannot_be_had_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"customized_optimizer 'torch.optim.Atom' cannot be had.*no attribute"):
        run(settings, customized_optimizer="torch.optim.Atom")
    with pytest.raises(TrainingError, match=r"customized_optimizer 'torch.optim.SGD' cannot be had.*betas"):
        run(settings, customized_optimizer="torch.optim.SGD", adam_beta2=0.9)


def test_accumulated_batches_are_one_step(settings: dict[str, Any], tmp_path: Path) -> None:
    one = load_file(run(settings, batch_size=4))
    accumulated = {"batch_size": 1, "gradient_accumulation_steps": 4, "output_path": tmp_path / "accumulated"}
    for name, value in load_file(run(settings, **accumulated)).items():
        torch.testing.assert_close(value, one[name], atol=1e-5, rtol=0)


def test_a_split_run_is_the_unsplit_one_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run(settings, validation_split=0.25)
    rows = run(settings, task="sft:data_process", output_path=tmp_path / "rows")
    assert run(settings, task="sft:data_process", output_path=rows) == rows  # nothing is left to do
    assert not list(rows.glob("*.pt")) + list(rows.glob("*.pkl"))
    stage = {
        **settings,
        "task": "sft:train",
        "dataset_metadata_path": None,
        "dataset_base_path": rows,
        "output_path": tmp_path / "split",
        "validation_split": 0.25,
    }
    trainer = _Run(TrainingConfig(**stage))
    assert trainer.pipe.vae is None and trainer.pipe.text_encoder is None
    assert same(whole, trainer.train())
    assert losses(tmp_path / "run") == losses(tmp_path / "split")

    for shard in rows.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(TrainingError, match="lacks 4 of 4 rows"):
        run(stage, output_path=tmp_path / "third")


def test_rows_encoded_for_something_else_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = run(settings, task="sft:data_process", output_path=tmp_path / "rows")
    write_dataset(tmp_path / "data", count=5)
    with pytest.raises(TrainingError, match="holds rows encoded for something else: it has dataset"):
        run(settings, task="sft:data_process", output_path=rows)
    other = write_template(tmp_path / "other", MODEL.replace("0.1 *", "0.2 *"))
    with pytest.raises(TrainingError, match="it has template 'glow', this run 'other'; code"):
        run(
            settings,
            task="sft:train",
            template_model_id_or_path=str(other),
            dataset_base_path=rows,
            output_path=tmp_path / "o",
        )


def test_rows_of_another_base_and_of_other_encoders_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Two bases of one size, which no id tells apart, and two folders that a VAE may come from."""
    bases = [tmp_path / "one", tmp_path / "two"]
    for folder in bases:
        write_base(folder)
    rows = run(settings, task="sft:data_process", base=str(bases[0]), output_path=tmp_path / "rows")
    split = {"dataset_base_path": rows, "task": "sft:train", "output_path": tmp_path / "split"}
    with pytest.raises(TrainingError, match="it has base 'unknown"):
        run(settings, **split, base=str(bases[1]))
    with pytest.raises(TrainingError, match="it has encoders"):
        elsewhere = f"vae={bases[1] / 'vae'}"
        run(settings, task="sft:data_process", base=str(bases[0]), components=elsewhere, output_path=rows)


def write_base(folder: Path) -> None:
    """Write flux2-tiny with a transformer and text encoder of sizes that no known base has, in new weights."""
    ignored = shutil.ignore_patterns("transformer", "text_encoder")
    shutil.copytree(describe_base("flux2-tiny").folder, folder, ignore=ignored)
    geometry = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 6, "attention_head_dim": 32}
    sizes = {"in_channels": 64, "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False}
    Flux2Transformer2DModel(**geometry, **sizes).save_pretrained(folder / "transformer")
    layers = {"num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = Qwen3Config(vocab_size=64, hidden_size=16, intermediate_size=16, **layers)
    Qwen3ForCausalLM(text).save_pretrained(folder / "text_encoder")


def test_encoded_rows_that_cannot_be_written_are_kept_in_memory(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "rows", {})
    store.add(3, Example(torch.ones(1), torch.ones(2), torch.ones(3), {"scale": [torch.zeros(1), "x"]}))
    shutil.rmtree(tmp_path / "rows")
    with pytest.raises(StoreError, match="rows cannot be written"):
        store.flush()
    assert store[3].processed["scale"][1] == "x"
    (tmp_path / "rows").mkdir()
    store.flush()
    assert torch.equal(ExampleStore(tmp_path / "rows", {})[3].prompt_embeds, torch.ones(2))


def test_a_template_that_draws_at_random_is_encoded_anew(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = MODEL.replace('{"scale": scale}', '{"scale": scale + float(torch.rand(()))}')
    settings["template_model_id_or_path"] = str(write_template(tmp_path / "random", code))
    first = run(settings)
    assert "processes a row differently each time" in capsys.readouterr().out
    assert same(first, run(settings, output_path=tmp_path / "again", dataset_num_workers=1))
    with pytest.raises(TrainingError, match="cannot be encoded once for all"):
        run(settings, task="sft:data_process", output_path=tmp_path / "rows")


def test_bad_rows_stop_training_or_are_skipped(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings["dataset_metadata_path"]
    (tmp_path / "data" / "cut.png").write_bytes((tmp_path / "data" / "0.png").read_bytes()[:60])
    bad = [
        {"image": "cut.png", "prompt": "p", "template_inputs": {"scale": 1}},
        {"image": "0.png", "prompt": "p", "template_inputs": {"scala": 1}},
        {"image": "none.png", "prompt": "p", "template_inputs": {"scale": 1}},
    ]
    path.write_text(path.read_text() + "\n".join(map(json.dumps, bad)))
    with pytest.raises(TrainingError) as caught:
        run(settings)
    for line, reason in ((5, "trunc"), (6, "scala"), (7, "there is no file")):
        assert any(f"jsonl:{line}:" in part and reason in part for part in str(caught.value).splitlines())
    run(settings, bad_rows="skip", num_epochs=1)
    assert "going on without 3 bad rows" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 2


def test_validation_tells_the_loss_and_keeps_the_best(settings: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(
            json.dumps({"prompt": "a large red star on a blue background", "template_inputs": {"scale": scale}})
            for scale in (0.1, 0.9)
        )
    )
    held_out = write_dataset(tmp_path / "held-out", count=3)
    run(
        settings,
        validation_metadata_path=held_out,
        validation_prompts=prompts,
        validation_steps=2,
        ema_decay=0.5,
        dataset_base_path=tmp_path / "data",
    )
    with (tmp_path / "run" / "log.csv").open() as file:
        told = [float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]]
    assert len(told) == 2 and told[0] != told[1]
    assert (tmp_path / "run" / "best.safetensors").exists()
    for step in (2, 4):
        with Image.open(tmp_path / "run" / "samples" / f"step-{step}.png") as sheet:
            assert sheet.width > 256 and sheet.height > 128


def test_validation_noise_levels_are_stratified() -> None:
    made = probes([7, 8, 9], seed=0)
    assert sorted(probe.index * len(made) // 1000 for probe in made) == list(range(len(made)))
    assert {probe.row for probe in made} == {7, 8, 9}
    assert made == probes([7, 8, 9], seed=0)


def test_a_run_is_not_overwritten_and_resumes_only_as_itself(settings: dict[str, Any]) -> None:
    first = run(settings)
    kept = first.read_bytes()
    with pytest.raises(TrainingError, match="holds a run: go on with it by --resume latest"):
        run(settings)
    with pytest.raises(TrainingError, match="holds a run with other settings"):
        run(settings, resume="latest", learning_rate=2e-2)
    assert run(settings, resume="latest") == first
    assert first.read_bytes() == kept


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run(settings, num_epochs=3, ema_decay=0.9, lr_scheduler="cosine", warmup_steps=2)
    more = {"ema_decay": 0.9, "lr_scheduler": "constant", "output_path": tmp_path / "parts"}
    constant = run(settings, num_epochs=3, **{**more, "output_path": tmp_path / "constant"})
    run(settings, num_epochs=1, **more)
    assert same(constant, run(settings, num_epochs=3, resume="latest", **more))
    assert losses(tmp_path / "constant") == losses(tmp_path / "parts")
    assert not same(whole, constant)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        run(settings, output_path=tmp_path / "file" / "run")


def test_weights_to_start_from(settings: dict[str, Any], tmp_path: Path) -> None:
    first = run(settings, num_epochs=1)
    prefixed = {f"pipe.template_model.{name}": value for name, value in load_file(first).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    from_plain, from_prefixed = (
        run(settings, num_epochs=1, resume_from_checkpoint=path, output_path=tmp_path / path.stem / "out")
        for path in (first, tmp_path / "prefixed.safetensors")
    )
    assert same(from_plain, from_prefixed)
    assert not same(first, from_plain)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fp8_models": "x"}, "--fp8_models makes no sense here"),
        ({"lora_rank": 4}, "--lora_rank makes no sense here"),
        ({"offload": "group"}, "--offload group takes away weights that the backward pass needs: use model"),
        ({"offload": "disk"}, "--offload disk saves nothing while every weight is kept"),
        ({"extra_inputs": "template_inputs,edit_image"}, "--extra_inputs 'edit_image'"),
        ({"height": 100, "width": 128}, "--height 100: a multiple of 16"),
        ({"dataset_metadata_path": None}, "--dataset_metadata_path is missing"),
        ({"task": "sft:train"}, "needs --dataset_base_path"),
        ({"validation_split": 1.0}, "--validation_split 1.0"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0"),
        ({"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5}, "a smaller and a larger share"),
    ],
)
def test_settings_that_make_no_sense_say_so(settings: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(**{**settings, **more})
