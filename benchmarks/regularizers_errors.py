"""Bias and spread of the estimators of R_1 against the truth."""

import statistics
import time

import torch
from regularizers_models import seconds, step
from torch import nn
from tqdm import tqdm

from torch_dropout_ir import testing
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    last_layer,
    leave_one_out,
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
