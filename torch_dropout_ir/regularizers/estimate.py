"""The form in which an estimate of R_1 is asked for and given; when it is closed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers.checks import read_beside
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import read_outputs

# Steps in units of the outputs' size: dropout at a large ``p`` moves them by many.
_STEPS: Final = (1.0, 4.0, 16.0, 64.0)
_SEED: Final = 0
_TOLD: Final = 0.01  # of the curvature, up to which differences have to tell


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its error and its parts.

    Attributes:
        value: The estimate, 0-d, in the units of the loss.
        per_site: Contribution of each dropout site by name; empty where the method
            cannot tell them apart.
        standard_error: Standard error from sampling, 0-d: 0 for a deterministic
            formula, NaN where the draws cannot tell.
        exact: Whether the value equals ``E[R_drop] - R_S`` up to rounding, rather than
            its second-order part or a sample of it.
        num_samples: Random draws taken; 0 for a deterministic formula.
        converged: Whether the standard error that was asked for was reached; True where
            none was.
        notes: What there is to know besides, for example sites whose part is 0 because
            the loss does not depend on them.
        per_site_standard_error: Standard error of each entry of ``per_site``, as
            ``standard_error``; sites share draws, so that these do not add up to it.
    """

    value: Tensor
    per_site: dict[str, Tensor]
    standard_error: Tensor
    exact: bool
    num_samples: int
    converged: bool = True
    notes: tuple[str, ...] = ()
    per_site_standard_error: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Asked(NamedTuple):
    """What an estimate is of, and of how many draws; None for the exact sum."""

    model: nn.Module
    batch: Batch
    loss: Loss
    num_samples: int | None


def is_exact(
    clean: CleanPass, loss: Loss, targets: Any, num_samples: int | None
) -> bool:
    """Whether a second-order form is R_1 itself: Lemma 1, or no noise at all."""
    if not clean.uses:
        return not clean.out_of_sight and not clean.noisy
    if num_samples is not None or clean.last_weight is None:
        return False
    return of_squares(clean, loss, targets)


def of_squares(clean: CleanPass, loss: Loss, targets: Any) -> bool:
    """Whether a loss adds squares of single outputs, and of nothing beside them."""
    if not is_quadratic(loss, clean.outputs.detach(), targets):
        return False
    return not read_beside(
        read_outputs(clean.outputs, loss, targets), clean.edges, None, clean.later
    )


def last_layer_form(
    clean: CleanPass, targets: Any, loss: Loss, form: Callable[..., Tensor]
) -> Tensor:
    """Return a closed form of R_1 from the features that a pass has found, or raise."""
    weight = clean.last_weight
    if weight is None or not fits_last_layer(clean):
        raise ValueError(
            f"{form.__name__}: expected a single site, an `nn.Dropout` whose output "
            "goes straight into the last `nn.Linear`, which makes all that the model "
            "returns, with no number asked of it on the way (a branch) and no writing "
            f"on the weight, got the sites {[site.name for site, _, _ in clean.uses]}. "
            "Use 'gauss_newton', 'second_order' or 'monte_carlo'."
        )
    if loss.kind == "cross_entropy" and clean.outputs.ndim > 2:
        raise ValueError(
            f"{form.__name__}: expected outputs [n, C] for this loss, got "
            f"{list(clean.outputs.shape)}: its classes are in dimension 1, those of "
            "the last layer in the last. Pass a callable that flattens them."
        )
    site, features, _ = clean.uses[0]
    _ = site.variance  # names the site where it drops everything
    return form(
        features, weight, site.p, loss=loss, outputs=clean.outputs, targets=targets
    )


def fits_last_layer(clean: CleanPass) -> bool:
    """Whether a pass has features of which the closed forms can be taken."""
    if clean.last_weight is None:
        return False
    site, features, _ = clean.uses[0]
    return site.mask_shape(features.shape) == tuple(features.shape)


def is_quadratic(loss: Loss, outputs: Tensor, targets: Any) -> bool:
    """Whether a loss is known or shown to be a sum of squares of single outputs."""
    shown = loss.kind in ("general", "elementwise")
    return loss.is_quadratic or (shown and _adds_squares(loss, outputs, targets))


@torch.no_grad()
def _adds_squares(loss: Loss, outputs: Tensor, targets: Any) -> bool:
    r"""Return whether a loss without closed form is a sum of single outputs' squares.

    Its graph tells, but for what is computed of the outputs and is a constant there, as
    a weight. So differences of the loss have to be a square's too, along steps ``d`` of
    the outputs' size and more, which they take under dropout: the second :math:`\sum_i
    H_{ii} d_i^2`, and the third 0.
    """
    if outputs.dtype not in (torch.float32, torch.float64):
        return False
    try:
        product = HessianProduct(loss, outputs, targets)
    except ValueError:
        return False
    if product.terms is None or not product.terms.squares:
        return False
    diagonal = product(torch.ones_like(outputs))
    size = outputs.detach().square().mean().sqrt()
    draw = torch.Generator(outputs.device).manual_seed(_SEED)
    for step in _STEPS:
        d = outputs.new_empty(outputs.shape).normal_(generator=draw)
        d *= step * torch.where(size > 0, size, 1.0)
        at = torch.stack([loss(outputs + k * d, targets) for k in (2, 1, 0, -1)])
        curved = (diagonal * d * d).sum()
        second = at[1] - 2 * at[2] + at[3] - curved
        third = at[0] - 3 * at[1] + 3 * at[2] - at[3]
        rounding = torch.finfo(at.dtype).eps ** (2 / 3) * at.abs().sum()
        if not torch.stack([second, third]).abs().max() <= rounding:
            return False
        # Beside a large constant nothing tells.
        if not rounding <= _TOLD * curved.abs():
            return False
    return True
