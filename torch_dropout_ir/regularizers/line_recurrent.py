r"""How lines go through recurrent layers: step by step, with the state.

Value, first and second derivative of a step are one tensor, ``[3, rows, units]``. A
linear map takes it as it is, a product is :math:`(ab, \dot a b + a \dot b, \ddot a b +
2 \dot a \dot b + a \ddot b)`, and a function of single elements :math:`(f, f' \dot z,
f'' \dot z^2 + f' \ddot z)`. What is at hand is what a layer reads and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import Line

# A step, the state before it and the weights, to the state after it.
Cell = Callable[[Tensor, Sequence[Tensor], Sequence["Tensor | None"]], list[Tensor]]


@torch.no_grad()  # of parameters that are not the model's, too
def along_steps(
    name: str, args: Sequence[Any], line_of: Callable[[Tensor], Line]
) -> tuple[list[Tensor], list[Line]]:
    """Return what recurrent layers make, without dropout between, and how that moves.

    ``args`` are those of torch's function ``name``, with parameters that do not move.
    """
    x, *rest = args
    packed = isinstance(rest[0], Tensor) and not rest[0].is_floating_point()
    sizes = rest.pop(0).tolist() if packed else None
    hx, weights, biases, layers, _, __, both, *last = rest
    dim = int(bool(last and last[0]))  # of time
    made = _three(x, line_of(x))
    states = list(hx) if name == "lstm" else [hx]
    starts = [torch.stack(_three(h, line_of(h))) for h in states]
    ways, width = (False, True) if both else (False,), starts[0].shape[-1]
    each = len(weights) // (layers * len(ways))
    ends: list[list[Tensor]] = []
    for _ in range(layers):
        below = [_steps(u, sizes, dim) for u in made]
        made = [x.new_empty(*x.shape[:-1], width * len(ways)) for _ in range(3)]
        for way, back in enumerate(ways):
            k = len(ends)
            ends.append([h[:, k].clone() for h in starts])
            inner, outer, *more = weights[k * each : (k + 1) * each]
            own = [inner, outer, *([] if biases else [None, None]), *more]
            to = [_steps(u.narrow(-1, way * width, width), sizes, dim) for u in made]
            for t in range(len(to[0]))[
                :: -1 if back else 1
            ]:  # the state goes on in place
                u = torch.stack([part[t] for part in below])
                rows = u.shape[1]  # sequences that are over keep their state
                new = _CELLS[name](u, [h[:, :rows] for h in ends[k]], own)
                for h, now in zip(ends[k], new, strict=True):
                    h[:, :rows] = now
                for part, now in zip(to, new[0], strict=True):
                    part[t].copy_(now)
    last = [torch.stack(h, 1).unbind() for h in zip(*ends, strict=True)]
    found = [tuple(made), *last]
    return [y[0] for y in found], [(y[1], y[2]) for y in found]


def _three(x: Tensor, line: Line) -> list[Tensor]:
    return [x, *[torch.zeros_like(x) if u is None else u for u in line]]


def _steps(x: Tensor, sizes: list[int] | None, dim: int) -> Sequence[Tensor]:
    """Return the steps of a batch, or of sequences that are packed, as views."""
    return x.unbind(dim) if sizes is None else x.split(sizes)


def _mapped(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    found = x @ weight.mT
    if bias is not None:
        found[0] += bias
    return found


def _times(a: Tensor, b: Tensor) -> Tensor:
    found = a * b[0]
    found[1:].addcmul_(a[0], b[1:])
    found[2].addcmul_(a[1], b[1], value=2)
    return found


def _bent(z: Tensor, value: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    found = z * slope
    found[0] = value
    found[2].addcmul_(bend * z[1], z[1])
    return found


def _sigmoid(z: Tensor) -> Tensor:
    value = z[0].sigmoid()
    slope = value * (1 - value)
    return _bent(z, value, slope, slope * (1 - 2 * value))


def _tanh(z: Tensor) -> Tensor:
    value = z[0].tanh()
    slope = 1 - value * value
    return _bent(z, value, slope, -2 * value * slope)


def _relu(z: Tensor) -> Tensor:
    return z * (z[0] > 0)


def _lstm(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> list[Tensor]:
    h, c = state
    inner, outer, b1, b2, *project = weights
    gates = _mapped(x, inner, b1) + _mapped(h, outer, b2)
    i, f, g, o = gates.chunk(4, -1)
    c = _times(_sigmoid(f), c) + _times(_sigmoid(i), _tanh(g))
    h = _times(_sigmoid(o), _tanh(c))
    return [_mapped(h, project[0], None) if project else h, c]


def _gru(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> list[Tensor]:
    (h,), (inner, outer, b1, b2) = state, weights
    own, before = _mapped(x, inner, b1), _mapped(h, outer, b2)
    r, z, n = own.chunk(3, -1)
    hr, hz, hn = before.chunk(3, -1)
    n = _tanh(n + _times(_sigmoid(r + hr), hn))
    return [n + _times(_sigmoid(z + hz), h - n)]


def _plain(bend: Callable[[Tensor], Tensor]) -> Cell:
    def cell(
        x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> list[Tensor]:
        (h,), (inner, outer, b1, b2) = state, weights
        return [bend(_mapped(x, inner, b1) + _mapped(h, outer, b2))]

    return cell


_CELLS: Final[dict[str, Cell]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(_tanh),
    "rnn_relu": _plain(_relu),
}
