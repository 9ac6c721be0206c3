"""From quadratic forms at the uses of the sites to an estimate with its error."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.sites import Site

Form = tuple[str, Tensor]
_NAN: Final = float("nan")
LINEAR: Final = "the loss is linear in the outputs: this form is 0; use `second_order`"
_FEW: Final = 1024


class Sums(NamedTuple):
    """A draw of the forms, added up.

    Attributes:
        values: The sum of all, its standard error, and the sum of each use.
        names: The site of each use that a derivative has come to.
        coupled: Whether samples depend on each other.
    """

    values: list[Tensor]
    names: list[str]
    coupled: bool


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


def not_reached(uses: Sequence[str], reached: Collection[str]) -> tuple[str, ...]:
    """Return what is to be said of sites that no derivative has come to."""
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
    names = list(dict.fromkeys(uses))
    reached = {name for draw in draws for name, _ in draw}
    notes = not_reached(uses, reached)
    if like.dtype == torch.float16:
        notes = (*notes, "in float16 parts below 6e-8 vanish: use float32 or bfloat16")
    one = num_samples == 1 and len(draws) == 1
    found = _of_few(names, draws[0], coupled, like) if one else None
    value, per_site, error = found or (
        *_sums(names, draws, like),
        _standard_error(draws, like, num_samples, coupled),
    )
    return Estimate(value, per_site, error, exact, num_samples or 0, notes=notes)


def of_sums(
    uses: Sequence[str], summed: Sums, exact: bool, notes: tuple[str, ...]
) -> Estimate:
    """Return the estimate of a draw that has been added up.

    Args:
        uses: The site of each use in the pass without noise.
        summed: The sums.
        exact: Whether the value is R_1 itself.
        notes: What there is to say of it.
    """
    value, error, *parts = summed.values
    per_site: dict[str, Tensor] = {}
    for name, part in zip(summed.names, parts, strict=True):
        per_site[name] = part + per_site[name] if name in per_site else part
    if len(per_site) < len(uses):
        notes = (*not_reached(uses, per_site), *notes)
        zero = value.new_zeros(())
        per_site = {name: per_site.get(name, zero) for name in uses}
    if summed.coupled and parts:
        error = value.new_full((), _NAN)
    return Estimate(value, per_site, error, exact, 1, notes=notes)


def _sums(
    names: Sequence[str], draws: Sequence[Sequence[Form]], like: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean over draws, and the part of each site."""
    per_site = {name: _mean(draws, like, name) for name in names}
    if len(names) == 1:
        return per_site[names[0]].clone(), per_site
    value = torch.stack([*per_site.values()]).sum() if names else like.new_zeros(())
    return value, per_site


def _of_few(
    names: Sequence[str], draw: Sequence[Form], coupled: bool, like: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor] | None:
    """Return value, parts and standard error of a draw of few numbers; else None.

    Python adds those up in less time than the first of several operations takes.
    """
    forms = [form for _, form in draw]
    if not draw or sum([form.numel() for form in forms]) > _FEW:
        return None
    if not all([form.is_cpu and not form.requires_grad for form in forms]):
        return None
    rows = [form.tolist() for form in forms]
    parts = dict.fromkeys(names, 0.0)
    for (name, _), row in zip(draw, rows, strict=True):
        parts[name] += sum(row)
    per_site = {name: like.new_full((), part) for name, part in parts.items()}
    value = like.new_full((), sum(parts.values()))
    return value, per_site, like.new_full((), _spread(rows, coupled))


def _spread(rows: Sequence[Sequence[float]], coupled: bool) -> float:
    """Return the standard error of the sum of a draw, as :func:`_standard_error`."""
    samples = min([len(row) for row in rows])
    if coupled or samples < 2 or any([len(row) % samples for row in rows]):
        return _NAN
    each = [
        row[i :: len(row) // samples]
        for row in rows
        for i in range(len(row) // samples)
    ]
    own = [sum(forms) for forms in zip(*each, strict=True)]
    mean = sum(own) / samples
    squares = sum([(x - mean) * (x - mean) for x in own])
    return math.sqrt(samples * squares / (samples - 1))


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
