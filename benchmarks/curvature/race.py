"""Who is first at the true value, and what that is."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


def budgets(
    racing: dict[str, dict[str, Callable]], what: str, true, starts: int, most: int
) -> dict[str, int | str]:
    """Smallest budget of each contender that reaches the true value from every start.

    Args:
        racing: Ours and the libraries, each by what it is asked for.
        what: What they race for.
        true: The true value.
        starts: Random starts.
        most: The largest budget to try.

    Returns:
        By contender the budget, or "-" if no budget does, or "fails".
    """
    return {
        name: first_budget(name, contender[what], what, true, starts, most)
        for name, contender in racing.items()
    }


def race(
    racing: dict[str, dict[str, Callable]],
    what: str,
    given: dict[str, int | str],
    plain: Callable,
) -> dict[str, str]:
    """What those budgets cost, in products by jvp(grad), which is timed in turns.

    Args:
        racing: Ours and the libraries, each by what it is asked for.
        what: What they race for.
        given: Budgets, as :func:`budgets` returns them.
        plain: One product by jvp(grad).

    Returns:
        By contender the units of time, or why there are none.
    """
    runs = {"unit": plain}
    for name in racing:
        if isinstance(given[name], int):
            runs[name] = functools.partial(racing[name][what], given[name])
    with sdpa_kernel(SDPBackend.MATH):
        took = side_by_side(runs)
    said = (f"{name} {x / took['unit']:.2f}" for name, x in took.items())
    print(f"  {what}: {', '.join(said)}", flush=True)
    return {
        name: f"{took[name] / took['unit']:.1f}" if name in took else given[name]
        for name in racing
    }


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
