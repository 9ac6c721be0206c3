"""What the noise of dropout sites adds to a loss to first order: nothing on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torch_dropout_ir import kernels, ops
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import read_outputs

# Elements of a mask that are looked at together, eight to a byte.
_BITS: Final = 2**18


class Slope(NamedTuple):
    """What the noise of a use of a site adds to a loss to first order.

    Attributes:
        terms: ``g h`` of each element of its mask.
        whole: Their sum, float64.
        live: How many are not zero: none of a loss that is least already.
    """

    terms: Tensor
    whole: Tensor
    live: int

    @classmethod
    def of(cls, terms: Tensor) -> Slope:
        """Return it of ``g h``."""
        parts = [x.sum(dtype=torch.float64) for x in terms.flatten().split(_BITS)]
        return cls(terms, torch.stack(parts).sum(), int(terms.count_nonzero()))

    def at(self, packed: Tensor, p: float) -> Tensor:
        """Return the sum of ``terms`` times the noise of a mask, float64."""
        scale, parts = kernels.keep_scale(p), [-self.whole]
        for x, bits in zip(
            self.terms.flatten().split(_BITS), packed.split(_BITS // 8), strict=False
        ):
            parts.append(ops.mask_apply(x, bits, scale).sum(dtype=torch.float64))
        return torch.stack(parts).sum()


class FirstOrder(NamedTuple):
    """What each use of a site adds to first order.

    Attributes:
        slopes: Of each use; None where the loss does not depend on it. No entry where
            derivatives cannot reach the sites.
        sites: The names of all sites that act, in order.
        unreachable: Those that derivatives cannot reach.
        uses: The site of each use.
    """

    slopes: list[Slope | None]
    sites: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    @classmethod
    def of(cls, clean: CleanPass, loss: Loss, targets: object) -> FirstOrder:
        """Return it of a pass, whose graph goes as the derivative comes."""
        if clean.unreachable or not clean.uses:
            return cls([], _names(clean), clean.unreachable)
        read = read_outputs(clean.outputs, loss, targets)
        return cls.of_risk(clean, read.risk(read.tensors))

    @classmethod
    def of_risk(cls, clean: CleanPass, risk: Tensor) -> FirstOrder:
        """Return it of a loss that has been taken already."""
        terms: list[Tensor | None] = [None] * len(clean.uses)

        def receive(use: int, g: Tensor) -> None:
            site, h, _ = clean.uses[use]
            terms[use] = (h.detach() * g).sum_to_size(site.mask_shape(h.shape))

        if clean.unreachable:
            return cls([], _names(clean), clean.unreachable)
        clean.pull(risk, None, receive, keep=False)
        slopes = [None if x is None else Slope.of(x) for x in terms]  # without a graph
        return cls(slopes, _names(clean), uses=tuple(clean.names))

    def of_pass(self) -> Callable[[str, torch.Size], Slope | None]:
        """Return what tells, use by use of another pass, what is known of it.

        That is of each site's first use, its second, and so on, where the mask has the
        same shape; None of others, as of layers that a model leaves out by chance.
        """
        left: dict[str, list[Slope | None]] = {}
        for name, own in zip(reversed(self.uses), reversed(self.slopes), strict=True):
            left.setdefault(name, []).append(own)

        def next_of(name: str, shape: torch.Size) -> Slope | None:
            slope = left[name].pop() if left.get(name) else None
            return None if slope is None or slope.terms.shape != shape else slope

        return next_of


def _names(clean: CleanPass) -> tuple[str, ...]:
    later = [site.name for site, _ in clean.later]
    return tuple(dict.fromkeys([*clean.names, *later]))
