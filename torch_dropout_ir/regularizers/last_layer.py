"""R_1 of dropout straight before the last linear layer, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import tracing
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.output_scales import cross_entropy_scale, squared_scale
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.sites import noise_variance

# Elements of a block: what is made of it stays in the cache, or is long enough for a
# product of matrices to be at its best.
_IN_CACHE: Final = 2**17
_FOR_PRODUCTS: Final = 2**21
ROWS_MEET: Final = (
    "expected a loss that is a sum (or mean) of terms of one row of the outputs each, "
    "got one that couples rows. Use `regularizers.second_order`, or `monte_carlo`."
)


def last_layer(
    features: Tensor,
    weight: Tensor,
    p: float,
    *,
    loss: Any = "mse",
    outputs: Tensor | None = None,
    targets: Any = None,
) -> Tensor:
    r"""Return R_1 of dropout on the input of the last linear layer.

    .. math::
        R_1 = \frac{p}{2 (1 - p)} \sum_i \sum_j h_{ij}^2 \, w_j^\top H_i w_j

    with :math:`w_j` the column of unit ``j`` and :math:`H_i` the Hessian of the loss,
    reduction included, in the outputs of sample ``i``. For the paper's risk
    (:func:`~torch_dropout_ir.losses.half_squared_error`, ``H_i = 1/n``) it is its
    eq. (4); for :func:`torch.nn.functional.mse_loss` (``"mse"``) it is ``2/d'`` times
    that, ``d'`` the number of outputs. In the units of the loss.

    Exact (Lemma 1) for a squared loss: the expected dropout loss is the loss plus
    this, at any width, depth and ``p``. For other losses it is the second-order part,
    off by the size of one unit's share of the outputs even as ``p`` goes to 0; there
    :func:`leave_one_out` is exact. No pass through the network; differentiable in every
    tensor argument. Not-a-number in gives not-a-number out.

    Args:
        features: Inputs of the last layer before dropout, ``[..., D]``.
        weight: Weight of the last layer, ``[C, D]``.
        p: Probability of dropping, in ``[0, 1)``. The paper's ``p`` is our ``1 - p``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``.
        outputs: Network outputs without dropout, ``[..., C]``; needed unless the loss
            is squared.
        targets: The targets, where the loss's Hessian depends on them.

    Returns:
        Scalar with the dtype and device of ``features``; not finite where they are not.

    Raises:
        TypeError: If ``features`` or ``weight`` is no real tensor, or dtypes differ
            outside of autocast.
        ValueError: If ``p`` is outside ``[0, 1)``, shapes disagree, ``outputs`` is
            missing for a loss that needs it, or the loss couples rows or has no second
            derivative, or there is no sample.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (4) and Lemma 1.

    Example:
        >>> from torch_dropout_ir.losses import half_squared_error
        >>> h, w = torch.ones(4, 3), torch.ones(2, 3)
        >>> last_layer(h, w, p=0.5, loss=half_squared_error).item()
        3.0
    """  # noqa: DOC502 (`check_layer` raises)
    resolved = resolve_loss(loss)
    check_layer("last_layer", features, weight, outputs)
    variance = noise_variance(p)
    rows = features.reshape(features.shape[:-1].numel(), features.shape[-1])
    if resolved.kind == "squared":
        shape = torch.Size((*features.shape[:-1], weight.shape[0]))
        _check_targets(shape, targets)
        form = squared_scale(resolved, shape, targets) * _squared_form(rows, weight)
        return variance / 2 * form
    if outputs is None:
        raise ValueError(
            "last_layer: the Hessian of this loss depends on the outputs: expected "
            "`outputs` [..., C], got None"
        )
    resolved = resolved.at(outputs.reshape(-1, outputs.shape[-1]))
    if resolved.kind == "cross_entropy":
        softmax, scale = softmax_and_scale(resolved, outputs, targets)
        return variance / 2 * _softmax_form(rows, weight, softmax, scale)
    read = read_outputs(outputs, resolved, targets)
    check_curvature(read)
    product = HessianProduct(resolved, outputs, targets)
    if resolved.kind == "elementwise":
        diagonal = product(torch.ones_like(outputs)).reshape(-1, weight.shape[0])
        return variance / 2 * sum_by_rows(
            lambda h, d, squares: ((d @ squares) * h.square()).sum(),
            _FOR_PRODUCTS, rows, diagonal, whole=(weight.square(),),
        )  # fmt: skip
    check_rows(read)
    return variance / 2 * _general_form(rows, weight, outputs, product)


def check_layer(
    name: str, features: Tensor, weight: Tensor, outputs: Tensor | None
) -> None:
    """Raise if a layer's features, weight and outputs are none, or do not fit."""
    given = {"features": features, "weight": weight, "outputs": outputs}
    for argument, x in given.items():
        real = isinstance(x, Tensor) and x.is_floating_point()
        if not real and (argument != "outputs" or x is not None):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name}: expected `{argument}` to be a real floating-point tensor, "
                f"got {got}"
            )
    kinds = {x.dtype for x in given.values() if isinstance(x, Tensor)}
    if len(kinds) > 1 and not torch.is_autocast_enabled(features.device.type):
        raise TypeError(
            f"{name}: expected `features`, `weight` and `outputs` of one dtype, got "
            + ", ".join(f"`{n}` {x.dtype}" for n, x in given.items() if x is not None)
        )
    fit = features.ndim > 0 and weight.ndim == 2
    fit = fit and features.shape[-1] == weight.shape[1]
    if outputs is not None:
        fit = fit and outputs.shape == (*features.shape[:-1], weight.shape[0])
    if not fit:
        shapes = ", ".join(
            f"{list(x.shape)}" for x in given.values() if isinstance(x, Tensor)
        )
        raise ValueError(
            f"{name}: expected `features` [..., D], `weight` [C, D] and `outputs` "
            f"[..., C], if any, got {shapes}"
        )
    for what, count in (
        ("sample", features.shape[:-1].numel()),
        ("output", len(weight)),
    ):
        if not count:
            raise ValueError(f"{name}: expected at least one {what}, got none")


