"""From quadratic forms at the uses of the sites to an estimate with its error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
        values: The sum of all, its standard error, the sum of each site, and the
            standard errors of those.
        names: The sites that a derivative has come to.
        coupled: Whether samples depend on each other.
    """

    values: list[Tensor]
    names: list[str]
    coupled: bool


class Known(NamedTuple):
    """What there is to say of an estimate besides its draws; a site for each use."""

    uses: Sequence[str]
    num_samples: int | None
    exact: bool
    like: Tensor
    notes: tuple[str, ...]


def by_sample(site: Site, form: Tensor, count: int) -> Form:
    """Sum a form over what is of a sample, of ``count``; else of a row."""
    rows = rows_of_form(form.shape, count)
    if form.ndim != 2 or form.shape[0] != rows:
        form = form.reshape(rows, form.numel() // rows if rows else 0)
    return site.name, form.sum(1)


def rows_of_form(shape: Sequence[int], count: int) -> int:
    """Return into how many a form goes: samples, which may have several rows each."""
    rows = shape[0] if shape else 1
    return count if count and not rows % count else rows


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


def join(
    parts: Sequence[Sequence[Sequence[Form]]], num_samples: int | None
) -> list[list[Form]]:
    """Return the draws of all rows from those of chunks; of an exact sum its terms."""
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
        f"site `{name}`: 0, for the loss does not depend on it, or is linear in it (or "
        "the model cuts its graph, or rounds, which `monte_carlo` tells)"
        for name in dict.fromkeys(uses)
        if name not in reached
    )


def _told(
    uses: Sequence[str], per_site: Mapping[str, Tensor], notes: tuple[str, ...]
) -> tuple[str, ...]:
    """Return what is to be said, of sites whose part is 0 too unless all are."""
    reached = [name for name, x in per_site.items() if x.item()]
    if LINEAR in notes or len(reached) == len(set(uses)):
        return notes
    return *not_reached(uses, reached), *notes


def assemble(known: Known, draws: Sequence[Sequence[Form]], coupled: bool) -> Estimate:
    """Return the mean of the draws, the part of each site, and the standard error."""
    uses, num_samples, exact, like, notes = known
    names = list(dict.fromkeys(uses))
    if like.dtype == torch.float16:
        lost = "in float16 parts below 6e-8 vanish: use float32 or bfloat16"
        notes = (lost, *notes)
    one = num_samples == 1 and len(draws) == 1
    found = _of_few(names, draws[0], coupled, like) if one else None
    if found is None:
        value, per_site = _sums(names, draws, like)
        error, errors = _standard_errors(draws, like, num_samples, coupled)
        found = value, per_site, error, errors
    value, per_site, error, errors = found
    errors = {name: errors.get(name, like.new_zeros(())) for name in names}
    notes = _told(uses, per_site, notes)
    return Estimate(
        value, per_site, error, exact, num_samples or 0, True, notes, errors
    )


def of_sums(known: Known, summed: Sums) -> Estimate:
    """Return the estimate of a draw that has been added up."""
    value, error, *parts = summed.values
    count = len(summed.names)
    if summed.coupled and parts:
        error = value.new_full((), _NAN)
        parts[count:] = [error] * count
    per_site = dict(zip(summed.names, parts[:count], strict=True))
    errors = dict(zip(summed.names, parts[count:], strict=True))
    notes = _told(known.uses, per_site, known.notes)
    if count < len(dict.fromkeys(known.uses)):
        zero = value.new_zeros(())
        per_site = {name: per_site.get(name, zero) for name in known.uses}
        errors = {name: errors.get(name, zero) for name in known.uses}
    return Estimate(value, per_site, error, known.exact, 1, True, notes, errors)


def _sums(
    names: Sequence[str], draws: Sequence[Sequence[Form]], like: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean over draws, and the part of each site."""
    per_site: dict[str, Tensor] = {}
    for name in names:
        totals = [total(draw, like, name) for draw in draws]
        per_site[name] = torch.stack(totals).mean() if len(totals) > 1 else totals[0]
    if len(names) == 1:
        return per_site[names[0]].clone(), per_site
    value = torch.stack([*per_site.values()]).sum() if names else like.new_zeros(())
    return value, per_site


def _of_few(
    names: Sequence[str], draw: Sequence[Form], coupled: bool, like: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]] | None:
    """Do what ``_sums`` and ``_standard_errors`` do, of few numbers; else None."""
    forms = [form for _, form in draw]
    if not draw or sum([form.numel() for form in forms]) > _FEW:
        return None
    if not all([form.is_cpu and not form.requires_grad for form in forms]):
        return None
    rows: dict[str, list[list[float]]] = {}
    for name, form in draw:
        rows.setdefault(name, []).append(form.tolist())
    samples = _samples(draw, coupled)
    own = {name: _by_sample(site, samples) for name, site in rows.items()}
    whole = own[draw[0][0]] if len(own) == 1 else _by_sample([*own.values()], samples)
    parts = {name: sum(own.get(name, ())) for name in names}

    def tensor(x: float) -> Tensor:
        return like.new_full((), x)

    return (
        tensor(sum(parts.values())),
        {name: tensor(part) for name, part in parts.items()},
        tensor(_spread(whole)),
        {name: tensor(_spread(site)) for name, site in own.items()},
    )


def _by_sample(rows: list[list[float]], samples: int) -> list[float]:
    """Return what each sample adds."""
    if samples == 1:
        return [sum([sum(row) for row in rows])]
    return rows[0] if len(rows) == 1 else [sum(own) for own in zip(*rows, strict=True)]


def _spread(own: Sequence[float]) -> float:
    """Return the standard error of a sum over samples."""
    samples = len(own)
    mean = sum(own) / samples
    if samples < 2 or not math.isfinite(mean):
        return _NAN
    away = math.dist(own, [mean] * samples)
    return away * math.sqrt(samples / (samples - 1))


def _samples(draw: Sequence[Form], coupled: bool) -> int:
    """Return the number of samples with draws of their own; 1 where they have none."""
    counts = {form.shape[0] for _, form in draw}
    return 1 if coupled or len(counts) != 1 else max(1, *counts)


def _standard_errors(
    draws: Sequence[Sequence[Form]],
    like: Tensor,
    num_samples: int | None,
    coupled: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return standard errors over draws, or by sample where each draws by itself."""
    names = list(dict.fromkeys(name for draw in draws for name, _ in draw))
    if num_samples is None or not names:
        return like.new_zeros(()), {}
    samples = min(_samples(draw, coupled) for draw in draws)
    table = torch.stack([
        torch.stack([_rows(draw, samples, name) for name in names]) for draw in draws
    ])
    table, kind = torch.cat((table.sum(1, keepdim=True), table), 1), table.dtype
    # Squares of what float16 just holds are 0 in it.
    table = table.to(torch.promote_types(kind, torch.float32))
    if num_samples > 1:
        errors = (table.var(0).sum(1) / num_samples).sqrt()
    elif samples > 1:
        errors = samples**0.5 * table[0].std(1)
    else:
        errors = table.new_full((len(names) + 1,), _NAN)
    whole, *parts = errors.to(kind).unbind()
    return whole, dict(zip(names, parts, strict=True))


def _rows(draw: Sequence[Form], samples: int, name: str) -> Tensor:
    forms = [
        f if len(f) == samples else f.sum().unsqueeze(0)
        for site, f in draw
        if site == name
    ]
    return torch.stack(forms).sum(0) if len(forms) > 1 else forms[0]
