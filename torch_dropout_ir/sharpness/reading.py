"""Batches of a loader, the same in every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_dropout_ir.batches import as_batches
from torch_dropout_ir.functional import Batch, batch_size
from torch_dropout_ir.generators import Standing, preserved_rng
from torch_dropout_ir.losses import Loss


class Reading:
    """Batches in the same order, with the same random transforms, every time.

    What is read twice must be one function: a loader that shuffles, drops its last
    batch or augments would give another one each time. All generators, those of the
    model's devices too, are given back as they were; data that change by others (of a
    sampler's own with NumPy, by a count of epochs) are told by their sum, the second
    time that they are read, and raise a ValueError. ``weigh`` tells what a batch counts
    for in a mean; None: its number of samples.

    Attributes:
        single: The only batch, where there is just one.
        empty: Whether it is known to hold no batch.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        weigh: Callable[[Batch], float] | None = None,
    ) -> None:
        self._batches: Iterable[Batch] = as_batches(data)
        self._model = model
        self._weigh = weigh
        listed = self._batches if isinstance(self._batches, list) else None
        for batch in listed or ():
            check_pair(batch)
        self.single = listed[0] if listed and len(listed) == 1 else None
        self.empty = listed == []
        self._generators = _generators(self._batches)
        self._began = Standing(self._generators)
        self._sum: float | None = None  # of all that was read the first time
        self._alike = False  # whether the second time gave the same

    def samples(self, batch: Batch) -> int:
        """Return the number of samples of a batch; raise if it is not to be told."""
        try:
            return batch_size(batch)
        except TypeError:  # inputs that are objects of the script's own
            if self.single is None:
                raise
            return 1

    def weight(self, batch: Batch) -> float:
        """Return what one of the batches counts for in a mean."""
        return float(self.samples(batch) if self._weigh is None else self._weigh(batch))

    def shares(self, adds: bool) -> list[tuple[Batch, float]] | None:
        """Return batches of samples with their shares in the mean, or with 1 of a sum.

        None of a loader, which would have to be read for that, and of nothing.
        """
        if not isinstance(self._batches, list):
            return None
        counts = [(batch, self.weight(batch)) for batch in self._batches]
        whole = 1 if adds else sum(n for _, n in counts)
        return [(b, 1.0 if adds else n / whole) for b, n in counts if n] or None

    def __iter__(self) -> Generator[Batch, None, None]:
        if isinstance(self._batches, (list, tuple)):
            yield from self._batches
            return
        before = Standing(self._generators)
        try:
            with preserved_rng(self._model, 0):
                self._began.restore()
                total = 0.0
                for batch in self._batches:
                    check_pair(batch)
                    # Of images a sum took up to a quarter of a small model's product.
                    total += 0.0 if self._alike else _sum(batch)
                    yield batch
                if not self._alike:
                    self._compare(total)
        finally:
            before.restore()

    def _compare(self, total: float) -> None:
        """Raise where data are others than when they were first read."""
        before = self._sum
        if before is None:
            self._sum = total
            return
        if math.isfinite(before - total) and not math.isclose(
            before, total, rel_tol=1e-6, abs_tol=1e-4
        ):
            raise ValueError(
                "expected a loader that gives the same data each time, got others (by "
                "a generator or a count of its own). Pass `list(loader)`."
            )
        self._alike = True


def terms(loss: Loss, batch: Batch) -> float:
    """Return the number of terms that a mean over ``batch`` is of, or their weights."""
    targets = batch[1]
    if not isinstance(targets, Tensor):
        return float(batch_size(batch))
    return loss.num_terms(targets)


def _sum(batch: Any) -> float:
    """The sum of all real numbers of a batch."""
    real = (x for x in tree_leaves(batch) if isinstance(x, Tensor) and _is_plain(x))
    return float(sum(x.detach().sum(dtype=torch.float64).item() for x in real))


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not (x.is_complex() or x.is_nested)


def check_pair(batch: Any) -> None:
    """Refuse what is no ``(inputs, targets)``; more than two may come of a loader."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            "expected batches of the form `(inputs, targets)`, got one of "
            f"{type(batch).__name__}. Make pairs of them: a dictionary of inputs may "
            "be the first part."
        )


def sliced(value: Any, size: int, places: Tensor) -> Any:
    """Return some of ``size`` samples; None where they cannot be told apart.

    Of a tensor, or of a tuple, list or dictionary of tensors, sample in front.
    """
    if isinstance(value, Tensor):
        fits = value.ndim > 0 and value.shape[0] == size
        return value[places.to(value.device)] if fits else None
    if type(value) in (tuple, list):
        parts = [sliced(x, size, places) for x in value]
        return None if any(x is None for x in parts) else type(value)(parts)
    if type(value) is dict:
        named = {k: sliced(x, size, places) for k, x in value.items()}
        return None if any(x is None for x in named.values()) else named
    return None


def _generators(batches: Any) -> list[torch.Generator]:
    """Generators of its own that a loader or its samplers shuffle with."""
    sampler = getattr(batches, "sampler", None)
    batched = getattr(batches, "batch_sampler", None)
    holders = (batches, sampler, batched, getattr(batched, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
