"""Input weights of neurons, their orientations and amplitudes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VIEWS: Final = ("filter", "kernel", "input_channel")


def input_weights(module: nn.Module, view: str = "filter") -> Tensor:
    """Return the input weights of a layer's neurons, one a row.

    Args:
        module: ``nn.Linear`` or ``nn.Conv1d/2d/3d``.
        view: For convolutions: ``"filter"``, the kernel of one output channel over all
            its input channels, with its bias; ``"kernel"``, each pair of output and
            input channel by itself (the view of the paper's ResNet-18 figures);
            ``"input_channel"``, all kernels that read one input channel.

    Returns:
        Matrix ``[neurons, d]`` in the graph of the module's parameters.

    Raises:
        NotImplementedError: If the layer is of another kind.
        ValueError: If ``view`` is none of the three, or not ``"filter"`` for a linear
            layer.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> input_weights(nn.Linear(4, 3)).shape
        torch.Size([3, 5])
        >>> input_weights(nn.Conv2d(4, 3, 5), view="kernel").shape
        torch.Size([12, 25])
    """
    if view not in _VIEWS:
        raise ValueError(
            f"input_weights: expected `view` to be one of {_VIEWS}, got {view!r}"
        )
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        raise NotImplementedError(
            f"input_weights: {type(module).__name__} is not supported. Supported: "
            "Linear, Conv1d, Conv2d, Conv3d. Pass a matrix [neurons, d] of your own to "
            "the functions of this module instead."
        )
    weight, bias = module.weight, module.bias
    if isinstance(module, nn.Linear) and view != "filter":
        raise ValueError(
            f"input_weights: a linear layer has only the view 'filter', got {view!r}"
        )
    if view == "kernel":
        return weight.flatten(2).flatten(0, 1)
    if view == "input_channel":
        return weight.transpose(0, 1).flatten(1)
    rows = weight.flatten(1)
    return rows if bias is None else torch.cat((rows, bias[:, None]), 1)


def orientations(weights: Tensor) -> Tensor:
    r"""Return the rows over their norms; a row of norm zero stays zero.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        Unit rows, ``[m, d]``.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> orientations(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # Largest entry first: the square of a small float16 or float32 underflows.
    largest = weights.detach().abs().amax(1, keepdim=True)
    scaled = weights / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, 1.0)


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
        ValueError: If ``outgoing`` has another number of neurons.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> amplitudes(torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0]))
        tensor([10.])
    """
    norms = torch.linalg.vector_norm(weights, dim=1)
    if outgoing is None:
        return norms
    columns = outgoing.reshape(-1, outgoing.shape[-1])
    if columns.shape[1] != weights.shape[0]:
        raise ValueError(
            f"amplitudes: expected `outgoing` [..., {weights.shape[0]}], got "
            f"{list(outgoing.shape)}"
        )
    return norms * torch.linalg.vector_norm(columns, dim=0)


def cosine_similarity(weights: Tensor, other: Tensor | None = None) -> Tensor:
    r"""Return the cosines between neurons.

    .. math:: D(u, v) = u^\top v / (\lVert u \rVert \lVert v \rVert)

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``; the first again if None.

    Returns:
        Cosines ``[m, n]`` in ``[-1, 1]``; 0 where a norm is zero.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 2.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    rows = orientations(weights)
    columns = rows if other is None else orientations(other)
    return (rows @ columns.T).clamp(-1.0, 1.0)
