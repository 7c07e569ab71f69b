"""Pictures on one sheet."""

from __future__ import annotations

import numpy as np
from PIL import Image
from silkscreen.sheet import contact_sheet


def test_a_label_taller_than_its_pictures_makes_room_for_itself() -> None:
    pictures = [Image.new("RGB", (48, 24), color) for color in ("red", "red", "blue", "blue")]
    tall = "a prompt of so many words that it takes many lines at the left of a small picture"
    sheet = np.asarray(contact_sheet(pictures, [""] * 4, 2, rows=[tall, "short"]))
    written = (sheet < 128).all(axis=2).any(axis=1)
    second = np.flatnonzero((sheet == (0, 0, 255)).all(axis=2).any(axis=1))[0]
    assert written[:second].sum() > 3 * 24
    assert not written[second - 3 : second].any()  # the label has ended
    assert written[second:].any()
