"""Ours at its own stopping rules: time, errors and memory."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from curvature.measuring import peak, plain_product, seconds
from curvature.methods import floor
from torch_dropout_ir import sharpness, vectors


def memory(model: nn.Module, batch) -> None:
    """Peaks of a product and of what is made of products."""

    def op():
        return sharpness.hessian(model, "cross_entropy", batch)

    def product() -> None:
        o = op()
        v = torch.ones(o.shape[0])
        o @ v, o @ v

    # What libraries load and keep at their first use is nobody's.
    sharpness.spectral_density(torch.eye(64), 20)
    sharpness.top_eigenvalues(torch.eye(64), max_matvecs=16)
    size = 4e-6 * sum(p.numel() for p in model.parameters())
    one = peak(product)
    for name, run, kept in (
        ("trace", lambda: sharpness.trace(op(), 100), 0),
        ("density, 20 steps", lambda: sharpness.spectral_density(op()), 20),
        (
            "top, 16 products",
            lambda: sharpness.top_eigenvalues(op(), max_matvecs=16),
            32,
        ),
    ):
        used = peak(run)
        print(f"  peak of {name:18} {used:6.0f} MB, of a product {one:.0f} MB; vectors "
              f"it keeps {kept * size:.0f} MB")  # fmt: skip


def numbers(model: nn.Module, batch, true: dict, unit: float) -> None:
    """Ours at its own stopping rules."""
    op = sharpness.hessian(model, "cross_entropy", batch)
    v = vectors.to_vector(vectors.random_like(op.params))
    plain = plain_product(model, batch)
    times = {"jvp(grad)": [], "hessian": [], "ggn": []}
    gn = sharpness.ggn(model, "cross_entropy", batch)
    for _ in range(15):
        for name, run in zip(
            times, (plain, lambda: op @ v, lambda: gn @ v), strict=True
        ):
            times[name].append(seconds(run, 1))
    best = {name: statistics.median(found) for name, found in times.items()}
    print("  repeated product, ratio to jvp(grad): "
          f"hessian {best['hessian'] / best['jvp(grad)']:.2f}, "
          f"ggn {best['ggn'] / best['jvp(grad)']:.2f}")  # fmt: skip
    for stop in ("value", "residual"):
        torch.manual_seed(1)
        cold = sharpness.top_eigenvalues(op, stop=stop)
        warm = sharpness.top_eigenvalues(op, stop=stop, start=cold.vectors[0])
        for name, found in (("cold", cold), ("warm", warm)):
            error = abs(float(found.values[0]) - true["top"]) / true["top"]
            print(f"  top-1 {name}, stop on {stop:8}: {found.num_matvecs:3} products, "
                  f"true error {error:.1e}")  # fmt: skip
    print(f"  products that any method needs, from 12 random starts: "
          f"{floor(op, true['top'])}")  # fmt: skip
    started = time.perf_counter()
    found = sharpness.trace(op, 100)
    took = time.perf_counter() - started
    error = abs(float(found.value) - true["trace"]) / abs(true["trace"])
    print(f"  trace ({found.method}): {took / unit:.1f} units, true error {error:.1e}, "
          f"standard error {float(found.standard_error):.2e}")  # fmt: skip
    if found.method != "exact":
        each = seconds(lambda: op @ v, 3)
        count = max(2, round(took / each))
        signs = sharpness.trace(op, count, method="hutchinson")
        ratio = float(signs.standard_error / found.standard_error)
        print(f"  Hutchinson in equal time ({count} products): standard error "
              f"{float(signs.standard_error):.2e}, {ratio:.1f} times")  # fmt: skip
    before = op.num_matvecs
    sharpness.spectral_density(op)
    print(f"  density of 20 steps: {op.num_matvecs - before} products")
