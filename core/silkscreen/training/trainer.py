"""The training loop: a frozen base, a template whose cache is injected into it, and the objective."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from diffusers import Flux2KleinPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from silkscreen import registry, weights
from silkscreen.cache import TemplateCache, inject
from silkscreen.errors import TrainingError
from silkscreen.files import replacing
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import default_dtype, load_base
from silkscreen.flux2.prepacking import weights_prepacked
from silkscreen.flux2.replacing import is_plain
from silkscreen.template import find_template
from silkscreen.training import checkpoints, objective, validation
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import Size, batches, draw_seed, seed_all
from silkscreen.training.encoding import Encoder, stacked
from silkscreen.training.examples import Examples
from silkscreen.training.models import read_components, training_base
from silkscreen.training.optimizer import make_optimizer
from silkscreen.training.reporting import Log, Reporter
from silkscreen.training.rows import rows_of
from silkscreen.training.store import Example
from silkscreen.training.trainable import choose_trainable, trained_names

_NOT_OF_THE_RUN = (
    "output_path", "resume", "num_epochs", "batch_size", "dataset_num_workers", "no_cache", "trust_code",
    "save_steps", "save_dtype", "checkpoints_total_limit", "log_with", "validation_prompts", "validation_steps",
    "use_gradient_checkpointing", "use_gradient_checkpointing_offload", "find_unused_parameters", "dataset_base_path",
)  # fmt: skip
"""Settings that a resumed run may change, because what is learned does not depend on them."""


def train(config: TrainingConfig) -> Path:
    """Train a template, or, as `--task` has it, only encode the rows.

    Returns:
        The last checkpoint, or the folder of the encoded rows.

    Raises:
        TrainingError: the data or the template cannot be trained on; each culprit is named.
    """
    run = _Run(config)
    try:
        return run.encode() if config.task == "sft:data_process" else run.train()
    finally:
        run.close()


@dataclasses.dataclass
class _Place:
    """Where a run is: kept with the full state.

    Attributes:
        epoch, batch: the next batch to learn from, of all processes together.
        step: steps done.
        items: items a batch, of all processes together.
        best: the lowest validation loss.
        run: hash of what the run depends on.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    items: int = 0
    best: float = float("inf")
    run: str = ""


