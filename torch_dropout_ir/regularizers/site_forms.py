"""From quadratic forms at the uses of the sites to an estimate with its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.sites import Site

Form = tuple[str, Tensor]
_NAN: Final = float("nan")
LINEAR: Final = "the loss is linear in the outputs: this form is 0; use `second_order`"


def by_row(site: Site, form: Tensor) -> Form:
    """Sum a form over all but the first dimension."""
    if form.ndim != 2:
        form = form.reshape(form.shape[0] if form.ndim else 1, -1)
    return site.name, form.sum(1)


def signs(site: Site, h: Tensor) -> Tensor:
    """Draw a sign for each element of the site's mask, shaped to multiply ``h``."""
    shape = site.mask_shape(h.shape)
    drawn = torch.empty(shape, dtype=h.dtype, device=h.device)
    return drawn.bernoulli_(0.5).mul_(2).sub_(1)


def total(forms: Sequence[Form], like: Tensor, name: str | None = None) -> Tensor:
    """Return the sum of all forms, or of those of one site."""
    parts = [form.sum() for site, form in forms if name in (None, site)]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum() if parts else like.new_zeros(())


def _mean(draws: Sequence[Sequence[Form]], like: Tensor, name: str) -> Tensor:
    """Return the mean over draws of the part of a site."""
    totals = [total(draw, like, name) for draw in draws]
    return torch.stack(totals).mean() if len(totals) > 1 else totals[0]


def join(
    parts: Sequence[Sequence[Sequence[Form]]], num_samples: int | None
) -> list[list[Form]]:
    """Return the draws of all rows from those of chunks of rows.

    Args:
        parts: The draws of each chunk.
        num_samples: Number of random draws; None for an exact sum.

    Returns:
        The draws; of an exact sum its terms, as they are.
    """
    if num_samples is None:
        return [[form for part in parts for form in part[0]]]
    return [
        [
            (forms[0][0], torch.cat([rows for _, rows in forms]))
            for forms in zip(*draw, strict=True)
        ]
        for draw in zip(*parts, strict=True)
    ]


def not_reached(uses: Sequence[str], forms: Sequence[Form]) -> tuple[str, ...]:
    """Return what is to be said of sites that no derivative has come to."""
    reached = {name for name, _ in forms}
    return tuple(
        f"site `{name}`: 0, for the loss does not depend on it (or the model cuts its "
        "graph, which `monte_carlo` tells)"
        for name in dict.fromkeys(uses)
        if name not in reached
    )


def assemble(
    uses: Sequence[str],
    draws: Sequence[Sequence[Form]],
    num_samples: int | None,
    coupled: bool,
    exact: bool,
    like: Tensor,
) -> Estimate:
    """Return the mean of the draws, the part of each site, and the standard error.

    Args:
        uses: The site of each use in the pass without noise.
        draws: The forms of each draw; a single one where ``num_samples`` is None.
        num_samples: Number of random draws; None for an exact sum.
        coupled: Whether samples depend on each other.
        exact: Whether the value is R_1 itself.
        like: A tensor of the dtype and device of the estimate.

    Returns:
        The estimate.
    """
    names = dict.fromkeys(uses)
    per_site = {name: _mean(draws, like, name) for name in names}
    notes = not_reached(uses, [form for draw in draws for form in draw])
    if like.dtype == torch.float16:
        notes = (*notes, "in float16 parts below 6e-8 vanish: use float32 or bfloat16")
    value = like.new_zeros(()) if len(names) != 1 else per_site[uses[0]].clone()
    if len(names) > 1:
        value = torch.stack([*per_site.values()]).sum()
    error = _standard_error(draws, like, num_samples, coupled)
    return Estimate(value, per_site, error, exact, num_samples or 0, notes=notes)


def _rows(draw: Sequence[Form], samples: int) -> Tensor:
    """Return the forms of each sample, which may have several rows at a site."""
    forms = [f if len(f) == samples else f.view(samples, -1).sum(1) for _, f in draw]
    return torch.stack(forms).sum(0) if len(forms) > 1 else forms[0]


def _standard_error(
    draws: Sequence[Sequence[Form]],
    like: Tensor,
    num_samples: int | None,
    coupled: bool,
) -> Tensor:
    """Standard error over draws; by sample where each has its own independent draws."""
    if num_samples is None or not draws or not draws[0]:
        return like.new_zeros(())
    samples = min([form.shape[0] for _, form in draws[0]])
    aligned = all(not form.shape[0] % samples for draw in draws for _, form in draw)
    if aligned and not coupled:
        if num_samples == 1:
            own = _rows(draws[0], samples)
            return samples**0.5 * own.std() if samples > 1 else like.new_tensor(_NAN)
        rows = torch.stack([_rows(draw, samples) for draw in draws])
        return (rows.var(0).sum() / num_samples).sqrt()
    if num_samples == 1:
        return like.new_tensor(_NAN)
    totals = torch.stack([total(draw, like) for draw in draws])
    return totals.std() / num_samples**0.5
