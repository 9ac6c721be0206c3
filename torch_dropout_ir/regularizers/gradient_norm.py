"""R_2: the squared gradient norm that a finite step adds, and its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_even, check_flag, check_real
from torch_dropout_ir.batches import as_batches
from torch_dropout_ir.functional import parameters
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.checks import as_pair, check_finite, noise_left_out
from torch_dropout_ir.regularizers.gradient_pairs import GradientPairs
from torch_dropout_ir.written_parameters import unwritten

ALIKE: Final = (
    "no standard error: no two masks made a difference to the gradient; take more"
)
_BESIDE: Final = (
    "the model draws noise besides its sites: the noise of masks is without that, at "
    "what was drawn"
)


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    r"""R_2 and its decomposition, all 0-d and in the units of the loss.

    Attributes:
        value: The paper's form, :math:`\frac{\epsilon}{4} E\lVert g \rVert^2`, the mean
            of the modified loss of a step; the sum of the next three.
        mean_gradient: The drift form, :math:`\frac{\epsilon}{4} \lVert E g \rVert^2
            = \frac{\epsilon}{4} \lVert \nabla (R_S + R_1) \rVert^2`, which the mean
            iterate follows; unbiased, so it can be negative.
        dropout_noise: :math:`\frac{\epsilon}{4} E_b \mathrm{tr}\,\mathrm{Cov}_\eta(g)`,
            the part that the masks add on one batch.
        batch_noise: :math:`\frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_b(E_\eta g)`,
            the part that the choice of the mini-batch adds; 0 for one batch.
        standard_error: Standard error of ``value``; NaN with fewer than two pairs of
            masks, or of batches where there are several, and where no two masks made a
            difference.
        mean_gradient_standard_error: The same for ``mean_gradient``.
        dropout_noise_standard_error: The same for ``dropout_noise``.
        batch_noise_standard_error: The same for ``batch_noise``.
        num_masks: Number of masks drawn a batch.
        shared_mask: Whether one mask served all samples.
        notes: What there is to know besides: noise that is not in it, or that no
            dropout site acted.
    """

    value: Tensor
    mean_gradient: Tensor
    dropout_noise: Tensor
    batch_noise: Tensor
    standard_error: Tensor
    mean_gradient_standard_error: Tensor
    dropout_noise_standard_error: Tensor
    batch_noise_standard_error: Tensor
    num_masks: int
    shared_mask: bool
    notes: tuple[str, ...] = ()


def gradient_norm(
    model: nn.Module,
    batch: Any,
    loss: Any,
    *,
    lr: float | Mapping[str, float],
    num_masks: int = 2,
    shared_mask: bool = False,
) -> GradientNorm:
    r"""Return R_2 and its parts, from pairs of masks and pairs of batches.

    .. math::
        R_2 = \frac{\epsilon}{4} E \lVert \nabla R_{drop}(\theta, \eta) \rVert^2
        = \frac{\epsilon}{4} \lVert E g \rVert^2
        + \frac{\epsilon}{4} E_b \mathrm{tr}\,\mathrm{Cov}_\eta(g)
        + \frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_b(E_\eta g)

    A pair ``g, g'`` of gradients at independent masks on one batch gives
    :math:`(\lVert g \rVert^2 + \lVert g' \rVert^2)/2` and the noise of the masks,
    :math:`\lVert g - g' \rVert^2 / 2`, without bias; their inner product is the rest.
    Of several batches the passes of two take turns, ``a a b b``, and each is held
    against the next: inner products across the two give the squared mean gradient,
    differences within one the noise of the masks, and what is left is the noise of the
    mini-batches, which plain SGD has too. Steps count alike, whatever the sizes of
    their batches.

    Noise that is not that of sites is switched off where its kind is known. Where it is
    not, both passes of a pair have the same: the noise of masks is at what was drawn,
    and the rest holds it. Near ``p = 1``, where next to no unit is kept at both masks
    of a pair, the draws do not show how far the mean is off, and neither do the errors.
    They are NaN where no two masks made a difference, as near ``p = 0``.

    Costs a forward and a backward pass a mask and batch. Memory: beside a pass, whose
    gradients go one by one as they come, one gradient, that of the pass before. Those
    of linear layers and convolutions are held as what they are products of, where that
    is smaller, and compared some rows at a time; what a linear layer takes in behind
    dropout is held as a bit an element, and what dropout took in, and behind GELU and
    the like as what that took in. Where both together are more than a step's, passes
    go by parts (:mod:`~torch_dropout_ir.regularizers.pass_parts`), of one more forward
    pass a mask each. For optimizers other than gradient descent R_2 is a diagnostic,
    not the theory. For a gradient that the script has anyway, ``(lr / 4) *
    g.square().sum()`` is one unbiased sample of the first form, free of extra passes.

    Args:
        model: The model; neither it nor its ``.grad`` fields change.
        batch: ``(inputs, targets)``; or an even number of mini-batches, as a list or a
            loader, of which consecutive ones are paired.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        lr: Learning rate, or one a parameter name.
        num_masks: Number of masks a batch, even.
        shared_mask: If True, one mask serves all samples of the batch (the paper's
            ``eta``); else each sample draws its own, as ``nn.Dropout`` does.

    Returns:
        The parts with standard errors over the pairs.

    Raises:
        TypeError: If ``num_masks`` is no integer, ``shared_mask`` no bool, or ``lr``
            no number.
        ValueError: If ``num_masks`` is odd or below 2, ``lr`` lacks a parameter, the
            number of batches is odd, a batch is empty, or a loss or gradient is not
            finite.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (5); Barrett & Dherin,
        *Implicit gradient regularization*, ICLR 2021; Smith et al., *On the origin of
        implicit regularization in stochastic gradient descent*, ICLR 2021.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        >>> batch = torch.ones(8, 3), torch.zeros(8, 1)
        >>> r2 = gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
        >>> torch.testing.assert_close(r2.value, r2.mean_gradient + r2.dropout_noise)
    """  # noqa: DOC502 (raised by the checks)
    check_even("gradient_norm", "num_masks", num_masks)
    check_flag("gradient_norm", "shared_mask", shared_mask)
    rates = learning_rates("gradient_norm", lr, list(parameters(model)))
    norms = GradientPairs(model, resolve_loss(loss), rates, shared_mask)
    batches = [as_pair(each) for each in as_batches(batch)]
    if not batches or (len(batches) > 1 and len(batches) % 2):
        raise ValueError(
            "gradient_norm: expected one batch or an even number of them, got "
            f"{len(batches)}: the squared mean gradient comes from pairs"
        )
    with unwritten(model):
        if len(batches) == 1:
            rows = [norms.pair(batches[0]) for _ in range(num_masks // 2)]
        else:
            pairs = zip(batches[::2], batches[1::2], strict=True)
            rows = [norms.across(a, b, num_masks) for a, b in pairs]
    table = torch.stack(rows)
    # A loss that is not finite can have a gradient that is, or is 0.
    finite = table.sum() + 0 * torch.as_tensor(norms.risk, device=table.device)
    check_finite("gradient_norm", finite, model, batches[0][0])
    mean = table.mean(0)
    error = table.std(0) / len(rows) ** 0.5 if len(rows) > 1 else mean * float("nan")
    names = ("value", "mean_gradient", "dropout_noise", "batch_noise")
    errors = ("standard_error", *(f"{name}_standard_error" for name in names[1:]))
    found = dict(zip((*names, *errors), (*mean, *error), strict=True))
    seen = norms.seen
    notes = noise_left_out(model, bool(seen.silenced), seen.met, cut=seen.cut)
    if norms.beside:
        notes = (*notes, _BESIDE)
    alike = bool(table[:, 0].any()) and not bool(table[:, 2].any())
    if alike and len(rows) > 1 and seen.met and not seen.cut:
        found |= dict.fromkeys(errors[:3], mean[0] * float("nan"))
        notes = (*notes, ALIKE)
    return GradientNorm(
        num_masks=num_masks, shared_mask=shared_mask, notes=notes, **found
    )


def learning_rates(
    function: str, lr: float | Mapping[str, float], names: list[str]
) -> list[float]:
    """Return the learning rate of each parameter.

    Raises:
        TypeError: If one is no number.
        ValueError: If a mapping lacks one, or one is negative or not finite.
    """  # noqa: DOC502 (`check_real` raises too)
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(names, lr)
    missing = [name for name in names if name not in rates]
    if missing:
        raise ValueError(
            f"{function}: expected a learning rate `lr` for every parameter, got none "
            f"for {missing}"
        )
    for name in names if rates is lr else names[:1]:
        own = f"lr[{name!r}]" if rates is lr else "lr"
        check_real(function, own, rates[name], least=0)
    found = [rates[name] for name in names]
    return [x if isinstance(x, Tensor) else float(x) for x in found]
