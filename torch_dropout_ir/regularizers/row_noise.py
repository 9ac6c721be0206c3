"""Random numbers of some rows of a batch, as a pass over all of them draws them.

What a model draws besides its sites (the code of a variational autoencoder, noise that
is added) has rows where its first dimension counts them. It is drawn for all rows, at
the generator's place in a pass over all, and those of the part are taken. Whether that
was right, the outputs tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir.regularizers.output_rows import rows_of_samples


class RowNoise(TorchDispatchMode):
    """Draws random numbers of some samples as those of all are drawn.

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
        """Return the rows of the samples."""
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
