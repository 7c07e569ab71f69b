"""The training loop: a frozen base, a template whose cache is injected into it, and the objective."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import inspect
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from diffusers import Flux2KleinPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from silkscreen import registry, weights
from silkscreen.cache import TemplateCache, inject
from silkscreen.errors import TrainingError
from silkscreen.files import replacing
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import default_dtype, load_base
from silkscreen.flux2.prepacking import weights_prepacked
from silkscreen.flux2.replacing import is_plain
from silkscreen.template import find_template, inputs_from_signature
from silkscreen.training import checkpoints, objective, validation
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import (
    Preparation,
    Prepared,
    Size,
    Sizing,
    batches,
    check_rows,
    draw_seed,
    read_rows,
    seed_all,
)
from silkscreen.training.encoding import Encoder, about, about_models
from silkscreen.training.models import read_components, training_base
from silkscreen.training.store import Example, ExampleStore, StoreError, read_index
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
        return run.encode_all() if config.task == "sft:data_process" else run.train()
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


class _Items(Dataset[Example | Prepared]):
    """The items of an epoch, by number: encoded where the row is in the store, prepared where it is not."""

    def __init__(self, shown: Sequence[int], store: ExampleStore | None, preparation: Preparation | None, epoch: int):
        self.shown, self.store, self.preparation, self.epoch = shown, store, preparation, epoch

    def __getitem__(self, item: int) -> Example | Prepared:
        row = self.shown[item % len(self.shown)]
        if self.store is not None and row in self.store:
            return self.store[row]
        assert self.preparation is not None
        return self.preparation.prepare(row, self.epoch)


class _Run:
    """One training run: the models, the rows, and the loop."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.accelerator = _make_accelerator(config)
        self.device = self.accelerator.device
        named = config.template_model_id_or_path
        self.template = find_template(named, trust_code=config.trust_code or not registry.is_source(named))
        base = training_base(config)
        split = config.task == "sft:train"
        self.prompts = validation.read_prompts(config.validation_prompts) if config.validation_prompts else []
        if self.accelerator.is_main_process:
            checkpoints.check_room(config.output_path, 0)
        self.accelerator.wait_for_everyone()
        self._read_data(base.id)
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
        self._open_store()

    # -- what there is to learn from

    def _read_data(self, base_id: str) -> None:
        """Find the rows, check them, and choose which are held out."""
        config = self.config
        self.preparation: Preparation | None = None
        count = 0
        if config.task == "sft:train":
            assert config.dataset_base_path is not None
            found = read_index(config.dataset_base_path)
            if found is None:
                raise TrainingError(
                    f"{config.dataset_base_path} holds no encoded rows: run --task sft:data_process first"
                )
            self.sizes: list[Size] = [(width, height) for width, height in found["sizes"]]
            self.about = about_models(base_id, self.template)
            count = len(self.sizes)
        else:
            assert config.dataset_metadata_path is not None
            keys = [key.strip() for key in config.data_file_keys.split(",") if key.strip()]
            rows, problems = read_rows(config.dataset_metadata_path, config.dataset_base_path, keys)
            extra = config.validation_metadata_path
            more, worse = read_rows(extra, config.dataset_base_path, keys) if extra else ([], [])
            count, problems = len(rows), problems + worse
            preparation = Preparation(
                rows=[*rows, *more],
                sizing=Sizing(config.max_pixels, config.height, config.width),
                processor=self.template.data_processor,
                inputs=inputs_from_signature(self.template.module.TEMPLATE_MODEL),
                seed=config.seed,
            )
            good = []
            with self._progress("checking", len(preparation.rows)) as advance:
                for number, (size, problem) in enumerate(check_rows(preparation, config.dataset_num_workers)):
                    path = config.dataset_metadata_path if number < count else extra
                    if problem:
                        problems.append(f"{path}:{preparation.rows[number].line}: {problem}")
                    else:
                        good.append((number, size))
                    advance(1)
            self._report(problems)
            count = sum(number < count for number, _ in good)
            if not count:
                raise TrainingError(f"{config.dataset_metadata_path} has no rows to train on")
            kept = [preparation.rows[number] for number, _ in good]
            self.preparation = dataclasses.replace(preparation, rows=kept)
            self.sizes = [size for _, size in good]
            self.about = about(config, base_id, self.template, kept, self.sizes)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(draw_seed(config.seed, "split"))).tolist()
        held = round(count * config.validation_split) if config.validation_split else 0
        if config.validation_split and not 0 < held < count:
            raise TrainingError(
                f"--validation_split {config.validation_split} of {count} rows leaves a side without any"
            )
        self.held_out = [*sorted(order[:held]), *range(count, len(self.sizes))]
        self.shown = sorted(order[held:])

    def _report(self, problems: Sequence[str]) -> None:
        if not problems:
            return
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        message = f"{len(problems)} bad row{'s' * (len(problems) > 1)}\n{shown}{more}"
        if self.config.bad_rows == "stop":
            raise TrainingError(f"{message}\nmend or remove them, or go on without them by --bad_rows skip")
        self._say(f"going on without {message}")

    def _open_store(self) -> None:
        """Open what holds encoded rows: the folder of a split run, or the run's own where it is of use."""
        config = self.config
        process = self.accelerator.process_index
        self.store: ExampleStore | None = None
        if config.task == "sft:train":
            assert config.dataset_base_path is not None
            self.store = ExampleStore(config.dataset_base_path, self.about, process)
            missing = [row for row in range(len(self.sizes)) if row not in self.store]
            if missing:
                raise TrainingError(
                    f"{config.dataset_base_path} lacks {len(missing)} of {len(self.sizes)} rows: "
                    "run --task sft:data_process again, it goes on where it stopped"
                )
            return
        assert self.preparation is not None
        seen_again = config.num_epochs * config.dataset_repeat > 1
        if config.task == "sft" and (config.no_cache or not seen_again):
            return
        if not self.encoder.is_constant(self.preparation):
            if config.task == "sft:data_process":
                raise TrainingError(
                    f"template {self.template.name!r} processes a row differently each time (by chance, or by weights "
                    "that are trained), so that its rows cannot be encoded once for all: train it with --task sft"
                )
            self._say("the template processes a row differently each time: rows are encoded anew in every epoch")
            return
        folder = config.output_path / "cache" if config.task == "sft" else config.output_path
        self.store = ExampleStore(folder, {**self.about, "dtype": str(self.context.torch_dtype)}, process)
        self.accelerator.wait_for_everyone()

    def _example(self, row: int, value: Example | Prepared, epoch: int) -> Example:
        """Return a row encoded, and keep it where a store is open."""
        if isinstance(value, Example):
            return value.to(self.device)
        if self.store is not None and row in self.store:
            return self.store[row].to(self.device)
        if self.config.offload == "model":
            self.pipe.maybe_free_model_hooks()  # the text encoder makes room for itself only at the start of a drawing
        try:
            example = self.encoder.encode(value, epoch)
        except TrainingError as error:
            assert self.preparation is not None
            line = self.preparation.rows[row].line
            raise TrainingError(f"{self.config.dataset_metadata_path}:{line}: {error}") from error
        if self.store is not None:
            self._keep(row, example)
        return example

    def _keep(self, row: int, example: Example) -> None:
        assert self.store is not None
        try:
            self.store.add(row, example)
        except StoreError as error:
            if self.config.task == "sft:data_process":
                raise
            self._say(f"{error}; going on, with rows encoded anew in every epoch")
            self.store = None

    def encode_all(self) -> Path:
        """Encode every row that is not yet, each process its share."""
        assert self.store is not None and self.preparation is not None
        everyone = range(len(self.sizes))[self.accelerator.process_index :: self.accelerator.num_processes]
        left = [row for row in everyone if row not in self.store]
        loader = self._loader(left, range(len(self.sizes)), 0)
        with self._progress("encoding", len(left)) as advance:
            for row, value in zip(left, loader, strict=True):
                self._example(row, value, 0)
                advance(1)
        self.store.flush()
        self.accelerator.wait_for_everyone()
        self._say(
            f"encoded: {self.store.folder}\n"
            f"train on it: silkscreen train --task sft:train --dataset_base_path {self.store.folder} "
            f"--template_model_id_or_path {self.config.template_model_id_or_path}"
        )
        return self.store.folder

    def _loader(self, items: Sequence[int], shown: Sequence[int], epoch: int) -> DataLoader[Example | Prepared]:
        workers = self.config.dataset_num_workers if self.preparation is not None else 0
        data = _Items(shown, self.store, self.preparation, epoch)
        return DataLoader(data, batch_size=None, sampler=items, num_workers=workers)

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
        optimizer = _optimizer(config, parameters)
        state = self._find_state()
        items = self.place.items
        if items % accelerator.num_processes:
            raise TrainingError(
                f"the run has batches of {items}, which {accelerator.num_processes} processes cannot share evenly"
            )
        sizes = [self.sizes[row] for row in self.shown]
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
            self._say(f"going on after step {self.place.step} of {total}")
        self._write_config()
        if config.log_with:
            accelerator.init_trackers("silkscreen", config=config.resolved())
        self.probes = validation.probes(self.held_out, config.seed) if self.held_out else []
        packed = accelerator.mixed_precision == "no" and is_plain(self.pipe.transformer)
        with weights_prepacked(self.pipe.transformer) if packed else nullcontext():
            path = self._loop(epochs, total, parameters, optimizer, schedule)
        if config.task == "sft" and self.store is not None and accelerator.is_main_process:
            shutil.rmtree(self.store.folder)
        self._say(
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
        log = _Log(config.output_path / "log.csv", place.step) if accelerator.is_main_process else None
        smooth, shown_since = None, 0
        with self._progress("training", total, place.step) as advance:
            for epoch in range(place.epoch, len(epochs)):
                left = epochs[epoch][place.batch :]
                loader = iter(self._loader([item for batch in left for item in batch[mine]], self.shown, epoch))
                for batch in left:
                    examples = [
                        self._example(self.shown[item % len(self.shown)], next(loader), epoch) for item in batch[mine]
                    ]
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
                        if self.store is not None:
                            self._share()
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

    def _share(self) -> None:
        """Let every process see the rows that the others have encoded."""
        assert self.store is not None
        if self.preparation is None:
            return
        try:
            self.store.flush()
        except StoreError as error:
            self._say(f"{error}; going on, with some rows encoded anew")
        self.accelerator.wait_for_everyone()
        self.store.refresh()

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
        loader = self._loader(rows, range(len(self.sizes)), 0)
        examples = {row: self._example(row, value, 0) for row, value in zip(rows, loader, strict=True)}
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
        return self.config.digest(without=_NOT_OF_THE_RUN, about=self.about)

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
            self._say(f"{output} holds no full state: starting from the beginning")
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

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            click.echo(text)

    @contextmanager
    def _progress(self, what: str, total: int, done: int = 0) -> Iterator[Any]:
        """Show progress on the main process; yield what advances it."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        began, samples = time.monotonic(), 0
        with Progress(*columns, disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(what, total=total, completed=done, figures="")

            def advance(count: int, figures: str = "", seen: int = 0) -> None:
                nonlocal samples
                samples += seen
                pace = f"{samples / (time.monotonic() - began):.1f} samples/s" if samples else ""
                progress.update(task, advance=count, figures=f"{figures}  {pace}".strip())

            yield advance


class _Log:
    """`log.csv`: a line a step. A resumed run's goes on after the last step that its state has."""

    FIELDS = ("step", "epoch", "loss", "learning_rate", "validation_loss")

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, self.FIELDS)
        self._writer.writeheader()
        self._writer.writerows(kept)

    def write(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        numbers = {name: f"{value:.8g}" for name, value in figures.items()}
        self._writer.writerow({"step": step, "epoch": epoch, **numbers})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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


def _optimizer(config: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    name = config.customized_optimizer
    module, _, attribute = name.rpartition(".")
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.adam_beta2 is not None:
        options["betas"] = (0.9, config.adam_beta2)
    try:
        chosen = getattr(importlib.import_module(module), attribute)
        if "fused" in inspect.signature(chosen).parameters:
            options["fused"] = True
        made: torch.optim.Optimizer = chosen(parameters, **options)
    except (ImportError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(f"--customized_optimizer {name!r} cannot be had with {options}: {error}") from error
    return made


def _offloaded_checkpoint(function: Any, *arguments: Any) -> Any:
    """Checkpoint a block, and keep its inputs in the main memory until the backward pass."""
    with torch.autograd.graph.save_on_cpu():
        return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def stacked(processed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
