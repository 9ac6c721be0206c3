"""Orientations and amplitudes of neurons, and the cosines between them."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dropout_ir.condensation.rows import check_real, check_rows
from torch_dropout_ir.vectors import balanced, full_precision


def orientations(weights: Tensor) -> Tensor:
    r"""Return the rows over their norms; a row of norm zero stays zero.

    A row with an infinite entry or NaN has NaN too.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        Unit rows, ``[m, d]``.

    Raises:
        ValueError: If ``weights`` are no matrix.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> orientations(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """  # noqa: DOC502 (`check_rows` raises)
    check_rows("orientations", weights)
    return _as_given(_units(weights), weights)


def _units(weights: Tensor) -> Tensor:
    """Rows over their norms, in single precision at least."""
    scaled, _ = balanced(weights, 1)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norms == 0, 1.0, norms)


def amplitudes(weights: Tensor, outgoing: Tensor | None = None) -> Tensor:
    r"""Return the amplitude of each neuron.

    .. math:: A_j = \lVert a_j \rVert \, \lVert w_j \rVert

    Args:
        weights: Input weights, ``[m, d]``.
        outgoing: Outgoing weights, ``[outputs, m]`` or ``[m]``; where they are not
            given the amplitude is the norm of the input weight alone.

    Returns:
        Amplitudes, ``[m]``.

    Raises:
        ValueError: If ``weights`` are no matrix, or ``outgoing`` has another number of
            neurons.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> amplitudes(torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0]))
        tensor([10.])
    """
    check_rows("amplitudes", weights)
    norms = _norms(weights, 1)
    if outgoing is None:
        return norms
    if outgoing.shape[-1:] != norms.shape:
        raise ValueError(
            f"amplitudes: expected `outgoing` [..., {weights.shape[0]}], got "
            f"{list(outgoing.shape)}"
        )
    columns = outgoing.reshape(-1, len(norms))
    return norms * _norms(columns, 0)


def _norms(weights: Tensor, dim: int) -> Tensor:
    """Norms along a dimension, of numbers of any size."""
    scaled, largest = balanced(weights, dim)
    norms = torch.linalg.vector_norm(scaled, dim=dim) * largest.squeeze(dim)
    return _as_given(norms, weights)


def _as_given(x: Tensor, weights: Tensor) -> Tensor:
    """Of integers stays single precision, of complex numbers what is real or is not."""
    return x.to(weights.dtype) if weights.is_floating_point() else x


@full_precision()
def cosine_similarity(weights: Tensor, other: Tensor | None = None) -> Tensor:
    r"""Return the cosines between neurons.

    .. math:: D(u, v) = u^\top v / (\lVert u \rVert \lVert v \rVert)

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``; the first again if None.

    Returns:
        Cosines ``[m, n]`` in ``[-1, 1]``, of the dtype of ``weights``; 0 where a norm
        is zero.

    Raises:
        ValueError: If one is no matrix, or their neurons have other numbers of weights.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 2.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    other = weights if other is None else other
    check_rows("cosine_similarity", weights, other)
    if weights.shape[1] != other.shape[1]:
        raise ValueError(
            "cosine_similarity: expected `other` [neurons, d] with the d of `weights`, "
            f"{weights.shape[1]}, got {list(other.shape)}"
        )
    for given in (weights, other):
        if given.is_complex():
            check_real(given)
    rows = _units(weights)
    columns = rows if other is weights else _units(other).to(rows)
    return _as_given((rows @ columns.T).clamp(-1.0, 1.0), weights)
