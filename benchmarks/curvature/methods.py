"""Lanczos or LOBPCG, and what any method needs at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import nn

from curvature.measuring import side_by_side
from torch_dropout_ir import sharpness


def lanczos_to(op, true: float, start: torch.Tensor | None) -> Callable:
    """Lanczos until its value is true to 1e-3, to be run again."""
    torch.manual_seed(0)
    found = sharpness.top_eigenvalues(op, 1, 1e-9, 8, start)
    while abs(float(found.values[0]) - true) > 1e-3 * true and found.num_matvecs < 128:
        found = sharpness.top_eigenvalues(op, 1, 1e-9, 1, state=found.state)
    return lambda: sharpness.top_eigenvalues(op, 1, 1e-9, found.num_matvecs, start)


def floor(op, true: float) -> str:
    """Products after which the best vector of a Krylov space is true to 1e-3.

    The Ritz value is the largest quotient over the space, so no method that multiplies
    one random vector (power iteration, Chebyshev, LOBPCG, restarts) can be sooner.
    """
    counts = []
    for seed in range(12):
        torch.manual_seed(seed)
        start = torch.randn(op.shape[0])
        found = sharpness.top_eigenvalues(op, 1, 1e-9, 4, start)
        while true - float(found.values[0]) > 1e-3 * true and found.num_matvecs < 64:
            found = sharpness.top_eigenvalues(op, 1, 1e-9, 1, state=found.state)
        counts.append(found.num_matvecs)
    mean = statistics.fmean(counts)
    return f"{min(counts)} to {max(counts)}, {mean:.1f} on average"


def lobpcg_to(op, true: float, start: torch.Tensor) -> Callable:
    """SciPy's LOBPCG, likewise, from as many columns as it works with."""
    from scipy.sparse.linalg import LinearOperator, lobpcg

    matrix = LinearOperator(
        op.shape,
        matvec=lambda v: (op @ torch.from_numpy(v).flatten()).numpy(),
        matmat=lambda v: (op @ torch.from_numpy(v)).numpy(),
        dtype="float32",
    )

    def run(most: int):
        return lobpcg(matrix, start.numpy().copy(), tol=1e-9, maxiter=most,
                      retLambdaHistory=True)  # fmt: skip

    history = run(128 // start.shape[1])[2]
    errors = [abs(float(x.max()) - true) / true for x in history]
    first = next((i for i, e in enumerate(errors) if e <= 1e-3), len(errors))
    return lambda: run(first)


def lanczos_or_lobpcg(
    model: nn.Module, batch, true: float, plain: Callable
) -> dict[str, tuple[float, float]]:
    """Products and time of either method to a true error of 1e-3, from one start.

    Args:
        model: The model.
        batch: Its batch.
        true: The eigenvalue.
        plain: One product by jvp(grad): the unit of time.
    """
    op = sharpness.hessian(model, "cross_entropy", batch)
    torch.manual_seed(1)
    columns = torch.randn(op.shape[0], 4)
    one = columns[:, 0].clone()
    runs = {
        "Lanczos": lanczos_to(op, true, one),
        "Lanczos, rehearsed": lanczos_to(op, true, None),
        "LOBPCG, one vector": lobpcg_to(op, true, columns[:, :1]),
        "LOBPCG, four": lobpcg_to(op, true, columns),
    }
    found = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        took = side_by_side({"unit": plain, name: run}, 2)
        before = op.num_matvecs
        torch.manual_seed(0)
        run()
        found[name] = op.num_matvecs - before, took[name] / took["unit"]
        print(f"  {name:20} top to 1e-3: {found[name]}", flush=True)
    return found
