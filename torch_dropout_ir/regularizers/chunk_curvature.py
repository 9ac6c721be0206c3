"""Draws of the second-order forms, some rows of the batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.line_pass import Mask
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.row_chunks import RowChunks
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, join, signs

# Draws whose signs are held at once, a byte each.
_DRAWS_HELD: Final = 3


def draws_held(num_samples: int | None) -> int:
    """Return of how many draws the signs are held at once, a byte each."""
    return min(_DRAWS_HELD, num_samples or 0)


def draws_by_chunks(
    chunks: RowChunks, masks: Sequence[Mask], num_samples: int | None, coupled: bool
) -> list[list[Form]] | None:
    """Return draws of the forms; None where samples do not run apart."""
    noise: list[list[Tensor]] = []

    def take(
        clean: CleanPass, read: OutputsRead, rows: Tensor
    ) -> list[list[Form]] | None:
        curvature = SiteCurvature(clean, read, linearized=False)
        if num_samples is None:
            if clean.couples_samples(read.tensors):
                return None
            return [curvature.exact(coupled)]
        return [
            curvature.sampled([chunks.take(z, rows) for z in draw]) for draw in noise
        ]

    if num_samples is None:
        parts = chunks.each(take)
        return None if parts is None else join(parts, None)
    found: list[list[Form]] = []
    while len(found) < num_samples:
        held = range(draws_held(num_samples - len(found)))
        # On the masks of all rows, as a pass over all of them draws them.
        noise = [[signs(s, x.expand(n)) > 0 for s, x, n in masks] for _ in held]
        parts = chunks.each(take)
        if parts is None:
            return None
        found += join(parts, num_samples)
    return found
