"""What the estimators of R_1 are worth: bias, spread and cost, measured.

Errors: a network 16-width-width-4 (tanh, 32 samples) with dropout straight before its
last layer (``one``) or before both of its last two (``two``). The truth is R_1 by every
mask where those are at most 2^12, by Lemma 1 for a squared loss and one site, else by
masks at random to the error given in the first column. ``bias`` and ``spread`` are mean
and standard deviation of estimate / truth - 1 over the repeats; ``steps`` is the time
in forward-backward passes of the same network and batch.

Costs: one sample of ``gauss_newton`` and the others against a forward-backward pass of
784-1024-1024-10 and of a small convolutional network at batch 128, with the peak memory
of each and its ratio to that of the pass, once more with a site at the input (the first
two with the forward pass that gives them their features and outputs). The pass holds
what is kept for going backward, what is made on the way, and the parameters' gradients,
which it allocates; parameters, batch and state of an optimizer are there before.
``gauss_newton`` on small networks, beside the least it could take: a forward pass, a
root of the loss's Hessian sent back to the sites' inputs alone, and the sums.
``last_layer`` of features [4096, 4096] with 1000 outputs against one product of those.
Contenders take turns; medians.

    python benchmarks/regularizers.py --png regularizers.png
    python benchmarks/regularizers.py --costs

``docs/estimators.md`` and its picture are made from the errors, which can be taken in
parts, each of them without anything beside it:

    python benchmarks/regularizers.py --errors --losses mse --save 1.json
    python benchmarks/regularizers.py --errors --losses cross_entropy --save 2.json
    python benchmarks/regularizers.py --page docs/estimators.md --rows 1.json 2.json
"""

import argparse
import copy
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from estimator_page import write_page
from torch import nn
from tqdm import tqdm

from torch_dropout_ir import testing
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.masked import clean_risk

ESTIMATORS = (
    "last_layer",
    "leave_one_out",
    "gauss_newton, 1",
    "gauss_newton, sum",
    "second_order, 1",
    "monte_carlo, 8",
    "monte_carlo, 64",
)
ENUMERABLE = 12


def network(width: int, p: float, sites: str) -> tuple[nn.Sequential, torch.Tensor]:
    """A network of two hidden layers, and inputs for it."""
    torch.manual_seed(width)
    between = nn.Dropout(p if sites == "two" else 0.0)
    net = nn.Sequential(
        nn.Linear(16, width), nn.Tanh(), between, nn.Linear(width, width), nn.Tanh(),
        nn.Dropout(p), nn.Linear(width, 4),
    )  # fmt: skip
    return net, torch.randn(32, 16)


def estimators(net, batch, loss):
    """Functions without arguments that return a number, by name."""
    x, y = batch

    def closed(form):
        with torch.no_grad():
            h = net[:-2](x)
            outputs = net[-1](h)
            return form(
                h, net[-1].weight, net[-2].p, loss=loss, outputs=outputs, targets=y
            )

    found = {
        "gauss_newton, 1": lambda: gauss_newton(net, batch, loss).value,
        "gauss_newton, sum": lambda: (
            gauss_newton(net, batch, loss, num_samples=None).value
        ),
        "second_order, 1": lambda: second_order(net, batch, loss).value,
        "monte_carlo, 8": lambda: monte_carlo(net, batch, loss, num_masks=8).value,
        "monte_carlo, 64": lambda: monte_carlo(net, batch, loss, num_masks=64).value,
    }
    if not net[2].p:
        found |= {
            "last_layer": lambda: closed(last_layer),
            "leave_one_out": lambda: closed(leave_one_out),
        }
    return found


def truth(net, batch, loss, width: int, sites: str) -> tuple[float, float]:
    """R_1 and its relative error."""
    net, batch = (
        net.double(),
        tuple(b.double() if b.is_floating_point() else b for b in batch),
    )
    masks = width * (2 if sites == "two" else 1)
    if masks <= ENUMERABLE:
        clean = clean_risk(net, batch, resolve_loss(loss)).detach()
        value, error = testing.expected_dropout_loss(net, batch, loss) - clean, 0.0
    elif loss == "mse" and sites == "one":
        value, error = gauss_newton(net, batch, loss, num_samples=None).value, 0.0
    else:
        found = monte_carlo(net, batch, loss, num_masks=4000, rtol=5e-3)
        value, error = found.value, float(found.standard_error / found.value)
    net.float()
    return float(value), error


