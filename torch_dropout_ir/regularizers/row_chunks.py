"""Second derivatives of the whole loss, some rows of the batch at a time.

Semantics:

* Where the network keeps samples apart, the rows of a chunk run alone, and the loss is
  that of the clean outputs of all rows with those of the chunk in their place: its
  second derivative in the chunk's rows is that of the whole loss, whatever the loss.
  Where the loss couples samples, what is between two chunks is left out of a sample of
  the form, and is not in its mean either way.
* The graph of a double backward is then that of a chunk, below a training step's.
* A chunk whose outputs are not the rows of the whole batch (batch normalization below
  the sites, a mask of the batch's size, other noise) says that this does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from torch_dropout_ir.functional import Inputs
from torch_dropout_ir.regularizers.clean_pass import CleanPass, Use, clean_pass
from torch_dropout_ir.regularizers.outputs import OutputsRead, replace_rows
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, signs

# A double backward keeps under three times what a training step does.
_CHUNKS: Final = 4
# Elements of the sites' inputs under which memory is no matter.
_FEWEST_ELEMENTS: Final = 2**16
# Draws whose signs are held at once, a byte each: the space of the sites' inputs.
_DRAWS_HELD: Final = 4

Noise = list[Tensor]


def pays(clean: CleanPass) -> bool:
    """Whether there is memory worth saving."""
    return sum(h.numel() for _, h, _ in clean.uses) >= _FEWEST_ELEMENTS


class RowChunks:
    """The forms of :class:`SiteCurvature`, of a chunk of rows at a time.

    Args:
        model: The model.
        inputs: Its inputs.
        uses: The uses of the sites in the pass over all rows; they are not held.
    """

    def __init__(self, model: nn.Module, inputs: Any, uses: Sequence[Use]) -> None:
        self._model = model
        self._inputs = Inputs.of(inputs)
        self._uses = [(site, h.new_empty(()), h.shape) for site, h, _ in uses]

    def draws(
        self, read: OutputsRead, num_samples: int | None, coupled: bool
    ) -> list[list[Form]] | None:
        """Return draws of the forms, as :meth:`SiteCurvature.draws` does.

        Args:
            read: What the loss reads of the outputs of all rows, without their graph.
            num_samples: Draws of signs; None for the exact sum.
            coupled: Whether the loss couples samples.

        Returns:
            The draws; None where the rows of a chunk are not those of the batch.
        """
        found: list[list[Form]] = []
        wanted = 1 if num_samples is None else num_samples
        while len(found) < wanted:
            noise = None
            if num_samples is not None:
                held = range(min(_DRAWS_HELD, num_samples - len(found)))
                noise = [self._noise() for _ in held]
            parts = []
            count = read.tensors[0].shape[0]
            step = -(-count // _CHUNKS)
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                try:
                    part = self._chunk(read, rows, noise, coupled)
                except (RuntimeError, ValueError, TypeError, IndexError):
                    return None  # a model that does not run on part of the rows
                if part is None:
                    return None
                parts.append(part)
            if noise is None:
                return [[form for part in parts for form in part[0]]]
            found += [_join(draw) for draw in zip(*parts, strict=True)]
        return found

    def _noise(self) -> Noise:
        """Draw signs on the masks of all rows, as a pass over all of them does."""
        return [signs(site, like.expand(s)) > 0 for site, like, s in self._uses]

    def _chunk(
        self, read: OutputsRead, rows: slice, noise: list[Noise] | None, coupled: bool
    ) -> list[list[Form]] | None:
        """Return the forms of each draw in the chunk's rows."""
        inputs = _rows_of(self._inputs, rows, read.tensors[0].shape[0])
        with clean_pass(self._model, inputs, twice=True) as clean:
            chunk = replace_rows(read, clean.outputs, rows)
            apart = self._are_rows(clean, chunk, read, rows)
            if not apart or clean.couples_samples(chunk.tensors):
                return None
            curvature = SiteCurvature(clean, chunk, linearized=False)
            if noise is None:
                return [curvature.exact(coupled)]
            return [curvature.sampled([z[rows] for z in draw]) for draw in noise]

    def _are_rows(
        self, clean: CleanPass, chunk: OutputsRead, read: OutputsRead, rows: slice
    ) -> bool:
        """Whether a chunk's pass is what the pass over all rows is in those."""
        count = rows.stop - rows.start
        used = [(site.name, h.shape) for site, h, _ in clean.uses]
        expected = [
            (site.name, torch.Size((count, *s[1:]))) for site, _, s in self._uses
        ]
        pairs = zip(chunk.tensors, read.tensors, strict=True)
        return used == expected and all(_equal(x, f[rows]) for x, f in pairs)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal but for the order of their sums."""
    if found.shape != expected.shape:
        return False
    off = (found.detach() - expected).abs().max()
    return bool(off <= torch.finfo(found.dtype).eps ** (2 / 3) * expected.abs().max())


def _rows_of(inputs: Inputs, rows: slice, count: int) -> Inputs:
    """Take rows of every tensor whose first dimension counts the samples."""

    def take(x: Any) -> Any:
        has_rows = isinstance(x, Tensor) and x.ndim and x.shape[0] == count
        return x[rows] if has_rows else x

    args, kwargs = _pytree.tree_map(take, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _join(parts: Sequence[list[Form]]) -> list[Form]:
    """Return the forms of all rows from those of chunks, use by use."""
    return [
        (forms[0][0], torch.cat([rows for _, rows in forms]))
        for forms in zip(*parts, strict=True)
    ]
