"""The trace: exact where theory allows it, else with its standard error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal

import torch
from torch import Tensor

from torch_dropout_ir.arguments import (
    check_count,
    check_real,
    check_square,
    check_state,
    check_symmetric,
)
from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.differentiability import explained
from torch_dropout_ir.sharpness.krylov import NOT_FINITE
from torch_dropout_ir.sharpness.layerwise import NotSplit
from torch_dropout_ir.sharpness.rounds import OVERHEAD, Rounds
from torch_dropout_ir.sharpness.sketches import SKETCHES, form
from torch_dropout_ir.vectors import full_precision, length

_LEAST: Final = 16  # draws before an error is believed
_AT_ONCE: Final = 8  # rounds between two looks at it
_KEPT: Final = {  # in a state
    "layerwise": ("exact", "draws", "spent"),
    "hutchinson": ("forms",),
    **dict.fromkeys(SKETCHES, ("runs",)),
}
Method = Literal["auto", "layerwise", "hutchinson", "hutchpp", "xtrace"]


@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """A trace with its error.

    Attributes:
        value: The estimate, 0-d float64; units of the loss over squared units of the
            parameters.
        standard_error: Its standard error, 0-d float64; 0 where the trace is exact, and
            where few draws agree: ``method`` tells which. Its square is unbiased, but
            forms of random signs have heavy tails (kurtosis 6 to 13 on a small
            network): over 200 runs with 25 draws a group, errors in its units had a
            standard deviation of 1.15, where Student's t explains 1.04, and 10 % were
            beyond 2; with 95 draws 1.01 and 5 %. With two draws a group, which is what
            the least budgets take, a quarter to a third were.
        num_matvecs: Products and backward passes spent, resumed runs included.
        converged: Whether ``rtol`` was reached; True where none was asked for.
        method: ``"exact"``; ``"gauss_newton"``: the Gauss-Newton part, exact or
            sampled, plus probes of the residual's diagonal blocks; ``"hutchinson"``,
            ``"hutchpp"`` or ``"xtrace"``.
        state: All that is needed to go on, for ``state=``; it can be saved.
    """

    value: Tensor
    standard_error: Tensor
    num_matvecs: int
    converged: bool
    method: str
    state: dict[str, Any] = dataclasses.field(repr=False)


@full_precision()
def trace(
    op: Any,
    num_matvecs: int = 100,
    rtol: float | None = None,
    *,
    method: Method = "auto",
    state: dict[str, Any] | None = None,
) -> TraceEstimate:
    r"""Return the trace of a symmetric operator.

    .. math:: \mathrm{tr} H = \mathrm{tr} G + \mathrm{tr} R, \qquad \mathrm{tr} G =
        \sum_i \sum_c \lVert \nabla_\theta \langle s_{ic}, f(x_i) \rangle \rVert^2

    For operators of :func:`hessian` and :func:`ggn` the Gauss-Newton part costs one
    backward pass an output, with squared norms by sample taken layer by layer. The
    residual ``R`` has zero diagonal blocks where the outputs are piecewise linear in
    the weights of each layer (ReLU-like activations, each weight used once a sample):
    then the trace is exact. That is found out, not assumed: a random probe of each
    block must come back as zero. Otherwise (smooth activations, shared weights,
    attention, batch normalization in training) the blocks that are not zero are probed
    alone, those with more noise more often, and queries, keys and values apart; where
    the positions of a layer do not see each other above it, each is probed by itself,
    which makes the last nonlinearity of a network exact. What has no known layer, or
    more outputs than half of ``num_matvecs``, is sampled. A loss of several outputs, as
    one that the model returns itself, is taken as one of the tensor among them (logits)
    that all of it goes through. An operator of at most ``num_matvecs`` dimensions is
    traced column by column.

    Operators given as such are probed with random signs: ``"hutchinson"`` averages
    ``z' A z``; ``"hutchpp"`` and ``"xtrace"`` take the range of a sketch apart, which
    pays where eigenvalues decay, and keep up to ``num_matvecs`` vectors.

    Args:
        op: Operator of :func:`hessian` or :func:`ggn`, or any symmetric one with ``@``
            and ``shape``, such as a matrix ``[P, P]``.
        num_matvecs: Most products to spend now, at least 2. A backward pass counts as
            one. Layer by layer, the exact part, a look at each layer and two draws of
            what is left are made in any case, some 10 and one or two a layer.
        rtol: If given, stop as soon as the standard error is at most this share of the
            magnitude of the estimate, after 16 draws a group at least, on average:
            fewer would be stopped where they happen to agree.
        method: How; ``"auto"``: column by column, else layer by layer, else Hutchinson.
        state: ``TraceEstimate.state`` of an earlier run on the same operator; goes on
            by its method.

    Returns:
        The estimate with its standard error, and which method gave it.

    Raises:
        ValueError: If ``num_matvecs`` is below 2 (6 for ``"hutchpp"``, 4 for
            ``"xtrace"``), ``rtol`` is negative, a matrix is not square, for these
            two not symmetric, ``method`` is unknown or cannot take ``op``, ``state`` is
            that of something else, or a product is not finite.
        TypeError: If a number is none, ``num_matvecs`` is no integer, ``op`` no
            operator or ``state`` no dictionary.

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*,
        1989; Zhang & Xu, *Implicit regularization of dropout*, section VII.

    Example:
        >>> trace(torch.diag(torch.arange(5.0))).value.item()
        10.0
        >>> net = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3))
        >>> batch = torch.randn(7, 9), torch.zeros(7, 3)
        >>> trace(tdi.sharpness.hessian(net, "mse", batch)).method
        'exact'
    """  # noqa: DOC502 (the checks raise)
    check_square("trace", op)
    if state is not None:
        method = _method_of(state, op)
    if method in ("hutchpp", "xtrace"):
        check_symmetric("trace", op)
    least = {"hutchpp": 6, "xtrace": 4}.get(method, 2)
    check_count("trace", "num_matvecs", num_matvecs, least)
    if rtol is not None:
        check_real("trace", "rtol", rtol, least=0)
    found = _trace(op, num_matvecs, rtol, method, state)
    found.state["size"] = op.shape[0]
    return found


def _trace(
    op: Any,
    num_matvecs: int,
    rtol: float | None,
    method: str,
    state: dict[str, Any] | None,
) -> TraceEstimate:
    chosen = "columns"
    if op.shape[0] and (state is None or method != chosen):
        chosen = _chosen(op, num_matvecs, method)
    if chosen == "layerwise":
        try:
            with explained():
                return _layerwise(op, num_matvecs, rtol, state)
        except NotSplit as err:
            if method == "layerwise":
                raise ValueError(f"trace: cannot go layer by layer, for {err}") from err
            chosen = "hutchinson"
    if chosen == "columns":
        return _columns(op)
    if chosen == "hutchinson":
        return _hutchinson(op, num_matvecs, rtol, state)
    return _sketched(op, num_matvecs, rtol, chosen, state)


def _method_of(state: dict[str, Any], op: Any) -> Any:
    """Return how an earlier run went, whose state is checked."""
    check_state("trace", state, ("method",), op)
    check_state("trace", state, _KEPT.get(state["method"], ()), op)
    return state["method"]


def _chosen(op: Any, num_matvecs: int, method: str) -> str:
    ours = isinstance(op, CurvatureOperator)
    if method == "auto":
        if op.shape[0] <= num_matvecs:
            return "columns"
        return "layerwise" if ours and num_matvecs >= 8 else "hutchinson"
    if method in ("hutchinson", *SKETCHES) or (method == "layerwise" and ours):
        return method
    raise ValueError(
        "trace: expected `method` to be 'auto', 'hutchinson', 'hutchpp', 'xtrace', or "
        f"'layerwise' for an operator of `hessian` or `ggn`, got {method!r}"
    )


def _columns(op: Any) -> TraceEstimate:
    size = op.shape[0]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    like = {"dtype": getattr(op, "dtype", None), "device": getattr(op, "device", None)}
    for i in range(size):
        place = torch.zeros(size, **like)
        place[i] = 1
        total += (op @ place)[i].double().cpu()
    return _finite(
        TraceEstimate(
            total, torch.zeros_like(total), size, True, "exact", {"method": "columns"}
        )
    )


def _estimate(
    exact: float, draws: list[list[float]], spent: int, rtol: float | None, method: str
) -> TraceEstimate:
    """The sum of the means of what was drawn apart."""
    seen = [torch.tensor(x, dtype=torch.float64, device="cpu") for x in draws]
    value = torch.tensor(exact, dtype=torch.float64, device="cpu")
    value += sum(x.mean() for x in seen)
    parts = [length(x - x.mean()) / (len(x) * (len(x) - 1)) ** 0.5 for x in seen]
    error = torch.tensor(math.hypot(*parts), dtype=torch.float64, device="cpu")
    count = sum(map(len, seen)) // max(1, len(seen))
    reached = not seen or _reached(float(value), float(error), count, rtol)
    found = TraceEstimate(value, error, spent, reached or rtol is None, method, {})
    return _finite(found)


def _finite(found: TraceEstimate) -> TraceEstimate:
    if bool(found.value.isfinite()):
        return found
    raise ValueError(f"trace: {NOT_FINITE}")


def _reached(value: float, error: float, count: int, rtol: float | None) -> bool:
    return rtol is not None and count >= _LEAST and error <= rtol * abs(value)


def _hutchinson(
    op: Any, num_matvecs: int, rtol: float | None, state: dict[str, Any] | None
) -> TraceEstimate:
    forms: list[float] = list(state["forms"]) if state else []
    for _ in range(num_matvecs):
        forms.append(form(op))
        if not math.isfinite(forms[-1]):
            raise ValueError(f"trace: {NOT_FINITE}")
        enough = rtol is not None and len(forms) >= _LEAST
        if enough and _estimate(0.0, [forms], len(forms), rtol, "").converged:
            break
    found = _estimate(0.0, [forms], len(forms), rtol, "hutchinson")
    saved = {"method": "hutchinson", "forms": forms}
    return dataclasses.replace(found, state=saved)


def _sketched(
    op: Any,
    num_matvecs: int,
    rtol: float | None,
    method: str,
    state: dict[str, Any] | None,
) -> TraceEstimate:
    """One estimate, averaged with those of earlier runs by the products spent."""
    value, error = SKETCHES[method](op, num_matvecs)
    runs = [*(state["runs"] if state else []), (value, error, num_matvecs)]
    values, errors, weights = torch.tensor(runs, dtype=torch.float64, device="cpu").T
    weights = weights / weights.sum()
    mean, deviation = (weights * values).sum(), (weights * errors).norm()
    reached = _reached(float(mean), float(deviation), _LEAST, rtol)
    return TraceEstimate(
        mean,
        deviation,
        sum(run[2] for run in runs),
        reached or rtol is None,
        method,
        {"method": method, "runs": runs},
    )


def _layerwise(
    op: CurvatureOperator,
    num_matvecs: int,
    rtol: float | None,
    state: dict[str, Any] | None,
) -> TraceEstimate:
    most = num_matvecs + (state["spent"] if state else 0)
    op.release()
    rounds = Rounds(op.surface, op.kind, num_matvecs, state)
    method = "gauss_newton" if rounds.draws else "exact"
    while True:
        left, round_of = most - rounds.spent - OVERHEAD, len(rounds.draws)
        if all(rounds.draws):
            found = _estimate(rounds.exact, rounds.draws, rounds.spent, rtol, method)
            enough = rtol is not None and found.converged
            if not rounds.draws or enough or left < round_of:
                break
        rounds.more(left if rtol is None else min(left, _AT_ONCE * round_of))
    op.num_matvecs += rounds.spent - (state["spent"] if state else 0)
    return dataclasses.replace(found, state=rounds.state())
