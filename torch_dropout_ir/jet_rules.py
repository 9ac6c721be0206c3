"""Floor 1: what the nodes of a loss's graph are in a program, by their names.

A rule reads what its node has saved, by torch's private names for that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_moments import LOSSES, MOMENTS
from torch_dropout_ir.jet_nodes import NODES
from torch_dropout_ir.jet_places import PLACES
from torch_dropout_ir.jet_products import PRODUCTS
from torch_dropout_ir.jet_program import Program, Rule, signed, told


def _linear(alpha: Callable[[Any], float], beta: Callable[[Any], float]) -> Rule:
    """Return the rule of ``alpha a + beta b``."""

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        a, b = inputs if len(inputs) == 2 else (inputs[0], -1)
        sizes = to.elementwise(node, a, b, True)
        return to.add(
            Kind.LINEAR, sizes, a, b, alpha=float(alpha(node)), beta=float(beta(node))
        )

    return rule


def _scaled(alpha: float) -> Rule:
    """Return the rule of what is multiplied by a number."""
    return lambda to, _, inputs: to.add(
        Kind.LINEAR, to.sizes[inputs[0]], inputs[0], alpha=alpha
    )


def _repeated(to: Program, node: Any, inputs: list[int]) -> int:
    sizes = to.elementwise(node, inputs[0], -1, False)
    return to.add(Kind.LINEAR, sizes, inputs[0], alpha=1.0)


def _reshaped(to: Program, node: Any, inputs: list[int]) -> int:
    """Dimensions of a row joined and split, one of size 1 before that of the rows."""
    a, shape = to.second.get(inputs[0], inputs[0]), node._input_metadata[0].shape
    own = to.row(a)
    if math.prod(own) == math.prod(shape[1:]):
        return to.reshaped(shape[1:], a)
    behind = (1, to.rows) == tuple(shape[:2])
    told(behind)
    return to.lifted(shape[2:], a)


def _times(to: Program, node: Any, inputs: list[int]) -> int:
    a, b = inputs
    sizes = to.elementwise(node, a, b, min(a, b) < 0)
    self, other = node._saved_self, node._saved_other
    values = (other if b < 0 else self, self if a < 0 else other)
    return to.add(Kind.TIMES, sizes, a, b, values)


def _over(to: Program, node: Any, inputs: list[int]) -> int:
    a, b = inputs
    sizes = to.elementwise(node, a, b, b < 0)
    values = (node._saved_other,) if b < 0 else (node._saved_other, node._saved_self)
    return to.add(Kind.OVER, sizes, a, b, values)


def _bent(
    kind: Kind,
    saved: str,
    alpha: Callable[[Any], float] = lambda _: 0.0,
    beta: Callable[[Any], float] = lambda _: 0.0,
) -> Rule:
    """Return the rule of a function of one number, by what its node has saved."""

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        sizes = to.elementwise(node, inputs[0], -1, False)
        value = (getattr(node, saved),)
        return to.add(
            kind, sizes, inputs[0], -1, value, alpha=alpha(node), beta=beta(node)
        )

    return rule


def _softmax(to: Program, node: Any, inputs: list[int]) -> int:
    own, dim = to.along(inputs[0], node._saved_dim)
    kind = Kind.LOG_SOFTMAX if "Log" in node.name() else Kind.SOFTMAX
    return to.add(kind, own, inputs[0], -1, (node._saved_result,), dim=dim)


def _log_sum_exp(to: Program, node: Any, inputs: list[int]) -> int:
    told(len(node._saved_dim) == 1)
    dim = to.along(inputs[0], node._saved_dim[0])[1]
    values = node._saved_self, node._saved_result
    sizes = node._input_metadata[0].shape[1:]
    return to.add(Kind.LOG_SUM_EXP, sizes, inputs[0], -1, values, dim=dim)


def _all_added(mean: bool) -> Rule:
    """Return the rule of a sum over all."""

    def rule(to: Program, _: Any, inputs: list[int]) -> int:
        count = to.rows * math.prod(to.row(inputs[0])) if mean else 1
        return to.total(inputs[0], 1 / max(1, count))

    return rule


def _added(mean: bool) -> Rule:
    """Return the rule of a sum over dimensions."""
    of_all = _all_added(mean)

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        own = to.row(inputs[0])
        dims = [signed(d, len(own) + 1) for d in node._saved_dim or ()]
        if not dims or 0 in dims:
            told(not 0 < len(dims) <= len(own))
            return of_all(to, node, inputs)
        bits = sum([1 << (d - 1) for d in dims])
        count = math.prod([own[d - 1] for d in dims]) if mean else 1
        alpha = 1 / max(1, count)  # of none there are no derivatives
        sizes = node._input_metadata[0].shape[1:]
        return to.add(Kind.SUMMED, sizes, inputs[0], dim=bits, alpha=alpha)

    return rule


def _masked(to: Program, node: Any, inputs: list[int]) -> int:
    """What is kept; what is filled in is a constant."""
    sizes = to.elementwise(node, inputs[0], -1, False)
    kept = ~node._saved_mask
    return to.add(Kind.TIMES, sizes, inputs[0], -1, (kept, kept))


def _weighed(shares: Callable[[Any], tuple[Tensor, Tensor]]) -> Rule:
    """Return the rule of a sum of two, each times its share, which is a constant."""

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        sizes = to.elementwise(node, inputs[0], inputs[1], False)
        a, b = (
            i if i < 0 else to.add(Kind.TIMES, sizes, i, -1, (share, share))
            for i, share in zip(inputs, shares(node), strict=True)
        )
        return to.add(Kind.LINEAR, sizes, a, b, alpha=1.0, beta=1.0)

    return rule


def _of_maximum(node: Any) -> tuple[Tensor, Tensor]:
    x, y = node._saved_self, node._saved_other
    first = ((x > y).double() + (x >= y)) / 2
    return first, 1 - first


def _x_log_y(to: Program, node: Any, inputs: list[int]) -> int:
    a, b = inputs
    sizes, x, y = to.elementwise(node, a, b, False), node._saved_self, node._saved_other
    log = -1 if b < 0 else to.add(Kind.LOG, to.sizes[b], b, -1, (y,))
    values = (y.double().log() if b < 0 else x, x if a < 0 else y.double().log())
    return to.add(Kind.TIMES, sizes, a, log, values)


def _bound(name: str, most: float) -> Callable[[Any], float]:
    """Return what reads a bound of a clamp, where there is none ``most``.

    As far as derivatives pass: not at the bound itself in newer versions of torch.
    """

    def bound(node: Any) -> float:
        if (given := getattr(node, name, None)) is None:
            return most
        x = node._saved_self.new_tensor(given)
        return float(x if _passes_at_bounds() else x.nextafter(x.new_tensor(-most)))

    return bound


@functools.cache
def _passes_at_bounds() -> bool:
    with torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(x.clamp(min=0), x)
    return bool(slope)


_CLAMPED: Final = _bent(
    Kind.CLAMP,
    "_saved_self",
    _bound("_saved_min", -math.inf),
    _bound("_saved_max", math.inf),
)


def _factor(node: Any) -> float:
    return float(node._saved_other)


def _rules() -> dict[str, Rule]:
    of_self = "Log Log1P Cosh Sinh Sin Cos Abs LogSigmoid"
    of_result = "Exp Expm1 Sqrt Rsqrt Reciprocal Sigmoid Tanh Relu"
    kinds = {"Log1P": Kind.LOG1P, "LogSigmoid": Kind.LOG_SIGMOID}
    rules = {
        name: _bent(kinds.get(name) or Kind[name.upper()], f"_saved_{saved}")
        for names, saved in ((of_self, "self"), (of_result, "result"))
        for name in names.split()
    }
    rules |= dict.fromkeys(("Alias", "Clone", "ToCopy"), _scaled(1.0))
    rules |= dict.fromkeys(
        ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"), _reshaped
    )
    rules |= {
        "Neg": _scaled(-1.0), "Expand": _repeated, "Mul": _times, "Div": _over,
        "Add": _linear(lambda _: 1.0, lambda x: x._saved_alpha),
        "Sub": _linear(lambda _: 1.0, lambda x: -x._saved_alpha),
        "Rsub": _linear(lambda x: -x._saved_alpha, lambda _: 1.0),

        "LogSoftmax": _softmax, "Softmax": _softmax, "Logsumexp": _log_sum_exp,
        "Sum": _all_added(False), "Mean": _all_added(True), "MaskedFill": _masked,
        "Xlogy": _x_log_y,
        "Where": _weighed(lambda x: (x._saved_condition, ~x._saved_condition)),
        "Maximum": _weighed(_of_maximum),
        "Minimum": _weighed(lambda x: _of_maximum(x)[::-1]),
        "ClampMin": _CLAMPED,
        "Pow": _bent(Kind.POWER, "_saved_self", lambda x: float(x._saved_exponent)),
        "Softplus": _bent(
            Kind.SOFTPLUS, "_saved_self",
            lambda x: float(x._saved_beta), lambda x: float(x._saved_threshold),
        ),
    }  # fmt: skip
    found = {f"{name}Backward0": rule for name, rule in rules.items()}
    found |= {"SumBackward1": _added(False), "MeanBackward1": _added(True)}
    found |= {"RsubBackward1": rules["Rsub"], "ClampBackward1": rules["ClampMin"]}
    found |= dict.fromkeys(("SqueezeBackward1", "SqueezeBackward4"), _reshaped)
    found |= dict.fromkeys(("AddBackward1", "SubBackward1"), _scaled(1.0))
    found |= {"MulBackward1": _linear(_factor, _factor)}
    found |= LOSSES | MOMENTS | NODES | PLACES | PRODUCTS
    return found | {"torch::autograd::AccumulateGrad": _scaled(1.0)}


RULES: Final = _rules()
