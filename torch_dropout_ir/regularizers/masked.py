"""One pass of a model under dropout whose masks are ours to choose, and its rows.

Semantics of a pass that is run again on some of its rows with the masks that it had:

* Torch's generators start from where they were, and each use of a site draws the mask
  of the whole batch, once for all parts: other rows have other masks, as they had.
* Where the outputs of the rows are what they were, the replay is right, whatever else
  the model does. Where they are not (samples that meet, as by batch normalization in
  training mode; noise that is none of a site; kernels that draw in another order),
  there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

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
    constants,
    fresh,
)
from torch_dropout_ir.generators import AllStanding, Standing, preserved_rng
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.kernels import keep_scale
from torch_dropout_ir.leaves import without_graph
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_batch, check_site
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
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.tracing import unasked, unasking

# Besides a first, small one; a double backward holds three times what a step does.
_PARTS: Final = 3
_TWIN: Final = 2**62 - 1  # bits of a key that make another one
Again: TypeAlias = Callable[[Tensor], Tensor]
_SHARED: Final = (
    "dropout site `{}`: expected one row of the mask for each of the {} samples, got "
    "{}: one mask for all samples is not defined there. Use `shared_mask=False`."
)


@dataclasses.dataclass
class NoiseSeen:
    """What passes under dropout have shown of the noise in a model.

    Attributes:
        met: Whether a site acted.
        cut: The sites that drop everything, in order.
        silenced: Functions of other noise that were switched off.
        keys: Where each key of the last pass was drawn.
    """

    met: bool = False
    cut: dict[str, None] = dataclasses.field(default_factory=dict)
    silenced: set[str] = dataclasses.field(default_factory=set)
    keys: list[torch.device] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def dropout_risk(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    seen: NoiseSeen,
    *,
    shared_mask: bool = False,
    watch: Callable[[Site, Tensor, torch.Size], None] | None = None,
    note: Callable[[Tensor, Tensor, Again], None] | None = None,
    look: Callable[[Site, Tensor, Tensor], None] | None = None,
    along: Callable[[Tensor, Tensor], Tensor] | None = None,
    constant: bool = False,
    twin: bool = False,
) -> Iterator[Tensor]:
    """Yield ``R_drop`` of a batch at one draw of masks; differentiate it inside.

    ``seen`` is told what noise there is. With ``shared_mask`` one mask serves all
    samples (the paper's ``eta``); else each sample draws its own, as ``nn.Dropout``
    does. At each use of a site ``watch`` is called with it, its packed mask and the
    mask's shape, ``note`` with what it returns, its input, and what makes the one of
    the other again, ``look`` with it, its input and what it returns. ``along`` makes
    of the input and of what dropout makes of it what passes on instead. Nobody asks a
    derivative in parameters that are ``constant``. A ``twin`` has
    other masks than a pass from the same states of generators that is none.
    """
    seen.keys.clear()
    survey = Survey.of(model)
    check_batch(model, batch[0], survey.modules)

    def drop(site: Site, h: Tensor) -> Tensor:
        check_site(site, h)
        seen.met = True
        if site.p >= 1:
            seen.cut[site.name] = None
        shape = site.mask_shape(h.shape)
        if shared_mask and h.ndim:
            if shape[0] not in (1, batch_size(batch)):
                raise ValueError(_SHARED.format(site.name, batch_size(batch), shape[0]))
            shape = (1, *shape[1:])
        own = shape == tuple(h.shape)
        seen.keys.append(h.device)
        key = ops.draw_key(h.device) ^ _TWIN if twin else None
        dropped, packed = ops.draw(h if own else h.new_ones(shape), site.p, key)
        if watch is not None:
            watch(site, packed, torch.Size(shape))
        scale = keep_scale(site.p)
        if own:
            again = functools.partial(ops.mask_apply, packed=packed, scale=scale)
        else:
            again = functools.partial(_multiplied, noise=dropped.detach())
            dropped = again(h)
        if note is not None:
            note(dropped, h, again)
        if look is not None:
            look(site, h, dropped)
        return dropped if along is None else along(h, dropped)

    with at_sites(model, unasking(drop), survey=survey) as calls:
        params = constants(survey.model) if constant else None
        yield loss(call(model, batch[0], params, survey=survey), batch[1])
        seen.silenced |= calls.silenced


def _multiplied(h: Tensor, noise: Tensor) -> Tensor:
    return torch.where(noise != 0, h, h.new_zeros(())).mul_(noise)


def clean_risk(
    model: nn.Module, batch: Batch, loss: Loss, keyed: bool = False
) -> Tensor:
    """Return ``R_S`` of a batch: dropout off, batch normalization as in training.

    Where it is ``keyed`` sites draw the keys of their masks, and other noise is that of
    :func:`dropout_risk` from the same states of generators.
    """
    survey = Survey.of(model)
    with at_sites(model, unasking(_keyed) if keyed else fresh, survey=survey):
        return loss(call(model, batch[0], survey=survey), batch[1])


def _keyed(site: Site, h: Tensor) -> Tensor:
    ops.draw_key(h.device)
    return fresh(site, h)


class MaskedRows:
    """Parts of a pass under dropout; made before the pass."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Loss, move_buffers: bool
    ) -> None:
        self._model = model
        self._batch = batch
        self._loss = loss
        self._began = AllStanding(model)
        self._moved = buffers_moved(model) if move_buffers else None
        self._back = keep_buffers(model) if move_buffers else None
        # Of each use its mask, its rows for a sample, 0 where samples share it, and
        # where generators are when it has been drawn.
        self._masks: list[tuple[Tensor, int, Standing]] = []

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
        with torch.enable_grad(), twice_differentiable():
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
            self._began.restore()
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

        def drop(site: Site, h: Tensor) -> Tensor:
            if new:
                shape = site.mask_shape(h.shape)
                own = shape and shape[0] == h.shape[0] and not shape[0] % len(rows)
                each = shape[0] // len(rows) if own else 0
                whole = (each * self._count, *shape[1:]) if each else shape
                noise.aside = True
                drawn = _drawn(site, h, whole, shape == tuple(h.shape))
                noise.aside = False
                self._masks.append((drawn, each, Standing(self._model)))
            kept, each, then = self._masks[-1] if new else next(known)
            then.restore()
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
    ours = site.kind is None and hasattr(type(site.module).forward, "draws_as_torch")
    if ours or site.keyed:
        return ops.draw(laid_out(h, shape).fill_(1), site.p, None)[0] != 0
    with unasked():  # a call of dropout is a site elsewhere
        if each:
            return F.dropout(laid_out(h, shape).fill_(1), site.p) != 0
        return h.new_empty(shape).bernoulli_(1 - site.p) != 0
