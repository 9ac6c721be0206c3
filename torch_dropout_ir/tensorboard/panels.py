"""Which pictures and histograms go into an event of bounded size."""

from __future__ import annotations

import dataclasses
from typing import Final

from tensorboard.compat.proto.summary_pb2 import Summary

from torch_dropout_ir.analysis import Histogram, Image, Record
from torch_dropout_ir.tensorboard import values
from torch_dropout_ir.tensorboard.pictures import FEWEST_ROWS, MOST_ROWS, draw

_SMALLEST_SHARE: Final = 3 * 2**10
_SHRINK: Final = 0.8
_FRAME: Final = 64


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
