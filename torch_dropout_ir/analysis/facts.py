"""What runs: facts of a training run, in words."""

from __future__ import annotations

import functools
import math
import platform
from typing import TYPE_CHECKING, Final

import torch
from torch.optim import Optimizer

from torch_dropout_ir.analysis.snapshot import rate_of

if TYPE_CHECKING:
    from torch_dropout_ir.analysis.analysis import Analysis

RUN: Final = "run/"
_MOST_SITES: Final = 20


def run_facts(analysis: Analysis, optimizer: Optimizer | None) -> dict[str, str]:
    """Return model, sites, ``p``, loss, optimizer, seed and versions as ``run/...``."""
    model, sites = analysis.model, analysis.sites
    count = sum(x.numel() for x in model.parameters())
    names = [f"{_quoted(site.name)} ({site.kind})" for site in sites]
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
    return {RUN + name: said for name, said in facts.items()}


def _quoted(name: str) -> str:
    return repr(name) if name else "the model itself"  # "2" alone reads as a number


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
