"""The examples of a run: its rows encoded, once where that can be, or anew each time that they are seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from silkscreen.errors import TrainingError
from silkscreen.template import Template
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import Preparation, Prepared
from silkscreen.training.encoding import Encoder
from silkscreen.training.reporting import Reporter
from silkscreen.training.rows import Rows
from silkscreen.training.store import Example, ExampleStore, StoreError


class Examples:
    """Gives examples, on the accelerator's device, and keeps what it encodes where that is of use.

    Attributes:
        store: the encoded rows: those of a split run, or the run's own; None where each is encoded whenever it is seen.

    Raises:
        TrainingError: there are encoded rows of something else, or some are missing; or rows are to be encoded once and
            for all, and the template processes them differently each time.
    """

    def __init__(
        self,
        config: TrainingConfig,
        rows: Rows,
        encoder: Encoder,
        template: Template,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.config, self.rows, self.encoder = config, rows, encoder
        self.accelerator, self.reporter = accelerator, reporter
        self.store = self._encoded() if rows.preparation is None else self._own(rows.preparation, template)

    def of(self, rows: Sequence[int], epoch: int) -> Iterator[Example]:
        """Yield the examples of rows, in their order."""
        workers = self.config.dataset_num_workers if self.rows.preparation is not None else 0
        data = _Items(self.store, self.rows.preparation, epoch)
        loader = DataLoader(data, batch_size=None, sampler=rows, num_workers=workers)
        for row, value in zip(rows, loader, strict=True):
            yield self._example(row, value, epoch)

    def encode_all(self) -> Path:
        """Encode every row that is not yet, each process its share, and return the folder that they are in."""
        assert self.store is not None
        everyone = range(len(self.rows.sizes))[self.accelerator.process_index :: self.accelerator.num_processes]
        left = [row for row in everyone if row not in self.store]
        with self.reporter.progress("encoding", len(left)) as advance:
            for _ in self.of(left, 0):
                advance(1)
        self.store.flush()
        self.accelerator.wait_for_everyone()
        return self.store.folder

    def share(self) -> None:
        """Let every process see the rows that the others have encoded."""
        if self.store is None or self.rows.preparation is None:
            return
        try:
            self.store.flush()
        except StoreError as error:
            self.reporter.say(f"{error}; going on, with some rows encoded anew")
        self.accelerator.wait_for_everyone()
        self.store.refresh()

    def remove(self) -> None:
        """Remove what was kept for this run alone."""
        if self.config.task == "sft" and self.store is not None and self.accelerator.is_main_process:
            shutil.rmtree(self.store.folder)

    def _encoded(self) -> ExampleStore:
        """Open what an earlier run has encoded."""
        folder = self.config.dataset_base_path
        assert folder is not None
        store = ExampleStore(folder, self.rows.about, self.accelerator.process_index)
        missing = [row for row in range(len(self.rows.sizes)) if row not in store]
        if missing:
            raise TrainingError(
                f"{folder} lacks {len(missing)} of {len(self.rows.sizes)} rows: "
                "run --task sft:data_process again, it goes on where it stopped"
            )
        return store

    def _own(self, preparation: Preparation, template: Template) -> ExampleStore | None:
        """Open what is to hold the rows that this run encodes, where they are seen again and stay the same."""
        config = self.config
        seen_again = config.num_epochs * config.dataset_repeat > 1
        if config.task == "sft" and (config.no_cache or not seen_again):
            return None
        if not self.encoder.is_constant(preparation):
            if config.task == "sft:data_process":
                raise TrainingError(
                    f"template {template.name!r} processes a row differently each time (by chance, or by weights "
                    "that are trained), so that its rows cannot be encoded once for all: train it with --task sft"
                )
            self.reporter.say(
                "the template processes a row differently each time: rows are encoded anew in every epoch"
            )
            return None
        folder = config.output_path / "cache" if config.task == "sft" else config.output_path
        about = {**self.rows.about, "dtype": str(self.encoder.context.torch_dtype)}
        store = ExampleStore(folder, about, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()
        return store

    def _example(self, row: int, value: Example | Prepared, epoch: int) -> Example:
        device = self.accelerator.device
        if isinstance(value, Example):
            return value.to(device)
        if self.store is not None and row in self.store:
            return self.store[row].to(device)
        try:
            example = self.encoder.encode(value, epoch)
        except TrainingError as error:
            assert self.rows.preparation is not None
            line = self.rows.preparation.rows[row].line
            raise TrainingError(f"{self.config.dataset_metadata_path}:{line}: {error}") from error
        if self.store is not None:
            self._keep(self.store, row, example)
        return example

    def _keep(self, store: ExampleStore, row: int, example: Example) -> None:
        try:
            store.add(row, example)
        except StoreError as error:
            if self.config.task == "sft:data_process":
                raise
            self.reporter.say(f"{error}; going on, with rows encoded anew in every epoch")
            self.store = None


class _Items(Dataset[Example | Prepared]):
    """The rows of an epoch, by number: encoded where they are in the store, prepared where they are not."""

    def __init__(self, store: ExampleStore | None, preparation: Preparation | None, epoch: int) -> None:
        self.store, self.preparation, self.epoch = store, preparation, epoch

    def __getitem__(self, row: int) -> Example | Prepared:
        if self.store is not None and row in self.store:
            return self.store[row]
        assert self.preparation is not None
        return self.preparation.prepare(row, self.epoch)
