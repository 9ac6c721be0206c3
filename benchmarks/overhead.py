"""What an attached analysis costs a training script: time by cadence, and peak memory.

Models of practice: an MLP on images of 784 pixels, ResNet-18 at 32 x 32 with dropout, a
small GPT. A bare script and a watched one take turns in blocks of steps in one process
(bare, watched, watched, bare), so that a drift of the machine's pace falls out.
Reported are the median over these rounds of watched over bare, less 1, and its
standard error:

* off cadence: steps at which nothing is due, of one and the same script, to which the
  analysis is attached and detached between blocks; beside it what the same steps of the
  tiny model cost more, over the step of this one, where direct differences drown;
* ``every="auto"``: the same from outside, as wall time over all rounds, beside the
  share that the analysis counts itself, both after the first measurement, which is on
  credit;
* one measurement, by measure, in training steps: over N it is the cost of ``every=N``;
* peak memory of fresh processes beyond what they hold before the model is made, by
  measure and of all. A tiny model has been trained in them before, with the same
  measures: the code that these load is in memory once, whatever the model's size. What
  is freed is given back at once in them, so that holes in the heap do not count.

glibc gives memory back and takes it again in the middle of training, at some states of
the heap and not at others: up to 1200 page faults in a step of the MLP, or none. What
these cost differs from block to block by more than a step off cadence does; with
MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 there are none.

    python benchmarks/overhead.py --png overhead.png
    python benchmarks/overhead.py --models mlp --seconds 20
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

NEVER = 10**9
WARM = 0.05  # seconds
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
PARTS = ("costs", "auto", "memory")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Run = Callable[[int], float]  # from steps to seconds
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


def tiny():
    """A model whose step is little but calls."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    return model, torch.randn(4, 8), torch.randint(4, (4,))


MODELS = {"mlp": mlp, "resnet18": resnet18, "gpt": gpt, "tiny": tiny}
TITLES = {"mlp": "MLP", "resnet18": "ResNet-18", "gpt": "small GPT"}


class Script:
    """A training loop, watched or not."""

    clock = staticmethod(CLOCKS["wall"])

    def __init__(self, name: str, **options):
        torch.manual_seed(0)
        self.model, self.inputs, self.targets = MODELS[name]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.criterion = nn.CrossEntropyLoss()
        self.analysis = None
        if options:
            self.analysis = tdi.attach_analysis(
                self.model, optimizer=self.optimizer, log_dir=False, **options
            )

    def run_bare(self, steps: int) -> float:
        """Train after steps that are not timed, as the watched blocks have them."""
        self.warm_up()
        return self.run(steps)

    def run_watched(self, steps: int) -> float:
        """Train with an analysis that has nothing to do; return the seconds."""
        cheap = [m for m in default_measures() if m.name in ("gradient", "masks")]
        self.analysis = tdi.attach_analysis(
            self.model, optimizer=self.optimizer, log_dir=False, every=NEVER,
            measures=cheap,
        )  # fmt: skip
        self.warm_up()  # the step that measures is among these
        seconds = self.run(steps)
        self.analysis.detach()
        self.analysis = None
        return seconds

    def warm_up(self) -> None:
        """Collect garbage, which is no step's, and take the steps that pay for it."""
        self.run(2)
        gc.collect()  # it reads every object there is: caches are cold after it
        until = time.perf_counter() + WARM
        while time.perf_counter() < until:
            self.run(1)

    def run(self, steps: int) -> float:
        """Train; return the seconds that it took."""
        if self.analysis is not None:
            # It has stood still while the other script ran: that earns it nothing.
            self.analysis._clock = time.perf_counter()
        started = self.clock()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(self.inputs), self.targets).backward()
            self.optimizer.step()
        return self.clock() - started


class Turns:
    """Rounds of bare, watched, watched, bare."""

    def __init__(self, bare: Run, watched: Run, seconds: float, fewest: int = 8):
        block = max(1, round(0.05 / statistics.median(bare(1) for _ in range(5))))
        self.bare, self.watched, self.steps = [], [], 2 * block
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(self.bare) < fewest:
            a, b = bare(block), watched(block)
            c, d = watched(block), bare(block)
            self.bare.append(a + d)
            self.watched.append(b + c)

    @property
    def step(self) -> float:
        """Seconds of a bare step."""
        return statistics.median(self.bare) / self.steps

    def extra(self) -> tuple[float, float]:
        """What watching adds to a step, relative, and its standard error."""
        pairs = zip(self.watched, self.bare, strict=True)
        ratios = [w / b - 1 for w, b in pairs]
        # Of medians of samples drawn again: outliers are the machine's own.
        draw = random.Random(0)
        again = [
            statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(400)
        ]
        return statistics.median(ratios), statistics.stdev(again)

    def outside(self) -> float:
        """Share of the watched script's wall time that the bare one does not need."""
        return 1 - sum(self.bare) / sum(self.watched)


def off_cadence(name: str, seconds: float) -> Turns:
    """Steps at which nothing is due, beside bare ones."""
    script = Script(name)
    return Turns(script.run_bare, script.run_watched, seconds)


