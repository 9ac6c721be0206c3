"""Mean gradients of some passes, as what takes least memory."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from torch_dropout_ir.gradient_factors import Factors, row_blocks
from torch_dropout_ir.regularizers.inner_products import Gradient


class GradientMeans:
    """The mean of each parameter's gradients so far, by its number.

    Args:
        targets: The parameters.
        count: Number of passes that will be entered.
        beside: Where the memory begins that is there anyway, as that of the inputs.
        entries: About how many entries of a gradient are made at a time.

    Attributes:
        count: As given.
    """

    def __init__(
        self, targets: Sequence[Tensor], count: int, beside: Set[int], entries: int
    ) -> None:
        self.count = count
        self._targets = targets
        self._beside = beside
        self._entries = entries
        self._means: dict[int, Gradient] = {}

    def numbers(self) -> set[int]:
        """Return the numbers of the parameters whose mean is not zero."""
        return set(self._means)

    def get(self, i: int) -> Gradient | None:
        """Return the mean of a parameter; None for zero."""
        return self._means.get(i)

    def take(self, i: int) -> Gradient | None:
        """Return the mean of a parameter, which is not held any longer."""
        return self._means.pop(i, None)

    def enter(self, i: int, g: Gradient | None, before: int = 0) -> None:
        """Enter a gradient, or None for zero, after so many of other passes.

        Of gradients that are all the same the mean is that very one.
        """
        mean = self._means.get(i)
        if isinstance(mean, Factors) and isinstance(g, Factors):
            mean.enter(g)
        elif before == 0 and g is not None:
            self._means[i] = self._first(i, g)
        elif mean is not None or g is not None:
            like = self._targets[i]
            zero = like.new_zeros(()).expand(like.shape)
            whole = mean[:] if isinstance(mean, Factors) else mean
            whole = torch.zeros_like(like) if whole is None else whole
            self._means[i] = whole
            g = zero if g is None else g
            if isinstance(g, Tensor):
                whole.lerp_(g, 1 / (before + 1))
                return
            for part in row_blocks(whole, self._entries):
                whole[part].lerp_(g[part], 1 / (before + 1))

    def _first(self, i: int, g: Gradient) -> Gradient:
        if isinstance(g, Factors):
            size = self.count * g.held(self._beside)
            return g if size < self._targets[i].nbytes else g[:]
        # One tensor may be the gradient of several, and some of its entries the same.
        only = self.count == 1
        return g if only else g.clone(memory_format=torch.contiguous_format)
