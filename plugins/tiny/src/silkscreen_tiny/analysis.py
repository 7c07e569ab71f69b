"""Reads a picture of flux2-tiny's grammar back: which colours, which shape, how large, and how bright."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from silkscreen_tiny.scenes import HUES, SHAPES, SIZES, unit_shape

Pixels = NDArray[np.float64]

_RING = 3
"""Width in pixels of the picture's edge, where no shape reaches."""

_LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Weights of red, green and blue in luminance (ITU-R BT.709)."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is seen in a picture, in the words of the grammar.

    Attributes:
        background, color, size, shape: the nearest words.
        mask: (H, W), true on the shape.
    """

    background: str
    color: str
    size: str
    shape: str
    mask: NDArray[np.bool_]

    def agrees(self, prompt: str) -> dict[str, bool]:
        """Compare with a prompt, word by word."""
        _, size, color, shape, _, _, background, _ = prompt.split()
        return {
            "background": self.background == background,
            "color": self.color == color,
            "size": self.size == size,
            "shape": self.shape == shape,
        }


def read(picture: Image.Image) -> Reading:
    """Read a picture."""
    pixels = as_pixels(picture)
    background = np.median(_ring(pixels), axis=0)
    mask = _shape_mask(pixels, background)
    inside = np.median(pixels[mask], axis=0) if mask.any() else background
    shape, scale = _best_shape(mask)
    middle = (SIZES["small"][1] + SIZES["large"][0]) / 2
    return Reading(
        background=nearest_hue(background),
        color=nearest_hue(inside),
        size="small" if scale < middle else "large",
        shape=shape,
        mask=mask,
    )


def as_pixels(picture: Image.Image) -> Pixels:
    """Return a picture as (H, W, 3) in 0..1."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def mean_luminance(picture: Image.Image) -> float:
    """Return the mean luminance of a picture, 0 black to 1 white."""
    return float((as_pixels(picture) @ _LUMA).mean())


def mean_color(picture: Image.Image) -> Pixels:
    """Return the mean of each channel, (3,) in 0..1."""
    mean: Pixels = as_pixels(picture).mean(axis=(0, 1))
    return mean


def edges(picture: Image.Image) -> NDArray[np.bool_]:
    """Return (H, W), true where the colour changes more than beside it along the direction of change, as Canny's edges.

    Changes of less than half of the picture's strongest are none, nor are those in the outer ring.
    """
    down, across = np.gradient(as_pixels(picture), axis=(0, 1))
    strength = np.sqrt((down**2 + across**2).sum(axis=-1))
    angle = 0.5 * np.arctan2(2 * (down * across).sum(axis=-1), (across**2 - down**2).sum(axis=-1))
    step_y, step_x = np.rint(np.sin(angle)).astype(int), np.rint(np.cos(angle)).astype(int)
    y, x = np.indices(strength.shape)[:, _RING:-_RING, _RING:-_RING]
    dy, dx, here = step_y[y, x], step_x[y, x], strength[y, x]
    found = np.zeros(strength.shape, dtype=bool)
    found[y, x] = (
        (here >= strength[y + dy, x + dx]) & (here >= strength[y - dy, x - dx]) & (here > 0.5 * np.percentile(here, 99))
    )
    return found


def outline_pixels(outline: Image.Image) -> NDArray[np.bool_]:
    """Return (H, W), true on the lines of an outline drawing."""
    return np.asarray(outline.convert("L")) > 127


def f1(found: NDArray[np.bool_], wanted: NDArray[np.bool_], tolerance: int = 2) -> float:
    """Return the F1 score of edge pixels, where a pixel counts as right within a tolerance in pixels."""
    if not found.any() or not wanted.any():
        return 0.0
    precision = (found & _grow(wanted, tolerance)).sum() / found.sum()
    recall = (wanted & _grow(found, tolerance)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def nearest_hue(color: Pixels) -> str:
    """Return the colour word whose hue is nearest to an RGB colour's."""
    hue = colorsys.rgb_to_hsv(*map(float, np.clip(color, 0, 1)))[0] * 360
    return min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))


def _ring(pixels: Pixels) -> Pixels:
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[_RING:-_RING, _RING:-_RING] = False
    return pixels[border]


def _shape_mask(pixels: Pixels, background: Pixels) -> NDArray[np.bool_]:
    distance = np.linalg.norm(pixels - background, axis=-1)
    apart = distance > max(0.5 * float(np.percentile(distance, 99)), 0.02)
    inner = np.zeros_like(apart)
    inner[_RING:-_RING, _RING:-_RING] = apart[_RING:-_RING, _RING:-_RING]
    without_specks: NDArray[np.bool_] = (
        np.asarray(Image.fromarray(inner).convert("L").filter(ImageFilter.MedianFilter(3))) > 127
    )
    return without_specks


def _best_shape(mask: NDArray[np.bool_]) -> tuple[str, float]:
    """Return the shape that overlaps the mask best, drawn to fill its bounding box, and its radius in pixels."""
    if not mask.any():
        return "none", 0.0
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    scores = {}
    for shape in SHAPES:
        corners = np.array(unit_shape(shape))
        low, high = corners.min(axis=0), corners.max(axis=0)
        size = np.array([right - left, bottom - top])
        scale = size / (high - low)
        placed = (corners - low) * scale + [left, top]
        canvas = Image.new("1", (mask.shape[1], mask.shape[0]))
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in placed], fill=1)
        drawn = np.asarray(canvas)
        scores[shape] = ((drawn & mask).sum() / (drawn | mask).sum(), float(scale.mean()))
    best = max(scores, key=lambda shape: scores[shape][0])
    return best, scores[best][1]


def _grow(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    grown = np.zeros_like(mask)
    for down in range(-radius, radius + 1):
        for across in range(-radius, radius + 1):
            if down**2 + across**2 <= radius**2:
                source = mask[
                    max(0, -down) : mask.shape[0] - max(0, down), max(0, -across) : mask.shape[1] - max(0, across)
                ]
                grown[
                    max(0, down) : mask.shape[0] - max(0, -down), max(0, across) : mask.shape[1] - max(0, -across)
                ] |= source
    return grown
