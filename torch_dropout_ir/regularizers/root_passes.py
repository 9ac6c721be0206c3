"""Roots sent back through passes of their own, in the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.root_forms import RootForms
from torch_dropout_ir.regularizers.root_pulls import added_up, pull_root
from torch_dropout_ir.regularizers.site_forms import Form

Run: TypeAlias = Callable[[], AbstractContextManager[tuple[CleanPass, OutputsRead]]]


def draws_by_passes(
    forms: RootForms,
    run: Run,
    coupled: bool | None,
) -> tuple[list[list[Form]], bool]:
    """Return the draws of the forms, of passes over all rows.

    A graph that goes as its derivatives come holds no more than a step: each root has a
    pass of its own. Where a graph that is kept holds no more either, as with sites near
    the network's end, one pass does for all.

    Args:
        forms: The forms.
        run: Runs a pass in which what is below the first site is weighed.
        coupled: Whether samples meet in the network; None to find that out.

    Returns:
        The draws, and whether samples meet in the network.
    """
    if coupled is None or not forms.rooted:
        with run() as (clean, read):
            if not forms.rooted:
                return forms.draws(clean, read, coupled=coupled, keep=False)
            coupled = clean.couples_samples(read.tensors)
    pulled = _pulled(forms, run, coupled)
    if forms.num_samples is None:
        return [added_up(form for _, form in pulled)], coupled
    draws: dict[int, list[Form]] = {}
    for draw, form in pulled:
        draws.setdefault(draw, []).append(form)
    return list(draws.values()), coupled


def _pulled(forms: RootForms, run: Run, coupled: bool) -> Iterator[tuple[int, Form]]:
    """Yield the forms of all roots, each with the number of its draw."""
    roots = forms.roots(coupled)
    following = next(roots, None)
    while following is not None:
        with run() as (clean, read):
            keep = clean.weighed(read.tensors).may_keep()
            while following is not None:
                (draw, (root, sign)), following = following, next(roots, None)
                kept = keep and following is not None
                pulled = pull_root(clean, read.tensors[0], root, sign, kept)
                yield from ((draw, form) for form in pulled)
                if not kept:
                    break
