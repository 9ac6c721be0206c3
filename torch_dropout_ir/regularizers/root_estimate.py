"""The Gauss-Newton estimate: what is said of it, and that of a pass already run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_reachable, read_beside
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.estimate import Estimate, is_exact
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.root_forms import RootForms
from torch_dropout_ir.regularizers.site_forms import (
    LINEAR,
    Form,
    Sums,
    assemble,
    of_sums,
)


class Known(NamedTuple):
    """What there is to say of an estimate besides its draws."""

    names: list[str]
    num_samples: int | None
    exact: bool
    like: Tensor
    notes: tuple[str, ...]

    def of(self, summed: Sums) -> Estimate:
        """Return the estimate of a draw that has been added up."""
        return of_sums(self.names, summed, self.exact, self.notes)

    def estimate(self, draws: list[list[Form]], coupled: bool) -> Estimate:
        """Return the estimate of draws, whether samples meet or not."""
        return assemble(
            self.names, draws, self.num_samples, coupled, self.exact, self.like,
            self.notes,
        )  # fmt: skip


def read_of(clean: CleanPass, targets: Any, loss: Loss) -> OutputsRead:
    """Return what the loss reads; raise if derivatives cannot be had of it."""
    check_reachable("gauss_newton", clean.unreachable)
    read = read_outputs(clean.outputs, loss, targets)
    if loss.kind == "cross_entropy" and read.tensors[0].ndim < 2:
        raise ValueError(
            "gauss_newton: expected outputs with a batch dimension, got shape "
            f"{list(read.tensors[0].shape)}"
        )
    return read


def known_of(
    model: nn.Module,
    clean: CleanPass,
    read: OutputsRead,
    loss: Loss,
    forms: RootForms,
    beside: tuple[str, ...],
    like: Tensor | None = None,
) -> Known:
    """Return what there is to say of an estimate by forms of a pass."""
    told = forms.curved or not clean.uses or check_curvature(read)
    linear = () if told else (LINEAR,)
    notes = (*clean.noise_left_out(model), *beside, *linear)
    exact = is_exact(clean, loss, read.targets, forms.num_samples)
    like = read.tensors[0].new_empty(()) if like is None else like
    return Known(clean.names, forms.num_samples, exact, like, notes)


def estimate(
    model: nn.Module,
    clean: CleanPass,
    targets: Any,
    loss: Loss,
    num_samples: int | None,
) -> Estimate:
    """Return the Gauss-Newton estimate of a pass that has run; its graph is kept."""
    read = read_of(clean, targets, loss)
    product = None if read.closed else read.product()
    forms = RootForms(clean, read, num_samples, product)
    beside = read_beside(read, clean.edges, product, clean.later)
    known = functools.partial(known_of, model, clean, read, loss, forms, beside)
    if (summed := forms.sums(clean, read)) is not None:
        return known(summed.values[0]).of(summed)
    draws, coupled = forms.draws(clean, read)
    return known().estimate(draws, coupled or forms.loss_couples)
