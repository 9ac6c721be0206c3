"""The analysis in words: sites, numbers, cost, what is absent, and what runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.optim import Optimizer

from torch_dropout_ir.analysis.observed_masks import ObservedMasks
from torch_dropout_ir.analysis.snapshot import rate_of
from torch_dropout_ir.analysis.tables import in_short, section, tables
from torch_dropout_ir.sites import find_sites, unobservable

if TYPE_CHECKING:
    from torch_dropout_ir.analysis.analysis import Analysis

_COST: Final = "cost/seconds/"
_RUN: Final = "run/"
_MOST_SITES: Final = 20


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
    facts = {k: v for k, v in analysis.notes.items() if k.startswith(_RUN)}
    said = {k: v for k, v in analysis.notes.items() if v and k not in facts}
    lines += section("how the numbers were obtained", said)
    lines += section("absent measures", analysis.absent)
    lines += section("run", {k.removeprefix(_RUN): v for k, v in facts.items()})
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


def run_facts(analysis: Analysis, optimizer: Optimizer | None) -> dict[str, str]:
    """Return model, sites, ``p``, loss, optimizer, seed and versions as ``run/...``."""
    model, sites = analysis.model, analysis.sites
    count = sum(x.numel() for x in model.parameters())
    # "2" alone reads as a number.
    own = [repr(site.name) if site.name else "the model itself" for site in sites]
    names = [f"{name} ({site.kind})" for name, site in zip(own, sites, strict=True)]
    if len(names) > _MOST_SITES:
        names[_MOST_SITES:] = [f"and {len(names) - _MOST_SITES} more"]
    rates = sorted({f"{site.p:g}" for site in sites if not math.isnan(site.p)})
    facts = {
        "model": f"{type(model).__name__}, {count} parameters",
        "sites": ", ".join(names) or "no dropout module",
        "p": ", ".join(rates) or "0",
        "loss": _name(analysis.loss and analysis.loss.function),
        "optimizer": "not known yet",
        "seed": str(torch.initial_seed()),
        "versions": _versions(),
    }
    if optimizer is not None:
        rate = rate_of(optimizer.param_groups[0])
        facts["optimizer"] = type(optimizer).__name__
        facts["lr"] = "?" if rate is None else f"{rate:g}"
    return {_RUN + name: said for name, said in facts.items()}


def _name(loss: object) -> str:
    if loss is None:
        return "not known"
    function = getattr(loss, "func", loss)  # of a functools.partial
    return getattr(function, "__name__", "") or type(function).__name__


@functools.cache
def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("torch-dropout-ir")
    except PackageNotFoundError:
        own = "not installed"
    python = platform.python_version()
    return f"torch-dropout-ir {own}, torch {torch.__version__}, Python {python}"
