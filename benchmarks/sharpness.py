"""Curvature against PyHessian, curvlinops and hessian-eigenthings.

    python benchmarks/sharpness.py [--tasks mlp tanh conv attention] [--steps 0 100]
        [--data-root DIR] [--race top trace density] [--starts 3]
        [--parts errors times memory]

Cross-entropy on one batch, one thread. Times are in units of one product by jvp(grad),
which is what one would write by hand, taken in turns with it; errors are against
float64: a tight Lanczos run, and the exact trace (by columns where the network is
smooth and small). Each contender runs with the smallest of some budgets that reach
the true value from every start. Libraries that are not there are skipped with a line;
`pip install '.[bench]'` brings them.

A density's error is the Wasserstein distance of its nodes and weights to those of many
probes in float64, over the root mean square of the eigenvalues.

Lanczos, not LOBPCG: the times of both on the MLP at initialization, from one random
start, are in the first table (one vector, and four).

A run in pieces, errors and budgets without a clock, times and memory on a machine with
nothing else to do, and the tables of all that was found:

    python benchmarks/sharpness.py --tasks mlp --steps 0 --parts errors --rows rows.json
    python benchmarks/sharpness.py --tasks mlp --steps 0 --parts times --rows rows.json
    python benchmarks/sharpness.py --tasks --rows rows.json
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from curvature.contenders import CONTENDERS
from curvature.measuring import plain_product
from curvature.own import accuracy, memory, times
from curvature.race import TARGETS, budgets, race, truth
from curvature.rows import joined, tables
from curvature.tasks import TASKS, states
from torch import nn

MOST = 64, 512  # products of a budget at most, of a large and of a small network
SMALL = 100_000
PARTS = ("errors", "times", "memory")


def available() -> dict:
    """Ours and the libraries that are there; a line for those that are not."""
    found = {}
    for name, contender in CONTENDERS.items():
        try:
            importlib.import_module("torch_dropout_ir" if name == "ours" else name)
            found[name] = contender
        except ImportError as err:
            print(f"skipped: {name} ({err})")
    return found


def cells(chosen: argparse.Namespace) -> Iterator[tuple[dict, nn.Module, tuple]]:
    """Each task before and after some training: what it is, model and batch."""
    found = states(chosen.tasks, chosen.steps, chosen.data_root)
    for task, steps, model, batch in found:
        yield {"task": task, "steps": steps}, model, batch


def measured(
    row: dict, model: nn.Module, batch: tuple, chosen: argparse.Namespace
) -> dict:
    """Add the parts that are chosen to what is known of a cell."""
    racing = {k: make(model, batch) for k, make in available().items()}
    plain = plain_product(model, batch)
    if "errors" in chosen.parts:
        make = TASKS[row["task"]][0]
        true = truth(make, copy.deepcopy(model.state_dict()), batch, {*chosen.race})
        row |= accuracy(model, batch, true, row)
        small = sum(p.numel() for p in model.parameters()) < SMALL
        most = MOST[1] if small else MOST[0]
        row["budgets"] = {
            what: budgets(racing, what, true[what], chosen.starts, most)
            for what in chosen.race
        }
    if "times" in chosen.parts:
        row |= times(model, batch, plain, row)
        row["race"] = {
            what: race(racing, what, row["budgets"][what], plain)
            for what in chosen.race
        }
    if "memory" in chosen.parts:
        row["memory"] = memory(model, batch)
    return row


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100],
                        help="steps of training before")  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS,
                        help="times need the budgets that errors find")  # fmt: skip
    parser.add_argument("--race", nargs="*", default=list(TARGETS), choices=TARGETS,
                        help="what to race for; nothing: ours alone")  # fmt: skip
    parser.add_argument("--starts", type=int, default=3,
                        help="random starts, all of which must do")  # fmt: skip
    parser.add_argument("--rows", type=Path,
                        help="JSON of earlier runs, added to")  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = joined([], chosen.rows)
    for cell, model, batch in cells(chosen):
        known = next((r for r in rows if cell.items() <= r.items()), cell)
        print(f"\n{cell['task']}, batch {len(batch[1])}, after {cell['steps']} steps")
        rows = joined([*rows, measured(known, model, batch, chosen)], chosen.rows)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread")
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
