"""The analysis in words: its sites, its numbers, its cost, and what is absent."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from torch import nn

from torch_dropout_ir.analysis.facts import RUN
from torch_dropout_ir.analysis.observed_masks import ObservedMasks
from torch_dropout_ir.analysis.tables import in_short, section, tables
from torch_dropout_ir.sites import find_sites, unobservable

if TYPE_CHECKING:
    from torch_dropout_ir.analysis.analysis import Analysis

_COST: Final = "cost/seconds/"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """A place where dropout acts.

    Attributes:
        name: Name in ``model.named_modules()``.
        kind: Class of the module.
        p: Probability of dropping.
        reason: Empty where it is observed; else why it cannot be.
    """

    name: str
    kind: str
    p: float
    reason: str = ""

    @property
    def observed(self) -> bool:
        """Whether its masks and its part of R_1 are measured."""
        return not self.reason


def report_sites(model: nn.Module, masks: ObservedMasks) -> tuple[SiteReport, ...]:
    """Return the sites of ``model``, and of what passes have shown; observed first."""
    calls, unseen = masks.calls, masks.unseen
    modules = dict(model.named_modules())
    sites = {s.name: (type(s.module).__name__, s.p) for s in find_sites(model)}
    sites |= {name: ("call", site.p) for name, site in calls.items()}
    seen = [SiteReport(n, *site) for n, site in sites.items() if n not in unseen]
    hidden = [
        SiteReport(name, type(modules[name]).__name__, _rate(modules[name]), reason)
        for name, reason in unobservable(model).items()
    ]
    hidden += [
        SiteReport(name, *sites.get(name, ("call", float("nan"))), reason)
        for name, reason in unseen.items()
    ]
    return (*seen, *hidden)


def _rate(module: nn.Module) -> float:
    return float(getattr(module, "p", getattr(module, "dropout", float("nan"))))


def describe(analysis: Analysis) -> str:
    """Return a table that a person can read."""
    model = type(analysis.model).__name__
    lines = [f"{model} after {analysis.step} optimizer steps"]
    lines += [*in_short(analysis.history), *_behind(analysis)]
    lines += ["", "dropout sites"]
    lines += [f"  {_site_line(site)}" for site in analysis.sites] or [
        "  no dropout module"
    ]
    latest = analysis.latest
    shown = {t: curve for t, curve in analysis.history.items() if t != "cost/share"}
    lines += tables(shown)  # the share of now is said below
    facts = {k: v for k, v in analysis.notes.items() if k.startswith(RUN)}
    said = {k: v for k, v in analysis.notes.items() if v and k not in facts}
    lines += section("how the numbers were obtained", said)
    lines += section("absent measures", analysis.absent)
    lines += section("run", {k.removeprefix(RUN): v for k, v in facts.items()})
    lines += ["", f"the analysis took {analysis.cost_share:.1%} of the time"]
    if not analysis.step and not latest:
        lines.append(
            "nothing was measured: no step of a torch.optim.Optimizer over parameters "
            "of this model was seen; where they are stepped by hand, "
            "`analysis.measure()` measures between backward pass and update"
        )
    return "\n".join(lines)


def _behind(analysis: Analysis) -> list[str]:
    """Say what was measured long ago alone."""
    taken = {
        tag.removeprefix(_COST): values[-1][0]
        for tag, values in analysis.history.items()
        if tag.startswith(_COST) and tag.removeprefix(_COST) not in analysis.absent
    }
    if old := [n for n, step in taken.items() if analysis.step > 2 * step + 1]:
        names = "nothing" if len(old) == len(taken) else f"of {', '.join(old)} nothing"
        return [
            f"{names} was measured after step {max(taken[n] for n in old)}: the "
            "schedule has not come to it yet; `analysis.measure()` measures now, "
            "`every=` at fixed steps"
        ]
    return []


def _site_line(site: SiteReport) -> str:
    seen = "observed" if site.p else "drops nothing"
    if not site.observed:
        seen = f"not observed: {site.reason}"
    kind = site.kind if math.isnan(site.p) else f"{site.kind}(p={site.p:g})"
    own = site.name[:1] in {"", ":"}  # the model, or a call in its own forward pass
    return f"{'(the model itself)' if own else ''}{site.name}  {kind}  {seen}"
