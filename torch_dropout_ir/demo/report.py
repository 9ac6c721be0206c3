"""The table and the picture that close the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch_dropout_ir.demo.data import Data, Settings
    from torch_dropout_ir.demo.run import Outcome

_ERRORS = {
    "R_2": "R_2 standard error",
    "top Hessian eigenvalue": "residual",
    "trace of the Hessian": "trace standard error",
}
# The direction in which dropout moves the number in the paper.
_DIRECTIONS = {
    "test accuracy (%)": +1,
    "R_1": -1,
    "effective ratio": -1,
    "trace of the Hessian": -1,
}
_MOST_PIXELS: Final = 250
_COLOURS: Final = ("#4d4d4d", "#b2182b")


def table(
    outcomes: Sequence[Outcome],
    settings: Settings,
    data: Data,
    seconds: float,
    picture: Path,
) -> str:
    """Return what the demonstration prints at its end."""
    without, with_ = (outcome.numbers for outcome in outcomes)
    rows = [("", outcomes[0].name, outcomes[1].name, "dropout makes it")]
    for name in without:
        if name in _ERRORS.values():
            continue
        cells = _cell(without, name), _cell(with_, name)
        rows.append((name, *cells, _verdict(name, without, with_)))
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    shape = f"{data.train[0].shape[1]}-{settings.width}-10"
    head = (
        f"{data.name}; {shape} network; {settings.steps} steps of gradient descent, "
        f"lr {settings.lr:g}, start std {settings.std:g}; {seconds:.0f} s"
    )
    foot = [
        f"picture:     {picture}",
        f"TensorBoard: torch-dropout-ir board {settings.log_dir}",
    ]
    return "\n".join(["", head, "", *lines, "", *foot])


def _cell(numbers: dict[str, float], name: str) -> str:
    value, error = f"{numbers[name]:.4g}", numbers.get(_ERRORS.get(name, ""))
    return f"{value} ± {error:.1g}" if error else value  # of what is exact no error


def _verdict(name: str, without: dict[str, float], with_: dict[str, float]) -> str:
    moved = with_[name] - without[name]
    errors = [numbers.get(_ERRORS.get(name, ""), 0.0) for numbers in (without, with_)]
    if abs(moved) <= 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5:
        return "no difference"
    found = "higher" if moved > 0 else "lower"
    direction = _DIRECTIONS.get(name.split(" at ")[0])
    if direction is None:  # the paper says nothing of it
        return found
    return f"{found}, {'as in' if moved * direction > 0 else 'unlike'} the paper"


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
