"""Curvature against PyHessian, curvlinops and hessian-eigenthings.

    python benchmarks/sharpness.py [--tasks mlp conv attention] [--data-root DIR]
        [--race top trace density] [--starts 3] [--no-numbers] [--no-memory]

Cross-entropy on one batch, one thread. Times are in one run and in units of one
product by jvp(grad), which is what one would write by hand; errors are against float64:
a tight Lanczos run, and the exact trace (by columns where the network is smooth).
Libraries that are not there are skipped with a line; `pip install '.[bench]'` brings
them.

A density's error is the Wasserstein distance of its nodes and weights to those of many
probes in float64, over the root mean square of the eigenvalues.

Lanczos, not LOBPCG: at initialization, from one random start, the MLP's top eigenvalue
is true to 1e-3 after 21 products, LOBPCG's after 24 (56 with four vectors).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import warnings
from pathlib import Path

import torch
from curvature.contenders import CONTENDERS
from curvature.measuring import plain_product, seconds
from curvature.methods import lanczos_or_lobpcg
from curvature.own import memory, numbers
from curvature.race import TARGETS, race, truth
from curvature.tasks import TASKS, images, trained


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


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100],
                        help="steps of training before")  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--race", nargs="*", default=list(TARGETS), choices=TARGETS,
                        help="what to race for; nothing: ours alone")  # fmt: skip
    parser.add_argument("--starts", type=int, default=3,
                        help="random starts, all of which must do")  # fmt: skip
    parser.add_argument("--no-numbers", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    racing = available() if chosen.race else {}
    wanted = {*chosen.race, *(() if chosen.no_numbers else ("top", "trace"))}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    for task in chosen.tasks:
        make, shape, n = TASKS[task]
        torch.manual_seed(0)
        batch = images(chosen.data_root, shape, n)
        model = make()
        done = 0
        for steps in chosen.steps:
            trained(model, batch, steps - done)
            done = steps
            model.eval()
            print(f"\n{task}, batch {n}, after {steps} steps", flush=True)
            true = truth(make, copy.deepcopy(model.state_dict()), batch, wanted)
            plain = plain_product(model, batch)
            unit = seconds(plain, 3)
            print(f"  unit: one product by jvp(grad), {1e3 * unit:.1f} ms")
            if not chosen.no_numbers:
                numbers(model, batch, true, unit)
                if task == "mlp":
                    lanczos_or_lobpcg(model, batch, true["top"], unit)
            own = {name: make_one(model, batch) for name, make_one in racing.items()}
            if row := race(own, true, plain, chosen) if own else []:
                print(f"  | {task}, {steps} steps | {' | '.join(row)} |", flush=True)
        if not chosen.no_memory:
            memory(model, batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
