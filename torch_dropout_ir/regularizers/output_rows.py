"""The rows of some samples: in the outputs, of the loss, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.functional import batch_size
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import OutputsRead, real_leaves

# Samples of a part at least, where nothing tells that one alone is as among others.
PAIR: Final = 2
# One row of so many is in the first chunk, which tells at small cost whether samples
# meet. Where a share ``q`` of the rows meets others, ``m`` rows miss that in ``(1 -
# q)^m`` of cases.
_FIRST: Final = 8
_SEED: Final = 0


def least_of_part(clean: CleanPass, read: OutputsRead) -> int:
    """Return how many samples a part has at least; 0 where none can be taken apart."""
    counts = {clean.count(x) if x.ndim else 0 for x in read.tensors}
    count = next(iter(counts))
    if len(counts) > 1 or count < 2 or not clean.by_samples(count):
        return 0
    # One row may lie in memory as torch's derivative of batch normalization misreads
    # it, where several do not.
    told = all([clean.samples_meet(x) is False for x in read.tensors])
    nodes = graph_nodes([x.grad_fn for x in read.tensors])
    told = told and not any(["BatchNorm" in node.name() for node in nodes])
    least = 1 if told else PAIR  # a single sample runs as among others
    return least if count >= 2 * least else 0


def count_samples(clean: CleanPass, read: OutputsRead, inputs: Any) -> int:
    """Return the number of samples, by the inputs where uses have flattened rows."""
    count, given = clean.count(read.tensors[0]), batch_size((inputs, None))
    return count if given < 2 or count % given else given


def chunks(count: int, parts: int, least: int = PAIR) -> Iterator[Tensor]:
    """Yield the numbers of the rows of each chunk: a small one, then ``parts``."""
    alike = torch.Generator("cpu").manual_seed(_SEED)
    order = torch.randperm(count, generator=alike, device="cpu")
    first = min(count, max(least, count // _FIRST))
    step = max(least, -(-(count - first) // parts))
    ends = [*range(first, count - least + 1, step), count]
    for i, end in enumerate(ends):
        rows = order[ends[i - 1] if i else 0 : end]
        if len(rows):
            yield rows.sort().values


def rows_of_samples(samples: Tensor, each: int) -> Tensor:
    """Return the numbers of the rows of some samples, which have ``each`` in a row."""
    if each == 1:
        return samples
    places = torch.arange(each, device=samples.device)
    return (samples[:, None] * each + places).flatten()


def replace_rows(
    read: OutputsRead, outputs: Any, samples: Tensor, count: int
) -> OutputsRead:
    """Return the loss as a function of some samples' outputs, others as read."""
    leaves, _ = real_leaves(outputs)
    tensors = [leaves[i] for i in read.places]
    alone = _loss_of_rows(read, rows_of_samples(samples, len(read.tensors[0]) // count))
    if alone is not None:
        return OutputsRead(tensors, alone, None, read.places)

    def risk(tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(read.tensors, tensors, strict=True)
        return read.risk([
            f.index_copy(0, rows_of_samples(samples, len(f) // count).to(f.device), x)
            for f, x in pairs
        ])

    return OutputsRead(tensors, risk, None, read.places)


def _loss_of_rows(
    read: OutputsRead, rows: Tensor
) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """Return a loss of some rows alone whose derivatives are those of the whole loss.

    A sum or mean over rows of a known kind, taken of some of them, is that of the whole
    but for a constant and, of a mean, a factor: their share in the weight of all. None
    where it is of another kind, or leaves all of these rows out.
    """
    loss, targets, f = read.loss, read.targets, read.single
    known = loss is not None and loss.kind in ("squared", "cross_entropy")
    if not known or not isinstance(targets, Tensor) or targets.shape[:1] != f.shape[:1]:
        return None
    assert loss is not None
    # Torch pairs all rows; those of one sample are its classes.
    if (loss.kind == "squared" and targets.shape != f.shape) or read.couples():
        return None
    some = targets[rows.to(targets.device)]
    if loss.reduction == "sum":
        return lambda x: loss(x[0], some)
    share = loss.num_terms(some)
    share = share and share / loss.num_terms(targets)
    return (lambda x: share * loss(x[0], some)) if share else None


class RowNoise(TorchDispatchMode):
    """Draws random numbers of some samples as those of all are drawn.

    What a model draws besides its sites (the code of a variational autoencoder, noise
    that is added) has rows where its first dimension counts them. It is drawn for all
    rows, at the generator's place in a pass over all, and those of the part are taken.
    Whether that was right, the outputs tell.

    Args:
        samples: The numbers of the samples.
        count: Of how many.

    Attributes:
        aside: Whether what is drawn is left alone for now.
    """

    def __init__(self, samples: Tensor, count: int) -> None:
        super().__init__()
        self.aside = False
        self._samples = samples
        self._count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aside or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        named = [x.name for x in func._schema.arguments]
        given = [
            self._sizes(x) if name == "size" else x
            for name, x in zip(named, args, strict=False)
        ]
        given, beside = _pytree.tree_map(self._whole, (given, kwargs))
        found = func(*given, **beside)
        if func._schema.is_mutable:
            return args[0].copy_(self._part(found)) if found is given[0] else found
        return _pytree.tree_map(self._part, found)

    def _sizes(self, size: Any) -> list[int]:
        rows = [n // len(self._samples) * self._count for n in size[:1]]
        return [*(rows if self._has_rows(size) else size[:1]), *size[1:]]

    def _has_rows(self, size: Any) -> bool:
        return bool(size) and size[0] > 0 and not size[0] % len(self._samples)

    def _whole(self, x: Any) -> Any:
        """Return a tensor as of all samples, with numbers of its own for others."""
        if not isinstance(x, Tensor) or not self._has_rows(x.shape):
            return x
        found = laid_out(x, self._sizes(x.shape))
        again = torch.arange(len(found), device=x.device) % len(x)
        torch.index_select(x, 0, again, out=found)
        return found.index_copy_(0, self._rows(len(x)).to(x.device), x)

    def _part(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] % self._count:
            return x
        return x[self._rows(len(x) // self._count * len(self._samples))]

    def _rows(self, own: int) -> Tensor:
        return rows_of_samples(self._samples, own // len(self._samples))


def laid_out(x: Tensor, shape: Any) -> Tensor:
    """Return room laid out in memory as a tensor is: kernels draw in that order.

    Args:
        x: The tensor.
        shape: The shape of the room.
    """
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: -strides[d])
    places = sorted(range(x.ndim), key=order.__getitem__)
    return x.new_empty([shape[d] for d in order]).permute(places)
