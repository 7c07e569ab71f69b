"""How strongly, when and where in the picture templates act."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from silkscreen import TemplateCache, TemplatePipeline
from silkscreen.carriers.weights import Region
from silkscreen.cli import command_line
from silkscreen.errors import CacheError, InputError
from small_flux2 import CALL, build_pipeline

MakeTemplate = Callable[[str, str], Path]
CARRIERS = {"kv_cache": "random_kv(seed)", "lora": "random_lora(seed)"}


def half(*box: int) -> Image.Image:
    """Return a mask of 64 x 64 that is white in a box."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, box)
    return mask


LEFT, RIGHT, TOP, BOTTOM = (half(*box) for box in ((0, 0, 32, 64), (32, 0, 64, 64), (0, 0, 64, 32), (0, 32, 64, 64)))


@pytest.fixture(params=CARRIERS)
def templates(request: Any, fixed_folder: MakeTemplate) -> TemplatePipeline:
    result = f'{{"{request.param}": {CARRIERS[request.param]}}}'
    return TemplatePipeline(fixed_folder("fixed", result), trust_code=True)


def draw(templates: TemplatePipeline, pipe: Any, *inputs: dict[str, Any], **arguments: Any) -> np.ndarray:
    settings = {"prompt": "red", "seed": 0, "template_inputs": inputs, **CALL, **arguments}
    return np.asarray(templates(pipe, **settings).images)


def test_the_defaults_change_no_bit(templates: TemplatePipeline, small_pipe: Any) -> None:
    plain = draw(templates, small_pipe, {})
    white = Image.new("L", (64, 64), 255)
    assert np.array_equal(plain, draw(templates, small_pipe, {"strength": 1, "start": 0, "end": 1, "region": white}))
    assert np.abs(plain - draw(templates, small_pipe)).max() > 1e-3


def test_no_strength_is_no_template(templates: TemplatePipeline, small_pipe: Any) -> None:
    bare = draw(templates, small_pipe)
    black = Image.new("L", (64, 64))
    assert np.array_equal(bare, draw(templates, small_pipe, {"strength": 0}))
    np.testing.assert_allclose(draw(templates, small_pipe, {"region": black}), bare, atol=1e-5)
    np.testing.assert_allclose(draw(templates, small_pipe, {"strength": 1e-9}), bare, atol=1e-5)


@pytest.mark.parametrize("strengths", [(2,), (0.5, 1.5), (0.25, 0.75, 1)])
def test_strengths_of_the_same_add_up(templates: TemplatePipeline, small_pipe: Any, strengths: tuple[float]) -> None:
    twice = draw(templates, small_pipe, {}, {})
    parts = draw(templates, small_pipe, *({"strength": strength} for strength in strengths))
    np.testing.assert_allclose(parts, twice, atol=1e-5)
    assert np.abs(twice - draw(templates, small_pipe, {})).max() > 1e-3


@pytest.mark.parametrize("templates", ["lora"], indirect=True)
def test_regions_of_a_lora_add_up_where_they_are(templates: TemplatePipeline, small_pipe: Any) -> None:
    across, down = (
        draw(templates, small_pipe, *({"region": region} for region in regions))
        for regions in ((LEFT, RIGHT), (TOP, BOTTOM))
    )
    np.testing.assert_allclose(across, down, atol=1e-5)
    left, top = (draw(templates, small_pipe, {"region": region}) for region in (LEFT, TOP))
    assert np.abs(left - top).max() > 1e-3
    assert np.abs(left - across).max() > 1e-3


def test_a_region_is_averaged_over_each_token() -> None:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8))
    drawn = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6), torch.arange(1))
    reference = drawn + torch.tensor([10, 0, 0, 0])
    pixels = np.asarray(mask) / 255
    naive = [pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean() for y in range(4) for x in range(6)]
    found = Region(mask).at(torch.cat([drawn, reference]))
    np.testing.assert_allclose(found, [*naive, *[0] * 24], atol=1e-6)


def test_start_and_end_are_fractions_of_the_steps(templates: TemplatePipeline, small_pipe: Any) -> None:
    def latents(*inputs: dict[str, Any]) -> list[torch.Tensor]:
        seen = []

        def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            seen.append(kwargs["latents"].clone())
            return kwargs

        draw(templates, small_pipe, *inputs, num_inference_steps=4, callback_on_step_end=note)
        return seen

    bare, full, first, last = latents(), latents({}), latents({"end": 0.5}), latents({"start": 0.5})
    for step in (0, 1):
        torch.testing.assert_close(first[step], full[step], atol=1e-5, rtol=0)
        torch.testing.assert_close(last[step], bare[step], atol=1e-5, rtol=0)
    for step in (2, 3):
        assert (first[step] - full[step]).abs().max() > 1e-4
        assert (last[step] - bare[step]).abs().max() > 1e-4
    whole = latents({"end": 0.25}, {"start": 0.25, "end": 0.75}, {"start": 0.75})
    torch.testing.assert_close(whole[-1], full[-1], atol=1e-5, rtol=0)


