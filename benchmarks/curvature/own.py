"""Ours at its own stopping rules: time, errors and memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from curvature.measuring import peak, side_by_side
from curvature.methods import floor
from torch_dropout_ir import sharpness, vectors


def memory(model: nn.Module, batch) -> dict[str, float]:
    """Peaks of a product and of what is made of products, and of vectors kept, MB."""

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
    runs = {
        "two products": product,
        "trace": lambda: sharpness.trace(op(), 100),
        "density, 20 steps": lambda: sharpness.spectral_density(op()),
        "top, 16 products": lambda: sharpness.top_eigenvalues(op(), max_matvecs=16),
    }
    found = {name: peak(run) for name, run in runs.items()}
    return found | {"20 vectors": 20 * size, "32 vectors": 32 * size}


def accuracy(model: nn.Module, batch, what: str, true) -> dict:
    """Products and true errors of ours at its own stopping rules.

    Args:
        model: The model.
        batch: Its batch.
        what: Top eigenvalue, trace or density.
        true: The true value.
    """
    op = sharpness.hessian(model, "cross_entropy", batch)
    torch.manual_seed(0)
    if what == "top":
        return {"runs": _top(op, true), "floor": floor(op, true)}
    if what == "trace":
        return {"error": abs(float(sharpness.trace(op, 100).value) - true) / abs(true)}
    return {"products": sharpness.spectral_density(op).num_matvecs}


def _top(op: sharpness.CurvatureOperator, true: float) -> dict:
    """Products and true error of the first eigenvalue, from one start."""
    top = {}
    for stop in ("value", "residual"):
        torch.manual_seed(1)
        cold = sharpness.top_eigenvalues(op, stop=stop)
        warm = sharpness.top_eigenvalues(op, stop=stop, start=cold.vectors[0])
        for name, found in (("cold", cold), ("warm", warm)):
            error = abs(float(found.values[0]) - true) / abs(true)
            top[f"{name}, stop on {stop}"] = {
                "products": found.num_matvecs, "error": error,
            }  # fmt: skip
    return top


def product(model: nn.Module, batch, plain: Callable) -> dict[str, float]:
    """Time of a repeated product, over that of one by jvp(grad), by kind."""
    op = sharpness.hessian(model, "cross_entropy", batch)
    v = vectors.to_vector(vectors.random_like(op.params))
    gn = sharpness.ggn(model, "cross_entropy", batch)
    took = side_by_side(
        {"unit": plain, "hessian": lambda: op @ v, "ggn": lambda: gn @ v}, 15
    )
    found = {name: took[name] / took["unit"] for name in ("hessian", "ggn")}
    print(f"  product {found}", flush=True)
    return found


def trace(model: nn.Module, batch, plain: Callable) -> dict:
    """Time of the trace, and Hutchinson's in the same where it is not exact."""
    op = sharpness.hessian(model, "cross_entropy", batch)
    v = vectors.to_vector(vectors.random_like(op.params))
    ours = sharpness.trace(op, 100)
    took = side_by_side(
        {"unit": plain, "product": lambda: op @ v,
         "trace": lambda: sharpness.trace(op, 100)}
    )  # fmt: skip
    error = float(ours.standard_error)
    found = {"method": ours.method, "units": took["trace"] / took["unit"],
             "standard_error": error}  # fmt: skip
    if ours.method != "exact":
        count = max(2, round(took["trace"] / took["product"]))
        signs = sharpness.trace(op, count, method="hutchinson")
        found["hutchinson"] = count
        found["times_hutchinson"] = float(signs.standard_error) / error
    print(f"  trace {found}", flush=True)
    return found
