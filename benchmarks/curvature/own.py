"""Ours at its own stopping rules: time, errors and memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from curvature.measuring import peak, side_by_side
from curvature.methods import floor, lanczos_or_lobpcg
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


def accuracy(model: nn.Module, batch, true: dict, cell: dict) -> dict:
    """Products and true errors of ours at its own stopping rules.

    Args:
        model: The model.
        batch: Its batch.
        true: The true values.
        cell: Which task it is.

    Returns:
        What to add to the cell.
    """
    op = sharpness.hessian(model, "cross_entropy", batch)
    found: dict = {}
    if "top" in true:
        found["top"] = _top(op, true["top"])
        found["floor"] = floor(op, true["top"])
        if (cell["task"], cell["steps"]) == ("mlp", 0):
            found["top_true"] = true["top"]
    if "trace" in true:
        trace = float(sharpness.trace(op, 100).value)
        found["trace_error"] = abs(trace - true["trace"]) / abs(true["trace"])
    if "density" in true:
        before = op.num_matvecs
        sharpness.spectral_density(op)
        found["density"] = op.num_matvecs - before
    return found


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


def times(model: nn.Module, batch, plain: Callable, cell: dict) -> dict:
    """Seconds of ours, over those of one product by jvp(grad).

    Args:
        model: The model.
        batch: Its batch.
        plain: One product by jvp(grad).
        cell: Which task it is.

    Returns:
        What to add to the cell.
    """
    op = sharpness.hessian(model, "cross_entropy", batch)
    v = vectors.to_vector(vectors.random_like(op.params))
    gn = sharpness.ggn(model, "cross_entropy", batch)
    took = side_by_side(
        {"unit": plain, "hessian": lambda: op @ v, "ggn": lambda: gn @ v}, 15
    )
    product = {name: took[name] / took["unit"] for name in ("hessian", "ggn")}
    print(f"  product {product}", flush=True)
    found = {"product": product, "trace": _trace(op, plain)}
    if "top_true" in cell:
        found["methods"] = lanczos_or_lobpcg(model, batch, cell["top_true"], plain)
    return found


def _trace(op: sharpness.CurvatureOperator, plain: Callable) -> dict:
    """The trace, and Hutchinson's in the same time where it is not exact."""
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
