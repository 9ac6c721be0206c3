"""Who is first at the true value, and what that is."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.contenders import Measure, quadrature
from curvature.measuring import seconds
from torch_dropout_ir import sharpness

BUDGETS = {
    "top": (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64),
    "trace": (8, 16, 32, 64),
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


def truth(make: Callable, state: dict, batch, wanted: set[str]) -> dict:
    """What is wanted, in float64."""
    model = make().double()
    model.load_state_dict(state)
    op = sharpness.hessian(model, "cross_entropy", (batch[0].double(), batch[1]))
    true, said = {}, []
    if "top" in wanted:
        top = sharpness.top_eigenvalues(op, tol=1e-7, stop="value", max_matvecs=400)
        true["top"] = float(top.values[0])
        residual = float(top.residuals[0])
        said.append(f"top {true['top']:.8g} (residual {residual:.0e})")
    if "trace" in wanted:
        found = sharpness.trace(op, 100)
        if found.method != "exact":
            size = op.shape[0]
            found = sharpness.trace(op, size if size < 4000 else 2000)
        true["trace"], error = float(found.value), float(found.standard_error)
        how = "exact" if found.method == "exact" else f"+- {error:.1e}"
        said.append(f"trace {true['trace']:.8g} ({how})")
    if "density" in wanted:
        torch.manual_seed(100)
        probes = 128 if op.shape[0] < 1e5 else 2
        true["density"] = quadrature(sharpness.spectral_density(op, 40, probes))
    print(f"  float64: {', '.join(said)}")
    return true


def race(
    name: str,
    contender: dict[str, Callable],
    true: dict,
    unit: float,
    chosen: argparse.Namespace,
) -> str:
    """Smallest budget that reaches the true value from every seed, and what it cost.

    Returns the units of time for top, trace and density: "." if not run, "-" if not
    reached.
    """
    cells = dict.fromkeys(TARGETS, ".")
    for what in chosen.race:
        line, first, failures = [], None, 0
        for budget in BUDGETS[what]:
            try:
                found = worst(what, contender[what], budget, true[what], chosen.starts)
            except Exception as err:
                line.append(f"{budget}: {type(err).__name__}")
                failures += 1
                if failures > 1:
                    break
                continue
            line.append(f"{budget}: {found:.1e}")
            if found <= TARGETS[what]:
                with sdpa_kernel(SDPBackend.MATH):
                    took = seconds(functools.partial(contender[what], budget), 5)
                first = took / unit
                break
        reached = "not reached" if first is None else f"{first:6.1f} units"
        failed = "fails" if failures > 1 else "-"
        cells[what] = failed if first is None else f"{first:.1f}"
        print(f"  {name:20} {what:7} to {TARGETS[what]:g}: {reached:>12}   "
              f"worst true error by budget {', '.join(line)}", flush=True)  # fmt: skip
    return " / ".join(cells.values())


def worst(what: str, run: Callable, budget: int, true, starts: int) -> float:
    """Largest error over random starts."""
    errors = []
    for seed in range(starts):
        torch.manual_seed(seed)
        # The fused kernel has no second derivative: it stops the others.
        with sdpa_kernel(SDPBackend.MATH):
            errors.append(error_of(what, run(budget), true))
    return max(errors)
