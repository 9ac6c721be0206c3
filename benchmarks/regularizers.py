"""What the estimators of R_1 are worth: bias, spread and cost, measured.

Errors: a network 16-width-width-4 (tanh, 32 samples) with dropout straight before its
last layer (``one``) or before both of its last two (``two``). The truth is R_1 by every
mask where those are at most 2^12, by Lemma 1 for a squared loss and one site, else by
masks at random to the error given in the first column. ``bias`` and ``spread`` are mean
and standard deviation of estimate / truth - 1 over the repeats; ``steps`` is the time
in forward-backward passes of the same network and batch.

Costs: one sample of ``gauss_newton`` and the others against a forward-backward pass of
784-1024-1024-10 and of a small convolutional network at batch 128, once more with a
site at the input (the first two with the forward pass that gives them their features
and outputs); then the peak memory of each, its ratio to that of the pass, and that of
the same written by hand with autograd, on these and on a language model, and what the
estimators take where samples meet, on networks of one convolution to ResNet-18, and
with losses without a closed form of 3000 outputs a row.
``gauss_newton`` on small networks, beside the least it could take: a forward pass, a
root of the loss's Hessian sent back to the sites' inputs alone, and the sums; and with
other losses on four networks, beside one product with their Hessian in plain torch,
and the spread of the sample.
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
import json
import sys
from pathlib import Path

import torch
from estimator_page import draw, write_page
from regularizers_costs import loss_costs, model_costs, product_costs, small_costs
from regularizers_errors import ESTIMATORS, errors, print_errors
from regularizers_losses import large_costs
from regularizers_memory import memory
from regularizers_own import own_costs


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
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
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    chosen = arguments()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.page:
        saved = [json.loads(path.read_text()) for path in chosen.rows]
        write_page(saved, ESTIMATORS, chosen.page)
        draw(
            [row for part in saved for row in part["rows"]],
            chosen.page.with_suffix(".png"),
            saved[0]["repeats"],
        )
        return 0
    setup = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(setup)
    if not chosen.errors:
        small_costs(chosen.turns)
        loss_costs(chosen.turns)
        large_costs(chosen.turns)
        own_costs(chosen.turns)
        model_costs(chosen.turns)
        product_costs(chosen.turns)
        memory()
    if chosen.costs:
        return 0
    rows = errors(chosen)
    print_errors(rows)
    if chosen.save:
        about = {"setup": setup, "repeats": chosen.repeats, "rows": rows}
        chosen.save.write_text(json.dumps(about))
    if chosen.png:
        draw(rows, chosen.png, chosen.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
