"""Tables, JSON and picture of `overhead.py`."""

import json
import statistics
from pathlib import Path

from overhead_models import MODELS, TITLES
from overhead_time import extra, share

COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")


def report(rows: list[dict]) -> str:
    """The tables."""
    lines = [
        f"{'off cadence':<12}{'bare step':>12}{'more, of the step':>22}"
        f"{'microseconds':>18}{'of CPU time':>18}{'objects left, bare, watched':>29}"
    ]
    for r in (r for r in rows if "wall" in r):
        (wall, error), (cpu, spread) = extra(r, "wall"), extra(r, "cpu")
        lines.append(
            f"{r['model']:<12}{_of_step(r, wall, error):>34}"
            f"{1e6 * wall:>+11.1f} +- {1e6 * error:.1f}"
            f"{1e6 * cpu:>+11.1f} +- {1e6 * spread:.1f}"
            f"{r['left'][0]:>20.2f} {r['left'][1]:.2f}"
        )
    lines += [
        "",
        'every="auto", budget 5%: share of the wall time, from the first step',
    ]
    for r in (r for r in rows if "auto" in r):
        a = r["auto"]
        whole, (outside, error) = sum(a["watched"]), share(a)
        taken = ", ".join(f"{name} {count}" for name, count in a["taken"].items())
        lines.append(
            f"{r['model']:<12}from outside {outside:.2%} +- {error:.2%}, own count "
            f"{sum(a['own']) / whole:.2%} over {whole:.0f} s in batches of "
            f"{a['batch']}; taken: {taken}"
        )
    costs = {
        r["model"]: {name: s / step(r) for name, s in r["costs"].items()}
        for r in rows
        if "costs" in r
    }
    peaks = {
        f"{r['model']}, {title}": found
        for r in rows
        for title, found in r.get("memory", {}).items()
    }
    lines += grid("one measurement, in training steps", costs)
    return "\n".join(lines + grid("peak memory, over that of training alone", peaks))


def _of_step(row: dict, more: float, error: float) -> str:
    """A bare step, and what it takes more as a share of it; nothing for a tiny one."""
    if "bare" not in row:
        return "-"
    pace = step(row)
    return f"{1e3 * pace:.1f} ms{more / pace:>+12.3%} +- {error / pace:.3%}"


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

    Rounds are added to those of earlier runs.
    """
    known = (
        {r["model"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    )
    for r in rows:
        old = known.setdefault(r["model"], {})
        both = {k: old.get(k, []) + r.get(k, []) for k in ("bare", "wall", "cpu")}
        both["memory"] = old.get("memory", {}) | r.get("memory", {})
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
        heights = [r["costs"].get(name, float("nan")) / step(r) for name in names]
        label = f"{TITLES[r['model']]} (step {step(r) * 1e3:.0f} ms)"
        bars = axes.bar(places, heights, width, color=COLOURS[k], label=label)
        labels = [f"{x:.3g}" if x >= 1 else f"{x:.2g}" for x in heights]
        axes.bar_label(bars, labels, fontsize=6, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(top=8 * max(max(r["costs"].values()) / step(r) for r in rows))
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel("cost of one measurement\n(training steps)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(rows), loc="upper left")
    figure.savefig(path, dpi=150)
