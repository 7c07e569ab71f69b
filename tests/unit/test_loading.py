from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silkscreen import load_base
from silkscreen.bases import find_base
from silkscreen.errors import BaseError, UnknownNameError
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import base_of, default_dtype
from small_flux2 import CALL


def draw(pipe: Any) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(prompt="red", generator=torch.Generator().manual_seed(0), **CALL).images)


def test_a_folder_in_diffusers_layout_is_a_base(small_pipe: Any, tmp_path: Path) -> None:
    small_pipe.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    assert type(loaded) is type(small_pipe)
    assert loaded.transformer.dtype == torch.float32
    assert base_of(loaded).geometry.blocks == ["double_0", "double_1", "single_0", "single_1"]
    np.testing.assert_allclose(draw(loaded), draw(small_pipe), atol=1e-5)


def test_a_folder_in_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"is no base in diffusers' layout.*needs a model_index\.json"):
        load_base(tmp_path)


def test_a_broken_component_is_named(small_pipe: Any, tmp_path: Path) -> None:
    small_pipe.save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(BaseError, match=r"the vae in .* cannot be loaded"):
        load_base(tmp_path)


def test_an_unknown_base_gets_the_nearest_id() -> None:
    with pytest.raises(UnknownNameError, match=r"'flux2-tyni': did you mean 'flux2-tiny'"):
        load_base("flux2-tyni")


def test_a_pipeline_of_a_published_geometry_is_recognised_without_a_mark() -> None:
    klein = find_base("black-forest-labs/FLUX.2-klein-base-4B")
    distilled = find_base("black-forest-labs/FLUX.2-klein-4B")

    class Pipe:
        class transformer:  # noqa: N801
            config = vars(klein.geometry)

        config: dict[str, Any] = {}  # noqa: RUF012

    assert base_of(Pipe()).id == klein.id
    Pipe.config = {"is_distilled": True}
    assert base_of(Pipe()).id == distilled.id


def test_a_cpu_computes_in_float32_and_an_accelerator_in_bfloat16() -> None:
    assert default_dtype(torch.device("cpu")) is torch.float32
    assert default_dtype(torch.device("cuda")) is torch.bfloat16


def test_a_template_sees_latents_as_the_pipeline_makes_them(small_pipe: Any) -> None:
    from PIL import Image

    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    context = TemplateContext(small_pipe)
    pixels = context.preprocess_image(picture)
    expected = small_pipe._encode_vae_image(small_pipe.image_processor.preprocess(picture), None)
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(context.vae.encode(pixels), expected)
