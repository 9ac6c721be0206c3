"""Which estimators of R_1 tell the truth about a model, and how well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_real
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers import (
    Estimate,
    gauss_newton,
    last_layer,
    leave_one_out,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.checks import (
    as_pair,
    check_batch,
    check_finite,
    noise_left_out,
)
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.estimate import (
    fits_last_layer,
    is_exact,
    last_layer_form,
)
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.testing.enumeration import (
    average,
    precision,
    uses_of_sites,
)
from torch_dropout_ir.testing.findings import Claim, Finding, RegularizerReport
from torch_dropout_ir.written_parameters import unwritten

# Of a number: how many times the draws that were asked for.
Estimator: TypeAlias = tuple[Claim, Callable[[int], Estimate]]
_FAR: Final = 5.0  # standard errors
_ALIKE: Final = 24  # draws: signs are that often the same once in 2^22
_ROUNDED: Final = 64  # units of the last place of a loss, which is a sum of many
_AGAIN: Final = 16  # times the draws, where few may not have shown their spread


def check_regularizer(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    *,
    rtol: float = 1e-6,
    max_masks: int = 2**14,
    num_masks: int = 4096,
    num_samples: int = 64,
    seed: int = 0,
) -> RegularizerReport:
    """Hold every estimator of R_1 against the truth on a model of yours.

    The truth is ``E[R_drop] - R_S`` from every mask; where those are more than
    ``max_masks``, or the model draws random numbers besides its sites, from
    ``num_masks`` of them at random, with the error of that.

    Args:
        model: The model; left as it is, and so are torch's generators.
        batch: ``(inputs, targets)``; several inputs are a tuple or a mapping.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable; of a model
            with several outputs a callable that picks what it takes.
        rtol: Relative tolerance for agreement, on top of five standard errors (more
            where they come from few draws) and of what the model's precision rounds.
            An unbiased estimate beyond that is drawn again, sixteen times as often:
            few draws of a loss that seldom is large do not show their spread.
        max_masks: Most masks to enumerate.
        num_masks: Random masks where they are more, and of ``monte_carlo``.
        num_samples: Draws of the sampled estimators, at least 2.
        seed: Seed of what is drawn.

    Returns:
        The report.

    Raises:
        TypeError: If ``batch`` is no pair, or a number is of another kind.
        ValueError: If ``num_samples`` or ``num_masks`` is below 2, ``rtol`` is
            negative, the batch is empty, or the loss is not finite.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Lemma 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        >>> batch = torch.ones(8, 2).double(), torch.zeros(8, 1).double()
        >>> report = tdi.testing.check_regularizer(net.double(), batch, "mse")
        >>> report.assert_holds()
        >>> "last_layer" in report.agreeing
        True
    """  # noqa: DOC502 (the checks raise too)
    for name, count in (("num_samples", num_samples), ("num_masks", num_masks)):
        check_count("check_regularizer", name, count, 2)  # one has no standard error
    check_count("check_regularizer", "max_masks", max_masks, 0)
    check_count("check_regularizer", "seed", seed, 0)
    check_real("check_regularizer", "rtol", rtol, least=0, finite=False)
    resolved, batch = resolve_loss(loss), as_pair(batch)
    check_batch(model, batch[0])
    with preserved_rng(model, seed), unwritten(model):
        clean = clean_risk(model, batch, resolved).detach()
        check_finite("check_regularizer", clean, model, batch[0])
        risk = float(clean)
        truth, error = _truth(model, batch, resolved, risk, max_masks, num_masks)
        estimators, notes = _estimators(model, batch, resolved, num_masks, num_samples)
        rounding = _ROUNDED * precision(model, clean) * max(abs(risk), abs(truth))
        allowed = rtol * abs(truth) + rounding
        findings = tuple(
            _finding(name, estimator, truth, error, allowed)
            for name, estimator in estimators.items()
        )
    return RegularizerReport(truth, error, risk, rtol, findings, notes)


def _truth(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    risk: float,
    max_masks: int,
    num_masks: int,
) -> tuple[float, float]:
    uses = uses_of_sites(model, batch, loss)
    if uses.count <= max_masks and not uses.drawn:
        return float(average(model, batch, loss, uses)) - risk, 0.0
    found = monte_carlo(model, batch, loss, num_masks=num_masks)
    return float(found.value), float(found.standard_error)


def _estimators(
    model: nn.Module, batch: Batch, loss: Loss, num_masks: int, num_samples: int
) -> tuple[dict[str, Estimator], tuple[str, ...]]:
    """Every estimator with what it claims, and what there is to know of the model."""
    with clean_pass(model, batch[0], find_last=True) as clean:
        at_last = fits_last_layer(clean)
        notes = noise_left_out(model, clean.noisy, bool(clean.uses), drawn=clean.drawn)
        closed = is_exact(clean, loss, batch[1], None) and not clean.unreachable
        closed = closed and all(site.p < 1 for site, _, _ in clean.uses)
    form: Claim = "exact" if closed else "second order"
    sampled: Claim = "unbiased" if closed else "second order"
    last: Claim = form if at_last else "second order"
    found: dict[str, Estimator] = {
        "last_layer": (last, partial(_of_features, model, batch, loss, last_layer)),
        "leave_one_out": (
            last,
            partial(_of_features, model, batch, loss, leave_one_out),
        ),
    }
    for function in (gauss_newton, second_order):
        name, draw = function.__name__, partial(_sampled, function, model, batch, loss)
        found[name] = form, partial(draw, None)
        found[f"{name}, sampled"] = sampled, partial(draw, num_samples)
    found["monte_carlo"] = (
        "unbiased",
        lambda times: monte_carlo(model, batch, loss, num_masks=times * num_masks),
    )
    return found, notes


def _sampled(
    form: Callable[..., Estimate],
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    num_samples: int | None,
    times: int,
) -> Estimate:
    """Take a form by so many times the draws, or exactly."""
    count = num_samples and times * num_samples
    return form(model, batch, loss, num_samples=count)


def _of_features(
    model: nn.Module, batch: Batch, loss: Loss, form: Callable[..., Tensor], _: int
) -> Estimate:
    """Take a closed form of the features before the last layer."""
    with clean_pass(model, batch[0], find_last=True) as clean, torch.no_grad():
        value = last_layer_form(clean, batch[1], loss, form)
    return Estimate(value, {}, torch.zeros_like(value), False, 0)


def _finding(
    name: str,
    estimator: Estimator,
    truth: float,
    error: float,
    allowed: float,
    times: int = 1,
) -> Finding:
    claim, run = estimator
    nan = float("nan")
    try:
        found = run(times)
    except (ValueError, RuntimeError, TypeError) as err:
        # What claims to be true of this model has to have a value.
        said: Claim = "not applicable" if claim == "second order" else claim
        return Finding(name, said, nan, nan, nan, False, str(err))
    value, own = float(found.value.detach()), float(found.standard_error)
    off = abs(value - truth)
    why = ""
    if math.isnan(own) or math.isnan(error):
        why = "masks too alike to tell; raise `num_masks`"
    elif own == 0 and 0 < found.num_samples < _ALIKE and off > allowed:
        why = "draws alike, perhaps by chance; raise `num_samples`"
    if why:
        return Finding(name, "not applicable", nan, nan, nan, False, why)
    relative = off / abs(truth) if truth else (0.0 if off == 0 else math.inf)
    spread = own
    if claim == "unbiased" and name != "monte_carlo" and value:
        # Squares: where their draws are small by chance, so is the spread they show.
        spread *= max(1.0, abs(truth / value))
    far = _far(found.num_samples) if own else _FAR
    agrees = off <= allowed + far * math.hypot(spread, error)
    if claim == "unbiased" and not agrees and times == 1:
        return _finding(name, estimator, truth, error, allowed, _AGAIN)
    return Finding(name, claim, value, own, relative, agrees, notes=found.notes)


def _far(draws: int) -> float:
    """Return standard errors that are as rare as five of a normal variable.

    Wallace's approximation to Student's distribution (*Annals of Mathematical
    Statistics* 30, 1959), on the safe side where ``draws`` are few.
    """
    freedom = max(draws - 1, 1)
    scale = (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1((_FAR * scale) ** 2 / freedom))