def test_pictures_of_a_batch_have_controls_of_their_own(templates: TemplatePipeline, small_pipe: Any) -> None:
    own: list[list[dict[str, Any]]] = [[{"strength": 0.5}], [], [{"region": LEFT}, {"seed": 1}], [{"end": 0.5}]]

    def pictures(inputs: list[list[dict[str, Any]]]) -> np.ndarray:
        count = len(inputs)
        settings = {"prompt": ["red"] * count, "generator": [torch.Generator().manual_seed(0) for _ in range(count)]}
        return np.asarray(templates(small_pipe, template_inputs=inputs, **settings, **CALL).images)

    np.testing.assert_allclose(pictures(own), np.concatenate([pictures([each]) for each in own]), atol=1e-5)


def test_the_default_negative_side_is_under_the_same_control(small_pipe: Any, fixed_folder: MakeTemplate) -> None:
    folder = fixed_folder("fixed", '{"kv_cache": random_kv(seed)}')
    (folder / "template.toml").write_text(
        'title = "F"\n[inputs.seed]\ntype = "integer"\ndefault = 0\nnegative = 5\n', encoding="utf-8"
    )
    templates = TemplatePipeline(folder, trust_code=True)
    control = {"strength": 0.5, "start": 0.5, "region": LEFT}
    default, written = (
        draw(templates, small_pipe, control, negative_template_inputs=negative)
        for negative in ("default", [{"seed": 5, **control}])
    )
    assert np.array_equal(default, written)
    assert not np.array_equal(default, draw(templates, small_pipe, control, negative_template_inputs=[{"seed": 5}]))


def test_a_made_cache_keeps_its_control(templates: TemplatePipeline, small_pipe: Any, tmp_path: Path) -> None:
    control = {"strength": 0.5, "end": 0.5, "region": LEFT}
    made = templates.compose(small_pipe, [control])
    settings = {"prompt": "red", "seed": 0, **CALL}
    picture = np.asarray(templates(small_pipe, template_cache=made, **settings).images)
    assert np.array_equal(picture, draw(templates, small_pipe, control))
    assert "strength=0.5 end=0.5" in made.inspect()
    with pytest.raises(CacheError, match="which belong to a call"):
        made.save(tmp_path / "made.safetensors")


def test_compiled_blocks_are_not_compiled_anew_from_step_to_step(fixed_folder: MakeTemplate) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe = build_pipeline()
    templates = TemplatePipeline(fixed_folder("fixed", '{"kv_cache": random_kv(seed)}'), trust_code=True)
    inputs = ({"strength": 0.5, "region": LEFT}, {"end": 0.5, "seed": 1})
    expected = draw(templates, pipe, *inputs, num_inference_steps=8)
    pipe.transformer.compile_repeated_blocks(backend=backend)
    draw(templates, pipe, *inputs, num_inference_steps=2)
    before = len(graphs)
    np.testing.assert_allclose(draw(templates, pipe, *inputs, num_inference_steps=8), expected, atol=1e-5)
    assert len(graphs) == before


def test_what_makes_no_sense_is_named(small_pipe: Any, fixed_folder: MakeTemplate) -> None:
    templates = TemplatePipeline(
        fixed_folder("fixed", '{"extra_text_embedding": random_tensor(seed, 1, 3, 32)}'), trust_code=True
    )
    with pytest.raises(CacheError, match="its carrier 'extra_text_embedding' has no strength and no region"):
        draw(templates, small_pipe, {"strength": 0.5})
    with pytest.raises(InputError, match=r"start=0.5, end=0.5: start has to be before end"):
        draw(templates, small_pipe, {"start": 0.5, "end": 0.5})
    with pytest.raises(InputError, match=r"strength=-1 is out of range"):
        draw(templates, small_pipe, {"strength": -1})
    bare, timed = draw(templates, small_pipe), draw(templates, small_pipe, {"end": 0.5})
    assert np.abs(bare - timed).max() > 1e-4


def test_a_cache_without_carriers_takes_no_control() -> None:
    from silkscreen.control import Control

    cache = TemplateCache.from_result({"height": 32}, "x")
    with pytest.raises(CacheError, match=r"template 'x' has only pipeline arguments \(height\)"):
        cache.controlled(Control(strength=0.5))


def test_on_the_command_line_and_in_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LEFT.save("left.png")

    def generate(*words: str) -> np.ndarray:
        done = CliRunner().invoke(command_line(), ["generate", *words, "--overwrite"])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(words[-1]))

    base = ("a large red circle on a blue background", "--steps", "4")
    controls = ("strength=0.7", "region=left.png", "end=0.75")
    controlled = generate(*base, "-t", "brightness", "scale=0.9", *controls, "-o", "a.png")
    assert np.array_equal(controlled, generate("--like", "a.png", "-o", "b.png"))
    assert not np.array_equal(controlled, generate(*base, "-t", "brightness", "scale=0.9", "-o", "c.png"))
