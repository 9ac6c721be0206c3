"""Floor 0 in Python: random roots of the Hessian of a loss in its outputs.

What the compiled kernels of ``csrc/roots.cpp`` do, for every device and size, and their
oracle. Of each Hessian there are two roots: of its positive part, and of its negative
one; the squares of the one less those of the other are the Hessian on average. A part
that is zero has a root without elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIGNS = (1.0, -1.0)


def signs_of(part: Tensor) -> tuple[float, ...]:
    """Return the signs that there are in a part of a Hessian; none where it is zero.

    What float rounding makes of a zero eigenvalue is no negative part, and what is not
    finite is a positive one, to be found in the result.
    """
    least, most = map(float, part.aminmax())
    rounding = -1e-6 * max(most, -least)
    signs = () if most <= 0 else (1.0,)
    return (*signs, -1.0) if least < 0 and not least > rounding else signs


def magnitudes(values: Tensor, sign: float) -> Tensor:
    """Return the square roots of what has a sign, 0 in the place of what has not."""
    return (values if sign > 0 else -values).clamp(min=0).sqrt_()


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


def softmax_diagonal(
    log_softmax: Tensor, slope: Tensor | None, bend: Tensor | None, classes: int
) -> tuple[Tensor, Tensor]:
    """Return ``s``, and ``D + m diag(s)`` for what :func:`softmax_roots` is given."""
    s = log_softmax.exp()
    diagonal = s if slope is None else s * slope.sum(classes, keepdim=True).neg_()
    return s, diagonal if bend is None else diagonal + bend


def in_logits(root: Tensor, softmax: Tensor, classes: int) -> Tensor:
    """Take what log-probabilities have in common off a root, written on: ``J' r``."""
    return root.addcmul_(softmax, root.sum(classes, keepdim=True), value=-1)


def block_roots(columns: Tensor) -> list[Tensor]:
    """Return two roots ``[n, K]`` of a symmetric block for each of ``n`` samples.

    Column ``c`` of the blocks is at the index ``c`` of ``columns``, ``[K, n, K]``.
    """
    values, vectors = eigen(columns.movedim(0, -1))
    return _roots(values, lambda root: turned(vectors, root))


def eigen(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the blocks; half precision has no such routine."""
    wide = blocks if blocks.dtype == torch.float64 else blocks.float()
    if not wide.isfinite().all():  # which the routine refuses; the estimate tells
        return blocks.sum(-1), blocks
    values, vectors = torch.linalg.eigh(wide)
    return values.to(blocks.dtype), vectors.to(blocks.dtype)


def turned(vectors: Tensor, root: Tensor) -> Tensor:
    """Return a root in the outputs from one along the eigenvectors."""
    return (vectors @ root.unsqueeze(-1)).squeeze(-1)


def _roots(values: Tensor, turn: Callable[[Tensor], Tensor]) -> list[Tensor]:
    drawn, signs = torch.randn_like(values), signs_of(values)
    return [
        turn(root_of_sign(values, sign, drawn))
        if sign in signs
        else values.new_empty(0)
        for sign in SIGNS
    ]
