"""The quadratic form of a root at each use of a site."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.coupling import row_weight
from torch_dropout_ir.regularizers.site_forms import Form, by_sample


def plain(h: Tensor) -> Tensor:
    """Return a tensor without its graph."""
    return h.detach() if h.requires_grad else h


def pull_root(
    clean: CleanPass,
    outputs: Tensor,
    root: Tensor,
    sign: Tensor | float,
    keep: bool = True,
    weights: dict[int, Tensor] | None = None,
) -> list[Form]:
    """Return the quadratic form of each use, summed over units, by sample.

    ``weights`` is filled with what :func:`row_weights` gives, if there.
    """
    squares: dict[int, Tensor] = {}
    count = clean.count(outputs)

    def receive(use: int, g: Tensor) -> None:
        (site, h, _), shape = clean.uses[use], clean.mask_shapes[use]
        shared = plain(h) * g
        if shared.shape != shape:
            shared = shared.sum_to_size(shape)
        # In place where memory matters; else by what has just been done.
        shared = shared.square_() if clean.matters else shared * shared
        _, squares[use] = by_sample(site, shared, count)
        if weights is not None:
            weights[use] = row_weight(g)

    clean.pull(outputs, root, receive, keep=keep)
    return [
        (site.name, site.variance / 2 * _each(sign, squares[use]) * squares[use])
        for use, (site, _, _) in enumerate(clean.uses)
        if use in squares
    ]


def added_up(forms: Iterable[Form]) -> list[Form]:
    """Return the sum of each site's forms: of an exact sum they are very many."""
    sums: dict[str, Tensor] = {}
    for name, form in forms:
        part = form.sum(dtype=torch.float64)
        sums[name] = sums[name] + part if name in sums else part
        dtype = form.dtype
    return [(name, whole.to(dtype)) for name, whole in sums.items()]


def _each(sign: Tensor | float, rows: Tensor) -> Tensor | float:
    """Return the sign of each row of a use, of which a sample may have several."""
    if not isinstance(sign, Tensor) or sign.numel() == rows.numel():
        return sign
    return sign.repeat_interleave(rows.numel() // sign.numel())
