"""Which estimators of R_1 tell the truth about a model, and how well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch, preserved_rng
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
from torch_dropout_ir.regularizers.gauss_newton import is_exact
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.regularizers.modified_loss import (
    fits_last_layer,
    last_layer_form,
)
from torch_dropout_ir.testing.enumeration import count_masks, expected_dropout_loss

Claim: TypeAlias = Literal["exact", "unbiased", "second order", "not applicable"]
Estimator: TypeAlias = tuple[Claim, Callable[[], Estimate]]
_FAR: Final = 5.0  # standard errors
_ROUNDED: Final = 64  # units of the last place of a loss, which is a sum of many


@dataclasses.dataclass(frozen=True)
class Finding:
    """One estimator against the truth.

    Attributes:
        name: The estimator.
        claim: ``"exact"``: equal to R_1 up to rounding; ``"unbiased"``: its mean is;
            ``"second order"``: an approximation, of which nothing is asserted;
            ``"not applicable"``: it does not fit the model.
        value: The estimate; NaN where not applicable.
        standard_error: Its standard error; 0 for a formula.
        relative_error: ``|value - truth| / |truth|``.
        agrees: Whether it is within the tolerance of the truth: ``rtol`` and five
            standard errors.
        reason: Why there is no value, else empty.
    """

    name: str
    claim: Claim
    value: float
    standard_error: float
    relative_error: float
    agrees: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class RegularizerReport:
    """What :func:`check_regularizer` found; ``str()`` makes a table of it.

    Attributes:
        truth: R_1.
        truth_standard_error: Its standard error; 0 where every mask was taken.
        risk: ``R_S``, for scale.
        rtol: The relative tolerance.
        findings: One for each estimator.
        notes: What there is to know besides: noise that is in none of the numbers, or
            that no dropout site acted.
    """

    truth: float
    truth_standard_error: float
    risk: float
    rtol: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def agreeing(self) -> tuple[str, ...]:
        """Names of the estimators that agree with the truth."""
        return tuple(f.name for f in self.findings if f.agrees)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Findings whose claim does not hold."""
        claims = ("exact", "unbiased")
        return tuple(f for f in self.findings if f.claim in claims and not f.agrees)

    def assert_holds(self) -> None:
        """Raise unless every estimator is what it claims to be.

        Raises:
            AssertionError: With the table.
        """
        if self.broken:
            names = [f.name for f in self.broken]
            raise AssertionError(f"{names} are not what they claim to be\n{self}")

    def __str__(self) -> str:
        source = "every mask"
        if self.truth_standard_error:
            source = f"masks at random, +- {self.truth_standard_error:.2g}"
        lines = [
            f"R_1 = {self.truth:.6g} ({source}); R_S = {self.risk:.6g}",
            f"{'estimator':24}{'claim':>16}{'value':>14}{'+-':>10}{'off by':>10}"
            "  agrees",
        ]
        for f in self.findings:
            if f.reason:
                lines.append(f"{f.name:24}{f.claim:>16}  {f.reason}")
                continue
            error = f"{f.standard_error:.1e}" if f.standard_error else "-"
            lines.append(
                f"{f.name:24}{f.claim:>16}{f.value:>14.6g}{error:>10}"
                f"{f.relative_error:>10.1e}  {'yes' if f.agrees else 'no'}"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


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
    ``max_masks``, from ``num_masks`` of them at random, with the error of that.

    Args:
        model: The model; left as it is, and so are torch's generators.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        rtol: Relative tolerance for agreement, on top of five standard errors and of
            what the precision of the model rounds.
        max_masks: Most masks to enumerate.
        num_masks: Random masks where they are more, and of ``monte_carlo``.
        num_samples: Draws of the sampled estimators, at least 2.
        seed: Seed of what is drawn.

    Returns:
        The report.

    Raises:
        TypeError: If ``batch`` is no pair.
        ValueError: If ``num_samples`` or ``num_masks`` is below 2, the batch is empty,
            or the loss is not finite.

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
        if count < 2:
            raise ValueError(
                f"check_regularizer: expected `{name}` >= 2, got {count}: one draw has "
                "no standard error"
            )
    resolved, batch = resolve_loss(loss), as_pair(batch)
    check_batch(model, batch[0])
    with preserved_rng(model, seed):
        clean = clean_risk(model, batch, resolved).detach()
        check_finite("check_regularizer", clean, model, batch[0])
        risk = float(clean)
        truth, error = _truth(model, batch, resolved, risk, max_masks, num_masks)
        estimators, notes = _estimators(model, batch, resolved, num_masks, num_samples)
        rounding = _ROUNDED * _precision(model, clean) * max(abs(risk), abs(truth))
        allowed = rtol * abs(truth) + rounding
        findings = tuple(
            _finding(name, estimator, truth, error, allowed)
            for name, estimator in estimators.items()
        )
    return RegularizerReport(truth, error, risk, rtol, findings, notes)


def _precision(model: nn.Module, risk: Tensor) -> float:
    """The coarsest rounding of parameters and loss."""
    real = (x for x in (*model.parameters(), risk) if x.is_floating_point())
    return max(torch.finfo(x.dtype).eps for x in real)


def _truth(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    risk: float,
    max_masks: int,
    num_masks: int,
) -> tuple[float, float]:
    if count_masks(model, batch, loss) <= max_masks:
        every = expected_dropout_loss(model, batch, loss, max_masks=max_masks)
        return float(every) - risk, 0.0
    found = monte_carlo(model, batch, loss, num_masks=num_masks)
    return float(found.value), float(found.standard_error)


def _estimators(
    model: nn.Module, batch: Batch, loss: Loss, num_masks: int, num_samples: int
) -> tuple[dict[str, Estimator], tuple[str, ...]]:
    """Every estimator with what it claims, and what there is to know of the model."""
    with clean_pass(model, batch[0]) as clean:
        at_last = fits_last_layer(clean, loss)
        notes = noise_left_out(model, clean.noisy, bool(clean.uses))
        closed = is_exact(model, clean, loss, None) and not clean.unreachable
        closed = closed and all(site.p < 1 for site, _, _ in clean.uses)
    form: Claim = "exact" if closed else "second order"
    sampled: Claim = "unbiased" if closed else "second order"
    last: Claim = form if at_last else "second order"
    found: dict[str, Estimator] = {
        "last_layer": (last, lambda: _of_features(model, batch, loss, last_layer)),
        "leave_one_out": (
            last,
            lambda: _of_features(model, batch, loss, leave_one_out),
        ),
    }
    for function in (gauss_newton, second_order):
        name = function.__name__
        found[name] = form, partial(function, model, batch, loss, num_samples=None)
        found[f"{name}, sampled"] = (
            sampled,
            partial(function, model, batch, loss, num_samples=num_samples),
        )
    found["monte_carlo"] = (
        "unbiased",
        partial(monte_carlo, model, batch, loss, num_masks=num_masks),
    )
    return found, notes


def _of_features(
    model: nn.Module, batch: Batch, loss: Loss, form: Callable[..., Tensor]
) -> Estimate:
    """Take a closed form of the features before the last layer."""
    with clean_pass(model, batch[0]) as clean, torch.no_grad():
        value = last_layer_form(clean, batch[1], loss, form)
    return Estimate(value, {}, torch.zeros_like(value), False, 0)


def _finding(
    name: str, estimator: Estimator, truth: float, error: float, allowed: float
) -> Finding:
    claim, run = estimator
    nan = float("nan")
    try:
        found = run()
    except (ValueError, RuntimeError, TypeError) as err:
        # What claims to be true of this model has to have a value.
        said: Claim = "not applicable" if claim == "second order" else claim
        return Finding(name, said, nan, nan, nan, False, str(err))
    value, own = float(found.value.detach()), float(found.standard_error)
    if math.isnan(own) or math.isnan(error):
        why = "masks too alike to tell; raise `num_masks`"
        return Finding(name, "not applicable", nan, nan, nan, False, why)
    off = abs(value - truth)
    relative = off / abs(truth) if truth else (0.0 if off == 0 else math.inf)
    agrees = off <= allowed + _FAR * math.hypot(own, error)
    return Finding(name, claim, value, own, relative, agrees)
