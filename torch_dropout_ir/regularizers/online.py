"""R_1 for a training run: the best estimate that a few passes can give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.collectives import alone, every, some
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_finite
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Estimate, fits_last_layer, of_squares
from torch_dropout_ir.regularizers.excess import TOO_ALIKE, ExcessRisk, linear_parts
from torch_dropout_ir.regularizers.last_layer import last_layer
from torch_dropout_ir.regularizers.outputs import check_curvature, read_outputs
from torch_dropout_ir.regularizers.own_loss import outputs_within
from torch_dropout_ir.regularizers.root_passes import estimate
from torch_dropout_ir.regularizers.second_order import second_order

_FEW: Final = 16  # outputs of a batch


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
    the second-order forms can be off by a factor in deep networks. Where targets are
    not known the second-order form is all that can be had. The parts of the sites are
    those of the second-order form in any case: the Gauss-Newton form, or, where the
    loss is linear in the outputs, as one that the model returns itself, the full one.

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
    twice = loss.kind == "general"
    risk, slopes, linear = None, [], False
    seed = int(torch.randint(2**62, (), device="cpu"))  # of noise beside sites
    run = functools.partial(clean_pass, model, batch[0], twice=twice, find_last=True)
    with preserved_rng(model, seed), run(bare=not twice) as clean:
        found, how, within = _second_order(model, clean, batch[1], loss)
        if batch[1] is not None:
            with torch.no_grad():
                # A model may have computed it itself, with its graph.
                risk = loss(clean.outputs, batch[1]).detach()
            if not found.exact:
                slopes = linear_parts(clean, loss, batch[1])
                linear = not within and _is_linear(clean, loss, batch[1])
                linear = every(linear, "linear")
    if linear:
        with preserved_rng(model, seed):
            form = functools.partial(second_order, model, batch, loss)
            found, how = _parts(form, "sampled form of the whole loss")
    if found.exact:
        how = f"exact, {how}"
    elif risk is None:
        how = f"second order (approximate; targets unknown), {how}"
    else:
        excess = ExcessRisk(model, batch, loss, slopes)
        excess.draw(num_masks)
        if (lacking := excess.lacking()) <= most_masks - num_masks:
            excess.draw(lacking)
        value, error = excess.mean()
        found = dataclasses.replace(
            found, value=value, standard_error=error, num_samples=excess.num_masks
        )
        if found.per_site:
            how = f"second-order parts (approximate), {how}"
        how = f"unbiased, average over {excess.num_masks} masks; by site: {how}"
        if not excess.knows_its_error:
            how = f"{TOO_ALIKE}; {how}"
    check_finite("regularizer/R1", found.value, model, batch[0])
    return found, "; ".join((how, *found.notes)), risk


def _second_order(
    model: nn.Module, clean: CleanPass, targets: Any, loss: Loss
) -> tuple[Estimate, str, bool]:
    """Return the parts, how, and whether they are within a loss of the model's own."""
    closed = _closed_form(clean, targets, loss)
    if every(closed is not None, "closed form") and closed is not None:
        return closed, "closed form", False
    own = outputs_within(clean, loss, targets)
    own = own if every(own is not None, "own loss") else None
    # Without targets it is the form or nothing; with them R_1 can still be had.
    draws = 2 if targets is None else 1
    form = functools.partial(estimate, model, clean, targets, loss, draws, own)
    found, how = _parts(form, "sampled Gauss-Newton form", needed=targets is None)
    errors = [found.standard_error, *found.per_site_standard_error.values()]
    if draws == 1 and some(any([x.isnan() for x in errors]), "no error"):
        all_of_few = functools.partial(estimate, model, clean, targets, loss, None, own)
        # Ranks whose passes meet would have to take as many of them.
        few = alone() and _has_few_outputs(clean, own)
        other, said = _parts(all_of_few if few else form, "Gauss-Newton form")
        if other.per_site and not other.num_samples:
            found, how = other, said
        elif other.per_site:
            found, how = _mean(found, other), f"{how}, of two draws"
    return found, how, own is not None and bool(found.per_site)


def _has_few_outputs(clean: CleanPass, own: Any) -> bool:
    """Whether a pass for each output, as of a single sample, is no more than a few."""
    outputs = clean.outputs if own is None else own[0].single
    return isinstance(outputs, Tensor) and outputs.numel() <= _FEW


def _mean(a: Estimate, b: Estimate) -> Estimate:
    """Return the mean of two draws, whose difference tells its error, if it is one."""

    def error(x: Tensor, y: Tensor) -> Tensor:
        off = (x - y).abs() / 2
        return off.where((off > 0) | (x == 0), torch.nan)

    sites = {name: (x, b.per_site[name]) for name, x in a.per_site.items()}
    return dataclasses.replace(
        a,
        value=(a.value + b.value) / 2,
        per_site={name: (x + y) / 2 for name, (x, y) in sites.items()},
        standard_error=error(a.value, b.value),
        per_site_standard_error={name: error(*both) for name, both in sites.items()},
        num_samples=2,
    )


def _parts(
    form: Callable[[], Estimate], how: str, needed: bool = False
) -> tuple[Estimate, str]:
    """Return the parts of the sites, on all ranks or on none, where they can be had."""
    said = "another rank has none"
    try:
        found = form()
    except (RuntimeError, ValueError) as err:
        if needed:
            raise
        said = str(err)
        every(False, "parts")  # here: where the others have left, this is why
    else:
        if every(True, "parts"):
            return found, how
    zero = torch.zeros((), dtype=torch.get_default_dtype(), device="cpu")
    return Estimate(zero, {}, zero, False, 0, notes=(said,)), "none"


def _is_linear(clean: CleanPass, loss: Loss, targets: Any) -> bool:
    """Whether the loss is linear in the outputs, where its Hessian is 0."""
    if loss.kind != "general":
        return False
    try:
        return not check_curvature(read_outputs(clean.outputs, loss, targets))
    except (RuntimeError, ValueError):
        return False  # no second derivative, or piecewise linear: no form sees it


@torch.no_grad()
def _closed_form(clean: CleanPass, targets: Any, loss: Loss) -> Estimate | None:
    # With p = 1 the noise has no variance, and masks alone tell what it does.
    fits = fits_last_layer(clean) and clean.uses[0][0].p < 1
    if clean.last_weight is None or not fits:
        return None
    site, features, _ = clean.uses[0]
    outputs: Tensor = clean.outputs.detach()
    if targets is None:
        exact = loss.is_quadratic
    elif (exact := of_squares(clean, loss, targets)) and loss.kind == "general":
        loss = dataclasses.replace(loss, kind="elementwise")
    if not exact and loss.at(outputs).kind != "cross_entropy":
        return None
    # Cross-entropy has its classes in dimension 1, the linear layer in the last.
    if loss.kind == "cross_entropy" and outputs.ndim > 2:
        return None
    value = last_layer(
        features, clean.last_weight, site.p, loss=loss, outputs=outputs, targets=targets
    )
    error, name = torch.zeros_like(value), site.name
    return Estimate(
        value, {name: value}, error, exact, 0,
        per_site_standard_error={name: error},
    )  # fmt: skip
