"""Who is first at the true value, and what that is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.contenders import Measure, quadrature
from curvature.measuring import side_by_side
from torch_dropout_ir import sharpness

BUDGETS = {
    "top": (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64),
    "trace": (8, 16, 32, 64, 128, 256, 512),
    "density": (4, 6, 8, 10, 12, 14, 16, 18, 20, 40, 80),
}
TARGETS = {"top": 1e-3, "trace": 1e-2, "density": 0.25}


def distance(found: Measure, true: Measure) -> float:
    """Wasserstein distance of two measures, over the second's root mean square."""
    nodes = torch.cat([x.double() for x, _ in (found, true)])
    weights = torch.cat((found[1].double(), -true[1].double()))
    nodes, order = nodes.sort()
    apart = weights[order].cumsum(0)[:-1].abs() * nodes.diff()
    return float(apart.sum() / (true[1] * true[0].square()).sum().sqrt())


def error_of(what: str, found, true) -> float:
    """Relative error of what a contender returned."""
    if what == "density":
        return distance(found, true)
    return abs(found - true) / abs(true)


def truth(what: str, make: Callable, state: dict, batch) -> Any:
    """What they race for, in float64: a number, or the nodes and weights of a density.

    Args:
        what: What they race for.
        make: Makes the model.
        state: Its parameters and buffers.
        batch: Its batch.
    """
    model = make().double()
    model.load_state_dict(state)
    op = sharpness.hessian(model, "cross_entropy", (batch[0].double(), batch[1]))
    torch.manual_seed(100)
    if what == "density":
        probes = 128 if op.shape[0] < 1e5 else 2
        found = quadrature(sharpness.spectral_density(op, 40, probes))
        return [x.tolist() for x in found]
    if what == "top":
        top = sharpness.top_eigenvalues(op, tol=1e-7, stop="value", max_matvecs=400)
        value, known = float(top.values[0]), f"residual {float(top.residuals[0]):.0e}"
    else:
        found = sharpness.trace(op, 100)
        if found.method != "exact":
            size = op.shape[0]
            found = sharpness.trace(op, size if size < 4000 else 2000)
        value, known = float(found.value), f"+- {float(found.standard_error):.1e}"
    print(f"  float64: {what} {value:.8g} ({known})", flush=True)
    return value


def budget(name: str, run: Callable, what: str, true, starts: int, most: int) -> Any:
    """Smallest budget of a contender that reaches the true value from every start.

    Args:
        name: Who it is.
        run: What it does with a budget.
        what: What they race for.
        true: The true value.
        starts: Random starts.
        most: The largest budget to try.

    Returns:
        The budget, or "-" if none does, or "fails".
    """
    if what == "density":
        nodes, weights = (torch.tensor(x, dtype=torch.float64) for x in true)
        true = nodes, weights
    return first_budget(name, run, what, true, starts, most)


def race(name: str, run: Callable, given: int | str, plain: Callable) -> float | str:
    """What a budget costs, in products by jvp(grad), which is timed in turns.

    Args:
        name: Who runs.
        run: What it does with a budget.
        given: The budget, as :func:`budget` returns it.
        plain: One product by jvp(grad).

    Returns:
        Units of time, or why there are none.
    """
    if not isinstance(given, int):
        return given
    with sdpa_kernel(SDPBackend.MATH):
        took = side_by_side({"unit": plain, name: functools.partial(run, given)})
    units = took[name] / took["unit"]
    print(f"  {name} {units:.2f} for {given} products", flush=True)
    return units


def first_budget(
    name: str, run: Callable, what: str, true, starts: int, most: int
) -> int | str:
    """Smallest budget that reaches the true value from every seed; else what to say."""
    line, first, failures = [], "-", 0
    for budget in (x for x in BUDGETS[what] if x <= most):
        try:
            found = worst(what, run, budget, true, starts)
        except Exception as err:
            line.append(f"{budget}: {type(err).__name__}")
            failures += 1
            if failures > 1:
                first = "fails"
                break
            continue
        line.append(f"{budget}: {found:.1e}")
        if found <= TARGETS[what]:
            first = budget
            break
    print(f"  {name:20} {what:7} to {TARGETS[what]:g}: worst true error by budget "
          f"{', '.join(line)}", flush=True)  # fmt: skip
    return first


def worst(what: str, run: Callable, budget: int, true, starts: int) -> float:
    """Largest error over random starts."""
    errors = []
    for seed in range(starts):
        torch.manual_seed(seed)
        # The fused kernel has no second derivative: it stops the others.
        with sdpa_kernel(SDPBackend.MATH):
            errors.append(error_of(what, run(budget), true))
    return max(errors)
