"""One TensorBoard event a step, with everything in it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Final

import numpy as np
from PIL import Image as PillowImage
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch.utils.tensorboard import SummaryWriter

from torch_dropout_ir.analysis import Histogram, Image, Record
from torch_dropout_ir.tensorboard.descriptions import describe_tag

_SMALLEST_SIDE: Final = 192
_BLUE, _WHITE, _RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


class TensorBoardSink:
    """Writes records of an analysis as one event a step.

    Scalars, fixed-edge histograms and palette images of at most 256 x 256 go into one
    event. The first time that a tag is written it carries a description.

    Args:
        log_dir: Run directory; None: ``runs/<time>_<host>``.

    Attributes:
        log_dir: The directory written to.

    Raises:
        OSError: If the directory cannot be written.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None) -> None:
        path = None if log_dir is None else os.fspath(log_dir)
        try:
            self._writer = SummaryWriter(log_dir=path, flush_secs=5)
        except OSError as err:
            raise type(err)(
                err.errno,
                f"attach_analysis: cannot write TensorBoard events to `log_dir` "
                f"({err.strerror}); choose another, or pass `log_dir=False`",
                path,
            ) from err
        self.log_dir = self._writer.log_dir
        self._events = self._writer._get_file_writer()
        self._described: set[str] = set()

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Write the records of one step as one event."""
        summary = Summary()
        for tag, record in records.items():
            value = summary.value.add(tag=tag)
            if tag not in self._described:
                self._described.add(tag)
                said = describe_tag(tag, notes)
                if said:
                    value.metadata.summary_description = said
            if isinstance(record, Histogram):
                value.histo.CopyFrom(_histogram(record))
            elif isinstance(record, Image):
                value.image.CopyFrom(_image(record))
            else:
                value.simple_value = record
        self._events.add_summary(summary, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _histogram(record: Histogram) -> HistogramProto:
    counts = record.counts.double().numpy()
    edges = np.linspace(record.low, record.high, len(counts) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    return HistogramProto(
        min=record.low,
        max=record.high,
        num=counts.sum(),
        sum=counts @ centres,
        sum_squares=counts @ centres**2,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _image(record: Image) -> Summary.Image:
    values = record.values.numpy()
    places = (values - record.low) / (record.high - record.low)
    indices = (np.nan_to_num(places).clip(0, 1) * 255).round().astype(np.uint8)
    grow = -(-_SMALLEST_SIDE // max(1, *indices.shape))
    indices = indices.repeat(grow, 0).repeat(grow, 1)
    picture = PillowImage.fromarray(indices)
    picture.putpalette(_PALETTE)
    file = io.BytesIO()
    picture.save(file, "PNG")
    height, width = indices.shape
    return Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=file.getvalue()
    )


def _palette() -> bytes:
    """Blue through white to red, 256 colours."""
    low, middle, high = (np.array(c, dtype=float) for c in (_BLUE, _WHITE, _RED))
    t = np.linspace(-1, 1, 256)[:, None]
    ends = np.where(t < 0, low, high)
    colours = middle + np.abs(t) * (ends - middle)
    return colours.round().astype(np.uint8).tobytes()


_PALETTE: Final = _palette()
