"""Sums of the quadratic forms of dropout sites, in plain torch: as `csrc/forms.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def form_sums(
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factors: Sequence[float],
    rows: Sequence[int],
    units: Sequence[int],
    sites: Sequence[int],
) -> list[Tensor]:
    """Sum the quadratic forms of the uses of dropout sites.

    Args:
        inputs: The input of each use, ``rows * units * shared`` elements.
        gradients: What has been sent back to it, of its shape.
        factors: What the form of each use is a multiple of.
        rows: Its rows, of which a sample has one or several, one after the other.
        units: Elements of its mask in a row; the others share them.
        sites: The number of its site, from 0 on.

    Returns:
        The sum of all, its standard error over samples (NaN where there are not two, or
        rows do not tell them apart), the sum of each site, and the standard errors of
        those, all 0-d.
    """
    forms = [
        factor * (h * g).reshape(n, k, -1 if n * k else 0).sum(2).square().sum(1)
        for h, g, factor, n, k in zip(
            inputs, gradients, factors, rows, units, strict=True
        )
    ]
    samples = min(rows)
    alike = samples > 1 and not any(n % samples for n in rows)
    table = forms[0].new_zeros(max(sites) + 1, samples if alike else 1)
    for site, form in zip(sites, forms, strict=True):
        table[site] += form.view(samples, -1).sum(1) if alike else form.sum()
    own = table.sum(1)
    errors = own.new_full((len(own) + 1,), float("nan"))
    if alike:
        errors = samples**0.5 * torch.cat((table.sum(0, keepdim=True), table)).std(1)
    error, *parts = errors.unbind()
    return [own.sum(), error, *own.unbind(), *parts]
