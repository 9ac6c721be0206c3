"""The passes of an estimate, those through which single roots go, and what is said."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count
from torch_dropout_ir.collectives import some
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers.checks import (
    as_pair,
    check_finite,
    check_reachable,
    explained,
    read_beside,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.coupling import alike, row_weights, telling_roots
from torch_dropout_ir.regularizers.estimate import Asked, Estimate, is_exact
from torch_dropout_ir.regularizers.line_pass import AlongLine
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.root_forms import RootForms, added_up, pull_root
from torch_dropout_ir.regularizers.site_forms import (
    LINEAR,
    Form,
    Known,
    assemble,
    of_sums,
)
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.written_parameters import unwritten

_ONE_DRAW: Final = (
    "one draw does not tell its error where samples meet (batch normalization, a loss "
    "that couples them), are not known to be apart, or are one: take `num_samples=8`"
)
Run: TypeAlias = Callable[[], AbstractContextManager[tuple[CleanPass, OutputsRead]]]


def estimated(
    name: str,
    first_pass: Callable[..., Any],
    drawn: Callable[..., Estimate],
    model: nn.Module,
    batch: Batch,
    loss: Any,
    num_samples: int | None,
    *,
    linear: bool,
) -> Estimate:
    """Return the estimate that a first pass shows, or what is drawn of what it does.

    ``linear`` leaves out the curvature of the network.
    """
    if num_samples is not None:
        check_count(name, "num_samples", num_samples, 1)
    asked = Asked(model, as_pair(batch), resolve_loss(loss), num_samples)

    def look(survey: Survey | None, line: bool) -> Any:
        seen = first_pass(asked, survey, line, None)
        if isinstance(seen, LossParts):  # finding them has used the pass up
            seen = first_pass(asked, survey, line, seen)
        return seen

    survey = Survey.of(model)
    with unwritten(model, survey=survey), explained(name):
        found = look(survey, True)
        if isinstance(found, AlongLine):
            found = found.estimate(asked, linear) or look(None, False)
        if not isinstance(found, Estimate):
            found = drawn(found, asked)
    check_finite(name, found.value, model, batch[0])
    if num_samples == 1 and math.isnan(found.standard_error.item()):
        found = dataclasses.replace(found, notes=(*found.notes, _ONE_DRAW))
    return found


def draws_by_passes(
    forms: RootForms, run: Run, coupled: bool | None
) -> tuple[list[list[Form]], bool]:
    """Return the draws of the forms, of passes over all rows, and whether samples meet.

    A graph that goes as its derivatives come holds no more than a step: each root has a
    pass of its own. Where a graph that is kept holds no more either, as with sites near
    the network's end, one pass does for all.
    """
    if not forms.rooted:
        with run() as (clean, read):
            return forms.draws(clean, read, coupled=coupled, keep=False)
    if coupled is None:
        coupled = samples_meet(run)
    pulled = _pulled(forms, run, coupled)
    if forms.num_samples is None:
        return [added_up(form for _, form in pulled)], coupled
    draws: dict[int, list[Form]] = {}
    for draw, form in pulled:
        draws.setdefault(draw, []).append(form)
    return list(draws.values()), coupled


@contextlib.contextmanager
def again(asked: Asked, **options: Any) -> Iterator[tuple[CleanPass, OutputsRead]]:
    """Run a pass over all rows once more, with options of its own."""
    with clean_pass(asked.model, asked.batch[0], **options) as clean:
        yield clean, read_outputs(clean.outputs, asked.loss, asked.batch[1])


def samples_meet(run: Run) -> bool:
    """Return what :meth:`CleanPass.couples_samples` does, by two passes."""
    told: list[bool | None] = []
    weights: list[list[dict[int, Tensor]]] = []
    for k in range(2):
        with run() as (clean, read):
            told = told or [clean.samples_meet(x) for x in read.tensors]
            if None not in told:
                return some(any(told), "samples meet")
            asked = [
                x for x, meet in zip(read.tensors, told, strict=True) if meet is None
            ]
            counts = [clean.count(x) for x in asked]
            weights.append([])
            for i, (x, count) in enumerate(zip(asked, counts, strict=True)):
                root = [*telling_roots(x, count)][k]
                weights[k].append(row_weights(clean.pull, x, root, i + 1 < len(asked)))
    even, scaled = weights
    apart = [alike(*three) for three in zip(even, scaled, counts, strict=True)]
    return some(any(told) or not all(apart), "samples meet")


def _pulled(forms: RootForms, run: Run, coupled: bool) -> Iterator[tuple[int, Form]]:
    """Yield the forms of all roots, each with the number of its draw."""
    roots, last = forms.roots(coupled), False
    while not last:
        with run() as (clean, read):
            keep = clean.weighed(read.tensors).may_keep()
            for draw, (root, sign), last in roots:  # made when a pass is there
                kept = keep and not last
                pulled = pull_root(clean, read.tensors[0], root, sign, kept)
                del root
                yield from ((draw, form) for form in pulled)
                if not kept:
                    break
            else:
                last = True  # a draw without roots
        del clean, read


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
) -> Known:
    """Return what there is to say of an estimate by forms of a pass."""
    told = forms.curved or not clean.uses or check_curvature(read)
    linear = () if told else (LINEAR,)
    notes = (*clean.noise_left_out(model), *beside, *linear)
    exact = is_exact(clean, loss, read.targets, forms.num_samples)
    like = read.tensors[0].new_empty(())
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
    beside = read_beside(read, clean.edges, product, clean.later)
    forms = RootForms(clean, read, num_samples, product)
    summed = forms.sums(clean, read)
    draws, coupled = ([], False) if summed else forms.draws(clean, read)
    known = known_of(model, clean, read, loss, forms, beside)
    if summed is not None:
        return of_sums(known, summed)
    return assemble(known, draws, coupled or forms.loss_couples)
