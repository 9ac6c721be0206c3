"""Tables, JSON and picture of `overhead.py`."""

import json
import statistics
from pathlib import Path

from overhead_models import MODELS, TITLES
from overhead_time import off_share

COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")


def report(rows: list[dict]) -> str:
    """The tables."""
    timed = [r for r in rows if "extra" in r]
    tiny = [off_share(r)[0] * step(r) for r in timed if r["model"] == "tiny"]
    lines = [
        f"{'model':<10}{'bare step':>12}{'off cadence':>22}{'microseconds':>18}"
        f"{'what the tiny step has more':>29}{'objects left, bare, watched':>29}"
    ]
    for r in timed:
        (extra, error), micro = off_share(r), 1e6 * step(r)
        lines.append(
            f"{r['model']:<10}{micro / 1e3:>9.3f} ms{extra:>+13.3%} +- {error:.3%}"
            f"{extra * micro:>+11.1f} +- {error * micro:.1f}"
            + "".join(f"{seconds / step(r):>20.3%}" for seconds in tiny)
            + f"{r['left'][0]:>20.2f} {r['left'][1]:.2f}"
        )
    lines += ["", 'every="auto", budget 5%: share of the wall time']
    for r in (r for r in rows if "auto" in r):
        a = r["auto"]
        lines.append(
            f"{r['model']:<10}from outside {a['outside']:.2%}, own count {a['own']:.2%}"
            f" over {a['seconds']:.0f} s in {a['taken']} measurements (the first, on "
            f"credit, is beside it: with it {a['credit']:.1%} more; `cost/share` at "
            f"the end {a['told']:.2%})"
        )
    costs = {r["model"]: r["costs"] for r in rows if "costs" in r}
    peaks = {
        f"{r['model']}, {optimizer}": found
        for r in rows
        for optimizer, found in r.get("memory", {}).items()
    }
    lines += grid("one measurement, in training steps", costs)
    return "\n".join(lines + grid("peak memory, over that of training alone", peaks))


def grid(title: str, cells: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table."""
    names = list(dict.fromkeys(n for row in cells.values() for n in row))
    lines = ["", title, " " * 20 + "".join(f"{n:>15}" for n in names)]
    for title, row in cells.items():
        found = (f"{row.get(n, float('nan')):>15.3g}" for n in names)
        lines.append(f"{title:<20}" + "".join(found))
    return lines


def step(row: dict) -> float:
    """Seconds of a bare step."""
    return statistics.median(row["bare"])


def joined(rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with those of earlier runs, and write them where those were.

    Rounds off cadence are added to those of earlier runs.
    """
    known = (
        {r["model"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    )
    for r in rows:
        old = known.setdefault(r["model"], {})
        both = {k: old.get(k, []) + r.get(k, []) for k in ("bare", "extra")}
        peaks = old.get("memory", {}), r.get("memory", {})
        both["memory"] = {
            o: peaks[0].get(o, {}) | peaks[1].get(o, {}) for o in peaks[0] | peaks[1]
        }
        old |= r | {k: x for k, x in both.items() if x}
    whole = [known[name] for name in MODELS if name in known]
    path.write_text(json.dumps(whole, indent=1))
    return whole


def draw(rows: list[dict], path: Path) -> None:
    """Bars of what each measure costs, in training steps."""
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "costs" in r]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(rows[0]["costs"])
    width = 0.8 / len(rows)
    for k, r in enumerate(rows):
        places = [i + (k - (len(rows) - 1) / 2) * width for i in range(len(names))]
        heights = [r["costs"].get(name, float("nan")) for name in names]
        label = f"{TITLES[r['model']]} (step {step(r) * 1e3:.0f} ms)"
        bars = axes.bar(places, heights, width, color=COLOURS[k], label=label)
        labels = [f"{x:.3g}" if x >= 1 else f"{x:.1g}" for x in heights]
        axes.bar_label(bars, labels, fontsize=6, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(top=8 * max(max(r["costs"].values()) for r in rows))
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel("cost of one measurement\n(training steps)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(rows), loc="upper left")
    figure.savefig(path, dpi=150)
