"""The pictures that flux2-tiny knows: one shape on a plain background, seen in any light.

A prompt says what is there (`a large red circle on a blue background`). It does not say where the shape is, how strong
or how coloured the light is, or how sharp the picture is: those vary freely from scene to scene, and are what templates
learn to control.
"""

from __future__ import annotations

import colorsys
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

RESOLUTION = 128
"""Width and height of a scene in pixels: 64 tokens of 16 x 16 pixels."""

HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 55,
    "green": 125,
    "cyan": 182,
    "blue": 228,
    "purple": 272,
    "pink": 325,
}
"""Colour names and their hues in degrees. Light moves a colour towards black or white, which leaves its hue alone."""

SIZES = {"small": (24.0, 28.0), "large": (42.0, 46.0)}
"""Size names and the range of the shape's radius in pixels."""

SHAPES = ("circle", "square", "triangle", "star")

_SUPERSAMPLING = 4
_OUTLINE_WIDTH = 2.0


def color_of(name: str) -> NDArray[np.float64]:
    """Return the RGB colour (3 values in 0..1) of a colour name in neutral light."""
    return np.array(colorsys.hsv_to_rgb(HUES[name] / 360, 0.9, 0.92))


def prompts() -> list[str]:
    """Return every prompt of the grammar, 448 of them."""
    return [
        f"a {size} {color} {shape} on a {background} background"
        for size in SIZES
        for color in HUES
        for shape in SHAPES
        for background in HUES
        if color != background
    ]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene: what the prompt says, and what it leaves open.

    Attributes:
        size, color, shape, background: the words of the prompt.
        x, y, radius: centre and radius of the shape in pixels.
        exposure: -1 is black, 0 neutral light, 1 white.
        tint: gain of the light in red, green and blue, 0.88 to 1.12.
        blur: standard deviation of the blur in pixels, 0 for none.
    """

    size: str
    color: str
    shape: str
    background: str
    x: float
    y: float
    radius: float
    exposure: float
    tint: tuple[float, float, float]
    blur: float

    @classmethod
    def random(cls, rng: np.random.Generator, prompt: str | None = None, *, wide_exposure: bool = False) -> Scene:
        """Draw a scene at random.

        Args:
            rng: source of randomness; the same state gives the same scene.
            prompt: a prompt of the grammar to obey; a random one when None.
            wide_exposure: draw the exposure uniformly over its range, rather than mostly in between.
        """
        if prompt is None:
            color, background = rng.choice(list(HUES), 2, replace=False)
            size, shape = rng.choice(list(SIZES)), rng.choice(SHAPES)
        else:
            _, size, color, shape, _, _, background, _ = prompt.split()
        radius = rng.uniform(*SIZES[size])
        x, y = rng.uniform(radius + 2, RESOLUTION - radius - 2, 2)
        exposure = rng.uniform(-0.9, 0.9) if wide_exposure else np.clip(rng.normal(0, 0.42), -0.9, 0.9)
        red, green, blue = rng.uniform(0.88, 1.12, 3)
        blur = rng.uniform(0.8, 2.5) if rng.random() < 0.3 else 0.0
        return cls(
            size=str(size),
            color=str(color),
            shape=str(shape),
            background=str(background),
            x=float(x),
            y=float(y),
            radius=float(radius),
            exposure=float(exposure),
            tint=(float(red), float(green), float(blue)),
            blur=float(blur),
        )

    @property
    def prompt(self) -> str:
        """The prompt that describes this scene."""
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"

    def draw(self) -> Image.Image:
        """Return the scene as an RGB picture."""
        coverage = self.mask()
        if self.blur:
            coverage = coverage.filter(ImageFilter.GaussianBlur(self.blur))
        alpha = np.asarray(coverage, dtype=np.float64)[..., None] / 255
        picture = alpha * self._lit(self.color) + (1 - alpha) * self._lit(self.background)
        return Image.fromarray((picture * 255).round().astype(np.uint8))

    def mask(self) -> Image.Image:
        """Return where the shape is: a grey picture, white on black."""
        large = Image.new("L", (RESOLUTION * _SUPERSAMPLING,) * 2)
        ImageDraw.Draw(large).polygon(self._corners(_SUPERSAMPLING), fill=255)
        return large.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)

    def outline(self) -> Image.Image:
        """Return the shape's outline: a grey picture, white lines two pixels wide on black."""
        large = Image.new("L", (RESOLUTION * _SUPERSAMPLING,) * 2)
        corners = self._corners(_SUPERSAMPLING)
        width = round(_OUTLINE_WIDTH * _SUPERSAMPLING)
        ImageDraw.Draw(large).line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
        return large.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)

    def _lit(self, name: str) -> NDArray[np.float64]:
        color = np.clip(color_of(name) * self.tint, 0, 1)
        return (1 - abs(self.exposure)) * color + max(self.exposure, 0)

    def _corners(self, scale: float) -> list[tuple[float, float]]:
        return [
            ((self.x + self.radius * dx) * scale, (self.y + self.radius * dy) * scale)
            for dx, dy in unit_shape(self.shape)
        ]


def unit_shape(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 about the origin, y downwards; a circle is a polygon of 96."""
    if shape == "circle":
        return _spokes([1.0] * 96, start=0.0)
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(-1.0, 0.86), (0.0, -0.9), (1.0, 0.86)]
    if shape == "star":
        return _spokes([1.04, 0.45] * 5, start=-math.pi / 2)
    raise ValueError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")


def _spokes(lengths: list[float], start: float) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / len(lengths) for i in range(len(lengths))]
    return [(length * math.cos(angle), length * math.sin(angle)) for length, angle in zip(lengths, angles, strict=True)]


def stream(seed: int, *, wide_exposure: bool = False) -> Iterator[Scene]:
    """Yield random scenes for ever; the n-th depends on the seed and n alone."""
    for sequence in _spawn(seed):
        yield Scene.random(np.random.default_rng(sequence), wide_exposure=wide_exposure)


def _spawn(seed: int) -> Iterator[np.random.SeedSequence]:
    index = 0
    while True:
        yield np.random.SeedSequence(seed, spawn_key=(index,))
        index += 1