def seconds(run, repeats: int = 1) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def step(net, batch, loss):
    """A forward-backward pass, as a script would run it."""

    def run():
        net.zero_grad()
        loss(net(batch[0]), batch[1]).backward()

    return run


def errors(chosen) -> list[dict]:
    """Bias, spread and time of each estimator over the grid."""
    rows = []
    grid = [
        (sites, loss, width, p)
        for sites in ("one", "two")
        for loss in ("mse", "cross_entropy")
        for width in chosen.widths
        for p in chosen.rates
    ]
    grid = [cell for cell in grid if cell[1] in chosen.losses]
    for sites, loss, width, p in tqdm(grid, desc="errors", disable=None):
        net, x = network(width, p, sites)
        y = torch.randn(32, 4) if loss == "mse" else torch.randint(4, (32,))
        batch = x, y
        true, uncertain = truth(net, batch, loss, width, sites)
        plain = step(net, batch, resolve_loss(loss))
        seconds(plain)
        passes = []
        row = {"sites": sites, "loss": loss, "width": width, "p": p, "+-": uncertain}
        for name, run in estimators(net, batch, loss).items():
            random = name.endswith(tuple("0123456789"))
            times, base, values = [], [], []
            for _ in range(chosen.repeats if random else 5):
                base.append(seconds(plain))
                started = time.perf_counter()
                values.append(float(run()))
                times.append(time.perf_counter() - started)
            passes += base
            off = torch.tensor(values, dtype=torch.float64) / true - 1
            row[name] = (
                float(off.mean()),
                float(off.std()) if random else 0.0,
                statistics.median(times) / statistics.median(base),
            )
        row["pass"] = statistics.median(passes)
        rows.append(row)
    return rows


def small_models() -> dict:
    """Networks whose pass takes less than some milliseconds, with their batches."""
    drop, relu = functools.partial(nn.Dropout, 0.5), nn.ReLU
    conv = nn.Sequential(
        nn.Conv2d(1, 8, 3), relu(), nn.MaxPool2d(2), nn.Dropout2d(0.2),
        nn.Conv2d(8, 16, 3), relu(), nn.MaxPool2d(2), nn.Flatten(), drop(),
        nn.Linear(400, 10),
    )  # fmt: skip
    toy = nn.Sequential(
        nn.Linear(20, 64), relu(), drop(), nn.Linear(64, 64), relu(), drop(),
        nn.Linear(64, 3),
    )  # fmt: skip
    digits = nn.Sequential(nn.Linear(784, 128), relu(), drop(), nn.Linear(128, 10))
    return {
        "20-64-64-3, batch 32": (toy, torch.randn(32, 20), torch.randint(3, (32,))),
        "784-128-10, batch 64": (
            digits, torch.randn(64, 784), torch.randint(10, (64,))
        ),
        "convolutional, 28 x 28, batch 64": (
            conv, torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
        ),
    }  # fmt: skip


def least(net, x):
    """The passes and sums of the Gauss-Newton form written out for one network."""

    def run():
        held, h = [], x
        for layer in net:
            if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
                h = h + torch.zeros((), requires_grad=True).expand(h.shape)
                held.append((layer, h))
            else:
                h = layer(h)
        softmax = h.detach().softmax(1)
        label = torch.multinomial(softmax, 1)
        root = softmax.scatter_add_(1, label, -torch.ones_like(label, dtype=h.dtype))
        found = torch.autograd.grad(h, [at for _, at in held], root / len(x) ** 0.5)
        total = 0.0
        for (layer, at), g in zip(held, found, strict=True):
            shared = (2, 3) if isinstance(layer, nn.Dropout2d) else ()
            form = at.detach() * g
            form = form.sum(shared) if shared else form
            total += layer.p / (2 - 2 * layer.p) * form.square().sum()
        return total

    return run


def small_costs(turns: int) -> None:
    """Print what one sample of the Gauss-Newton form costs on small networks."""
    print("\nsmall networks: gauss_newton, 1, and the least it could take, in passes")
    for name, (net, x, y) in small_models().items():
        runs = {
            "pass": step(net, (x, y), F.cross_entropy),
            "least": least(net, x),
            "gauss_newton, 1": functools.partial(
                gauss_newton, net, (x, y), "cross_entropy"
            ),
        }
        times = {key: [] for key in runs}
        for _ in range(20 * turns):
            for key, run in runs.items():
                times[key].append(seconds(run))
        base, lowest, cost = (statistics.median(found) for found in times.values())
        print(
            f"  {name:34}pass {1e3 * base:>6.2f} ms{lowest / base:>8.2f} least"
            f"{cost / base:>8.2f} gauss_newton"
        )


