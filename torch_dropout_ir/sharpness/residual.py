r"""Diagonal blocks of the residual: what moves, what it couples, probes of its trace.

Semantics:

* A block is one layer whose action is known, perturbed at its output by parameters that
  are drawn for each sample; or the parameters of one module themselves.
* Where a layer's positions (pixels, tokens) do not see each other in the residual, each
  is perturbed by itself: then a nonlinearity that acts on entries alone is seen
  exactly, as the block is diagonal.
* A weight of three squares one above the other is that of queries, keys and values
  together. They are probed apart: what couples queries with keys is most of the block,
  and has no part in the trace.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torch_dropout_ir.sharpness.uses import Use, perturbation

_FEW_ROWS = 32  # on which positions could look apart by chance


@dataclasses.dataclass(frozen=True)
class Block:
    """Parameters whose block of the residual is probed alone.

    Attributes:
        owner: Name of the module of the first parameter.
        layer: Uses of one layer, perturbed at its output; empty for other parameters.
        targets: What derivatives are taken in.
        piece: Which third of the layer's output features; None for all.
        apart: Whether positions do not see each other.
    """

    owner: str
    layer: list[Use]
    targets: list[Tensor]
    piece: int | None = None
    apart: bool = False

    def split(self) -> list[Block]:
        """Return a block for each of queries, keys and values, or this one."""
        for use in self.layer:
            _, groups, _, width = use.part.split(use.delta).shape
            if groups == 1 and width > 3 and width == 3 * use.part.size:
                return [dataclasses.replace(self, piece=k) for k in range(3)]
        return [self]

    def probe(self, normal: bool) -> list[Tensor]:
        """Draw a perturbation of the targets."""

        def draw(x: Tensor) -> Tensor:
            return x.normal_() if normal else x.bernoulli_(0.5).mul_(2).sub_(1)

        if self.layer:
            return [perturbation(self.layer, draw, self._columns(), self.apart)]
        return [draw(torch.empty_like(x)) for x in self.targets]

    def _columns(self) -> slice:
        if self.piece is None:
            return slice(None)
        width = self.layer[0].part.split(self.targets[0]).shape[3] // 3
        return slice(self.piece * width, (self.piece + 1) * width)

    def own(self, g: Tensor) -> Tensor:
        """Return a derivative in the target with zeros for the other pieces."""
        part, columns = self.layer[0].part, self._columns()
        rows = part.split(g)
        found = torch.zeros_like(rows)
        found[..., columns] = rows[..., columns]
        return part.join(found)


@dataclasses.dataclass(frozen=True)
class Residual:
    """Products with the diagonal blocks of the residual.

    Attributes:
        gradients: Derivatives of the outputs under the loss's slope, by target.
    """

    gradients: dict[int, Tensor]

    def _product(
        self, targets: list[Tensor], probe: list[Tensor]
    ) -> list[Tensor | None]:
        pairs = [
            (g, z)
            for x, z in zip(targets, probe, strict=True)
            if (g := self.gradients[id(x)]).requires_grad
        ]
        if not pairs:
            return [None] * len(probe)
        values, weights = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(
                values, targets, weights, retain_graph=True, allow_unused=True
            )
        )

    def variances(self, block: Block) -> tuple[float, float] | None:
        """Return the variance of a probe of signs, estimated from one normal probe.

        For ``z = L e`` with normal ``e``, and ``M = L' K L`` the block as the
        parameters see it, ``|M e|^2`` is ``|M|^2`` on average, the variance of signs
        at most twice that. Where ``L`` is diagonal the part of the diagonal, which
        signs do not see, is taken out: ``E sum (e M e)^2 - (M e)^2 = 2 sum M_jj^2``.

        It is that if positions see each other, and if they do not; None if the block
        is zero: a normal probe would show it if it were not.
        """
        probe = block.probe(True)
        found = self._product(block.targets, probe)
        moved = [(z, g) for z, g in zip(probe, found, strict=True) if g is not None]
        if not any(bool(g.any()) for _, g in moved):
            return None
        if not block.layer:
            own = sum(_off_diagonal(z, g, g.square()) for z, g in moved)
            return float(own), float(own)
        (z, g), uses = (moved[0][0], block.own(moved[0][1])), block.layer
        seen = sum(2 * float(use.squared_norms(g).sum()) for use in uses)
        scaled = torch.stack([use.variance() for use in uses]).sum(0) * g.square()
        return seen, _off_diagonal(z, g, scaled)

    def vanishes(self, blocks: list[Block]) -> bool:
        """Whether a normal probe of all blocks moves nothing, within or between."""
        targets = [x for block in blocks for x in block.targets]
        probe = [z for block in blocks for z in block.probe(True)]
        found = self._product(targets, probe)
        return not any(g is not None and bool(g.any()) for g in found)

    def couples(self, layers: list[Block]) -> bool:
        """Whether what moves half of the samples in some layers reaches the others."""
        by_layer = {id(block.targets[0]): block for block in layers}.values()
        moved, half = [], None
        for block in by_layer:
            part = block.layer[0].part
            rows = part.split(block.probe(True)[0]).clone()
            half = halved(rows) if half is None else half
            rows[half] = 0
            moved.append(part.join(rows))
        targets = [block.targets[0] for block in by_layer]
        found = self._product(targets, moved)
        return any(
            g is not None and bool(block.layer[0].part.split(g)[half].any())
            for block, g in zip(by_layer, found, strict=True)
        )

    def apart(self, block: Block) -> bool:
        """Whether what moves half of each sample's positions reaches no others."""
        part = block.layer[0].part
        rows = part.split(block.probe(True)[0]).clone()
        samples, _, positions, _ = rows.shape
        if samples * positions < _FEW_ROWS:
            return False
        # Other halves for other samples: those that see each other show too.
        order = torch.rand(samples, positions, dtype=torch.float32, device=rows.device)
        order = order.argsort(1)
        still = (order < positions // 2)[:, None, :, None]
        (found,) = self._product(block.targets, [part.join(rows * ~still)])
        return found is None or not bool((part.split(found) * still).any())

    def form(self, blocks: list[Block]) -> Tensor:
        """One probe of the trace of some blocks, 0-d."""
        targets = [x for block in blocks for x in block.targets]
        probe = [z for block in blocks for z in block.probe(False)]
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for z, g in zip(probe, self._product(targets, probe), strict=True):
            if g is not None:
                total += (z.double() * g.double()).sum().cpu()
        return total


def _off_diagonal(z: Tensor, g: Tensor, scaled: Tensor) -> float:
    """Twice the squares off the diagonal, from what a normal probe gives."""
    squares = 3 * scaled.double().sum() - (z * g).double().square().sum()
    return max(0.0, float(squares))


def halved(rows: Tensor) -> Tensor:
    """Draw half of the rows, rounded up: a mask."""
    count = rows.shape[0]
    return torch.randperm(count, device=rows.device) >= count // 2


def merged(places: list[int], most: int) -> list[list[int]]:
    """Put neighbours together until there are at most ``most`` groups."""
    size = max(1, -(-len(places) // most))
    return [places[i : i + size] for i in range(0, len(places), size)]
