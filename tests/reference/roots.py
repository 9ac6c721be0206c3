"""Random roots of the Hessian of a loss in its outputs, in plain torch.

What the kernels of ``csrc/roots.cpp`` do. A part that is zero has a root without
elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_dropout_ir.output_hessian import eigen, turned
from torch_dropout_ir.output_products import SIGNS, magnitudes, signs_of
from torch_dropout_ir.softmax_roots import in_logits, softmax_diagonal


def root_of_sign(values: Tensor, sign: float, drawn: Tensor) -> Tensor:
    """Return the square roots of what has a sign, with the signs of what was drawn."""
    return magnitudes(values, sign).copysign(drawn)


def diagonal_roots(diagonal: Tensor) -> list[Tensor]:
    """Return two roots of a diagonal, of the shape of its entries."""
    return _roots(diagonal, lambda root: root)


def softmax_roots(
    log_softmax: Tensor, slope: Tensor | None, bend: Tensor | None, classes: int
) -> list[Tensor]:
    """Return two roots in the logits, for a loss of log-probabilities ``u``.

    With ``s = e^u`` they are those of ``J' (D + m diag(s)) J``, ``J = 1 - 1 s'``.
    ``slope`` is the gradient of the loss in ``u``, whose sum over the dimension
    ``classes`` is ``-m``, None for ``m`` of one; ``bend`` is ``D``, its second
    derivatives, None for zero.
    """
    s, diagonal = softmax_diagonal(log_softmax, slope, bend, classes)
    return _roots(diagonal, lambda root: in_logits(root, s, classes))


def block_roots(columns: Tensor) -> list[Tensor]:
    """Return two roots ``[n, K]`` of a symmetric block for each of ``n`` samples.

    Column ``c`` of the blocks is at the index ``c`` of ``columns``, ``[K, n, K]``.
    """
    values, vectors = eigen(columns.movedim(0, -1))
    return _roots(values, lambda root: turned(vectors, root))


def _roots(values: Tensor, turn: Callable[[Tensor], Tensor]) -> list[Tensor]:
    drawn, signs = torch.randn_like(values), signs_of(values)
    return [
        turn(root_of_sign(values, sign, drawn))
        if sign in signs
        else values.new_empty(0)
        for sign in SIGNS
    ]
