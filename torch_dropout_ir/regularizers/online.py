"""R_1 for a training run: the best estimate that a few passes can give."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.collectives import every
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_finite
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Estimate, fits_last_layer, of_squares
from torch_dropout_ir.regularizers.excess import TOO_ALIKE, ExcessRisk
from torch_dropout_ir.regularizers.first_order import FirstOrder
from torch_dropout_ir.regularizers.last_layer import last_layer
from torch_dropout_ir.regularizers.path_parts import Parts, PathParts
from torch_dropout_ir.regularizers.root_passes import estimate

_DRAWS: Final = 2  # of the form, where targets are not known
_ALONG: Final = (
    "unbiased, of {} other masks along the path from no noise to all of it: parts add "
    "up to R_1 in the mean"
)
_UNKNOWN: Final = "second order (approximate; targets unknown)"


def online(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    *,
    num_masks: int = 8,
    most_masks: int = 8,
) -> tuple[Estimate, str, Tensor | None]:
    """Return R_1 of a batch, how it was obtained, and the loss without dropout.

    Where the only site is a :class:`torch.nn.Dropout` straight before the last linear
    layer and the loss is squared, it is the closed form of :func:`last_layer`, exact.
    Else, where targets are known, its definition, averaged over masks: unbiased, for
    the second-order forms can be off by a factor in deep networks. Of several sites
    each has what it adds along the path from no noise to all of it, by half as many
    masks: parts add up to R_1 (:mod:`~torch_dropout_ir.regularizers.path_parts`). Where
    targets are not known the Gauss-Newton form is all that can be had.

    Args:
        model: The model; left as it is.
        batch: ``(inputs, targets)``; targets may be None.
        loss: The loss.
        num_masks: Masks where R_1 is averaged over them.
        most_masks: How many it may be where so few elements are dropped, as by
            stochastic depth of a small batch, that there is no standard error yet, if
            there is one then.

    Returns:
        The estimate, a sentence, and ``R_S``, 0-d, or None without targets.

    Raises:
        ValueError: If an estimate is not finite.
    """  # noqa: DOC502 (`check_finite` raises)
    twice, targets = loss.kind == "general", batch[1]
    run = clean_pass(model, batch[0], twice=twice, bare=not twice, find_last=True)
    with run as clean:
        closed = _closed_form(clean, targets, loss)
        told = every(closed is not None, "closed form")
        if targets is None:
            found, how = closed, "closed form"
            if found is None or not told:
                how = "sampled Gauss-Newton form"
                found = estimate(model, clean, None, loss, _DRAWS)
            how = f"exact, {how}" if found.exact else f"{_UNKNOWN}, {how}"
            return _checked(found, model, batch), _said(how, found), None
        with torch.no_grad():
            # A model may have computed it itself, with its graph.
            risk = loss(clean.outputs, targets).detach()
        if told and closed is not None:
            how = "exact, closed form"
            return _checked(closed, model, batch), _said(how, closed), risk
        first, notes = FirstOrder.of(clean, loss, targets), clean.noise_left_out(model)
    passes = ExcessRisk(model, batch, loss, first), PathParts(model, batch, loss, first)
    found, how = _averaged(*passes, notes, num_masks, most_masks)
    return _checked(found, model, batch), _said(how, found), risk


def _averaged(
    excess: ExcessRisk,
    path: PathParts,
    notes: tuple[str, ...],
    num_masks: int,
    most_masks: int,
) -> tuple[Estimate, str]:
    """Return R_1 averaged over masks, with parts that add up to it, and how."""
    excess.draw(num_masks)
    if (lacking := excess.lacking()) <= most_masks - num_masks:
        excess.draw(lacking)
    value, error = excess.mean()
    notes += tuple(f"site `{x}` drops everything (p = 1)" for x in excess.seen.cut)
    how = f"unbiased, average over {excess.num_masks} masks"
    if not excess.knows_its_error:
        how = f"{TOO_ALIKE}; {how}"
    parts, said = Parts({}, {}), ""
    try:
        parts = path.parts(value, error, max(num_masks // 2, 2), most_masks // 2)
    except (RuntimeError, ValueError) as err:
        said = str(err)
    if not every(not said, "parts"):  # here: where others have left, that is why
        parts, notes = Parts({}, {}), (*notes, said or "another rank has none")
    elif parts.drawn:
        how = f"{how}; by site: {_ALONG.format(parts.drawn)}"
    found = Estimate(
        value, parts.values, error, False, excess.num_masks, notes=notes,
        per_site_standard_error=parts.errors,
    )  # fmt: skip
    return found, how


def _checked(found: Estimate, model: nn.Module, batch: Batch) -> Estimate:
    check_finite("regularizer/R1", found.value, model, batch[0])
    return found


def _said(how: str, found: Estimate) -> str:
    return "; ".join((how, *found.notes))


@torch.no_grad()
def _closed_form(clean: CleanPass, targets: Any, loss: Loss) -> Estimate | None:
    """Return what is exact; where targets are not known, a form of second order too."""
    # With p = 1 the noise has no variance, and masks alone tell what it does.
    fits = fits_last_layer(clean) and clean.uses[0][0].p < 1
    if clean.last_weight is None or not fits:
        return None
    site, features, _ = clean.uses[0]
    outputs: Tensor = clean.outputs.detach()
    if targets is None:
        exact = loss.is_quadratic
        if not exact and loss.at(outputs).kind != "cross_entropy":
            return None
        # Its classes are in dimension 1, those of the linear layer in the last.
        if not exact and outputs.ndim > 2:
            return None
    elif not (exact := of_squares(clean, loss, targets)):
        return None
    elif loss.kind == "general":
        loss = dataclasses.replace(loss, kind="elementwise")
    value = last_layer(
        features, clean.last_weight, site.p, loss=loss, outputs=outputs, targets=targets
    )
    error, name = torch.zeros_like(value), site.name
    return Estimate(
        value, {name: value}, error, exact, 0,
        per_site_standard_error={name: error},
    )  # fmt: skip
