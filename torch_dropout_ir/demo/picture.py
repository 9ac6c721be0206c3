"""The picture of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch_dropout_ir.demo.data import Data
    from torch_dropout_ir.demo.run import Outcome
    from torch_dropout_ir.demo.settings import Settings

_MOST_PIXELS: Final = 250
_COLOURS: Final = ("#4d4d4d", "#b2182b")


def draw(
    outcomes: Sequence[Outcome], settings: Settings, data: Data, path: Path
) -> None:
    """Draw accuracy, R_1, loss slices and cosine heat maps of both runs as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Without and with dropout (p = {settings.p:g}): {data.name}", fontsize=12
    )
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    top, bottom = panels
    accuracy, r1, slices = top.subplots(1, 3)
    _curve(accuracy, outcomes, 1, "test accuracy (%)", 100.0)
    reached = [outcome.numbers["test accuracy (%)"] for outcome in outcomes]
    accuracy.legend(frameon=False)
    accuracy.set_ylim(max(0.0, min(reached) - 15), min(100.0, max(reached) + 4))
    _curve(r1, outcomes, 2, rf"$R_1$ at p = {settings.p:g}")
    r1.set(yscale="log", ylabel="units of the loss")
    _slices(slices, outcomes)
    _heat_maps(bottom, outcomes)
    figure.savefig(path)


def _curve(
    axes: Any, outcomes: Sequence[Outcome], column: int, title: str, unit: float = 1.0
) -> None:
    for outcome, colour in zip(outcomes, _COLOURS, strict=True):
        steps = [point[0] + 1 for point in outcome.points]
        values = [unit * point[column] for point in outcome.points]
        axes.plot(steps, values, color=colour, label=outcome.name)
    axes.set(title=title, xlabel="optimizer steps + 1", xscale="log")
    axes.grid(alpha=0.25)


def _slices(axes: Any, outcomes: Sequence[Outcome]) -> None:
    from torch_dropout_ir.demo.run import SLICE_ALPHAS

    for outcome, colour in zip(outcomes, _COLOURS, strict=True):
        axes.plot(
            SLICE_ALPHAS.numpy(),
            outcome.slice.numpy(),
            color=colour,
            label=outcome.name,
        )
    axes.set_title(r"loss slice $R_S(\theta + \alpha d)$")
    axes.set_xlabel(r"$\alpha$ (1: the norm of the weights)")
    axes.set(yscale="log", ylabel="units of the loss")
    axes.grid(alpha=0.25)


def _heat_maps(figure: Any, outcomes: Sequence[Outcome]) -> None:
    panels = figure.subplots(1, len(outcomes))
    for axes, outcome in zip(panels, outcomes, strict=True):
        # A stride through the sorted neurons keeps the shares of the clusters.
        stride = -(-len(outcome.cosines) // _MOST_PIXELS)
        picture = axes.imshow(
            outcome.cosines[::stride, ::stride].numpy(),
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        ratio = outcome.numbers["effective ratio"]
        axes.set_title(f"{outcome.name}: effective ratio {ratio:.3f}")
        shown = f" (1 of {stride} shown)" if stride > 1 else ""
        axes.set_xlabel(f"hidden neuron, sorted by orientation{shown}")
        axes.set_ylabel("hidden neuron")
    figure.colorbar(picture, ax=panels, label="cosine of input weights", shrink=0.9)
