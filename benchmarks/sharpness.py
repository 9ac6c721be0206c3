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
nothing else to do, and the tables of all that was found. What is in the file already is
not measured again, so a piece that was cut off is gone on with by the same command:

    python benchmarks/sharpness.py --tasks mlp --steps 0 --parts errors --rows rows.json
    python benchmarks/sharpness.py --tasks mlp --steps 0 --parts times --rows rows.json
    python benchmarks/sharpness.py --tasks --rows rows.json
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
import warnings
from pathlib import Path

import torch
from curvature.contenders import CONTENDERS
from curvature.measuring import plain_product
from curvature.methods import lanczos_or_lobpcg
from curvature.own import accuracy, memory, product, trace
from curvature.race import TARGETS, budget, race, truth
from curvature.rows import Rows, tables
from curvature.tasks import TASKS, states
from torch import nn

MOST = 64, 512  # products of a budget at most: of a large network, of a small one
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


def measured(
    rows: Rows, row: dict, model: nn.Module, batch: tuple, chosen: argparse.Namespace
) -> None:
    """Find the parts that are chosen of a cell, as far as they are not known."""
    racing = {k: make(model, batch) for k, make in available().items()}
    plain = plain_product(model, batch)
    if "errors" in chosen.parts:
        errors(rows, row, model, batch, chosen, racing)
    if "times" in chosen.parts:
        for name, find in (("product", product), ("trace", trace)):
            rows.found(row, name, lambda find=find: find(model, batch, plain))
        if (row["task"], row["steps"]) == ("mlp", 0) and "top" in chosen.race:
            true = row["true"]["top"]
            rows.found(
                row, "methods", lambda: lanczos_or_lobpcg(model, batch, true, plain)
            )
        for what, (name, each) in itertools.product(chosen.race, racing.items()):
            given = functools.partial(
                race, name, each[what], row["budgets"][what][name], plain
            )
            rows.found(row.setdefault("race", {}).setdefault(what, {}), name, given)
    if "memory" in chosen.parts:
        rows.found(row, "memory", lambda: memory(model, batch))


def errors(
    rows: Rows,
    row: dict,
    model: nn.Module,
    batch: tuple,
    chosen: argparse.Namespace,
    racing: dict,
) -> None:
    """Find the true values, the errors of ours, and the budgets that reach them."""
    make = TASKS[row["task"]][0]
    true, known, given = (
        row.setdefault(x, {}) for x in ("true", "accuracy", "budgets")
    )
    small = sum(p.numel() for p in model.parameters()) < SMALL
    for what in chosen.race:
        tight = functools.partial(truth, what, make, model.state_dict(), batch)
        value = rows.found(true, what, tight)
        rows.found(known, what, functools.partial(accuracy, model, batch, what, value))
        for name, each in racing.items():
            first = functools.partial(
                budget, name, each[what], what, value, chosen.starts, MOST[small]
            )
            rows.found(given.setdefault(what, {}), name, first)


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
                        help="JSON of what is known, gone on from")  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(chosen.rows)
    found = states(chosen.tasks, chosen.steps, chosen.data_root)
    for task, steps, model, batch in found:
        print(f"\n{task}, batch {len(batch[1])}, after {steps} steps")
        measured(rows, rows.cell(task, steps), model, batch, chosen)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread")
    print(tables(rows.all()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
