"""An answer as a picture for TensorBoard: its tokens coloured by how far target and readout differ."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from dgd_lightning.report.text import visible

WIDTH, LINES = 64, 60  # characters of the coloured text: TensorBoard shows pictures small
FONT_SIZE = 15


def text_image(title: str, record: dict[str, Any]) -> np.ndarray:
    """A picture [height, width, 3] of a row's text: darker orange for more JS(target, readout), red lines under tokens
    whose top-1 token guidance changed.

    Args:
        title: written above.
        record: a row's ``dgd.divergence``.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", FONT_SIZE)
    cell, line = font.getlength("m"), FONT_SIZE + 7
    places = list(_places(record["tokens"]))  # (token, character, column, line)
    lines = max((row for *_, row in places), default=0) + 1
    image = Image.new("RGB", (round(cell * (WIDTH + 2)), line * (lines + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((cell, 2), visible(title).replace("\n", " ")[:WIDTH], fill="#666666", font=font)
    for token, character, column, row in places:
        js = record["js"][token]
        share = min(1.0, (math.log(2) if js is None else js) / math.log(2))
        left, top = cell * (column + 1), line * (row + 1) + 6
        colour = tuple(round(255 - share * (255 - full)) for full in (240, 140, 40))
        draw.rectangle((left, top, left + cell, top + line - 3), fill=colour)
        draw.text((left, top), character, fill="black", font=font)
        if record["argmax_changed"][token]:
            draw.line((left, top + line - 4, left + cell, top + line - 4), fill="#c00000", width=2)
    return np.asarray(image)


def _places(tokens: list[str]) -> Iterable[tuple[int, str, int, int]]:
    """The place of every character, the text broken into lines; the rest of a long text is left out."""
    column = row = 0
    for token, text in enumerate(tokens):
        for character in visible(text).replace("\t", "    "):
            if column == WIDTH or character == "\n":
                column, row = 0, row + 1
            if row == LINES:
                return
            if character != "\n":
                yield token, character, column, row
                column += 1