def by_measure(name: str, step: float) -> dict[str, float]:
    """Return what each measure costs when it is taken again, in training steps."""
    script = Script(name, every=NEVER)
    script.run(2)
    latest = script.analysis.measure()
    script.analysis.detach()
    stem = "cost/seconds/"
    return {
        tag.removeprefix(stem): seconds / step
        for tag, seconds in latest.items()
        if tag.startswith(stem)
    }


def automatic(name: str, seconds: float) -> dict[str, float]:
    """Shares of `every="auto"`, from outside and as it counts itself."""
    bare, watched = Script(name), Script(name, every="auto", budget=0.05)
    watched.run(1)
    cadence = watched.analysis._cadence
    credit = cadence.measured_seconds
    turns = Turns(bare.run, watched.run, seconds)
    later = cadence.measured_seconds - credit
    watched.analysis.detach()
    whole = sum(turns.watched)
    return {
        "outside": turns.outside(),
        "own": later / whole,
        "credit": credit / (credit + whole),
        "taken": len(watched.analysis.history.get("regularizer/R2", [])),
    }


def peak(name: str, measures: list[str] | None, queue) -> None:
    """Put the peak memory of two steps above an empty process's, in kilobytes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def script(model: str) -> Script:
        if measures is None:
            return Script(model)
        chosen = [m for m in default_measures() if m.name in measures]
        return Script(model, every=1, measures=chosen)

    script("tiny").run(3)
    gc.collect()
    empty = resident("VmRSS")
    watched = script(name)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    watched.run(2)
    queue.put(resident("VmHWM") - empty)


def resident(what: str) -> int:
    """Memory of this process in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what))


def memory(name: str) -> dict[str, float]:
    """Return peak memory over that of a bare script: by measure, and of all."""
    context = multiprocessing.get_context("spawn")
    kept = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    names = [m.name for m in default_measures()]
    peaks = {}
    for measures in (None, *([n] for n in names), names):
        queue = context.Queue()
        process = context.Process(target=peak, args=(name, measures, queue))
        process.start()
        key = measures and ("all" if measures is names else measures[0])
        peaks[key] = queue.get()
        process.join()
    for key, value in kept.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value
    bare = peaks.pop(None)
    return {key: found / bare for key, found in peaks.items()}


def row(name: str, seconds: float, parts: list[str]) -> dict:
    """Measure one model."""
    turns = off_cadence(name, seconds)
    found = {"model": name, "step": turns.step, "off": turns.extra()}
    if name == "tiny":
        return found
    if "costs" in parts:
        found["costs"] = by_measure(name, turns.step)
    if "auto" in parts:
        found["auto"] = automatic(name, seconds)
    if "memory" in parts:
        found["memory"] = memory(name)
    return found


def report(rows: list[dict]) -> str:
    """The tables."""
    calls = [r["off"][0] * r["step"] for r in rows if r["model"] == "tiny"]
    lines = [
        f"{'model':<10}{'bare step':>12}{'off cadence':>22}{'microseconds':>18}"
        f"{'the tiny step has more, of this step':>38}"
    ]
    for r in rows:
        (extra, error), micro = r["off"], 1e6 * r["step"]
        lines.append(
            f"{r['model']:<10}{micro / 1e3:>9.3f} ms{extra:>+13.3%} +- {error:.3%}"
            f"{extra * micro:>+11.1f} +- {error * micro:.1f}"
            + "".join(f"{seconds / r['step']:>20.3%}" for seconds in calls)
        )
    lines += ["", 'every="auto", budget 5%: share of the wall time']
    for r in (r for r in rows if "auto" in r):
        a = r["auto"]
        lines.append(
            f"{r['model']:<10}from outside {a['outside']:.2%}, own count {a['own']:.2%}"
            f" in {a['taken']} measurements (the first, on credit, is beside it: with "
            f"it {a['credit']:.1%} more)"
        )
    for title, key in (
        ("one measurement, in training steps", "costs"),
        ("peak memory, over that of training alone", "memory"),
    ):
        whole = [r for r in rows if key in r]
        names = list(whole[0][key]) if whole else []
        lines += ["", title, " " * 10 + "".join(f"{n:>15}" for n in names)]
        for r in whole:
            cells = (f"{r[key].get(n, float('nan')):>15.3g}" for n in names)
            lines.append(f"{r['model']:<10}" + "".join(cells))
    return "\n".join(lines)


def joined(rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with those of earlier runs, and write them where those were."""
    known = (
        {r["model"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    )
    for r in rows:
        known[r["model"]] = known.get(r["model"], {}) | r
    both = [known[name] for name in MODELS if name in known]
    path.write_text(json.dumps(both, indent=1))
    return both


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
        label = f"{TITLES[r['model']]} (step {r['step'] * 1e3:.0f} ms)"
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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=40, help="for each timing")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: on a busy machine")  # fmt: skip
    parser.add_argument("--png", type=Path)
    parser.add_argument("--rows", type=Path,
                        help="JSON of earlier runs, added to")  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    Script.clock = staticmethod(CLOCKS[chosen.clock])
    rows = [row(name, chosen.seconds, chosen.parts) for name in chosen.models]
    if chosen.rows:
        rows = joined(rows, chosen.rows)
    print(f"torch {torch.__version__}, {chosen.threads} threads, {chosen.clock} clock")
    print(report(rows))
    if chosen.png:
        draw(rows, chosen.png)


if __name__ == "__main__":
    main()
