"""A pass under dropout, run again on some of its rows with the masks that it had.

Semantics:

* Torch's generators start from where they were, and each use of a site draws the mask
  of the whole batch, once for all parts: other rows have other masks, as they had.
* Where the outputs of the rows are what they were, the replay is right, whatever else
  the model does. Where they are not (samples that meet, as by batch normalization in
  training mode; noise that is none of a site; kernels that draw in another order),
  there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dropout_ir import ops
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.functional import (
    Batch,
    at_sites,
    batch_size,
    call,
    preserved_rng,
    rewinding,
)
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.leaves import without_graph
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.output_rows import (
    PAIR,
    RowNoise,
    chunks,
    laid_out,
    replace_rows,
    rows_of_samples,
)
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.regularizers.row_chunks import rows_of
from torch_dropout_ir.sharpness.derivatives import LeanDerivatives
from torch_dropout_ir.sharpness.frozen import twice_differentiable, unrecorded
from torch_dropout_ir.sites import Site
from torch_dropout_ir.substitution import buffers_moved, keep_buffers
from torch_dropout_ir.tracing import generators, unasked

# Besides a first, small one; a double backward holds three times what a step does.
_PARTS: Final = 3


class MaskedRows:
    """Parts of a pass under dropout; made before the pass."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Loss, move_buffers: bool
    ) -> None:
        self._model = model
        self._batch = batch
        self._loss = loss
        self._rewind = rewinding(model)
        self._moved = buffers_moved(model) if move_buffers else None
        self._back = keep_buffers(model) if move_buffers else None
        # Of each use its mask, its rows for a sample, 0 where samples share it, and
        # where generators are when it has been drawn.
        self._masks: list[tuple[Tensor, int, list[Tensor]]] = []

    def apart(self, outputs: Any, risk: Tensor) -> bool:
        """Return whether the first few rows are known to run alone as among all."""
        if self._moved is not None and self._moved():
            return False  # a part would run with others
        try:
            with preserved_rng(self._model), torch.no_grad():
                if not self._by_rows(outputs, risk):
                    return False
            first = next(chunks(self._count, _PARTS))
            with torch.no_grad():
                return self._run(first) is not None
        except Exception as err:
            raise_if_exhausted(err)
            return False  # a model that does not run on part of the rows

    def _by_rows(self, outputs: Any, risk: Tensor) -> bool:
        """Whether the loss is one of rows of the outputs, each by itself."""
        self._count = batch_size(self._batch)
        read = read_outputs(without_graph(outputs), self._loss, self._batch[1])
        self._read = read
        rows = [x.shape[0] if x.ndim else 0 for x in self._read.tensors]
        if self._count < 2 * PAIR or any(not n or n % self._count for n in rows):
            return False
        with torch.enable_grad():
            again = self._read.risk(self._read.tensors)
        # Else it depends on something else, or draws.
        alone = not again.requires_grad and torch.equal(again, risk.detach())
        return alone and not self._read.couples()

    def parts(self) -> Iterator[Tensor | None]:
        """Yield the loss by each part of the rows; None where these have changed."""
        for rows in chunks(self._count, _PARTS):
            yield self._run(rows)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Let generators start from where they were; give them back after.

        Layers that count what they draw have counted it.
        """
        with preserved_rng(self._model), unrecorded(self._model):
            self._rewind()
            yield

    def rewind_buffers(self) -> None:
        """Give buffers back as the first pass found them."""
        if self._back is not None:
            self._back()

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """Let passes inside begin with buffers as the first pass found them."""
        forth = keep_buffers(self._model)
        self.rewind_buffers()
        try:
            yield
        finally:
            forth()

    def _run(self, rows: Tensor) -> Tensor | None:
        inputs = rows_of(Inputs.of(self._batch[0]), rows, self._count)
        known = iter(self._masks[:])
        new = not self._masks
        noise = RowNoise(rows, self._count)
        of = generators(self._model)

        def drop(site: Site, h: Tensor) -> Tensor:
            if new:
                shape = site.mask_shape(h.shape)
                own = shape and shape[0] == h.shape[0] and not shape[0] % len(rows)
                each = shape[0] // len(rows) if own else 0
                whole = (each * self._count, *shape[1:]) if each else shape
                noise.aside = True
                drawn = _drawn(site, h, whole, shape == tuple(h.shape))
                noise.aside = False
                self._masks.append((drawn, each, [g.get_state() for g in of]))
            kept, each, states = self._masks[-1] if new else next(known)
            for generator, state in zip(of, states, strict=True):
                generator.set_state(state)
            if each:
                kept = kept[rows_of_samples(rows, each).to(h.device)]
            return h * kept.to(h.dtype).mul_(1 / (1 - site.p) if site.p < 1 else 0.0)

        with self.again(), twice_differentiable(), LeanDerivatives():
            with at_sites(self._model, drop), noise:
                found = call(self._model, inputs)
            part = replace_rows(self._read, found, rows, self._count)
            pairs = zip(part.tensors, self._read.tensors, strict=True)
            same = all(
                nearly_equal(x, f[rows_of_samples(rows, len(f) // self._count)])
                for x, f in pairs
            )
            return part.risk(part.tensors) if same else None


def _drawn(site: Site, h: Tensor, shape: tuple[int, ...], each: bool) -> Tensor:
    """Draw a mask as the site's own module does, for an input like ``h``."""
    if site.kind is None and hasattr(type(site.module).forward, "draws_as_torch"):
        return ops.draw(laid_out(h, shape).fill_(1), site.p, None)[0] != 0
    with unasked():  # a call of dropout is a site elsewhere
        if each:
            return F.dropout(laid_out(h, shape).fill_(1), site.p) != 0
        return h.new_empty(shape).bernoulli_(1 - site.p) != 0
