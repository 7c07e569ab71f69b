"""The training loop: a frozen base, a template whose cache is injected into it, and the objective."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import Flux2KleinPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from silkscreen.cache import TemplateCache, inject
from silkscreen.errors import TrainingError
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import load_base
from silkscreen.template import Template, find_template
from silkscreen.training import checkpoints, objective
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import Row, batches, load_picture, read_rows

_EMPTY = TemplateCache({}, {}, "")


@dataclasses.dataclass(frozen=True)
class Example:
    """A row, encoded: everything about it that does not depend on trained weights.

    Attributes:
        latents: (1, C, H/16, W/16), patchified and normalised.
        prompt_embeds: (1, L, joint_attention_dim).
        text_ids: (1, L, 4).
        processed: what `process_inputs` returned.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    text_ids: torch.Tensor
    processed: Mapping[str, Any]


def train(config: TrainingConfig) -> Path:
    """Train a template.

    Returns:
        The last checkpoint.

    Raises:
        TrainingError: the data or the template cannot be trained on; the first culprit is named.
    """
    rows = read_rows(config.dataset_metadata_path, config.dataset_base_path)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    template = find_template(config.template_model_id_or_path, trust_code=config.trust_code)
    pipe = load_base(config.base, device=accelerator.device, dtype=torch.float32)
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder):
        component.requires_grad_(False).eval()
    context = TemplateContext(pipe)
    model = template.construct(context.base.id).to(accelerator.device, torch.float32)
    if config.resume_from_checkpoint is not None:
        checkpoints.load_into(model, config.resume_from_checkpoint)
    examples = _encode(rows, template, model, context, config)
    return _run(accelerator, pipe, context, model, examples, config, template.name)


def _encode(
    rows: Sequence[Row], template: Template, model: nn.Module, context: TemplateContext, config: TrainingConfig
) -> list[Example]:
    """Encode every row once; none of it depends on what is trained."""
    processor = template.data_processor() if template.data_processor else None
    examples = []
    with _progress() as progress, torch.no_grad():
        for row in progress.track(rows, description="encoding"):
            picture = load_picture(row.image, max_pixels=config.max_pixels, height=config.height, width=config.width)
            try:
                values = processor(**row.template_inputs) if processor else row.template_inputs
                processed = model.process_inputs(pipe=context, **values)  # type: ignore[operator]
            except Exception as error:  # whatever a template raises on a bad row
                where = f"{config.dataset_metadata_path}:{row.line}"
                raise TrainingError(f"{where}: the template raised {type(error).__name__}: {error}") from error
            embeds, ids = context.encode_prompt(row.prompt)
            examples.append(Example(context.vae.encode(context.preprocess_image(picture)), embeds, ids, processed))
    return examples


def _run(
    accelerator: Accelerator,
    pipe: Any,
    context: TemplateContext,
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainingConfig,
    name: str,
) -> Path:
    model.train()
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    sizes = [(example.latents.shape[-2], example.latents.shape[-1]) for example in examples]
    epochs = [
        list(batches(sizes, config.batch_size, config.dataset_repeat, config.seed, epoch))
        for epoch in range(config.num_epochs)
    ]
    total = sum(map(len, epochs))
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, total)
    average = EMAModel(list(trainable.values()), decay=config.ema_decay) if config.ema_decay else None
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def save(stem: str) -> Path:
        path = config.output_path / f"{stem}.safetensors"
        averaged = dict(zip(trainable, average.shadow_params, strict=True)) if average else trainable
        dtype = getattr(torch, config.save_dtype)
        checkpoints.save(path, {name: value.to(dtype) for name, value in averaged.items()})
        return path

    config.output_path.mkdir(parents=True, exist_ok=True)
    path, step = config.output_path, 0
    with (config.output_path / "log.csv").open("w", newline="") as file, _progress() as progress:
        log = csv.writer(file)
        log.writerow(["step", "epoch", "loss", "learning_rate"])
        task = progress.add_task("training", total=total)
        smooth = None
        for epoch, steps in enumerate(epochs):
            for rows in steps:
                value = _loss(
                    accelerator, pipe, context, model, [examples[row] for row in rows], config.seed, step, name
                )
                accelerator.backward(value)
                accelerator.clip_grad_norm_(trainable.values(), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if average:
                    average.step(trainable.values())
                step += 1
                loss = value.item()
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                log.writerow([step, epoch, f"{loss:.6f}", f"{schedule.get_last_lr()[0]:.3e}"])
                progress.update(task, advance=1, description=f"training, loss {smooth:.4f}")
                if config.save_steps and step % config.save_steps == 0:
                    save(f"step-{step}")
            path = save(f"epoch-{epoch}")
    return path


def _loss(
    accelerator: Accelerator,
    pipe: Any,
    context: TemplateContext,
    model: nn.Module,
    examples: Sequence[Example],
    seed: int,
    step: int,
    name: str,
) -> torch.Tensor:
    device = accelerator.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    latents = torch.cat([example.latents for example in examples])
    noise = torch.randn(latents.shape, generator=generator).to(device)
    index = torch.randint(objective.STEPS, (len(examples),), generator=generator).to(device)
    noisy = objective.add_noise(latents, noise, index)
    text = torch.cat([example.prompt_embeds for example in examples])
    with accelerator.autocast():
        result = model(pipe=context, **_stacked([example.processed for example in examples]))
        cache = TemplateCache.from_result(result, name)
        if cache.arguments:
            raise TrainingError(
                f"template {name!r} returned {', '.join(cache.arguments)}, which does not reach the transformer alone: "
                "only carriers can be trained"
            )
        with inject(pipe, cache, _EMPTY):
            velocity = pipe.transformer(
                hidden_states=Flux2KleinPipeline._pack_latents(noisy),
                encoder_hidden_states=text,
                timestep=objective.sigmas().to(device)[index],
                img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(device),
                txt_ids=examples[0].text_ids,
                guidance=torch.ones(len(examples), device=device) if context.base.geometry.guidance_embeds else None,
                return_dict=False,
            )[0]
    pack = Flux2KleinPipeline._pack_latents
    return objective.loss(velocity, pack(latents), pack(noise), index)


def _stacked(processed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what `process_inputs` returned for each row: tensors along the batch, equal values as they are."""
    joined: dict[str, Any] = {}
    for key in processed[0]:
        values = [each[key] for each in processed]
        if len(values) == 1 or all(not isinstance(v, torch.Tensor | list) and v == values[0] for v in values):
            joined[key] = values[0]
        elif all(isinstance(v, torch.Tensor) and v.shape[0] == 1 for v in values):
            joined[key] = torch.cat(values)
        elif all(isinstance(v, list) and len(v) == len(values[0]) for v in values):
            joined[key] = [torch.cat(parts) for parts in zip(*values, strict=True)]
        else:
            raise TrainingError(
                f"process_inputs returned {key!r} in a form that does not stack into a batch: "
                "return tensors whose first dimension is 1, or train with --batch_size 1"
            )
    return joined


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
    )
