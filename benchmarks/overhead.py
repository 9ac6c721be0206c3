"""What an attached analysis costs a training script: time by cadence, and peak memory.

Models of practice: an MLP on images of 784 pixels, ResNet-18 at 32 x 32, a small GPT.
For each, a bare script and watched ones take turns in blocks of steps, so that a busy
machine slows all alike; the ratio of the median block times is reported for steps at
which nothing is due ("off cadence"), for a measurement at every 100th step, and for
`every="auto"` with its share of the time. Peak memory is that of fresh processes, above
what they hold before the first step.

    python benchmarks/overhead.py --png overhead.png
    python benchmarks/overhead.py --models mlp --seconds 20
"""

import argparse
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

NEVER = 10**9
COLOURS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")


class GPT(nn.Module):
    """Four blocks of width 192, 128 tokens, dropout 0.1 on what each branch adds."""

    def __init__(self, vocabulary: int = 96, width: int = 192, tokens: int = 128):
        super().__init__()
        self.symbols = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(tokens, width) / 50)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        """Logits of the next symbols, ``[batch, vocabulary, tokens]``."""
        h = self.drop(self.symbols(x) + self.places)
        for block in self.blocks:
            h = block(h)
        return self.head(h).transpose(1, 2)


class Block(nn.Module):
    """Attention and a feed-forward net, each beside a residual path."""

    def __init__(self, width: int, heads: int = 6):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(2))

    def forward(self, x):
        """The residual stream after this block."""
        parts = self.mix(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drops[0](self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drops[1](self.narrow(F.gelu(self.wide(self.norms[1](x)))))


def mlp():
    """A model and a batch of 128."""
    model = nn.Sequential(
        nn.Linear(784, 1000), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(1000, 1000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 10),
    )  # fmt: skip
    return model, torch.randn(128, 784), torch.randint(10, (128,))


def resnet18():
    """A model and a batch of 32: a CPU's share of the usual 128."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    return model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def gpt():
    """A model and a batch of 8 texts of 128 symbols."""
    return GPT(), torch.randint(96, (8, 128)), torch.randint(96, (8, 128))


MODELS = {"mlp": mlp, "resnet18": resnet18, "gpt": gpt}


class Script:
    """A training loop, watched or not."""

    def __init__(self, name: str, **options):
        torch.manual_seed(0)
        self.model, self.inputs, self.targets = MODELS[name]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.criterion = nn.CrossEntropyLoss()
        self.blocks: list[float] = []
        self.analysis = None
        if options:
            self.analysis = tdi.attach_analysis(
                self.model, optimizer=self.optimizer, log_dir=False, **options
            )

    def run(self, steps: int) -> float:
        """Train; return the seconds of a step."""
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(self.inputs), self.targets).backward()
            self.optimizer.step()
        return (time.perf_counter() - started) / steps


def off_cadence(name: str, seconds: float) -> tuple[float, float]:
    """Return the bare step's seconds, and what a watched one costs on top."""
    bare, watched = Script(name), Script(name, every=NEVER, measures=cheapest())
    block = max(1, round(0.1 / statistics.median(bare.run(1) for _ in range(5))))
    watched.run(1)  # the step that measures
    ratios, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(ratios) < 8:
        # a-b-b-a: a drift of the machine's pace falls out.
        a, b = bare.run(block), watched.run(block)
        c, d = watched.run(block), bare.run(block)
        bare.blocks += [a, d]
        ratios.append((b + c) / (a + d))
    watched.analysis.detach()
    return statistics.median(bare.blocks), statistics.median(ratios) - 1


def cheapest() -> list:
    """What is measured once, at the first step; off cadence it does not matter."""
    return [m for m in default_measures() if m.name in ("gradient", "masks")]


def by_measure(name: str, step: float) -> dict[str, float]:
    """Return what each measure costs, in training steps."""
    script = Script(name, every=NEVER)
    script.run(1)
    latest = script.analysis.latest
    script.analysis.detach()
    stem = "cost/seconds/"
    return {
        tag.removeprefix(stem): seconds / step
        for tag, seconds in latest.items()
        if tag.startswith(stem)
    }


def automatic(name: str, seconds: float, step: float, steps: dict) -> tuple:
    """Return the share of `every="auto"`: with the first measurement, and after it."""
    script = Script(name, every="auto", budget=0.05)
    script.run(1)
    first = script.analysis._cadence.measured_seconds
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        script.run(max(1, round(0.1 / step)))
    cadence = script.analysis._cadence
    later = cadence.measured_seconds - first
    script.analysis.detach()
    return cadence.share, later / (later + cadence.training_seconds)


def peak(name: str, watched: bool, queue) -> None:
    """Put the peak memory of three steps above an empty process's, in kilobytes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    empty = resident("VmRSS")
    script = Script(name, **({"every": 1} if watched else {}))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    script.run(3)
    queue.put(resident("VmHWM") - empty)


def resident(what: str) -> int:
    """Memory of this process in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what))


def memory(name: str) -> float:
    """Return the peak memory of a watched script over that of a bare one."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for watched in (False, True):
        queue = context.Queue()
        process = context.Process(target=peak, args=(name, watched, queue))
        process.start()
        peaks.append(queue.get())
        process.join()
    return peaks[1] / peaks[0]


def row(name: str, seconds: float) -> dict:
    """Measure one model."""
    step, extra = off_cadence(name, seconds)
    costs = by_measure(name, step)
    share, later = automatic(name, seconds, step, costs)
    return {
        "model": name,
        "step": step,
        "off": extra,
        "hundredth": sum(costs.values()) / 100,
        "share": share,
        "later": later,
        "memory": memory(name),
        "costs": costs,
    }


def report(rows: list[dict]) -> str:
    """The table."""
    lines = [
        f"{'model':<10}{'step':>10}{'off cadence':>13}{'every=100':>11}"
        f"{'auto, all':>11}{'after 1st':>11}{'peak memory':>13}"
    ]
    for r in rows:
        lines.append(
            f"{r['model']:<10}{r['step'] * 1e3:>7.1f} ms{r['off']:>+12.2%} "
            f"{r['hundredth']:>+10.1%} {r['share']:>10.1%} {r['later']:>10.1%} "
            f"{r['memory']:>11.2f} x"
        )
    lines += ["", "one measurement, in training steps"]
    names = list(rows[0]["costs"])
    lines.append(f"{'':<10}" + "".join(f"{name:>15}" for name in names))
    for r in rows:
        cells = "".join(
            f"{r['costs'].get(name, float('nan')):>15.2f}" for name in names
        )
        lines.append(f"{r['model']:<10}{cells}")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Bars of what each measure costs, in training steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(rows[0]["costs"])
    width = 0.8 / len(rows)
    for k, r in enumerate(rows):
        places = [i + (k - (len(rows) - 1) / 2) * width for i in range(len(names))]
        heights = [r["costs"].get(name, float("nan")) for name in names]
        label = f"{r['model']} (step {r['step'] * 1e3:.0f} ms)"
        bars = axes.bar(places, heights, width, color=COLOURS[k], label=label)
        axes.bar_label(bars, fmt="%.2g", fontsize=7, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(top=8 * max(max(r["costs"].values()) for r in rows))
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel("cost of one measurement\n(training steps)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(rows), loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=60, help="for each timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--png", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [row(name, chosen.seconds) for name in chosen.models]
    print(f"torch {torch.__version__}, {chosen.threads} threads")
    print(report(rows))
    if chosen.png:
        draw(rows, chosen.png)


if __name__ == "__main__":
    main()
