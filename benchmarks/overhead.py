"""What an attached analysis costs a training script: time by cadence, and peak memory.

Models of practice: an MLP on images of 784 pixels, ResNet-18 at 32 x 32 with dropout, a
small GPT. A bare script and a watched one take turns in one process, so that a drift of
the machine's pace falls out:

* off cadence: steps of one script at which nothing is due, with the hooks of the
  analysis in place and without, by turns step by step (bare, watched, watched, bare and
  the reverse). All else is the same for both, the state of Python's garbage collector
  included. The median over these rounds of what watched steps take more, its standard
  error, and the objects that a step leaves for the collector, either way;
* ``every="auto"``: two scripts in blocks of steps, as wall time over all rounds, beside
  the share that the analysis counts itself, both after the first measurement, which is
  on credit;
* one measurement, by measure, in training steps: over N it is the cost of ``every=N``;
* peak memory of fresh processes beyond what they hold before the model is made, by
  measure and of all. A tiny model has been trained in them before, with the same
  measures: the code that these load is in memory once, whatever the model's size. What
  is freed is given back at once in them, so that holes in the heap do not count. Beside
  it a floor: parameters and their gradient are in memory when a measurement is made,
  and a product with the Hessian is of one vector of that size and makes another, so
  sharpness cannot do with less than four times the parameters, nor the process with
  less than training.

    python benchmarks/overhead.py --png overhead.png
    python benchmarks/overhead.py --models mlp --seconds 20
"""

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.optim.optimizer as hooks
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

NEVER = 10**9
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
PARTS = ("off", "costs", "auto", "memory")
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

    def switch(self) -> Callable[[bool], None]:
        """Attach what has nothing to do; return what puts its hooks there or away."""
        cheap = [m for m in default_measures() if m.name in ("gradient", "masks")]
        self.analysis = tdi.attach_analysis(
            self.model, optimizer=self.optimizer, log_dir=False, every=NEVER,
            measures=cheap,
        )  # fmt: skip
        self.run(5)  # the step that measures is among these
        places = (
            hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks,
            self.model._forward_pre_hooks, self.model._forward_pre_hooks_with_kwargs,
        )  # fmt: skip
        kept = [dict(place) for place in places]

        def watch(on: bool) -> None:
            for place, own in zip(places, kept, strict=True):
                place.clear()
                place.update(own if on else {})

        return watch

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
    """Rounds of bare, watched, watched, bare, in blocks of steps."""

    def __init__(self, bare: Run, watched: Run, seconds: float, fewest: int = 8):
        block = max(1, round(0.05 / statistics.median(bare(1) for _ in range(5))))
        self.bare, self.watched, self.steps = [], [], 2 * block
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(self.bare) < fewest:
            a, b = bare(block), watched(block)
            c, d = watched(block), bare(block)
            self.bare.append(a + d)
            self.watched.append(b + c)

    def outside(self) -> float:
        """Share of the watched script's wall time that the bare one does not need."""
        return 1 - sum(self.bare) / sum(self.watched)


def off_cadence(name: str, seconds: float) -> dict[str, Any]:
    """Steps at which nothing is due, beside bare ones, by turns step by step."""
    script = Script(name)
    watch = script.switch()
    left = dict.fromkeys((True, False), math.inf)
    for on in (True, False) * 2:
        watch(on)
        script.run(1)
        gc.collect()
        gc.disable()
        before = gc.get_count()[0]
        script.run(50)
        left[on] = min(left[on], (gc.get_count()[0] - before) / 50)
        gc.enable()
    extra, bare, order = [], [], (False, True, True, False)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        took = []
        for on in order:
            watch(on)
            took.append(script.run(1))
        pairs = list(zip(took, order, strict=True))
        bare.append(sum(t for t, on in pairs if not on) / 2)
        extra.append(sum(t for t, on in pairs if on) / 2 - bare[-1])
        order = tuple(not on for on in order)
    script.analysis.detach()
    # Of medians of samples drawn again: outliers are the machine's own.
    draw = random.Random(0)
    again = [statistics.median(draw.choices(extra, k=len(extra))) for _ in range(400)]
    step = statistics.median(bare)
    more = statistics.median(extra), statistics.stdev(again)
    return {"step": step, "off": [x / step for x in more],
            "left": [left[False], left[True]]}  # fmt: skip


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


def floor(name: str) -> float:
    """Return the least peak of sharpness over training's: four times the parameters."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        script = Script(name)
        script.run(2)
    own = sum(x.nbytes for x in script.model.parameters())
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if "Allocation" in str(event.tag):
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    peak = max(itertools.accumulate(size for _, size in sorted(sizes)))
    return max(1.0, (4 * own + script.inputs.nbytes) / peak)


def row(name: str, seconds: float, parts: list[str]) -> dict:
    """Measure one model."""
    found = {"model": name}
    if "off" in parts or "costs" in parts:
        found |= off_cadence(name, seconds if "off" in parts else 5)
    if name == "tiny":
        return found
    if "costs" in parts:
        found["costs"] = by_measure(name, found["step"])
    if "auto" in parts:
        found["auto"] = automatic(name, seconds)
    if "memory" in parts:
        found["memory"] = memory(name) | {"floor": floor(name)}
    return found


def report(rows: list[dict]) -> str:
    """The tables."""
    timed = [r for r in rows if "off" in r]
    tiny = [r["off"][0] * r["step"] for r in timed if r["model"] == "tiny"]
    lines = [
        f"{'model':<10}{'bare step':>12}{'off cadence':>22}{'microseconds':>18}"
        f"{'what the tiny step has more':>29}{'objects left, bare, watched':>29}"
    ]
    for r in timed:
        (extra, error), micro = r["off"], 1e6 * r["step"]
        lines.append(
            f"{r['model']:<10}{micro / 1e3:>9.3f} ms{extra:>+13.3%} +- {error:.3%}"
            f"{extra * micro:>+11.1f} +- {error * micro:.1f}"
            + "".join(f"{seconds / r['step']:>20.3%}" for seconds in tiny)
            + f"{r['left'][0]:>20.2f} {r['left'][1]:.2f}"
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
