"""What was found of the estimators of R_1 on a model, as a table."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Claim: TypeAlias = Literal["exact", "unbiased", "second order", "not applicable"]


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
        agrees: Whether it is within the tolerance of the truth: ``rtol``, rounding and
            five standard errors.
        reason: Why there is no value, else empty.
        notes: What the estimate says of itself, as of sites whose part is 0.
    """

    name: str
    claim: Claim
    value: float
    standard_error: float
    relative_error: float
    agrees: bool
    reason: str = ""
    notes: tuple[str, ...] = ()


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
        of_each = (note for f in self.findings for note in f.notes)
        lines += [f"note: {note}" for note in dict.fromkeys((*self.notes, *of_each))]
        return "\n".join(lines)
