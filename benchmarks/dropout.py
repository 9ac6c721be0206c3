"""Dropout's time and memory, side by side with what one would use instead.

Prints, for each size and dtype, the time of each contender, its ratio to ``nn.Dropout``
(higher is faster) and to a plain copy (1 is memory speed), and the bytes that it keeps
for the backward pass. Contenders take many short turns, so that a busy machine slows
all alike, and the fastest turn of each is reported: others' work only adds to a time,
most of all where two threads wait for each other. Inputs are rows of 1024 units.

    python benchmarks/dropout.py --png dropout.png
    python benchmarks/dropout.py --sizes 20 --threads 2
    python benchmarks/dropout.py --device cuda
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import torch_dropout_ir as tdi

P = 0.5
COLOURS = ("#999999", "#1f77b4", "#17becf", "#2ca02c", "#d62728", "#ff7f0e", "#8c564b")


def composed(x):
    """What one writes by hand."""
    return torch.where(torch.rand_like(x) >= P, x * (1 / (1 - P)), 0)


def contenders() -> dict[str, Callable]:
    """Functions of a tensor, by name."""
    tracked, untracked = tdi.Dropout(P), tdi.Dropout(P)
    untracked.track = False
    return {
        "nn.Dropout": nn.Dropout(P),
        "native_dropout": lambda x: torch.native_dropout(x, P, True)[0],
        "composed": composed,
        "tdi.dropout": lambda x: tdi.dropout(x, P),
        "tdi.Dropout": untracked,
        "tdi.Dropout + statistics": tracked,
    }


def seconds(run: Callable, device: torch.device, repeats: int) -> float:
    """Wall time of one call, over ``repeats`` of them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def saved_bytes(function: Callable, x: torch.Tensor) -> int:
    """Bytes that autograd keeps, each storage once; the input is nobody's fault."""
    kept = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() != x.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = function(x)
    total = sum(kept.values())
    del y
    return total


def measure(size: int, dtype: torch.dtype, device: torch.device, turns: int):
    """Least seconds by (contender, pass), and bytes kept by contender."""
    x = torch.randn(size // 1024, 1024, dtype=dtype, device=device)
    target = torch.empty_like(x)
    leaf = x.clone().requires_grad_()
    gradient = torch.ones_like(x)
    runs = {("copy_", "forward"): lambda: target.copy_(x)}
    for name, function in contenders().items():
        runs[name, "forward"] = lambda f=function: f(x)
        runs[name, "forward + backward"] = lambda f=function: torch.autograd.grad(
            f(leaf), leaf, gradient
        )
    repeats = {}
    for key, run in runs.items():
        run()
        repeats[key] = max(1, min(2000, int(0.004 / seconds(run, device, 1))))
    times = {key: [] for key in runs}
    for _ in range(turns):
        for key, run in runs.items():
            times[key].append(seconds(run, device, repeats[key]))
    least = {key: min(found) for key, found in times.items()}
    return least, {n: saved_bytes(f, leaf) for n, f in contenders().items()}


def report(size: int, dtype: torch.dtype, least: dict, kept: dict) -> None:
    """Print the table of one size and dtype."""
    print(f"\n2^{size.bit_length() - 1} elements, {str(dtype).removeprefix('torch.')}")
    print(f"{'':26}{'forward':>34}{'forward + backward':>30}{'kept, bytes':>14}")
    heads = ("us", "ns/el", "x nn", "/ copy", "us", "ns/el", "x nn", "an element")
    print(f"{'':26}{heads[0]:>10}" + "".join(f"{h:>8}" for h in heads[1:4])
          + f"{heads[4]:>14}{heads[5]:>8}{heads[6]:>8}{heads[7]:>14}")  # fmt: skip
    copy = least["copy_", "forward"]
    for name in ("copy_", *contenders()):
        forward, both = (
            least.get((name, p)) for p in ("forward", "forward + backward")
        )
        line = f"{name:26}{1e6 * forward:>10.1f}{1e9 * forward / size:>8.2f}"
        line += (
            f"{least['nn.Dropout', 'forward'] / forward:>8.2f}{forward / copy:>8.2f}"
        )
        if both is not None:
            times = least["nn.Dropout", "forward + backward"] / both
            line += f"{1e6 * both:>14.1f}{1e9 * both / size:>8.2f}{times:>8.2f}"
            line += f"{kept[name] / size:>14.3f}"
        print(line)


def draw(rows: list, path: Path) -> None:
    """Draw nanoseconds an element against size, one panel a pass and dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in rows))
    passes = ("forward", "forward + backward")
    colours = dict(zip(("copy_", *contenders()), COLOURS, strict=True))
    figure = Figure(figsize=(10, 3.6 * len(dtypes)), dpi=100, layout="constrained")
    panels = figure.subplots(len(dtypes), 2, squeeze=False, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, which in zip(line, passes, strict=True):
            for name, colour in colours.items():
                points = [
                    (size, 1e9 * least[name, which] / size)
                    for size, kind, least in rows
                    if kind == dtype and (name, which) in least
                ]
                if points:
                    steps, times = zip(*points, strict=True)
                    axes.loglog(steps, times, marker=".", color=colour, label=name)
            axes.set_xscale("log", base=2)
            title = f"{which}, {str(dtype).removeprefix('torch.')}"
            axes.set(title=title, xlabel="elements", ylabel="ns an element")
            axes.grid(alpha=0.3)
    names, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(names, labels, loc="outside right center", frameon=False)
    figure.savefig(path)
    print(f"\npicture: {path}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own")
    parser.add_argument("--turns", type=int, default=35)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="K",
                        default=list(range(10, 27, 2)), help="sizes 2^K")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--png", type=Path, help="draw the times into this file")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device here")
        return 0
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    built = "compiled" if tdi.ops.COMPILED else "pure-Python"
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {built} kernels"
    )
    rows = []
    for dtype in (getattr(torch, name) for name in chosen.dtypes):
        for size in (2**k for k in chosen.sizes):
            least, kept = measure(size, dtype, device, chosen.turns)
            report(size, dtype, least, kept)
            rows.append((size, dtype, least))
    if chosen.png:
        draw(rows, chosen.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
