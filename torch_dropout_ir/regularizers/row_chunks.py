"""A pass without noise, some rows of the batch at a time.

Semantics:

* Where the network keeps samples apart, the rows of a chunk run alone, and the loss is
  that of the clean outputs of all rows with those of the chunk in their place: its
  derivatives in the chunk's rows are those of the whole loss, whatever the loss. Where
  the loss couples samples, what is between two chunks is left out of a sample of a
  second-order form, and is not in its mean either way.
* The first site is given what it had in the pass over all rows: what lies below it, for
  example batch normalization, may couple samples.
* The graph of a backward pass is then that of a chunk, below a training step's.
* A chunk whose outputs are not the rows of the whole batch (batch normalization above
  the first site, a mask of the batch's size, other noise) says that this does not hold.
  Rows go to chunks in no order, lest pairs or groups of samples stay together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from torch_dropout_ir.collectives import every, most, some
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.output_rows import (
    PAIR,
    RowNoise,
    chunks,
    count_samples,
    least_of_part,
    replace_rows,
    rows_of_samples,
)
from torch_dropout_ir.regularizers.outputs import OutputsRead

T = TypeVar("T")
# Of a chunk: its pass, what is read, its rows.
Take: TypeAlias = Callable[[CleanPass, OutputsRead, Tensor], "T | None"]


class RowChunks:
    """Chunks of the rows of a batch, for what is a sum or a list over rows.

    Of the pass over all rows the input of the first site is held, and what the loss
    reads, without graph; nothing where parameters learn by the chunks (``trained``).
    They are a first, small one and so many ``parts`` besides, of ``least`` samples at
    least, or those of which the loss is known to be a sum (``alone``).

    Attributes:
        coupled: Whether a chunk has shown that samples meet above the first site.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        clean: CleanPass,
        read: OutputsRead,
        *,
        twice: bool,
        parts: int,
        thrice: bool = False,
        trained: bool = False,
        alone: LossParts | None = None,
        least: int = PAIR,
    ) -> None:
        self.coupled = False
        self.alone = alone
        self._model = model
        self._inputs = Inputs.of(inputs)
        self._uses = [(site.name, h.shape) for site, h, _ in clean.uses]
        self._first = None if trained else clean.uses[0][1].detach()
        self._trained = trained
        self._read = read
        self._twice, self._thrice = twice, thrice
        self._parts = parts
        self._began = clean.began
        self._least = max(least, PAIR) if clean.drawn else least
        self._count = count_samples(clean, read, inputs)

    @staticmethod
    def least(clean: CleanPass, read: OutputsRead) -> int:
        """Return how many samples a chunk has at least; 0 where chunks do not pay.

        They do where there are rows to take apart, and memory worth saving.
        """
        least = 0
        if clean.uses and clean.matters:
            least = least_of_part(clean, read)
        return most(least, "rows of a chunk") if every(least > 0, "rows") else 0

    def take(self, x: Tensor, samples: Tensor) -> Tensor:
        """Return the rows of some samples of a tensor that has rows of all."""
        return x[rows_of_samples(samples, len(x) // self._count)]

    def apart(self) -> bool:
        """Whether a few rows run alone as among all, and do not meet each other."""

        def take(clean: CleanPass, read: OutputsRead, _: Tensor) -> bool | None:
            return None if clean.couples_samples(read.tensors) else True

        return bool(self._try(0, next(iter(self._samples())), take))

    def add_up(self, params: Sequence[Tensor]) -> bool:
        """Return whether a few rows' gradient is the sum of those of two parts.

        Parts are in no order, one of an odd number: rows may meet next to each other,
        or half a batch apart. However they meet in pairs, one pair is parted.
        """

        def take(_: CleanPass, read: OutputsRead, __: Tensor) -> list[Tensor]:
            risk = read.risk(read.tensors)
            return [*torch.autograd.grad(risk, params, materialize_grads=True)]

        count = min(6 * self._least, self._count)
        left, size = self._try(0, torch.arange(count, device="cpu"), take), 0.0
        for part in chunks(count, 1, (count // 2 - 1) | 1):
            own = self._try(0, part, take)
            if left is None or own is None:
                return False
            size += _length(own)
            for i, g in enumerate(own):
                left[i] = left[i] - g
        eps = max(torch.finfo(x.dtype).eps for x in params)
        return left is not None and _length(left) <= eps ** (2 / 3) * size

    def each(self, take: Take[T]) -> list[T] | None:
        """Return what ``take`` does of each chunk.

        None where it returns None, for samples meet, or rows of a chunk are not those
        of the batch.
        """
        found = self._each(take)
        single = found is None and self._least < PAIR and self.alone is None
        if single and every(self._count >= 2 * PAIR, "pairs"):
            self._least = PAIR  # below the first site one may not run by itself
            found = self._each(take)
        if found is None and self._began:  # what is drawn may have no rows
            self._began = None
            found = self._each(take)
        if found is None:  # no more is asked
            self._first = None
            self._read = dataclasses.replace(self._read, tensors=[])
        return found

    def _each(self, take: Take[T]) -> list[T] | None:
        found: list[T] = []
        taken = [*self._samples()]
        if most(len(taken), "most chunks") + most(-len(taken), "fewest chunks"):
            return None
        for k, rows in enumerate(taken):
            part = self._try(k, rows, take)
            self.coupled = some(self.coupled, "chunk meets")
            if not every(part is not None, "chunk") or part is None:
                return None
            found.append(part)
        return found

    def _samples(self) -> Iterable[Tensor]:
        if self.alone is not None:
            return self.alone.samples
        return chunks(self._count, self._parts, self._least)

    def _try(self, k: int, rows: Tensor, take: Take[T]) -> T | None:
        try:
            return self._chunk(k, rows, take)
        except Exception as err:
            raise_if_exhausted(err)
            return None  # a model that does not run on part of the rows

    def _chunk(self, k: int, rows: Tensor, take: Take[T]) -> T | None:
        inputs = rows_of(self._inputs, rows, self._count)
        first = None if self._first is None else self.take(self._first, rows)
        with clean_pass(
            self._model, inputs, twice=self._twice, thrice=self._thrice, first=first,
            outlives=self._trained, around=self._drawing(rows),
        ) as clean:  # fmt: skip
            chunk = replace_rows(self._read, clean.outputs, rows, self._count)
            if self.alone is not None:
                chunk = self.alone.read(k, chunk.tensors)
            if every(self._are_rows(clean, chunk, rows), "rows of a chunk"):
                part = take(clean, chunk, rows)
                self.coupled = part is None
                return part
            self.coupled = clean.couples_samples(chunk.tensors)
            return None

    @contextlib.contextmanager
    def _drawing(self, rows: Tensor) -> Iterator[None]:
        """Let the model draw for some rows what it drew in the pass over all."""
        if self._began is None:
            yield
            return
        with preserved_rng(self._model):
            self._began.restore()
            with RowNoise(rows, self._count):
                yield

    def _are_rows(self, clean: CleanPass, chunk: OutputsRead, rows: Tensor) -> bool:
        """Whether a chunk's pass is what the pass over all rows is in those."""
        used = [(site.name, h.shape) for site, h, _ in clean.uses]
        expected = [
            (name, torch.Size((len(rows) * (shape[0] // self._count), *shape[1:])))
            for name, shape in self._uses
        ]
        pairs = zip(chunk.tensors, self._read.tensors, strict=True)
        return used == expected and all(
            nearly_equal(x, self.take(f, rows)) for x, f in pairs
        )


def _length(vectors: Sequence[Tensor]) -> float:
    return math.hypot(*[float(torch.linalg.vector_norm(x)) for x in vectors])


def rows_of(inputs: Inputs, rows: Tensor | slice, count: int) -> Inputs:
    """Take rows of every tensor whose first dimension counts the samples."""

    def take(x: Any) -> Any:
        has_rows = isinstance(x, Tensor) and x.ndim and x.shape[0] == count
        return x[rows] if has_rows else x

    args, kwargs = _pytree.tree_map(take, (inputs.args, dict(inputs.kwargs)))
    return type(inputs)(args, kwargs)