def print_errors(rows: list[dict]) -> None:
    """Print one block for each network, loss and estimator; a line a width and p."""
    for sites in ("one", "two"):
        for loss in ("mse", "cross_entropy"):
            print(f"\n{sites} site(s), {loss}: bias ± spread in %, (time in steps)")
            head = "".join(f"{name:>24}" for name in ESTIMATORS)
            print(f"{'width':>6}{'p':>6}{'truth +- %':>12}{head}")
            for row in rows:
                if (row["sites"], row["loss"]) != (sites, loss):
                    continue
                line = f"{row['width']:>6}{row['p']:>6}{100 * row['+-']:>12.2f}"
                for name in ESTIMATORS:
                    cell = "-"
                    if name in row:
                        bias, spread, cost = row[name]
                        cell = f"{100 * bias:.1f} ± {100 * spread:.1f} ({cost:.1f})"
                    line += f"{cell:>24}"
                print(line)


def draw(rows: list[dict], path: Path) -> None:
    """Draw the bias against p, a panel a number of sites and a loss."""
    from matplotlib.figure import Figure

    names = ("last_layer", "leave_one_out", "gauss_newton, sum", "monte_carlo, 64")
    colours = dict(
        zip(names, ("#1f77b4", "#2ca02c", "#d62728", "#999999"), strict=True)
    )
    widths = sorted({row["width"] for row in rows})
    shown = (widths[0], widths[-1])
    figure = Figure(figsize=(10, 6.6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, sites in zip(panels, ("one", "two"), strict=True):
        for axes, loss in zip(line, ("mse", "cross_entropy"), strict=True):
            for name, colour in colours.items():
                for width, style in zip(shown, ("--", "-"), strict=True):
                    points = [
                        (row["p"], 100 * row[name][0])
                        for row in rows
                        if (row["sites"], row["loss"], row["width"])
                        == (sites, loss, width)
                        and name in row
                    ]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True), style, color=colour, marker=".",
                            label=f"{name}, width {width}",
                        )  # fmt: skip
            axes.axhline(0, color="black", lw=0.5)
            axes.set_yscale("symlog", linthresh=1)
            title = "one site before the last layer" if sites == "one" else "two sites"
            axes.set_title(f"{title}, {loss.replace('_', ' ')}")
            axes.set(xlabel="p (drop)", ylabel="bias of R_1, %")
            axes.grid(alpha=0.3)
    names_, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(names_, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    print(f"\npicture: {path}")


def models() -> dict:
    """Models of practice with their batches."""
    mlp = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, 1024),
        nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip
    conv = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Dropout2d(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(4096, 10),
    )  # fmt: skip
    both = (("784-1024-1024-10", mlp), ("convolutional", conv))
    at_the_input = {
        f"{name}, a site at the input": nn.Sequential(
            nn.Dropout(0.1), *copy.deepcopy(net)
        )
        for name, net in both
    }
    apart = [m for m in copy.deepcopy(conv) if not isinstance(m, nn.BatchNorm2d)]
    at_the_input["convolutional, no batch norm, a site at the input"] = nn.Sequential(
        nn.Dropout(0.1), *apart
    )
    images = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    rows = torch.randn(128, 784), torch.randint(10, (128,))
    nets = {**dict(both), **at_the_input}
    return {
        name: (net, *(images if name.startswith("conv") else rows))
        for name, net in nets.items()
    }


