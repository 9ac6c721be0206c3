"""The page ``docs/estimators.md`` and its picture, of ``regularizers.py``."""

from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import median

# What theory says; the rest of the page is measured.
EXACT = {
    "last_layer": "one site before the last layer, squared loss",
    "leave_one_out": "as `last_layer`; any loss as p goes to 0",
    "gauss_newton, 1": "in the mean, as `last_layer`",
    "gauss_newton, sum": "as `last_layer`",
    "second_order, 1": "in the mean, as `last_layer`",
    "monte_carlo, 8": "in the mean, always",
    "monte_carlo, 64": "in the mean, always",
}
CASES = [(s, x) for s in ("one", "two") for x in ("mse", "cross_entropy")]
NAMES = {"mse": "MSE", "cross_entropy": "cross-entropy"}

HEAD = """# The estimators of R_1, measured

Written by `benchmarks/regularizers.py`, whose docstring has the commands: a network
16-width-width-4 with tanh, 32 samples, float32, dropout straight before the last layer
(one site) or before both of the last two (two sites). Of each estimator {repeats} draws
are held against the truth: every mask where that is possible, Lemma 1 for a squared
loss and one site, else masks at random to the error in the column "truth". Errors are
in percent of R_1. The number behind a name is its number of draws; "sum" is the exact
sum over outputs.

Cost is time in forward-backward passes of the same network and batch, side by side
({setup}). These networks are small (a pass took {fastest:.2f} to {slowest:.2f} ms):
what Python does around a pass counts most. `--costs` has larger ones, and the memory.

**Bias** is the mean error of the draws, **spread** the standard deviation of one. What
is random is off by its spread over the root of {repeats} by chance alone, the worst of
many cells by three times that, and no estimate is known better than the truth is. The
picture has both in its error bars; with one site `last_layer` lies under
`gauss_newton, sum`.

![Bias against p]({picture})

## In short

"Off by" is the largest bias over all widths ({widths})
and p ({rates}); spread and cost are medians over them.
"""


def write_page(parts: Sequence[dict], estimators: Sequence[str], path: Path) -> None:
    """Write the page.

    Args:
        parts: What ``--save`` has written.
        estimators: Names in their order.
        path: The file; its picture lies beside it.
    """
    rows = [row for part in parts for row in part["rows"]]
    rows.sort(key=lambda row: (row["width"], row["p"]))
    passes = [1e3 * row["pass"] for row in rows]
    text = HEAD.format(
        repeats=parts[0]["repeats"],
        setup=parts[0]["setup"],
        picture=path.with_suffix(".png").name,
        widths=_several(rows, "width"),
        rates=_several(rows, "p"),
        fastest=min(passes),
        slowest=max(passes),
    )
    text += _summary(rows, estimators)
    for sites, loss in CASES:
        chosen = [r for r in rows if (r["sites"], r["loss"]) == (sites, loss)]
        if chosen:
            text += _details(chosen, estimators, sites, loss)
    path.write_text(text)
    print(f"page: {path}")


def _several(rows: Sequence[dict], key: str) -> str:
    return ", ".join(str(x) for x in sorted({row[key] for row in rows}))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _summary(rows: Sequence[dict], estimators: Sequence[str]) -> str:
    cases = [c for c in CASES if any((r["sites"], r["loss"]) == c for r in rows)]
    titles = [f"{sites} site{'s' * (sites == 'two')}, {NAMES[x]}" for sites, x in cases]
    text = "\n" + _line(["estimator", "exact", *titles, "cost"])
    text += "|---|---|" + "---:|" * (len(cases) + 1) + "\n"
    for name in estimators:
        cells = [f"`{name}`", EXACT[name]]
        for case in cases:
            found = [
                r[name] for r in rows if name in r and (r["sites"], r["loss"]) == case
            ]
            if not found:
                cells.append("-")
                continue
            bias = max((x[0] for x in found), key=abs)
            spread = median(x[1] for x in found)
            said = f"off by {_percent(bias)}"
            cells.append(said + (f", spread {100 * spread:.1f}" if spread else ""))
        costs = [row[name][2] for row in rows if name in row]
        text += _line([*cells, f"{median(costs):.1f}"])
    return text


def _percent(bias: float) -> str:
    """Signed, but where nothing is left of it."""
    return f"{100 * bias:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def _details(
    rows: Sequence[dict], estimators: Sequence[str], sites: str, loss: str
) -> str:
    names = [name for name in estimators if name in rows[0]]
    title = f"{sites.capitalize()} site{'s' * (sites == 'two')}, {NAMES[loss]}"
    text = f"\n## {title}: bias ± spread in %, (cost)\n\n"
    text += _line(["width", "p", "truth ±", *(f"`{name}`" for name in names)])
    text += "|---:" * (3 + len(names)) + "|\n"
    for row in rows:
        cells = [str(row["width"]), str(row["p"]), f"{100 * row['+-']:.2f}"]
        for name in names:
            bias, spread, cost = (row[name][0], row[name][1], row[name][2])
            around = f" ± {100 * spread:.1f}" if spread else ""
            cells.append(f"{_percent(bias)}{around} ({cost:.1f})")
        text += _line(cells)
    return text


def draw(rows: list[dict], path: Path, repeats: int) -> None:
    """Draw the bias against p with its error, a panel a number of sites and a loss."""
    from matplotlib.figure import Figure

    names = ("last_layer", "leave_one_out", "gauss_newton, sum", "monte_carlo, 64")
    # Lines that lie on one another are wide below and narrow above.
    colours = ("#7fb8e6", "#2ca02c", "#d62728", "#777777")
    looks = list(zip(names, colours, (6, 3.5, 1.5, 1.2), strict=True))
    widths = sorted({row["width"] for row in rows})
    shown = (widths[0], widths[-1])
    figure = Figure(figsize=(10, 6.6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, sites in zip(panels, ("one", "two"), strict=True):
        for axes, loss in zip(line, ("mse", "cross_entropy"), strict=True):
            for name, colour, wide in looks:
                for width, style in zip(shown, ("--", "-"), strict=True):
                    points = [
                        (row["p"], 100 * row[name][0], _error(row, name, repeats))
                        for row in rows
                        if (row["sites"], row["loss"], row["width"])
                        == (sites, loss, width)
                        and name in row
                    ]
                    if points:
                        axes.errorbar(
                            *zip(*points, strict=True), fmt=style, color=colour,
                            lw=wide, elinewidth=1.2, capsize=2,
                            label=f"{name}, width {width}",
                        )  # fmt: skip
            axes.axhline(0, color="black", lw=0.5)
            axes.set_yscale("symlog", linthresh=1)
            title = "one site before the last layer" if sites == "one" else "two sites"
            axes.set_title(f"{title}, {loss.replace('_', ' ')}")
            axes.set(xlabel="p (drop)", ylabel="bias of $R_1$, % of $R_1$")
            axes.label_outer()
            axes.grid(alpha=0.3)
    names_, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(names_, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Bias of estimators of $R_1$, mean of {repeats} draws and its standard error",
        fontsize="large",
    )
    figure.savefig(path)
    print(f"\npicture: {path}")


def _error(row: dict, name: str, repeats: int) -> float:
    """Standard error of a bias in percent: of the draws, and of the truth."""
    return 100 * hypot(row[name][1] / repeats**0.5, row["+-"])
