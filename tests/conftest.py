"""What many tests need: a small random FLUX.2, and distributions made up on the spot."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from silkscreen import bases


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SILKSCREEN_BLOCK", raising=False)
    monkeypatch.delenv("SILKSCREEN_NO_PLUGINS", raising=False)
    bases.rescan()
    yield
    bases.rescan()


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a made-up distribution on the import path; returns the folder of its package."""

    def install(
        name: str,
        *,
        entry_points: str,
        files: dict[str, str] | None = None,
        requires: tuple[str, ...] = ("silkscreen>=0.1,<1",),
        version: str = "1.0",
    ) -> Path:
        site = tmp_path / "site" / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        package = site / name.replace("-", "_")
        package.mkdir()
        for file, text in {"__init__.py": "", **(files or {})}.items():
            (package / file).write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(site))
        bases.rescan()
        return package

    yield install
    for module in [
        m for m in sys.modules if (getattr(sys.modules[m], "__file__", None) or "").startswith(str(tmp_path))
    ]:
        del sys.modules[module]


@pytest.fixture
def small_pipe() -> Any:
    """A random FLUX.2 klein pipeline: 2 double and 2 single blocks of 2 heads of 16, pictures of 32 x 32."""
    from small_flux2 import build_pipeline

    return build_pipeline()


@pytest.fixture
def small_kv() -> Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Make random keys and values for blocks of `small_pipe`."""

    def make(
        *blocks: str, tokens: int = 3, batch: int = 1, seed: int = 0
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, tokens, 2, 16)
        return {
            block: (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for block in blocks
        }

    return make


@pytest.fixture
def transformer_inputs() -> dict[str, Any]:
    """Arguments of a call of `small_pipe.transformer`, for two pictures of 4 tokens and prompts of 6."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(2), torch.arange(1)),
        "txt_ids": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(6)),
        "return_dict": False,
    }


CONSTANT_TEMPLATE = """
    import torch

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self, tokens=2, heads=2, head_dim=16):
            super().__init__()
            self.key = torch.nn.Parameter(torch.ones(1, tokens, heads, head_dim))
            self.value = torch.nn.Parameter(torch.ones(1, tokens, heads, head_dim))

        @torch.no_grad()
        def process_inputs(self, pipe, scale=1.0, **kwargs):
            return {"scale": scale}

        def forward(self, pipe, scale, **kwargs):
            return {"kv_cache": {"single_1": (self.key, self.value * scale)}}
"""
"""A template in the field's format for `small_pipe`."""


@pytest.fixture
def constant_folder(tmp_path: Path) -> Path:
    """A folder with a `model.py` in the field's format."""
    folder = tmp_path / "constant"
    folder.mkdir()
    (folder / "model.py").write_text(textwrap.dedent(CONSTANT_TEMPLATE))
    return folder


FIXED_TEMPLATE = """
    import torch
    from small_flux2 import SHAPES, random_kv, random_lora, random_picture, random_tensor

    class TEMPLATE_MODEL(torch.nn.Module):
        def process_inputs(self, pipe, seed=0, **kwargs):
            return {{"seed": seed}}

        def forward(self, pipe, seed, **kwargs):
            return {result}
"""
"""A template without weights that returns a result written out, of a `seed`."""


@pytest.fixture
def fixed_folder(tmp_path: Path) -> Callable[[str, str], Path]:
    """Make a folder, of a name, with a template that returns what a Python expression says."""

    def make(name: str, result: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.py").write_text(textwrap.dedent(FIXED_TEMPLATE.format(result=result)))
        return folder

    return make
