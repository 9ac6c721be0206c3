"""The form in which an estimate of R_1 is asked for and given."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import read_beside
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.closed_forms import is_quadratic
from torch_dropout_ir.regularizers.outputs import read_outputs


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