def _check_targets(shape: torch.Size, targets: Any) -> None:
    """Raise if outputs of a shape and the targets of a squared loss do not fit."""
    if isinstance(targets, Tensor) and targets.shape != shape:
        try:
            torch.broadcast_shapes(shape, targets.shape)
        except RuntimeError as err:
            raise ValueError(
                f"expected `targets` of the shape of the outputs, {list(shape)}, got "
                f"{list(targets.shape)}"
            ) from err


def check_rows(read: OutputsRead) -> None:
    """Raise unless the loss is a sum (or mean) of terms of one row each."""
    if read.couples(read.tensors[0].ndim - 1):
        raise ValueError(ROWS_MEET)


def softmax_and_scale(
    loss: Loss, outputs: Tensor, targets: Any
) -> tuple[Tensor, Tensor]:
    """Return the softmax ``[N, C]`` of outputs ``[..., C]`` and its scale ``[N, 1]``.

    Targets are labels ``[...]`` or probabilities ``[..., C]``.
    """
    logits = outputs.reshape(-1, outputs.shape[-1])
    if isinstance(targets, Tensor):
        labels = not targets.is_floating_point()
        targets = targets.flatten() if labels else targets.reshape(logits.shape)
    return logits.softmax(-1), cross_entropy_scale(loss, logits, targets)


def _squared_form(rows: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of ``h_j^2 |w_j|^2``."""
    most = max(rows.shape[0], weight.shape[0])
    count = min(most, max(1, _IN_CACHE // max(1, rows.shape[1])))
    # Memory that stays in the cache: each of both is read once.
    fresh = differentiated(rows, weight) or rows.dtype != weight.dtype
    held = None if fresh else rows.new_empty(count, rows.shape[1])

    def squared(x: Tensor) -> Tensor:
        return x.square() if held is None else torch.mul(x, x, out=held[: len(x)])

    def squares(w: Tensor) -> Tensor:
        return squared(w).sum(0)

    def form(h: Tensor, lengths: Tensor) -> Tensor:
        return (squared(h) @ lengths).sum()

    lengths = sum_by_rows(squares, _IN_CACHE, weight)
    return sum_by_rows(form, _IN_CACHE, rows, whole=(lengths,))


def _softmax_form(
    rows: Tensor, weight: Tensor, softmax: Tensor, scale: Tensor
) -> Tensor:
    """Sum of ``h^2 (s'w^2 - (s'w)^2)``: the variance of each column under softmax."""
    # Fresh memory for each step would cost a quarter of the two products.
    in_place = not differentiated(rows, weight, softmax, scale)

    def form(h: Tensor, s: Tensor, a: Tensor, w: Tensor, squares: Tensor) -> Tensor:
        spread, mean = s @ squares, s @ w
        if not in_place:
            return (a.squeeze(-1) @ ((spread - mean.square()) * h.square())).sum()
        few = max(1, _IN_CACHE // max(1, h.shape[1]))
        for x, m, g in zip(*(t.split(few) for t in (spread, mean, h)), strict=True):
            x.addcmul_(m, m, value=-1).mul_(g).mul_(g)
        return (a.squeeze(-1) @ spread).sum()

    whole = weight, weight.square()
    return sum_by_rows(form, _FOR_PRODUCTS, rows, softmax, scale, whole=whole)


def _general_form(
    rows: Tensor, weight: Tensor, outputs: Tensor, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum over outputs ``c`` of ``h^2 w_c (H_c w)``, one product with H for each."""
    total = rows.new_zeros(())
    for c in range(weight.shape[0]):
        place = torch.zeros_like(outputs.detach())
        place[..., c] = 1.0
        products = product(place).reshape(-1, weight.shape[0]) @ weight
        total = total + (rows.square() * products * weight[c]).sum()
    return total


def differentiated(*tensors: Tensor) -> bool:
    """Whether what is made of these tensors may be differentiated or transformed."""
    live = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return live or not tracing.eager()


def sum_by_rows(
    form: Callable[..., Tensor],
    elements: int,
    rows: Tensor,
    *others: Tensor,
    whole: Sequence[Tensor] = (),
) -> Tensor:
    """Return the sum of ``form`` over blocks of rows.

    It is a function of blocks of ``rows``, of ``elements`` at most, and of ``others``
    with as many rows, and of ``whole`` as it is, to a scalar or a tensor of one shape.
    Where a gradient will be asked for, a block is computed again in the backward pass
    rather than kept. Where a ``torch.func`` transform or a compiler looks on, all rows
    are one block.
    """
    count = max(1, elements // max(1, rows.shape[1]))
    if rows.shape[0] <= count or not tracing.eager():
        return form(rows, *others, *whole)
    again = differentiated(rows, *others, *whole)
    total = rows.new_zeros(())
    for block in zip(*(x.split(count) for x in (rows, *others)), strict=True):
        total = total + computed(again, form, *block, *whole)
    return total


def computed(again: bool, form: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Return what a form makes, to be made ``again`` in a backward pass, or kept."""
    if not again:
        return form(*given)
    return checkpoint(form, *given, use_reentrant=False, preserve_rng_state=False)
