"""Records as values of a TensorBoard event."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util import tensor_util
from torch.utils.tensorboard.summary import hparams

from torch_dropout_ir.analysis import Histogram, Record
from torch_dropout_ir.analysis.records import estimate_of

_MARGINS: Final = {
    "R_1 and its standard error": "regularizer/R1",
    "Trace of the Hessian and its standard error": "sharpness/trace",
    "Top eigenvalue and its residual": "sharpness/top_eigenvalue",
    "R_2 of the masks and its standard error": "regularizer/R2_dropout_noise",
    "Modified loss and the standard error of R_1 in it": "loss/modified",
}
_CURVES: Final = {
    "Condensation: effective ratio of each layer": "condensation/effective_ratio/.*",
    "Loss: without dropout, and modified": "loss/(R_S|modified)",
    "R_2, and the part that dropout adds": "regularizer/R2(_dropout_noise)?",
    "R_1 of each site": "regularizer/R1/.*",
}


_PAGES: Final = {"simple_value": "scalars", "histo": "histograms", "image": "images"}


def describe(value: Summary.Value, said: str) -> None:
    """Attach a description, where there is one, and the page that it stands on."""
    if said:
        value.metadata.summary_description = said
        page = _PAGES.get(value.WhichOneof("value"))
        if page is not None:  # readers warn of metadata without one
            value.metadata.plugin_data.plugin_name = page


def histogram(record: Histogram) -> HistogramProto:
    """Return counts between fixed edges, empty ends left out.

    A reader takes ``min`` for the left edge of the first bin that is not empty, so
    that is what it says.
    """
    counts = torch.as_tensor(record.counts).detach().cpu().double().numpy()
    edges = np.linspace(record.low, record.high, len(counts) + 1)
    filled = np.flatnonzero(counts)
    if len(filled):
        first, last = filled[0], filled[-1] + 1
        counts, edges = counts[first:last], edges[first : last + 1]
    centres = (edges[:-1] + edges[1:]) / 2
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=counts @ centres,
        sum_squares=counts @ centres**2,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def bands(records: Mapping[str, Record]) -> dict[str, float]:
    """Return ``uncertainty/<tag>/lower`` and ``upper`` of what has an error.

    The name comes last in the alphabet, after the numbers that it is about.
    """
    found: dict[str, float] = {}
    for tag, error in records.items():
        estimate = estimate_of(tag)
        centre = None if estimate is None else records.get(estimate)
        if not isinstance(centre, float) or not isinstance(error, float):
            continue
        if math.isfinite(error):
            found[f"uncertainty/{estimate}/lower"] = centre - error
            found[f"uncertainty/{estimate}/upper"] = centre + error
    return found


def sites_of(bands: Iterable[str]) -> list[str]:
    """Return the tags of the sites' parts of R_1 that have a band."""
    lower = [band for band in bands if band.endswith("/lower")]
    tags = [x.removeprefix("uncertainty/").removesuffix("/lower") for x in lower]
    return [tag for tag in tags if tag.startswith("regularizer/R1/")]


def add_band(summary: Summary, tag: str, value: float, said: str) -> None:
    """Add a number that was derived from others, as a tensor of the scalars page."""
    summary.value.add(
        tag=tag,
        metadata=scalar_metadata.create_summary_metadata("", said),
        tensor=tensor_util.make_tensor_proto(np.float32(value)),
    )


def add_picture(summary: Summary, tag: str, drawn: Any, said: str) -> None:
    """Add a picture ``(png, width, height)`` as a tensor of the images page."""
    png, width, height = drawn
    parts = [str(width).encode(), str(height).encode(), png]
    summary.value.add(
        tag=tag,
        metadata=image_metadata.create_summary_metadata("", said),
        tensor=tensor_util.make_tensor_proto(parts),
    )


def add_layout(summary: Summary, sites: Collection[str] = ()) -> None:
    """Add the layout of the Custom Scalars page: estimates and sites with bands."""
    margins = [_margins(title, [tag]) for title, tag in _MARGINS.items()]
    # The page draws charts of this kind from the last to the first.
    shown = {"Estimates with their error": margins[::-1]}
    if sites:  # apart: of runs with other sites the page adds their charts in front
        names = [tag.removeprefix("regularizer/R1/") for tag in sites]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        title = f"R_1 of each site and its standard error: {', '.join(names[:3])}{more}"
        shown["Sites with their error"] = [_margins(title, sites)]
    shown["What dropout does"] = [
        layout_pb2.Chart(
            title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{regex}$"])
        )
        for title, regex in _CURVES.items()
    ]
    categories = [layout_pb2.Category(title=t, chart=x) for t, x in shown.items()]
    layout = layout_pb2.Layout(category=categories)
    summary.value.add(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=tensor_util.make_tensor_proto(layout.SerializeToString()),
    )
    describe(summary.value[-1], "The charts of the Custom Scalars page.")


def _margins(title: str, tags: Collection[str]) -> layout_pb2.Chart:
    """A chart of curves with their bands."""
    series = [
        layout_pb2.MarginChartContent.Series(
            value=tag,
            lower=f"uncertainty/{tag}/lower",
            upper=f"uncertainty/{tag}/upper",
        )
        for tag in tags
    ]
    margin = layout_pb2.MarginChartContent(series=series)
    return layout_pb2.Chart(title=title, margin=margin)


def add_facts(summary: Summary, facts: Mapping[str, str]) -> None:
    """Add what runs, as a list: the text page breaks the words of a narrow column."""
    text = "\n".join(f"* **{name}**: {_plain(said)}" for name, said in facts.items())
    said = "What runs: model, dropout sites, loss, optimizer, seed and versions."
    summary.value.add(
        tag="run/facts",
        metadata=text_metadata.create_summary_metadata("", said),
        tensor=tensor_util.make_tensor_proto(text.encode(), shape=()),
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(
        f"&#{ord(c)};" if c in "<>&`*_[]\\" else c for c in " ".join(text.split())
    )


def hyperparameters(facts: Mapping[str, str]) -> list[Summary]:
    """Return the summaries that put the run itself on the page of hyperparameters."""
    values: dict[str, str | float] = {}
    for name, said in facts.items():
        try:
            values[name] = float(said)
        except ValueError:
            values[name] = said
    summaries = list(hparams(values, dict.fromkeys(_MARGINS.values(), 0.0)))
    for summary in summaries:
        describe(summary.value[0], "What runs, for the page of hyperparameters.")
    return summaries
