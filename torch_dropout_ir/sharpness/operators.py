"""The Hessian of a loss, and its Gauss-Newton part, as operators."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.differentiability import Subset, depended_on, explained
from torch_dropout_ir.sharpness.frozen import Masks
from torch_dropout_ir.sharpness.ranks import Group
from torch_dropout_ir.sharpness.surface import Surface

BLOCK_BYTES: Final = 2**26


def hessian(
    model: nn.Module,
    loss: Any,
    batches: Any,
    *,
    masks: Masks = "off",
    params: Subset = None,
    block_bytes: int = BLOCK_BYTES,
    group: Group = "auto",
) -> CurvatureOperator:
    r"""Return the Hessian of the loss as an operator.

    .. math:: H = \frac{\partial^2}{\partial \theta^2} R(\theta), \qquad
        R(\theta) = \frac{1}{N} \sum_b n_b \, \ell_b(\theta)

    With dropout off ``R`` is ``R_S``. At frozen masks it is ``R_drop``: one symmetric
    matrix, as masks are the same in every product. With live dropout each product
    would be of another matrix.

    Batches are weighted by what a loss of torch's counts (targets that are not ignored,
    by class weights), else by their number of samples: ragged ones are exact for other
    losses that are plain means (or sums) over samples. Batch normalization keeps the
    mode it has; its running statistics do not move. Attention and recurrent layers run
    in kernels that have a second derivative. One batch is linearized once, and each
    product costs about half of one from scratch; several batches, or several masks, are
    streamed, with the graph of one at a time in memory.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``, the mean (or sum) over samples.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches. A
            loader that shuffles is read in one order.
        masks: ``"off"``; a seed, for ``R_drop`` at the masks of
            ``frozen_masks(model, seed)`` (further batches have their own); or several
            seeds, for the mean over those masks.
        params: Names of the parameters to differentiate in, or a predicate on names;
            all that require a gradient if None.
        block_bytes: Memory for the intermediate results of the columns of one block
            that are multiplied at once; those of one column are needed anyway.
        group: Process group over which batches are spread; products are summed over
            its ranks, all of which must take part. ``"auto"``: that of a model in
            ``DistributedDataParallel``, else none.

    Returns:
        The operator, with ``@``, ``shape``, ``num_matvecs`` and ``dense()``.

    Raises:
        ValueError: If there is no batch, the loss is not finite or does not depend on
            a parameter, or ``masks`` or ``params`` are not as said.
        NotImplementedError: If an operation has no second derivative.

    References:
        Pearlmutter, *Fast exact multiplication by the Hessian*, 1994; Zhang & Xu,
        *Implicit regularization of dropout*, section VII.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> op = hessian(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
        >>> op.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """  # noqa: DOC502 (the surface and the linearization raise)
    surface = Surface(
        "hessian", model, loss, batches, masks=masks, params=params, group=group
    )
    return CurvatureOperator("hessian", surface, block_bytes)


def ggn(
    model: nn.Module,
    loss: Any,
    batches: Any,
    *,
    masks: Masks = "off",
    params: Subset = None,
    block_bytes: int = BLOCK_BYTES,
    group: Group = "auto",
) -> CurvatureOperator:
    r"""Return the generalized Gauss-Newton matrix of the loss as an operator.

    .. math:: G = J^\top \, \frac{\partial^2 \ell}{\partial f^2} \, J, \qquad
        J = \frac{\partial f}{\partial \theta}

    Positive semi-definite where the loss is convex in the outputs; equal to the Hessian
    where the residuals vanish or the outputs are linear in the parameters, and to its
    diagonal blocks where they are piecewise linear in each layer. Takes the arguments
    of :func:`hessian`; one forward pass serves both factors ``J``, so they share their
    masks, and a product costs about 0.4 of a Hessian product from scratch.

    Args:
        model: The model, whose output is one tensor; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch, or a list or loader of batches.
        masks: ``"off"``, a seed, or several seeds.
        params: Names of the parameters, or a predicate on names.
        block_bytes: Memory for the columns of a block that are multiplied at once.
        group: Process group over which batches are spread.

    Returns:
        The operator.

    Raises:
        ValueError: As for :func:`hessian`.
        TypeError: If the model's output is no tensor.

    References:
        Schraudolph, *Fast curvature matrix-vector products*, Neural Computation 14
        (2002).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> op = ggn(net, "mse", (torch.randn(5, 2), torch.randn(5, 1)))
        >>> bool((torch.linalg.eigvalsh(op.dense()) > -1e-6).all())
        True
    """  # noqa: DOC502 (the surface and the linearization raise)
    surface = Surface(
        "ggn", model, loss, batches, masks=masks, params=params, group=group
    )
    return CurvatureOperator("ggn", surface, block_bytes)


def used_parameters(model: nn.Module, loss: Any, batches: Any) -> list[str]:
    """Return the names of the parameters that ``R_S`` depends on.

    What is left out is what :func:`hessian` would refuse. Costs a forward and a
    backward pass over the batches.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch, or a list or loader of batches.

    Returns:
        Names, for ``params=``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> used_parameters(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
        ['weight', 'bias']
    """
    return used_by(Surface("used_parameters", model, loss, batches, copied=False))


def used_by(surface: Surface) -> list[str]:
    """Return the names of the parameters that a loss depends on."""

    def one(batch: Batch, place: int, seed: int | None) -> Tensor:
        with torch.enable_grad():
            leaves = {n: x.detach().requires_grad_() for n, x in surface.params.items()}
            risk = surface.checked(surface.risk(leaves, batch, place, seed), place)
            targets = list(leaves.values())
            with explained(), surface.backward(), arrivals(targets, lambda *_: None):
                found = torch.autograd.grad(risk, targets, allow_unused=True)
        smooth = depended_on(risk, leaves, found)
        return targets[0].new_tensor([float(n in smooth) for n in leaves])

    depends = surface.average(one).tolist()
    return [n for n, x in zip(surface.params, depends, strict=True) if x > 0]
