"""Fields as small palette pictures, and which go into an event of bounded size."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont, PngImagePlugin
from tensorboard.compat.proto.summary_pb2 import Summary

from torch_dropout_ir.analysis import Histogram, Image, Record
from torch_dropout_ir.tensorboard import values

_SMALLEST_SHARE: Final = 3 * 2**10
_SHRINK: Final = 0.8
_FRAME: Final = 64
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


@dataclasses.dataclass
class _Waiting:
    step: int
    record: Record
    said: str


class Panels:
    """Pictures and histograms that wait for their turn in events of ``max_bytes``.

    Of a tag the newest waits. Those longest unseen go first; each picture is averaged
    down until it keeps to its share of the bytes or has 64 rows, and never grows again,
    so that the pictures of a tag compare.

    Attributes:
        waiting: Records by tag that are not written yet.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.waiting: dict[str, _Waiting] = {}
        self._seen: dict[str, int] = {}
        self._side: dict[str, int] = {}
        self._turn = 0

    def add(self, step: int, tag: str, record: Record, said: str) -> None:
        """Let a record wait; a tag's first picture once more as the initial one."""
        if not isinstance(record, (Image, Histogram)):
            raise TypeError(
                f"TensorBoardSink: expected the record {tag!r} to be a float, a "
                f"Histogram or an Image, got {type(record).__name__}"
            )
        first = tag not in self._seen and tag not in self.waiting
        self.waiting[tag] = _Waiting(step, record, said)
        if first and isinstance(record, Image):
            initial = f"The first of {tag}, kept for comparison. {said}"
            self.waiting[f"initial/{tag}"] = _Waiting(step, record, initial)

    def take(self, used: int) -> dict[int, Summary]:
        """Return what fits beside ``used`` bytes, by step; at least one record."""
        self._turn += 1
        room = self._max_bytes - used - _FRAME
        share = max(_SMALLEST_SHARE, 3 * room // (4 * max(1, self._large())))
        found: dict[int, Summary] = {}
        for tag in sorted(self.waiting, key=lambda t: self._seen.get(t, 0)):
            held = self.waiting[tag]
            drawn = self._drawn(tag, held, share)
            size = drawn.ByteSize() + (0 if held.step in found else _FRAME)
            if found and size > room:
                break
            room -= size
            found.setdefault(held.step, Summary()).MergeFrom(drawn)
            self._seen[tag] = self._turn
            del self.waiting[tag]
        return found

    def _large(self) -> int:
        """How many pictures wait that have rows to spare."""
        return sum(
            max(held.record.values.shape) > FEWEST_ROWS
            for tag, held in self.waiting.items()
            if isinstance(held.record, Image) and not tag.startswith("initial/")
        )

    def _drawn(self, tag: str, held: _Waiting, share: int) -> Summary:
        summary = Summary()
        said = "" if tag in self._seen else held.said
        if isinstance(held.record, Histogram):
            value = summary.value.add(tag=tag, histo=values.histogram(held.record))
            values.describe(value, said)
        elif isinstance(held.record, Image):
            png, width, height = self._picture(tag, held.record, share)
            if tag.startswith("initial/"):
                values.add_picture(summary, tag, (png, width, height), said)
            else:
                value = summary.value.add(tag=tag)
                value.image.width, value.image.height = width, height
                value.image.colorspace = 3
                value.image.encoded_image_string = png
                values.describe(value, said)
        return summary

    def _picture(self, tag: str, image: Image, share: int) -> tuple[bytes, int, int]:
        key = tag.removeprefix("initial/")
        side = self._side.get(key, MOST_ROWS)
        drawn = draw(image, side)
        while len(drawn[0]) > share and side > FEWEST_ROWS:
            side = max(FEWEST_ROWS, min(round(side * _SHRINK), max(image.values.shape)))
            drawn = draw(image, side)
        self._side[key] = side
        return drawn


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