def passes(net, x, y) -> dict:
    """What is timed against a forward-backward pass."""
    batch, loss = (x, y), "cross_entropy"
    objective = functools.partial(modified_loss, net, batch, loss, lr=0.1)

    def closed(form):
        with torch.no_grad():
            h = net[:-2](x)
            f = net[-1](h)
            return form(h, net[-1].weight, 0.5, loss=loss, outputs=f, targets=y)

    def objective_of(kind, **options):
        net.zero_grad()
        objective(kind=kind, **options).backward()

    return {
        "forward-backward": step(net, batch, F.cross_entropy),
        "last_layer": lambda: closed(last_layer),
        "leave_one_out": lambda: closed(leave_one_out),
        "gauss_newton, 1": lambda: gauss_newton(net, batch, loss),
        "second_order, 1": lambda: second_order(net, batch, loss),
        "monte_carlo, 8": lambda: monte_carlo(net, batch, loss, num_masks=8),
        "gradient_norm, 2": lambda: gradient_norm(net, batch, loss, lr=0.1),
        "L1, gauss_newton": lambda: objective_of("L1", r1="gauss_newton"),
        "L1, monte_carlo": lambda: objective_of("L1", r1="monte_carlo"),
        "L2": lambda: objective_of("L2"),
        "L3": lambda: objective_of("L3"),
        "regu": lambda: objective_of("regu"),
    }


def peak(model: str, name: str) -> float:
    """Peak memory that a call adds, MiB, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_dropout_ir", "__main__"])
    with context.Pool(1) as pool:
        return pool.apply(_added, (model, name))


def _added(model: str, name: str) -> float:
    net, x, y = models()[model]
    passes(net, x[:2], y[:2])[name]()  # what is loaded once is nobody's
    net.zero_grad()
    run = passes(net, x, y)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of this process's memory, KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))


def costs(turns: int) -> None:
    """Print what the estimators cost in passes and in products."""
    for model, (net, x, y) in models().items():
        runs = passes(net, x, y)
        for name in list(runs):
            try:
                runs[name]()
            except RuntimeError as err:  # batch norm has no third derivative
                print(f"\n{model}: no {name}: {err}")
                del runs[name]
        times = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                times[name].append(seconds(run))
        base = statistics.median(times["forward-backward"])
        memory = {name: peak(model, name) for name in runs}
        print(f"\n{model}: forward-backward pass {1e3 * base:.1f} ms")
        for name, found in times.items():
            ratio = statistics.median(found) / base
            share = memory[name] / memory["forward-backward"]
            print(
                f"  {name:20}{ratio:>8.2f} passes{memory[name]:>10.0f} MiB added,"
                f"{share:>6.2f} of a step's"
            )
    h, w = torch.randn(4096, 4096), 0.02 * torch.randn(1000, 4096)
    f, y = h @ w.T, torch.randint(1000, (4096,))
    runs = {
        "product": lambda: h @ w.T,
        "last_layer, mse": lambda: last_layer(h, w, 0.5),
        "last_layer, cross_entropy": lambda: last_layer(
            h, w, 0.5, loss="cross_entropy", outputs=f, targets=y
        ),
    }
    times = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run))
    base = statistics.median(times["product"])
    print(f"\n[4096, 4096] x [4096, 1000]: product {1e3 * base:.1f} ms")
    for name, found in times.items():
        print(f"  {name:28}{statistics.median(found) / base:>8.3f} products")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--costs", action="store_true", help="the costs alone")
    parser.add_argument("--errors", action="store_true", help="the errors alone")
    parser.add_argument("--losses", nargs="+", default=["mse", "cross_entropy"])
    parser.add_argument("--save", type=Path, help="write the errors into this file")
    parser.add_argument("--page", type=Path, help="write a page of saved errors")
    parser.add_argument("--rows", type=Path, nargs="+", help="the saved errors")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own")
    parser.add_argument("--turns", type=int, default=9, help="turns of the costs")
    parser.add_argument("--repeats", type=int, default=20, help="draws of the errors")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--rates", type=float, nargs="+",
                        default=[0.05, 0.2, 0.5, 0.8, 0.9], help="p")  # fmt: skip
    parser.add_argument("--png", type=Path, help="draw the biases into this file")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.page:
        saved = [json.loads(path.read_text()) for path in chosen.rows]
        write_page(saved, ESTIMATORS, chosen.page)
        draw(
            [row for part in saved for row in part["rows"]],
            chosen.page.with_suffix(".png"),
        )
        return 0
    setup = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(setup)
    if not chosen.errors:
        small_costs(chosen.turns)
        costs(chosen.turns)
    if chosen.costs:
        return 0
    rows = errors(chosen)
    print_errors(rows)
    if chosen.save:
        about = {"setup": setup, "repeats": chosen.repeats, "rows": rows}
        chosen.save.write_text(json.dumps(about))
    if chosen.png:
        draw(rows, chosen.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
