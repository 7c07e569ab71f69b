"""Draw the pictures of the README files: `python core/docs/pictures.py`, with the core and all plugins installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from silkscreen import TemplatePipeline, load_base
from silkscreen.cli import command_line
from silkscreen.sheet import contact_sheet
from silkscreen_tiny.scenes import Scene

ROOT = Path(__file__).parents[2]
PROMPT = "a large yellow star on a blue background"
SEED = 3

OUTLINE = Scene("large", "yellow", "star", "blue", 70, 62, 44, exposure=0, tint=(1, 1, 1), blur=0).outline()


def strip(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures side by side, each under its label."""
    labels, drawn = zip(*pictures, strict=True)
    return contact_sheet(drawn, labels, columns=len(drawn))


def main() -> None:
    """Draw and save every picture."""
    pipe = load_base("flux2-tiny")
    templates = TemplatePipeline(["brightness", "softrgb", "structure"])
    outline = OUTLINE.convert("RGB")

    def draw(*template_inputs: dict[str, Any]) -> Image.Image:
        result = templates(
            pipe,
            prompt=PROMPT,
            seed=SEED,
            template_inputs=template_inputs,
            negative_template_inputs="default",
        )
        picture: Image.Image = result.images[0]
        return picture

    structure = {"model_id": "structure", "image": outline, "prompt": PROMPT}
    dark, light = ({"model_id": "brightness", "scale": scale} for scale in (0.25, 0.75))
    warm = {"model_id": "softrgb", "R": 0.7, "G": 0.45, "B": 0.4}
    OUTLINE.save(ROOT / "core/docs/outline.png")
    strip(
        [
            ("no template", draw()),
            ("outline drawing", outline),
            ("structure", draw(structure)),
            ("+ brightness 0.25", draw(structure, dark)),
            ("+ brightness 0.75", draw(structure, light)),
            ("+ warm soft RGB", draw(structure, light, warm)),
        ]
    ).save(ROOT / "core/docs/composed.png")
    scales = [0.1, 0.3, 0.5, 0.7, 0.9]
    strip([(f"scale={s}", draw({"model_id": "brightness", "scale": s})) for s in scales]).save(
        ROOT / "plugins/brightness/brightness.png"
    )
    colors = [(0.7, 0.4, 0.4), (0.4, 0.7, 0.4), (0.4, 0.4, 0.7), (0.2, 0.2, 0.2), (0.8, 0.8, 0.8)]
    strip(
        [
            ("{} {} {}".format(*rgb), draw({"model_id": "softrgb", **dict(zip("RGB", rgb, strict=True))}))
            for rgb in colors
        ]
    ).save(ROOT / "plugins/softrgb/softrgb.png")
    strip([("no template", draw()), ("outline drawing", outline), ("structure", draw(structure))]).save(
        ROOT / "plugins/structure/structure.png"
    )
    left = Image.new("L", (128, 128))
    left.paste(255, (0, 0, 64, 128))
    right = ImageOps.invert(left)
    left.save(ROOT / "core/docs/left.png")
    right.save(ROOT / "core/docs/right.png")
    bright = {"model_id": "brightness", "scale": 0.9}
    strip(
        [
            ("strength=0", draw({**bright, "strength": 0})),
            ("strength=0.1", draw({**bright, "strength": 0.1})),
            ("strength=1", draw(bright)),
            ("end=0.25", draw({**bright, "end": 0.25})),
            ("start=0.25", draw({**bright, "start": 0.25})),
            ("left.png", left.convert("RGB")),
            (
                "0.9 left, 0.1 right",
                draw({**bright, "region": left}, {**bright, "scale": 0.1, "region": right}),
            ),
        ]
    ).save(ROOT / "core/docs/control.png")
    sweep = ["sweep", "a large red circle on a blue background", "-t", "brightness", "scale=0.1:0.9:5"]
    sweep += ["-t", "structure", f"image={ROOT / 'core/docs/outline.png'}", "strength=0,0.5,1"]
    command_line()([*sweep, "-o", str(ROOT / "core/docs/sweep.png"), "--overwrite"], standalone_mode=False)


if __name__ == "__main__":
    main()
