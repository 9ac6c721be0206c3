"""Condensation's time and memory, side by side with what one would write instead.

Three tables: cosine statistics of N neurons with d weights against the bare product
``W @ W.T``, which they contain; effective neurons against a cover taken neuron by
neuron; and the share that the online measure takes of a training run. Contenders take
turns; the median of the turns is reported. Memory is what the process holds at most
beyond what it held before, weights included, sampled, in MiB.

    python benchmarks/condensation.py --png condensation.png
    python benchmarks/condensation.py --sizes 8192x4096 32768x9 --threads 2
"""

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation
from torch_dropout_ir.analysis.measures import Condensation

SIZES = ("256x9", "1024x9", "8192x9", "32768x9", "65536x9", "1024x512", "4096x512",
         "1024x4096", "4096x4096", "8192x4096")  # fmt: skip
MOST_PRODUCT = 3 * 2**30  # bytes of the whole matrix of cosines


def anonymous_bytes() -> int:
    """Memory of the process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


class Peak:
    """Most memory held inside the context, beyond that before it."""

    def __enter__(self):
        self.before = self.most = anonymous_bytes()
        self.running = True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        """Look every other millisecond."""
        while self.running:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.extra = self.most - self.before


def leader_cover(weights: torch.Tensor, threshold: float = 0.95) -> int:
    """What one writes by hand: the first neuron left covers those parallel to it."""
    left = condensation.orientations(weights)
    count = 0
    while len(left):
        left, count = left[1:][left[1:] @ left[0] <= threshold], count + 1
    return count


def seconds(run) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(neurons: int, dims: int, turns: int) -> dict[str, float]:
    """Median seconds and extra memory of each contender."""
    weights = torch.randn(neurons, dims)
    heavy = neurons**2 * dims > 1e11
    runs = {
        "statistics": lambda: condensation.cosine_statistics(weights),
        "effective": lambda: condensation.effective_neurons(weights),
    }
    if 4 * neurons**2 <= MOST_PRODUCT:
        runs["product"] = lambda: weights @ weights.T
    if neurons**2 * dims <= 1e10:
        runs["leader"] = lambda: leader_cover(weights)
    times = {name: [] for name in runs}
    row = {"neurons": neurons, "dims": dims}
    for turn in range(1 if heavy else turns):
        for name, run in runs.items():
            if turn == 0 and not heavy:
                run()
            with Peak() as peak:
                times[name].append(seconds(run))
            held = peak.extra / 2**20
            row[f"{name} memory"] = max(held, row.get(f"{name} memory", 0.0))
    return row | {name: statistics.median(found) for name, found in times.items()}


def report(row: dict[str, float]) -> None:
    """Print a line of the table."""
    product, leader = row.get("product"), row.get("leader")
    line = f"{row['neurons']:>8}{row['dims']:>7}"
    line += f"{4 * row['neurons'] * row['dims'] / 2**20:>9.1f}"
    line += f"{product:>11.4f}" if product else f"{'-':>11}"
    line += f"{row['statistics']:>12.4f}"
    line += f"{row['statistics'] / product:>9.2f}" if product else f"{'-':>9}"
    line += f"{row['statistics memory']:>9.1f}"
    line += f"{leader:>12.4f}" if leader else f"{'-':>12}"
    print(f"{line}{row['effective']:>12.4f}{row['effective memory']:>9.1f}", flush=True)


def online(steps: int, width: int) -> None:
    """Print what the measure costs a training run at the default cadence."""
    net = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    criterion = nn.CrossEntropyLoss()

    def train():
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            optimizer.step()

    bare = seconds(train)
    with tdi.attach_analysis(net, log_dir=False, measures=[Condensation()]) as analysis:
        watched = seconds(train)
    taken = len(analysis.history.get("cost/seconds/condensation", []))
    print(f"\nonline, 784-{width}-10, {steps} steps: measured {taken} times, "
          f"its own count {analysis.cost_share:.1%} of the time; "
          f"{bare:.1f} s bare, {watched:.1f} s watched")  # fmt: skip


def draw(rows: list, path: Path) -> None:
    """Draw seconds against neurons, a panel each for statistics and effective ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, names, title in (
        (panels[0], ("product", "statistics"), "cosine statistics"),
        (panels[1], ("leader", "effective"), "effective neurons"),
    ):
        for dims, colour in zip(
            sorted({row["dims"] for row in rows}),
            ("#1f77b4", "#2ca02c", "#d62728", "#8c564b"),
            strict=False,
        ):
            for name, style in zip(names, ("--", "-"), strict=True):
                points = sorted(
                    (row["neurons"], row[name])
                    for row in rows
                    if row["dims"] == dims and name in row
                )
                if points:
                    axes.loglog(*zip(*points, strict=True), style, color=colour,
                                marker=".", label=f"d = {dims}, {name}")  # fmt: skip
        axes.set(title=title, xlabel="neurons")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("seconds")
    figure.savefig(path)
    print(f"picture: {path}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="NxD")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own")
    parser.add_argument("--steps", type=int, default=1500, help="of the online table")
    parser.add_argument("--width", type=int, default=1000, help="of the online table")
    parser.add_argument("--png", type=Path, help="draw the times into this file")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds, and "
          "MiB held beyond the weights")  # fmt: skip
    print(f"{'neurons':>8}{'d':>7}{'W':>9}{'W @ W.T':>11}{'statistics':>12}{'ratio':>9}"
          f"{'MiB':>9}{'by hand':>12}{'effective':>12}{'MiB':>9}")  # fmt: skip
    rows = []
    for size in chosen.sizes:
        neurons, _, dims = size.partition("x")
        rows.append(measure(int(neurons), int(dims), chosen.turns))
        report(rows[-1])
    if chosen.steps:
        online(chosen.steps, chosen.width)
    if chosen.png:
        draw(rows, chosen.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
