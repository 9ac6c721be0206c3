"""Squared norms of gradients at pairs of masks, and of mini-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence, Set
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_differentiable
from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.collectives import alone, go_on
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.functional import Batch, parameters
from torch_dropout_ir.generators import AllStanding
from torch_dropout_ir.gradient_factors import Factors, address, row_blocks
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.kernels import draw_key
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.masked import NoiseSeen, dropout_risk
from torch_dropout_ir.regularizers.pass_parts import PassParts
from torch_dropout_ir.regularizers.step_memory import LEAST
from torch_dropout_ir.weight_parts import WeightParts

Gradient: TypeAlias = Tensor | Factors  # gives rows by slices
# Entries of a gradient that are made at a time: a share of all, within these.
_SHARE: Final = 16
_FEWEST: Final = 2**11
_MOST: Final = 2**16


class GradientPairs:
    """Squared norms of the gradients of one model, weighted by learning rates."""

    def __init__(
        self, model: nn.Module, loss: Loss, rates: Sequence[float], shared_mask: bool
    ) -> None:
        self._model = model
        self._loss = loss
        self._rates = rates
        self._targets = list(parameters(model).values())
        count = sum(x.numel() for x in self._targets)
        self._entries = min(_MOST, max(_FEWEST, count // _SHARE))
        self._shared_mask = shared_mask
        self._remake = True  # dropped inputs of layers, as they go backward
        self._copies = False  # whether what is held may be written over
        self._overwritten = False  # whether it has been
        self._large = sum(x.nbytes for x in self._targets) > LEAST
        self._passes: PassParts | None = None
        self._twin = False  # whether it is the second of a pair's turn
        self._began: AllStanding | None = None  # where generators stood for a pair
        self.beside: bool | None = None  # whether the model draws besides its sites
        self.seen = NoiseSeen()
        self.risk: Tensor | float = 0.0  # the sum of all losses

    def _gradients(
        self, batch: Batch, receive: Callable[[int, Gradient], None]
    ) -> None:
        """Draw masks; give each parameter's gradient away as it comes, by number."""
        if self._remake and not self._pass(batch, receive):
            self._remake = False  # of a model that writes on what it has dropped
        if not self._remake:
            self._pass(batch, receive)

    def _pass(self, batch: Batch, receive: Callable[[int, Gradient], None]) -> bool:
        """Return whether the pass could go backward."""
        passes = self._passes

        def take(i: int, g: Tensor) -> None:
            receive(i, g.to_dense() if g.is_sparse else g)

        watch = passes is None or not passes.parted
        given = receive if passes is None else passes.taken(receive)
        parts = WeightParts(self._targets, given, self._remake, watch)
        masked = dropout_risk(
            self._model, batch, self._loss, self.seen,
            shared_mask=self._shared_mask, note=parts.note,
            look=None if passes is None else passes.look,
            twin=self._twin and bool(self.beside),
        )  # fmt: skip
        if not self._twin and self.beside is not False:
            self._began = AllStanding(self._model)
        elif self._began is not None:
            self._began.restore()
        saving = contextlib.nullcontext() if passes is None else passes.saving()
        with torch.enable_grad(), parts, contextlib.ExitStack() as stack:
            with saving:
                value = stack.enter_context(masked)
            if self.beside is None and self._began is not None:
                self.beside = self._drawn_beside(self._began)
                self._began = self._began if self.beside else None
            check_differentiable(value, "parameters", "gradient_norm")
            if parts.overwritten():
                return False
            self.risk = self.risk + value.detach()
            parts.settle(value)
            if passes is not None:
                passes.back(value, take, bool(parts.plain))
                return True
            go_on("backward")
            with arrivals(self._targets, take, [value]):
                torch.autograd.grad(value, self._targets, allow_unused=True)
        return True

    def _drawn_beside(self, began: AllStanding) -> bool:
        """Return whether the pass that was made has drawn more than keys of masks."""
        now = AllStanding(self._model)
        began.restore()
        given_back = not now.moved()  # as by `frozen_masks`
        for device in self.seen.keys:
            draw_key(device)
        found = now.moved() and not given_back
        now.restore()
        return found

    def across(self, a: Batch, b: Batch, num_masks: int) -> Tensor:
        """Return value, mean, mask noise and batch noise of two batches.

        Their passes take turns such that each has a link to the next: within one for
        the noise of masks, as often in either, between the two for the mean.
        """
        value, inner, away = self._chain([a, a, b, b] * (num_masks // 2))
        mean, noise = inner[1::2].mean(), away[::2].mean() / 2
        return torch.stack((value, mean, noise, value - noise - mean))

    def pair(self, batch: Batch) -> Tensor:
        """Return value, mean, mask noise and batch noise, which is 0, of two masks."""
        value, inner, away = self._chain([batch, batch])
        return torch.stack((value, inner[0], away[0] / 2, value.new_zeros(())))

    def _chain(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw masks on each batch; hold one gradient at a time, against the next.

        Returns:
            The mean squared norm; the inner product of each with the next, and the
            squared norm of their difference.
        """
        links = self._taken(batches)
        if self._overwritten and not self._copies:  # by a model that keeps buffers
            self._copies = True
            links = self._taken(batches)
        own, before, inner, away = links[1:].unbind(1)
        return (own.sum() + before[0]) / len(batches), inner, away

    def _taken(self, batches: Sequence[Batch]) -> Tensor:
        return self._by_parts(batches) if self._large else self._links(batches)

    def _by_parts(self, batches: Sequence[Batch]) -> Tensor:
        """Return the links, by parts where whole passes hold more than a step."""
        there = {
            address(x) for x in (*self._model.parameters(), *self._model.buffers())
        }
        there |= {x for batch in batches for x in _addresses(batch)}
        began = AllStanding(self._model)
        passes = PassParts(self._model, self._targets, there)
        self._passes = passes
        failed: Exception | None = None
        try:
            links = self._links(batches)
            while passes.next():
                links = links + self._links(batches)
        except Exception as err:  # of a model that lets nobody see what it saves
            raise_if_exhausted(err)
            failed = err
        self._passes = None
        # Of a model that went another way, by its masks perhaps: at the same ones.
        if failed or (passes.parted and not passes.alike):
            passes.alike = False
            began.restore()
            try:
                links = self._links(batches)
            except Exception:
                if failed and not alone():  # other ranks ask something else by now
                    raise failed from failed.__cause__
                raise
        self._large = passes.parted and passes.alike
        return links

    def _links(self, batches: Sequence[Batch]) -> Tensor:
        """Return what each gradient and the one before say: ``[K, 4]``."""
        held: dict[int, tuple[Gradient, int]] = {}
        links: list[Tensor] = []
        for k, batch in enumerate(batches):
            self._twin = k % 2 == 1
            links.append(self._link(batch, held, k == 0, k + 1 == len(batches)))
            if self._passes is not None and not self._passes.parted:
                self._passes = None
        return torch.stack(links)

    def _link(
        self,
        batch: Batch,
        held: dict[int, tuple[Gradient, int]],
        first: bool,
        last: bool,
    ) -> Tensor:
        """Return what gradients and those of the pass before say; hold them instead.

        ``held`` are those before and their versions, by number.
        """
        found = [x.new_zeros(4, dtype=wide_dtype(x).to_real()) for x in self._targets]
        missed = {*held}  # which have no gradient in this pass so far
        beside = _addresses(batch)  # memory that is there anyway

        def take(i: int, g: Gradient | None) -> None:
            missed.discard(i)
            if not first:
                found[i] += self._compared(i, g, *held.pop(i, (None, 0)))
            if g is not None and not last:
                kept = self._smaller(i, g, beside)
                held[i] = kept, kept._version

        self._gradients(batch, take)
        for i in missed.copy():  # at these masks the loss does not depend on it
            take(i, None)
        pairs = zip(self._rates, found, strict=True)
        return torch.stack([rate / 4 * x for rate, x in pairs]).sum(0)

    def _compared(
        self, i: int, g: Gradient | None, before: Gradient | None, version: int
    ) -> Tensor:
        """Compare with the gradient held, unless that has been written over."""
        if before is not None:
            self._overwritten |= before._version != version
            if isinstance(before, Tensor) and isinstance(g, Tensor):
                self._overwritten |= address(before) == address(g)
        return compared(g, before, self._targets[i], self._entries)

    def _smaller(self, i: int, g: Gradient, beside: Set[int]) -> Gradient:
        """Return a gradient as what takes less memory, its factors or itself."""
        if not isinstance(g, Factors):
            return g.clone() if self._copies else g
        if self._copies or g.held(beside) >= self._targets[i].nbytes:
            return g[:]
        return g


def _addresses(batch: Batch) -> set[int]:
    """Return where the inputs are, which are there anyway."""
    given = (x for x in Inputs.of(batch[0]).leaves() if isinstance(x, Tensor))
    return {address(x) for x in given}


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums: squares of half precision vanish."""
    return torch.promote_types(x.dtype, torch.float32)


def compared(
    a: Gradient | None, b: Gradient | None, like: Tensor, entries: int
) -> Tensor:
    r"""Return what two gradients of one parameter say, some rows at a time.

    That is :math:`\lVert a \rVert^2`, :math:`\lVert b \rVert^2`, :math:`\langle a, b
    \rangle` and :math:`\lVert a - b \rVert^2`; None is zero.
    """
    wide = wide_dtype(like)
    total = torch.zeros(4, dtype=wide.to_real(), device=like.device)
    given = [x for x in (a, b) if x is not None]
    # Entries may be taken in any number then, not as rows.
    flat = all(
        isinstance(x, Tensor) and (x.is_contiguous() or not x.ndim) for x in given
    )
    lines = like.reshape(-1) if flat else like
    zero = like.new_zeros(()).expand(lines.shape)
    a, b = (
        zero if x is None else x.reshape(lines.shape) if isinstance(x, Tensor) else x
        for x in (a, b)
    )
    for part in row_blocks(lines, entries):
        total += _of_rows(a, b, part, wide)  # whose rows are gone before the next
    return total


def _of_rows(a: Gradient, b: Gradient, part: slice, wide: torch.dtype) -> Tensor:
    x, y = (each[part].to(wide).reshape(-1) for each in (a, b))
    square, inner, other = torch.vdot(x, x), torch.vdot(y, x), torch.vdot(y, y)
    # In the place of what has just been made, where one of them is.
    made = [
        own
        for own, each in ((x, a), (y, b))
        if not isinstance(each, Tensor) or each.dtype != wide
    ]
    away = torch.sub(x, y, out=made[0] if made else None)
    return torch.stack((square, other, inner, torch.vdot(away, away))).real
