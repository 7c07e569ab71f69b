"""Pictures on one sheet, with labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import accumulate

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], columns: int, rows: Sequence[str] = (), title: str = ""
) -> Image.Image:
    """Return pictures on one sheet, row by row.

    Args:
        pictures: at least one.
        labels: what is written above each picture.
        columns: how many pictures are in a row.
        rows: what is written at the left of each row.
        title: what is written above all.
    """
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    letter = max(12, height // 24)
    font, gap = ImageFont.load_default(letter), letter // 2
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrap(text: str, room: int) -> str:
        return "\n".join(textwrap.wrap(text, max(1, int(room / font.getlength("n")))))

    def box(text: str) -> tuple[int, int]:
        _, _, right, bottom = measure.multiline_textbbox((0, 0), text, font)
        return (int(right) + 2 * gap, int(bottom) + 2 * gap) if text else (0, 0)

    labels, rows = [wrap(text, width - 2 * gap) for text in labels], [wrap(text, width) for text in rows]
    title = wrap(title, width * columns)
    left = max([gap, *(box(text)[0] for text in rows)])
    starts = range(0, len(pictures), columns)
    heads = [max([gap, *(box(text)[1] for text in labels[start : start + columns])]) for start in starts]
    bodies = [max(height, box(text)[1]) for text in [*rows, *[""] * len(heads)][: len(heads)]]
    tops = list(accumulate(map(sum, zip(heads, bodies, strict=True)), initial=box(title)[1]))
    sheet = Image.new("RGB", (left + columns * (width + gap), tops[-1] + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((left, gap), title, "black", font)
    for top, head, text in zip(tops, heads, rows, strict=False):
        pen.multiline_text((gap, top + head), text, "black", font)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(index, columns)
        x = left + column * (width + gap)
        pen.multiline_text((x, tops[row] + gap), label, "black", font)
        sheet.paste(picture, (x, tops[row] + heads[row]))
    return sheet
