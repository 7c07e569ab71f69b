"""A carrier that a plugin brings, used by a template of the same plugin: nothing of the core knows of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silkscreen import TemplatePipeline
from silkscreen.cache import TemplateCache
from silkscreen.errors import CacheError
from small_flux2 import CALL, draw

ENTRY_POINTS = """
    [silkscreen]
    shift = silkscreen_shift.plugin
    [silkscreen.templates]
    shift = silkscreen_shift.model
"""

PLUGIN = """
    from silkscreen import hookimpl

    @hookimpl
    def register_carriers():
        from silkscreen_shift.carrier import LatentShift

        return [LatentShift()]
"""

CARRIER = """
    from contextlib import contextmanager

    class LatentShift:
        name = "latent_shift"

        def check(self, value, base):
            channels = base.geometry.in_channels
            return [] if value.shape == (channels,) else [f"latent_shift: {base.id} wants ({channels},)"]

        def merge(self, values):
            return sum(values)

        def flatten(self, value):
            return {"shift": value}

        def unflatten(self, tensors):
            return tensors["shift"]

        def describe(self, value):
            return f"{len(value)} channels"

        @contextmanager
        def inject(self, pipe, sides):
            def shift(module, args, kwargs):
                value = sides.current("latent_shift")
                if value is not None:
                    kwargs = {**kwargs, "hidden_states": kwargs["hidden_states"] + value}
                return args, kwargs

            hook = pipe.transformer.register_forward_pre_hook(shift, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
"""

TEMPLATE = """
    import torch

    class TEMPLATE_MODEL(torch.nn.Module):
        def process_inputs(self, pipe, amount=1.0, channels=16, **kwargs):
            return {"amount": amount, "channels": channels}

        def forward(self, pipe, amount, channels, **kwargs):
            return {"latent_shift": torch.full((channels,), amount)}
"""


@pytest.fixture
def templates(distribution: Callable[..., Path]) -> TemplatePipeline:
    files = {"plugin.py": PLUGIN, "carrier.py": CARRIER, "model.py": TEMPLATE}
    distribution("silkscreen-shift", entry_points=ENTRY_POINTS, files=files)
    return TemplatePipeline("shift")


def test_it_is_merged_and_acts_on_its_side_for_one_call(templates: TemplatePipeline, small_pipe: Any) -> None:
    bare = draw(small_pipe)
    drawn = templates(
        small_pipe,
        prompt="red",
        seed=0,
        template_inputs=[{"amount": 0.5}, {"amount": 0.25}],
        negative_template_inputs=[{"amount": -1.0}],
        **CALL,
    ).images
    shifts = {"cond": 0.75, "uncond": -1.0}
    transformer, running = small_pipe.transformer, []
    forward, context = transformer.forward, transformer.cache_context

    def shifted(**kwargs: Any) -> Any:
        return forward(**{**kwargs, "hidden_states": kwargs["hidden_states"] + shifts[running[-1]]})

    def noted(name: str) -> Any:
        running.append(name)
        return context(name)

    transformer.forward, transformer.cache_context = shifted, noted
    naive = draw(small_pipe)
    del transformer.forward, transformer.cache_context
    assert np.array_equal(drawn, naive)
    assert not np.array_equal(drawn, bare)
    assert np.array_equal(draw(small_pipe), bare)


def test_it_is_checked_and_saved_as_ours_are(templates: TemplatePipeline, small_pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"template 'shift': latent_shift: unknown wants \(16,\)"):
        templates.compose(small_pipe, [{"channels": 3}])
    templates.compose(small_pipe, [{"amount": 2.0}]).save(tmp_path / "c.safetensors")
    loaded = TemplateCache.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.fields["latent_shift"], torch.full((16,), 2.0))
