"""Repeated products with the Hessian against a plain loop of jvp(grad).

    python benchmarks/products.py [--turns 7] [--cases WORD ...]

One thread, both in turns. The plain loop draws the same masks by a seed, and gives
batch normalization copies of its statistics. Torch has no forward mode of LSTM's own
kernel, nor of its squared error's: the plain loop goes by what they are made of.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from curvature.measuring import side_by_side
from curvature.practice import CASES, Case
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from torch_dropout_ir import sharpness, vectors


def plain_loop(model: nn.Module, case: Case, batch, v) -> Callable:
    """One product by jvp(grad)."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    x, y = batch

    def loss(p):
        if case.masks is not None:
            torch.manual_seed(case.masks)
        held = {n: b.clone() for n, b in model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.func.functional_call(model, {**p, **held}, (x,))
        return F.cross_entropy(out, y) if case.classes else (out - y).square().mean()

    def run():
        with torch.backends.mkldnn.flags(enabled=not hasattr(model, "cells")):
            return torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]

    return run


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=[""], help="what names hold")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, case in CASES.items():
        if not any(word in name for word in chosen.cases):
            continue
        torch.manual_seed(0)
        model, batch = case.make(), case.batch()
        for module in model.modules():
            norm = isinstance(module, _BatchNorm)
            module.training = case.normalizes if norm else case.masks is not None
        loss = "cross_entropy" if case.classes else "mse"
        masks = "off" if case.masks is None else case.masks
        op = sharpness.hessian(model, loss, batch, masks=masks)
        v = vectors.random_like(op.params)
        plain, flat = plain_loop(model, case, batch, v), vectors.to_vector(v)
        expected = vectors.to_vector(plain())
        error = float((op @ flat - expected).norm() / expected.norm())
        took = side_by_side({"plain": plain, "ours": lambda: op @ flat}, chosen.turns)  # noqa: B023
        print(f"{name:36} jvp(grad) {1e3 * took['plain']:7.1f} ms, ours "
              f"{took['ours'] / took['plain']:.2f} of it, apart by {error:.0e}",
              flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