class _Run:
    """One training run: the models, the rows, and the loop."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.accelerator = _make_accelerator(config)
        self.device = self.accelerator.device
        self.reporter = Reporter(self.accelerator.is_main_process)
        named = config.template_model_id_or_path
        self.template = find_template(named, trust_code=config.trust_code or not registry.is_source(named))
        base = training_base(config)
        split = config.task == "sft:train"
        self.prompts = validation.read_prompts(config.validation_prompts) if config.validation_prompts else []
        if self.accelerator.is_main_process:
            checkpoints.check_room(config.output_path, 0)
        self.accelerator.wait_for_everyone()
        self.rows = rows_of(config, base, self.template, self.reporter)
        without = ("vae", "text_encoder", "tokenizer") if split else ()
        dtype = torch.float32 if config.mixed_precision == "no" else default_dtype(self.device)
        self.pipe = load_base(
            base,
            device=self.device,
            dtype=dtype,
            without=without,
            hub=config.hub,
            revision=config.revision,
            components=read_components(config.components),
            offload=config.offload,
            quantize=config.quantize,
            compile=config.compile,
            attention_backend=config.attention_backend,
        )
        self.pipe.set_progress_bar_config(disable=True)
        for component in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder):
            if component is not None:
                component.requires_grad_(False).eval()
        self.context = TemplateContext(self.pipe)
        self.model = self._make_model()
        choose_trainable(self.model, config.trainable_models)
        self.encoder = Encoder(self.context, self.model, config.seed)
        self.examples = Examples(config, self.rows, self.encoder, self.template, self.accelerator, self.reporter)

    def encode(self) -> Path:
        """Encode every row, and return the folder that they are in."""
        folder = self.examples.encode_all()
        self.reporter.say(
            f"encoded: {folder}\n"
            f"train on it: silkscreen train --task sft:train --dataset_base_path {folder} "
            f"--template_model_id_or_path {self.config.template_model_id_or_path}"
        )
        return folder

    # -- what is trained

    def _make_model(self) -> nn.Module:
        """Build the template's model, in float32, with the weights that the run starts from."""
        config, base_id = self.config, self.context.base.id
        seed_all(config.seed, "weights")
        own = self.template.has_weights(base_id) and not config.from_scratch and config.resume_from_checkpoint is None
        if own:
            model = self.template.load(base_id, dtype=torch.float32, device=self.device)
            empty = weights.build_empty(lambda: self.template.construct(base_id))
            for name, parameter in empty.named_parameters():  # its constructor says what is to stay frozen
                model.get_parameter(name).requires_grad_(parameter.requires_grad)
        else:
            model = self.template.construct(base_id).to(self.device, torch.float32)
        if config.resume_from_checkpoint is not None:
            checkpoints.load_into(model, config.resume_from_checkpoint)
        return model

    def train(self) -> Path:
        """Train, and return the last checkpoint."""
        config, accelerator = self.config, self.accelerator
        self.names = trained_names(self.model)
        parameters = [value for value in self.model.parameters() if value.requires_grad]
        checkpoints.check_room(config.output_path, sum(value.nbytes for value in self.model.parameters()) * 6)
        optimizer = make_optimizer(config, parameters)
        state = self._find_state()
        items = self.place.items
        if items % accelerator.num_processes:
            raise TrainingError(
                f"the run has batches of {items}, which {accelerator.num_processes} processes cannot share evenly"
            )
        sizes = [self.rows.sizes[row] for row in self.rows.shown]
        epochs = [self._epoch(sizes, items, epoch) for epoch in range(config.num_epochs)]
        total = sum(map(len, epochs)) // config.gradient_accumulation_steps
        kind = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total)
        self.enable_checkpointing()
        self.prepared, optimizer, schedule = accelerator.prepare(self.model, optimizer, schedule)
        self.average = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
        if self.average:
            accelerator.register_for_checkpointing(self.average)
        if state is not None:
            accelerator.load_state(str(state))
            self.reporter.say(f"going on after step {self.place.step} of {total}")
        self._write_config()
        if config.log_with:
            accelerator.init_trackers("silkscreen", config=config.resolved())
        self.probes = validation.probes(self.rows.held_out, config.seed) if self.rows.held_out else []
        packed = accelerator.mixed_precision == "no" and is_plain(self.pipe.transformer)
        with weights_prepacked(self.pipe.transformer) if packed else nullcontext():
            path = self._loop(epochs, total, parameters, optimizer, schedule)
        self.examples.remove()
        self.reporter.say(
            f"trained: {path}\nmake it a package: silkscreen pack {config.template_model_id_or_path} {path}"
            f"{' --trust-code' if Path(config.template_model_id_or_path).is_dir() else ''}"
        )
        return path

    def close(self) -> None:
        """Finish the trackers, and leave the other processes.

        The model's wrapper goes first: were it the last to hold the process group, ending that would wait, with
        Python's lock, for a thread that waits for the lock.
        """
        self.prepared = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def enable_checkpointing(self) -> None:
        """Let the base compute activations anew in the backward pass, where the settings say so."""
        offload = self.config.use_gradient_checkpointing_offload
        if self.config.use_gradient_checkpointing or offload:
            self.pipe.transformer.enable_gradient_checkpointing(_offloaded_checkpoint if offload else None)

    def _epoch(self, sizes: Sequence[Size], items: int, epoch: int) -> list[list[int]]:
        """Return an epoch's batches, filled up from the beginning to whole steps."""
        made = batches(sizes, items, self.config.dataset_repeat, self.config.seed, epoch)
        lacking = -len(made) % self.config.gradient_accumulation_steps
        return made + [made[n % len(made)] for n in range(lacking)]

    def _loop(
        self,
        epochs: Sequence[list[list[int]]],
        total: int,
        parameters: list[nn.Parameter],
        optimizer: Any,
        schedule: Any,
    ) -> Path:
        config, accelerator, place = self.config, self.accelerator, self.place
        path = config.output_path
        share = len(epochs[0][0]) // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        log = Log(config.output_path / "log.csv", place.step) if accelerator.is_main_process else None
        shown = self.rows.shown
        smooth, shown_since = None, 0
        with self.reporter.progress("training", total, place.step) as advance:
            for epoch in range(place.epoch, len(epochs)):
                left = epochs[epoch][place.batch :]
                seen = [shown[item % len(shown)] for batch in left for item in batch[mine]]
                supply = self.examples.of(seen, epoch)
                for batch in left:
                    examples = list(islice(supply, share))
                    with accelerator.accumulate(self.prepared):
                        value = self._learn(examples, batch[mine], epoch)
                        shown_since += len(batch)
                        place.batch += 1
                        if accelerator.sync_gradients and config.max_grad_norm:
                            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                    if not accelerator.sync_gradients:
                        continue
                    schedule.step()
                    if self.average:
                        self.average.step(parameters)
                    place.step += 1
                    if place.batch == len(epochs[epoch]):
                        place.epoch, place.batch = epoch + 1, 0
                    loss = accelerator.reduce(value, "mean").item()
                    smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                    figures = {"loss": loss, "learning_rate": schedule.get_last_lr()[0]}
                    ended = place.batch == 0
                    if self._due(config.validation_steps, ended, place.step, total):
                        figures |= self._validate(parameters)
                    if log:
                        log.write(place.step, epoch, figures)
                    if config.log_with:
                        accelerator.log(figures, step=place.step)
                    if config.save_steps and place.step % config.save_steps == 0:
                        path = self._save(f"step-{place.step}")
                    if ended:
                        self.examples.share()
                        path = self._save(f"epoch-{epoch}")
                    if ended or (config.save_steps and place.step % config.save_steps == 0):
                        checkpoints.save_state(accelerator, config.output_path, vars(place))
                    advance(1, f"loss {smooth:.4f}", shown_since)
                    shown_since = 0
        if log:
            log.close()
        if path == config.output_path:  # resumed after its end
            path = config.output_path / f"epoch-{len(epochs) - 1}.safetensors"
        return path

    def _due(self, every: int, ended: bool, step: int, total: int) -> bool:
        if not (self.probes or self.prompts):
            return False
        return step % every == 0 or step == total if every else ended

    def _learn(self, examples: Sequence[Example], items: Sequence[int], epoch: int) -> torch.Tensor:
        """Add to the gradients what a batch tells, and return its loss."""
        drawn = [torch.Generator().manual_seed(draw_seed(self.config.seed, epoch, item)) for item in items]
        part = (self.config.min_timestep_boundary, self.config.max_timestep_boundary)
        index = torch.cat([objective.draw_index(generator, *part) for generator in drawn])
        noise = torch.cat([torch.randn(e.latents.shape, generator=g) for e, g in zip(examples, drawn, strict=True)])
        seed_all(self.config.seed, epoch, items[0], "step")
        with self._loss(examples, noise, index) as value:
            self.accelerator.backward(value)  # in the injection: checkpointed activations are computed anew here
        return value.detach()

    @contextmanager
    def _loss(self, examples: Sequence[Example], noise: torch.Tensor, index: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the objective of examples at grid points `index` (B,) with `noise` (B, C, H, W), injection in place."""
        noise, index = noise.to(self.device), index.to(self.device)
        latents = torch.cat([example.latents for example in examples]).float()
        noisy = objective.add_noise(latents, noise, index)
        sigma = objective.sigmas().to(self.device)[index]
        text = torch.cat([example.prompt_embeds for example in examples])
        guidance = torch.ones(len(examples), device=self.device) if self.context.base.geometry.guidance_embeds else None
        transformer, pack = self.pipe.transformer, Flux2KleinPipeline._pack_latents
        with self.accelerator.autocast():
            result = self.prepared(
                pipe=self.context,
                use_gradient_checkpointing=self.config.use_gradient_checkpointing,
                use_gradient_checkpointing_offload=self.config.use_gradient_checkpointing_offload,
                **stacked([example.processed for example in examples]),
            )
        cache = TemplateCache.from_result(result, self.template.name)
        if cache.arguments:
            raise TrainingError(
                f"template {self.template.name!r} returned {', '.join(cache.arguments)}, which does not reach the "
                "transformer alone: only carriers can be trained"
            )
        cache.check(self.context.base)
        with inject(self.pipe, cache, None):
            with self.accelerator.autocast():
                velocity = transformer(
                    hidden_states=pack(noisy).to(self.context.torch_dtype),
                    encoder_hidden_states=text,
                    timestep=sigma,
                    img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(self.device),
                    txt_ids=examples[0].text_ids,
                    guidance=guidance,
                    return_dict=False,
                )[0]
            yield objective.loss(velocity, pack(latents), pack(noise), index)

    # -- what is kept and shown

    def _validate(self, parameters: Sequence[nn.Parameter]) -> dict[str, float]:
        """Return the loss on held-out rows, keep the best checkpoint, and draw the prompts."""
        training = {module: module.training for module in self.model.modules()}
        if self.average:
            self.average.store(parameters)
            self.average.copy_to(parameters)
        self.model.eval()
        figures: dict[str, float] = {}
        try:
            if self.probes:
                figures["validation_loss"] = self._validation_loss()
            if self.prompts and self.accelerator.is_main_process:
                sheet = validation.draw_sheet(self.pipe, self.template, self.model, self.prompts)
                path = self.config.output_path / "samples" / f"step-{self.place.step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
        finally:
            for module, mode in training.items():
                module.training = mode
            if self.average:
                self.average.restore(parameters)
        if figures and figures["validation_loss"] < self.place.best:
            self.place.best = figures["validation_loss"]
            self._save("best")
        self.accelerator.wait_for_everyone()
        return figures

    @torch.no_grad()
    def _validation_loss(self) -> float:
        mine = self.probes[self.accelerator.process_index :: self.accelerator.num_processes]
        rows = sorted({probe.row for probe in mine})
        examples = dict(zip(rows, self.examples.of(rows, 0), strict=True))
        losses = torch.zeros(2, device=self.device)
        for probe in mine:
            example = examples[probe.row]
            noise = torch.randn(example.latents.shape, generator=torch.Generator().manual_seed(probe.seed))
            with self._loss([example], noise, torch.tensor([probe.index])) as value:
                losses += torch.stack([value, torch.ones_like(value)])
        total, count = self.accelerator.reduce(losses, "sum").tolist()
        return float(total / count)

    def _save(self, stem: str) -> Path:
        """Write the trained tensors as a checkpoint."""
        path = self.config.output_path / f"{stem}.safetensors"
        state = self.accelerator.get_state_dict(self.prepared)
        if self.average:
            learned = [name for name, value in self.model.named_parameters() if value.requires_grad]
            state |= dict(zip(learned, self.average.shadow_params, strict=True))
        if self.accelerator.is_main_process:
            dtype, prefix = getattr(torch, self.config.save_dtype), self.config.remove_prefix_in_ckpt
            tensors = {
                f"{checkpoints.PREFIX}{name}".removeprefix(prefix): _as(state[name], dtype) for name in self.names
            }
            checkpoints.save(path, tensors)
            checkpoints.keep_newest(self.config.output_path, self.config.checkpoints_total_limit)
        return path

    def _identity(self) -> str:
        """Return a hash of all that the result of the run depends on."""
        return self.config.digest(without=_NOT_OF_THE_RUN, about=self.rows.about)

    def _find_state(self) -> Path | None:
        """Return the full state that the run goes on from, and take up its place; None at the beginning."""
        config, output = self.config, self.config.output_path
        self.place = _Place(items=config.batch_size * self.accelerator.num_processes, run=self._identity())
        if config.resume is None:
            if checkpoints.checkpoints_in(output) or checkpoints.latest_state(output):
                raise TrainingError(
                    f"--output_path {output} holds a run: go on with it by --resume latest, or choose another folder"
                )
            return None
        state = checkpoints.latest_state(output)
        if state is None:
            self.reporter.say(f"{output} holds no full state: starting from the beginning")
            return None
        self.place = _Place(**checkpoints.read_place(state))
        if self.place.run != self._identity():
            raise TrainingError(
                f"{output} holds a run with other settings or data, see its config.toml: "
                "resume with the same, or train into another folder"
            )
        return state

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            with replacing(self.config.output_path / "config.toml") as partial:
                partial.write_text(tomli_w.dumps(self.config.resolved()), encoding="utf-8")


def _make_accelerator(config: TrainingConfig) -> Accelerator:
    on_cpu = not torch.accelerator.is_available()
    configured = on_cpu or "ACCELERATE_MIXED_PRECISION" in os.environ
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision or (None if configured else "bf16"),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
        log_with=[name.strip() for name in config.log_with.split(",")] if config.log_with else None,
        project_dir=str(config.output_path),
    )


def _offloaded_checkpoint(function: Any, *arguments: Any) -> Any:
    """Checkpoint a block, and keep its inputs in the main memory until the backward pass."""
    with torch.autograd.graph.save_on_cpu():
        return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
