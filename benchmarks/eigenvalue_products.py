"""Products that a largest eigenvalue takes from every random start, and its true error.

    python benchmarks/eigenvalue_products.py [--starts 10] [--tasks mlp conv attention]
        [--others] [--data-root DIR] [--stop value residual]

Relative error 1e-3. Cold is from a random start, warm from the eigenvector that it
found. Products are least, mean and most over starts; what a rehearsal on few samples
costs is in them, each of its products as its share of the samples. True values are of
float64, to a residual of 1e-6, from another random start and without a rehearsal. A
claim is false where it says that it converged and the error is larger.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from curvature.others import OTHERS
from curvature.tasks import TASKS, states
from torch import nn

from torch_dropout_ir import sharpness

TOL = 1e-3


def cases(chosen: argparse.Namespace) -> Iterator[tuple]:
    """Name, model, loss, batch and masks."""
    found = states(chosen.tasks, chosen.steps, chosen.data_root)
    for task, steps, model, batch in found:
        yield f"{task}, {steps} steps", model, "cross_entropy", batch, "off"
    for name in OTHERS if chosen.others else ():
        for seed in range(chosen.networks):
            torch.manual_seed(seed)
            yield name, *OTHERS[name]()


def truth(model: nn.Module, loss: Any, batch: tuple, masks: Any) -> float:
    """The largest eigenvalue in float64."""
    precise = copy.deepcopy(model).double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    op = sharpness.hessian(precise, loss, batch, masks=masks)
    torch.manual_seed(100)
    start = torch.randn(op.shape[0], dtype=torch.float64)
    found = sharpness.top_eigenvalues(op, tol=1e-6, max_matvecs=400, start=start)
    return float(found.values[0])


def row(name: str, found: list[sharpness.Eigen], true: float) -> str:
    """A line of the table."""
    counts = [x.num_matvecs for x in found]
    errors = [abs(float(x.values[0]) - true) / abs(true) for x in found]
    false = sum(x.converged and e > TOL for x, e in zip(found, errors, strict=True))
    return (f"| {name:32} | {min(counts):3} | {statistics.fmean(counts):5.1f} | "
            f"{max(counts):3} | {max(errors):.1e} | {false:2} |")  # fmt: skip


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--tasks", nargs="*", default=["mlp", "conv", "attention"],
                        choices=TASKS)  # fmt: skip
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100],
                        help="steps of training before")  # fmt: skip
    parser.add_argument("--others", action="store_true",
                        help="networks beyond the tasks too")  # fmt: skip
    parser.add_argument("--networks", type=int, default=1, help="of each of those")
    parser.add_argument("--stop", nargs="+", default=["value", "residual"])
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| {'':32} | min |  mean | max | worst   | false |")
    for name, model, loss, batch, masks in cases(chosen):
        true = truth(model, loss, batch, masks)
        op = sharpness.hessian(model, loss, batch, masks=masks)
        for stop in chosen.stop:
            cold, warm = [], []
            for seed in range(chosen.starts):
                torch.manual_seed(seed)
                cold.append(sharpness.top_eigenvalues(op, tol=TOL, stop=stop))
                start = cold[-1].vectors[0]
                cold[-1].state.clear()  # its basis
                warm.append(
                    sharpness.top_eigenvalues(op, tol=TOL, stop=stop, start=start)
                )
                warm[-1].state.clear()
            print(row(f"{name}, {stop}, cold", cold, true))
            print(row(f"{name}, {stop}, warm", warm, true), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
