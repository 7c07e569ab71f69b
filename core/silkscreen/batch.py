"""Many pictures from a file with a recipe a line.

`torchrun --nproc-per-node 2 -m silkscreen.batch rows.jsonl -o pictures` and `accelerate launch -m silkscreen.batch ...`
share the rows among processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import track

from silkscreen.errors import RecipeError, SilkscreenError
from silkscreen.files import replacing
from silkscreen.flux2.loading import load_base
from silkscreen.pipeline import TemplatePipeline
from silkscreen.recipe import Recipe, read, save_picture

REPORT = "report.jsonl"
"""The file, next to the pictures, with the rows that failed."""


def draw_batch(
    path: Path,
    output: Path,
    *,
    base: str = "flux2-tiny",
    load: Callable[..., Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_code: bool = False,
) -> list[dict[str, Any]]:
    """Draw a picture for each row of a file, except those that are there already with the recipe of their row.

    A row's picture depends on nothing but the row, so that a batch that was stopped ends with the same pictures.

    Args:
        path: a JSONL file; a row has the fields of `Recipe`, of which only `prompt` is needed.
        output: the folder of the pictures, `000000.png` for the first row, and of `report.jsonl`, which is there when
            rows have failed.
        base: for rows that name none.
        load: loads a base, given its id, the templates, the recipe it is first needed for, and the `device` of the
            process; by default `load_base`.
        seed: rows that have no `seed` get this plus their index, from 0.
        overwrite: replace pictures of other recipes.
        trust_code: let the code of templates named by a folder run.

    Returns:
        The rows that failed in any process: each one's `row` from 0, `line` of the file from 1, and `reason`.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    output.mkdir(parents=True, exist_ok=True)
    templates = TemplatePipeline([])

    loaded: dict[str, Any] = {}

    def pipe_for(recipe: Recipe) -> Any:
        if recipe.base not in loaded:
            loaded.clear()  # before the next is loaded: two may not fit
            make = load or (lambda base, *_, device: load_base(base, device=device))
            loaded[recipe.base] = make(recipe.base, templates, recipe, device=state.device)
            loaded[recipe.base].set_progress_bar_config(disable=True)
        return loaded[recipe.base]

    def draw(row: int, text: str) -> None:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise RecipeError("a row has to be a JSON object")
        recipe = Recipe.from_dict({"base": base, "seed": seed + row, **data}, path.parent)
        for name in recipe.template_names:
            if name not in templates:
                templates.add(name, trust_code=trust_code)
        pipe = pipe_for(recipe)
        recipe = recipe.completed(pipe, templates)
        picture = output / f"{row:06d}.png"
        if picture.exists():
            if _is_of(picture, recipe):
                return
            if not overwrite:
                raise FileExistsError(
                    f"{picture} exists with another recipe: choose another folder, or pass --overwrite"
                )
        save_picture(recipe.run(pipe, templates), picture, recipe)

    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    rows = list(enumerate((line, text) for line, text in lines if text.strip()))
    failures = []
    for row, (line, text) in track(
        rows[state.process_index :: state.num_processes],
        description="drawing",
        console=Console(stderr=True),
        disable=not state.is_main_process,
    ):
        try:
            draw(row, text)
        except Exception as error:  # whatever one row raises, the others go on
            known = isinstance(error, SilkscreenError | FileExistsError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            failures.append({"row": row, "line": line, "reason": reason})
    return _report(failures, output, state)


def _is_of(picture: Path, recipe: Recipe) -> bool:
    """Whether a picture was drawn from a recipe."""
    try:
        return read(picture) == recipe.to_dict(picture.parent)
    except RecipeError:
        return False


def _report(failures: list[dict[str, Any]], output: Path, state: PartialState) -> list[dict[str, Any]]:
    """Put the failures of all processes into one report, and return them."""
    report = output / REPORT
    _write_rows(output / f".report-{state.process_index}.jsonl", failures)
    state.wait_for_everyone()
    if state.is_main_process:
        parts = [output / f".report-{process}.jsonl" for process in range(state.num_processes)]
        together = sorted((row for part in parts for row in _read_rows(part)), key=lambda row: row["row"])
        _write_rows(report, together)
        for part in parts:
            part.unlink()
    state.wait_for_everyone()
    failures = _read_rows(report)
    state.wait_for_everyone()
    if state.is_main_process and not failures:
        report.unlink()
    state.destroy_process_group()
    return failures


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    from silkscreen.cli import main

    main(["batch", *sys.argv[1:]])
