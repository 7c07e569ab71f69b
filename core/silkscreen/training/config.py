"""What a training run is told: the field's flags and ours, as one dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from silkscreen.bases import Offload
from silkscreen.errors import TrainingError

WITHOUT_MEANING = {
    "fp8_models": "the frozen models are kept in the precision that suits the machine",
    "lora_base_model": "it trains a LoRA of the base itself; here a template is trained",
    "lora_target_modules": "it trains a LoRA of the base itself; here a template is trained",
    "lora_rank": "it trains a LoRA of the base itself; here a template is trained",
    "lora_checkpoint": "it continues a LoRA of the base itself; use --resume_from_checkpoint for a template",
    "dtype": "--mixed_precision says it",
    "device": "accelerate chooses it",
}
"""Flags of the field, and options of other commands, that make no sense here, with the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Attributes:
        template_model_id_or_path: an installed template, or a folder with a `model.py`, whose code is then executed.
        dataset_metadata_path: a `metadata.jsonl`, `.json` or `.csv` with `image`, `prompt` and `template_inputs`.
        output_path: the folder for checkpoints, the log and the resolved configuration.
        dataset_base_path: the folder that paths in the metadata are relative to; by default the metadata's.
        dataset_repeat: times each row is seen in an epoch.
        dataset_num_workers: processes that read pictures and run the template's data processor; 0 for none.
        data_file_keys: columns of the metadata that name files, by commas; `image` is the picture to learn.
        extra_inputs: columns that are given to the model, by commas; only `template_inputs` has a use here.
        bad_rows: what to do about rows that cannot be used: `stop` before the first step, or `skip` them.
        height, width: of every picture, multiples of 16; by default each picture's own.
        max_pixels: pictures above it are scaled down.
        base: id or folder of the base; the short way to name all of its models.
        components: parts of the base that come from elsewhere, by commas, as `NAME=REF`: see `silkscreen generate`.
        hub: where a known base is fetched from, `modelscope` or `hf`; by default where its `base.toml` says.
        revision: of the repository that a known base is fetched from.
        quantize: frozen weights of the base at fewer bits: `int8` or `nf4`.
        compile: compile the blocks of the base's transformer.
        attention_backend: one of diffusers' attention backends, for the base's transformer.
        offload: where the base's weights are while they do not run: see `silkscreen generate`. `sequential` and `disk`
            save memory in training with gradient checkpointing alone.
        model_paths: folders of the base's models, as a JSON list; for files, the folders they are in.
        model_id_with_origin_paths: the base's models, by commas, as `ID:PATTERN`; ID is a folder or a hub's id.
        tokenizer_path: the tokenizer's folder, or `ID:FOLDER/`.
        trust_code: let the code of a hub's repository run; a folder's runs without: to train it is to run it.
        task: `sft` trains; `sft:data_process` only encodes the rows, into `output_path`; `sft:train` trains on what it
            encoded, named by `dataset_base_path`, without VAE and text encoder in memory.
        no_cache: encode every row anew in every epoch.
        trainable_models: what is trained, by commas: `template_model`, or parts such as `template_model.proj_k`.
        remove_prefix_in_ckpt: a prefix that names of tensors in checkpoints are to have lost.
        resume_from_checkpoint: weights to start from, rather than the template's own.
        from_scratch: start from new weights also where the template has some.
        resume: `latest` goes on from the full state of the run in `output_path`, to the bit.
        num_epochs: passes over the data.
        batch_size: pictures a step, on each process.
        gradient_accumulation_steps: batches whose gradients make one step.
        learning_rate: peak learning rate.
        lr_scheduler: how the learning rate goes on after the warm-up.
        warmup_steps: steps over which it rises from 0.
        weight_decay: of the optimizer.
        customized_optimizer: an optimizer's class, such as `torch.optim.Adam`; by default `torch.optim.AdamW`.
        adam_beta2: Adam's decay of the mean squared gradient; by default the optimizer's own. Lower it, as to 0.95,
            where the first gradients are far larger than the rest and would hold every later step down.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        ema_decay: decay of an exponential moving average of the weights, which is then what is saved; 0 for none.
        max_timestep_boundary, min_timestep_boundary: the part of the noise levels that is trained on, as shares of
            their grid: 0 is noise alone, 1 the picture. A layout is settled early: 0 to 0.2 teaches it soonest.
        seed: of the order, the noise and the timesteps.
        mixed_precision: `bf16` computes in bfloat16 where torch's autocast does, `no` in the base's precision; by
            default what accelerate is configured for.
        use_gradient_checkpointing: compute activations anew in the backward pass, to save memory.
        use_gradient_checkpointing_offload: keep what is left of them in the main memory.
        find_unused_parameters: let some trained parameters have no part in a step, on several processes.
        initialize_model_on_cpu: accepted, and of no effect: models are read memory-mapped.
        save_steps: write a checkpoint and the full state every so many steps; 0 for only at the end of each epoch.
        save_dtype: of the tensors in checkpoints.
        checkpoints_total_limit: keep only so many of the newest checkpoints; 0 for all.
        validation_split: share of the rows, 0 to 1, that is held out to tell the loss on.
        validation_metadata_path: rows to tell the loss on.
        validation_prompts: a `.jsonl` of `prompt` and `template_inputs`, drawn as a contact sheet.
        validation_steps: validate every so many steps; 0 for at the end of each epoch.
        log_with: accelerate's trackers, by commas, such as `tensorboard`; `log.csv` is always written.
        fp8_models, lora_base_model, lora_target_modules, lora_rank, lora_checkpoint, dtype, device: refused, with the
            reason.
    """

    template_model_id_or_path: str
    output_path: Path = Path("models")
    dataset_metadata_path: Path | None = None
    dataset_base_path: Path | None = None
    dataset_repeat: int = 1
    dataset_num_workers: int = 0
    data_file_keys: str = "image,video"
    extra_inputs: str = "template_inputs"
    bad_rows: Literal["stop", "skip"] = "stop"
    height: int | None = None
    width: int | None = None
    max_pixels: int = 1024 * 1024
    base: str | None = None
    components: str | None = None
    hub: Literal["modelscope", "hf"] | None = None
    revision: str | None = None
    quantize: str | None = None
    compile: bool = False
    attention_backend: str | None = None
    offload: Offload = "none"
    model_paths: str | None = None
    model_id_with_origin_paths: str | None = None
    tokenizer_path: str | None = None
    trust_code: bool = False
    task: Literal["sft", "sft:data_process", "sft:train"] = "sft"
    no_cache: bool = False
    trainable_models: str = "template_model"
    remove_prefix_in_ckpt: str = "pipe.template_model."
    resume_from_checkpoint: Path | None = None
    from_scratch: bool = False
    resume: Literal["latest"] | None = None
    num_epochs: int = 1
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    customized_optimizer: str = "torch.optim.AdamW"
    adam_beta2: float | None = None
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    max_timestep_boundary: float = 1.0
    min_timestep_boundary: float = 0.0
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    use_gradient_checkpointing: bool = False
    use_gradient_checkpointing_offload: bool = False
    find_unused_parameters: bool = False
    initialize_model_on_cpu: bool = False
    save_steps: int = 0
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpoints_total_limit: int = 0
    validation_split: float = 0.0
    validation_metadata_path: Path | None = None
    validation_prompts: Path | None = None
    validation_steps: int = 0
    log_with: str | None = None
    fp8_models: str | None = None
    lora_base_model: str | None = None
    lora_target_modules: str | None = None
    lora_rank: int | None = None
    lora_checkpoint: str | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            TrainingError: with everything that is wrong.
        """
        problems = [
            f"--{flag} makes no sense here: {reason}: leave it out"
            for flag, reason in WITHOUT_MEANING.items()
            if getattr(self, flag) is not None
        ]
        problems += [
            f"--extra_inputs {name!r}: only template_inputs reach a template; put {name!r} into them"
            for name in self.extra_inputs.split(",")
            if name.strip() not in ("", "template_inputs")
        ]
        if self.quantize is not None and "fp8" in self.quantize:
            problems.append("--quantize fp8 saves nothing here, a step keeps each weight it has cast: use int8 or nf4")
        if self.task != "sft:data_process":
            checkpointing = self.use_gradient_checkpointing or self.use_gradient_checkpointing_offload
            if self.offload == "group":
                problems.append(
                    "--offload group takes away weights that the backward pass needs: use model, sequential or disk"
                )
            elif self.offload in ("sequential", "disk") and not checkpointing:
                problems.append(
                    f"--offload {self.offload} saves nothing while every weight is kept for the backward pass: "
                    "add --use_gradient_checkpointing"
                )
        if self.task == "sft:train":
            if self.dataset_base_path is None:
                problems.append("--task sft:train needs --dataset_base_path, the folder that sft:data_process wrote")
            if self.validation_prompts is not None:
                problems.append("--validation_prompts needs the VAE and the text encoder, which sft:train never loads")
            if self.validation_metadata_path is not None:
                problems.append("--validation_metadata_path needs the VAE: use --validation_split with sft:train")
        elif self.dataset_metadata_path is None:
            problems.append("--dataset_metadata_path is missing")
        if (self.height is None) != (self.width is None):
            problems.append("--height and --width go together")
        problems += [
            f"--{side} {value}: a multiple of 16 is needed"
            for side, value in (("height", self.height), ("width", self.width))
            if value is not None and (value < 16 or value % 16)
        ]
        for name in ("dataset_repeat", "batch_size", "num_epochs", "gradient_accumulation_steps", "max_pixels"):
            if getattr(self, name) < 1:
                problems.append(f"--{name} {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.min_timestep_boundary < self.max_timestep_boundary <= 1:
            problems.append(
                f"--min_timestep_boundary {self.min_timestep_boundary} --max_timestep_boundary "
                f"{self.max_timestep_boundary}: a smaller and a larger share from 0 to 1 are needed"
            )
        if self.adam_beta2 is not None and not 0 <= self.adam_beta2 < 1:
            problems.append(f"--adam_beta2 {self.adam_beta2}: from 0 to below 1 is needed")
        if not 0 <= self.validation_split < 1:
            problems.append(f"--validation_split {self.validation_split}: a share from 0 to below 1 is needed")
        if problems:
            raise TrainingError("\n".join(problems))

    def resolved(self) -> dict[str, Any]:
        """Return every setting that has a value, as plain data."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if value is not None}

    def digest(self, *, without: Collection[str], about: Mapping[str, Any]) -> str:
        """Return a hash of the settings but for some, and of what else a run depends on."""
        settings = {name: value for name, value in self.resolved().items() if name not in without}
        return digest({**settings, "about": about})


def digest(value: Mapping[str, Any]) -> str:
    """Return a hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
