"""What a training run is told: the field's flags, as one dataclass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        template_model_id_or_path: an installed template, or a folder with a `model.py`.
        dataset_metadata_path: a `metadata.jsonl`, `.json` or `.csv` with `image`, `prompt` and `template_inputs`.
        output_path: the folder for checkpoints and the log.
        dataset_base_path: the folder that paths in the metadata are relative to; by default the metadata's.
        base: id or folder of the base.
        max_pixels: pictures above it are scaled down.
        height, width: of every picture, multiples of 16; by default each picture's own.
        batch_size: pictures a step.
        num_epochs: passes over the data.
        dataset_repeat: times each row is seen in an epoch.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: steps over which it rises from 0; it falls to 0 along a cosine after.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of an exponential moving average of the weights, which is then what is saved; 0 for none.
        seed: of the order, the noise and the timesteps.
        mixed_precision: `bf16` computes in bfloat16 where torch's autocast does, `no` in float32.
        save_dtype: of the tensors in checkpoints.
        save_steps: write a checkpoint every so many steps; 0 for only at the end of each epoch.
        resume_from_checkpoint: weights to start from.
        trust_code: let the code of a template folder run.
    """

    template_model_id_or_path: str
    dataset_metadata_path: Path
    output_path: Path
    dataset_base_path: Path | None = None
    base: str = "flux2-tiny"
    max_pixels: int = 1024 * 1024
    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    num_epochs: int = 1
    dataset_repeat: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    save_steps: int = 0
    resume_from_checkpoint: Path | None = None
    trust_code: bool = False
