"""Regions of a picture, each drawn under templates of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from silkscreen import TemplatePipeline
from silkscreen.carriers.weights import Region, Weights
from silkscreen.flux2.regions import ACROSS, Separation
from small_flux2 import CALL

MakeTemplate = Callable[[str, str], Path]


def mask(*rows: list[float]) -> Image.Image:
    """Return a mask of as many tokens, at 16 pixels a side."""
    return Image.fromarray(np.kron(np.array(rows) * 255, np.ones((16, 16))).round().astype(np.uint8))


LEFT, RIGHT, CORNER = mask([1, 0], [1, 0]), mask([0, 1], [0, 1]), mask([0.2, 0], [0, 1])


def ids(references: int = 0) -> torch.Tensor:
    """Return the ids of 2 x 2 tokens, and of reference pictures of one token each."""
    drawn = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(2), torch.arange(1))
    return torch.cat([drawn, *(torch.tensor([[10 * (n + 1), 0, 0, 0]]) for n in range(references))])


def test_each_region_has_its_text_and_templates_and_sees_little_of_the_others() -> None:
    text, parts = 3, [(2, 0.5, LEFT), (1, 1.0, None), (2, 1.0, RIGHT)]
    weights = Weights.join([Weights.of(units, strength, m and Region(m)) for units, strength, m in parts])
    separation = Separation.of([weights], ids(references=1))
    assert separation is not None
    left = [1.0, 0.0, 1.0, 0.0]
    shares = {Region(LEFT): [*left, 0.0], Region(RIGHT): [*(1 - x for x in left), 0.0], None: [0.0] * 4 + [1.0]}
    assert set(separation.regions) == set(shares)

    copies = [region for region in separation.regions for _ in range(text)]
    tokens = [*copies, 0, 1, 2, 3, 4]
    naive = []
    for query in tokens:
        row: list[float] = []
        for key in tokens:
            of_text = [token for token in (query, key) if not isinstance(token, int)]
            picture = [token for token in (query, key) if isinstance(token, int)]
            if len(of_text) == 2:
                row.append(float(query == key))
            elif len(picture) == 2:
                common = sum(min(share[query], share[key]) for share in shares.values())
                row.append(1.0 if 4 in picture else ACROSS + (1 - ACROSS) * common)
            elif query in picture:
                row.append(shares[of_text[0]][picture[0]])
            else:
                row.append(1.0 if 4 in picture else ACROSS + (1 - ACROSS) * shares[of_text[0]][picture[0]])
        for units, strength, m in parts:
            region = m and Region(m)
            inside = shares[region][query] if isinstance(query, int) and m else float(region in (None, query))
            row += [strength * (inside if m else 1.0)] * units
        naive.append(row)
    torch.testing.assert_close(separation.bias(weights, text)[0].exp(), torch.tensor(naive))


def test_regions_share_tokens_that_are_in_several() -> None:
    weights = Weights.join([Weights.of(1, 1.0, Region(m)) for m in (RIGHT, CORNER)])
    separation = Separation.of([weights], ids())
    assert separation is not None
    shares = dict(zip(separation.regions, separation.shares[0].tolist(), strict=True))
    for region, share in ((Region(RIGHT), [0, 1, 0, 0.5]), (Region(CORNER), [0.2, 0, 0, 0.5]), (None, [0.8, 0, 1, 0])):
        np.testing.assert_allclose(shares[region], share, atol=1e-6)


def test_without_regions_nothing_is_separated() -> None:
    assert Separation.of([Weights.of(2), Weights.of(3, 0.5)], ids()) is None


def test_a_picture_is_separated_by_its_own_regions_only() -> None:
    weights = Weights.stack([Weights.of(2, 1.0, Region(LEFT)), Weights.of(2)], 2)
    separation = Separation.of([weights], ids())
    assert separation is not None
    outside = separation.regions.index(None)
    assert separation.shares[:, outside].tolist() == [[0, 1, 0, 1], [1, 1, 1, 1]]


def test_the_order_of_regions_does_not_matter(small_pipe: Any, fixed_folder: MakeTemplate) -> None:
    templates = TemplatePipeline(fixed_folder("fixed", '{"kv_cache": random_kv(seed)}'), trust_code=True)

    def draw(*inputs: dict[str, Any]) -> np.ndarray:
        return np.asarray(templates(small_pipe, prompt="red", seed=0, template_inputs=inputs, **CALL).images)

    left, right = {"region": LEFT, "seed": 0}, {"region": RIGHT, "seed": 1}
    both = draw(left, right)
    np.testing.assert_allclose(both, draw(right, left), atol=1e-5)
    for other in (draw({**left, "seed": 1}, {**right, "seed": 0}), draw(left), draw(right), draw()):
        assert np.abs(both - other).max() > 1e-3


def test_a_text_embedding_is_read_in_every_region(small_pipe: Any, fixed_folder: MakeTemplate) -> None:
    keys = TemplatePipeline(fixed_folder("keys", '{"kv_cache": random_kv(seed)}'), trust_code=True)
    keys.add(fixed_folder("words", '{"extra_text_embedding": random_tensor(seed, 1, 3, 32)}'), trust_code=True)

    def draw(*inputs: dict[str, Any]) -> np.ndarray:
        return np.asarray(keys(small_pipe, prompt="red", seed=0, template_inputs=inputs, **CALL).images)

    left, right = ({"model_id": "keys", "region": region} for region in (LEFT, RIGHT))
    words = {"model_id": "words"}
    np.testing.assert_allclose(draw(left, words, right), draw(words, right, left), atol=1e-5)
    assert np.abs(draw(left, right) - draw(left, words, right)).max() > 1e-3
