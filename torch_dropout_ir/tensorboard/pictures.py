"""Fields as small palette pictures that say what they show."""

from __future__ import annotations

import functools
import io
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont, PngImagePlugin

from torch_dropout_ir.analysis import Image

MOST_ROWS: Final = 208
FEWEST_ROWS: Final = 64
KEYWORD: Final = "torch-dropout-ir"
# Steps of the palette: a value is read back to within 1/256 of its range.
_LEVELS: Final = 129
_PAPER, _INK, _UNKNOWN = 129, 130, 131
_BLUE, _WHITE, _RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_NAMED: Final = 3
_BAR: Final = 40

Field = npt.NDArray[np.float64]


def draw(image: Image, side: int = MOST_ROWS) -> tuple[bytes, int, int]:
    """Return a field as a PNG with colour bar, scale and rows' names, width and height.

    A field with more rows or columns than ``side`` is averaged in blocks. The picture
    has at most 256 x 256 pixels of one byte. A compressed text chunk
    ``torch-dropout-ir`` holds, as JSON, where in the picture the field is, how many
    pixels a value has, the range, and the numbers of the neurons behind each row: a
    reader gets the values back from the pixels.
    """
    field = _averaged(
        torch.as_tensor(image.values).detach().cpu().double().numpy(), side
    )
    height, width = field.shape
    grow = MOST_ROWS // max(1, height, width)
    levels = _levels(field, image.low, image.high)
    levels = levels.repeat(grow, 0).repeat(grow, 1)
    canvas = np.full((max(levels.shape[0], 96), levels.shape[1] + _BAR), _PAPER)
    canvas[: levels.shape[0], : levels.shape[1]] = levels
    picture = Pillow.fromarray(_with_bar(canvas).astype(np.uint8))
    picture.putpalette(_palette())
    _write_scale(picture, image)
    said = {
        "rows": height,
        "columns": width,
        "grow": grow,
        "levels": _LEVELS,
        "low": image.low,
        "high": image.high,
        "names": row_names(image, height),
    }
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(KEYWORD, json.dumps(said, separators=(",", ":")), zip=True)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=chunk)
    return file.getvalue(), picture.width, picture.height


def row_names(image: Image, rows: int) -> list[str]:
    """Return what each row shows: a neuron's number, or some and how many more."""
    if image.order is None:
        return []
    order = [int(x) for x in image.order]
    names = []
    for start, stop in _blocks(len(order), rows):
        block = order[start:stop]
        more = len(block) - _NAMED
        said = ", ".join(map(str, block[:_NAMED]))
        names.append(f"{said} and {more} more" if more > 0 else said)
    return names


def _blocks(total: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of ``parts`` blocks that cover ``total``, as adaptive pooling has them."""
    return [
        (i * total // parts, max(-(-(i + 1) * total // parts), 1)) for i in range(parts)
    ]


def _averaged(field: Field, side: int) -> Field:
    """Means of blocks of rows, then of columns, where there are too many."""
    for axis in (0, 1):
        total = field.shape[axis]
        if total > side:
            means = [
                field.take(range(start, stop), axis).mean(axis)
                for start, stop in _blocks(total, side)
            ]
            field = np.stack(means, axis)
    return field


def _levels(field: Field, low: float, high: float) -> npt.NDArray[np.int64]:
    span = high - low
    places = (field - low) / (span if span > 0 else 1.0)
    known = np.isfinite(field)
    levels = np.where(known, places, 0).clip(0, 1) * (_LEVELS - 1)
    return np.where(known, levels.round().astype(np.int64), _UNKNOWN)


def _with_bar(canvas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    height, left = len(canvas), canvas.shape[1] - _BAR + 6
    ramp = np.linspace(_LEVELS - 1, 0, height).round()
    canvas[:, left : left + 8] = ramp[:, None]
    return canvas


def _write_scale(picture: Pillow.Image, image: Image) -> None:
    """Ends and middle of the scale, beside the bar."""
    pen = ImageDraw.Draw(picture)
    pen.fontmode = "1"
    middle = (image.low + image.high) / 2
    for value, place in (
        (image.high, 0),
        (middle, picture.height // 2 - 6),
        (image.low, picture.height - 12),
    ):
        text = f"{value:.2g}"
        pen.text((picture.width - _BAR + 17, place), text, fill=_INK, font=_font())


@functools.cache
def _font() -> Any:
    return ImageFont.load_default_imagefont()


@functools.cache
def _palette() -> bytes:
    """Blue through white to red; then paper, ink, and grey for what is not a number."""
    low, middle, high = (np.array(c, dtype=float) for c in (_BLUE, _WHITE, _RED))
    t = np.linspace(-1, 1, _LEVELS)[:, None]
    ends = np.where(t < 0, low, high)
    colours = (middle + np.abs(t) * (ends - middle)).round().astype(np.uint8)
    return colours.tobytes() + bytes((255, 255, 255, 40, 40, 40, 150, 150, 150))
