"""Draws of the layer-by-layer trace over all batches, masks and ranks.

Semantics:

* The first run over the batches takes what is exact, and finds the blocks of the
  residual that are not zero. Neighbours are put together until all can be afforded.
* Where one probe of all blocks together moves nothing, there is no residual.
* Every group of blocks is drawn apart, and one with more noise more often: shares of
  the draws follow the standard deviations that the first run has estimated, but for
  a part that is spread evenly, which errors of that run cannot starve. No draw that
  counts has a say in how many there are.
* A draw of a group is the average over all batches of one probe each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.sharpness.layerwise import Layerwise, owner
from torch_dropout_ir.sharpness.linearization import Kind
from torch_dropout_ir.sharpness.residual import Block, Residual, merged
from torch_dropout_ir.sharpness.surface import Surface

OVERHEAD: Final = 1  # passes of one run over the batches, besides its draws
_CHECKS: Final = 3  # of what layers are taken for, in the first run
_HEAD: Final = 4  # exact part, passes spent, one, whether outputs are sampled
_PIECES: Final = 3
_EVEN: Final = 0.4
_DRAWS: Final = 4  # of a group, below which its error is a guess
_SAMPLED: Final[list[int]] = []  # the group of what is sampled of the outputs

_ALL: Final = -1  # stands for all layers together

Key = tuple[int, int | None]


class Rounds:
    """What is exact, once, and as many random draws of the rest as are asked for.

    ``kind`` tells whether there is a residual; it goes on from a ``state`` that
    :meth:`state` returned, or starts with the exact part.

    Attributes:
        exact: The part that is exact.
        draws: Draws of each group; the sum of their means is an estimate of the rest.
            Empty where nothing is left to chance.
        spent: Passes spent.
    """

    def __init__(
        self,
        surface: Surface,
        kind: Kind,
        num_matvecs: int,
        state: dict[str, Any] | None,
    ) -> None:
        self._surface, self._kind = surface, kind
        owners = list(dict.fromkeys(owner(name) for name in surface.params))
        self._places = {name: _PIECES * i for i, name in enumerate(owners)}
        state = state or {}
        self._moved: dict[Key, dict[int, bool]] = dict(state.get("moved", {}))
        self._coupled: list[Key] = list(state.get("coupled", []))
        self._known: dict[Key, list[int]] = dict(state.get("known", {}))
        self._met: dict[tuple[int, int], tuple[bool, bool]] = {}
        self._flat = True  # no batch so far has a residual
        self._most: int = state.get("most", num_matvecs)
        self.exact, self.spent = state.get("exact", 0.0), state.get("spent", 0)
        self.draws: list[list[float]] = [list(x) for x in state.get("draws", [])]
        self._groups: list[list[int]] = state.get("groups", [])
        self._shares: list[float] = state.get("shares", [])
        if not state:
            self._begin()

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on."""
        return {
            "method": "layerwise",
            "most": self._most,
            "exact": self.exact,
            "draws": self.draws,
            "groups": self._groups,
            "shares": self._shares,
            "moved": self._moved,
            "coupled": self._coupled,
            "known": self._known,
            "spent": self.spent,
        }

    def _begin(self) -> None:
        found = self._run(self._first)
        self.exact, sampled = float(found[0]), bool(found[3] > 0)
        moved, variances = found[_HEAD:].chunk(2)
        places = [i for i, x in enumerate(moved.tolist()) if x > 0]
        # Each can be drawn often enough to tell its own error.
        left = (self._most - self.spent - OVERHEAD) // _DRAWS - sampled
        groups = merged(places, max(1, min(self._most // 8, left)))
        noise = torch.stack(
            [variances[x].sum() for x in groups] or [moved.sum()]
        ).sqrt()
        if not bool(noise.any()):
            noise = torch.ones_like(noise)
        even = 1 / max(1, len(groups) + sampled)
        shares = (_EVEN / len(noise) + (1 - _EVEN) * noise / noise.sum()).tolist()
        self._shares = [even] * sampled + [
            (1 - even * sampled) * x for x in shares[: len(groups)]
        ]
        self._groups = [_SAMPLED] * sampled + groups
        self.draws = [[] for _ in self._groups]

    def more(self, products: int) -> None:
        """Take so many more draws, and at least two of each group in all."""
        least = [max(0, 2 - len(draws)) for draws in self.draws]
        wanted = [math.floor(products * share) for share in self._shares]
        counts = [max(pair) for pair in zip(least, wanted, strict=True)]
        noisiest = self._shares.index(max(self._shares))
        counts[noisiest] += max(0, products - sum(counts))
        found = self._run(lambda net, key: self._drawn(net, key, counts))
        new = found[_HEAD:].split(counts)
        for draws, own in zip(self.draws, new, strict=True):
            draws += own.tolist()

    def _run(self, take: Callable[[Layerwise, Key], Tensor]) -> Tensor:
        """Average what is taken of the batches, over all masks."""

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            with torch.enable_grad():
                known = self._known.get((place, seed))
                whole = self._kind != "ggn"
                net = Layerwise(self._surface, batch, place, seed, known, whole)
                self._known[place, seed] = net.known
                with self._surface.backward():
                    found = take(net, (place, seed))
            return found.to(next(iter(self._surface.params.values())).device)

        seeds = self._surface.seeds
        total = torch.stack([self._surface.average(one, s).cpu() for s in seeds])
        found = total.mean(0)
        # A loss that is a sum over samples counts every batch.
        self.spent += math.ceil(float(found[1] / found[2]) - 1e-6)
        return found

    def _first(self, net: Layerwise, key: Key) -> Tensor:
        """Take what is exact, and look which blocks are not zero."""
        sampled = net.sampled or net.width > self._most // 2
        head = torch.zeros(_HEAD, dtype=torch.float64, device="cpu")
        spent = _CHECKS
        if net.uses and not sampled:
            head[0] = net.gauss_newton(net.roots().exact())
            spent += net.width
        moved, variances, probes = self._look(net, key)
        head[1], head[2] = spent + probes, 1.0
        head[3] = float(bool(net.others) or sampled)
        return torch.cat((head, moved, variances))

    def _look(self, net: Layerwise, key: Key) -> tuple[Tensor, Tensor, int]:
        """Places of the blocks that are not zero, variances, and what it has cost."""
        moved, variances = torch.zeros(
            2, _PIECES * len(self._places), dtype=torch.float64, device="cpu"
        )
        if self._kind == "ggn":
            return moved, variances, 0
        net.coupled = key in self._coupled
        blocks, spent = net.blocks(), 1
        residual = net.residual(blocks)
        if self._flat and blocks:
            spent += 1
            self._flat = residual.vanishes(blocks)
            if self._flat:
                return moved, variances, spent
        few = len(blocks) <= self._most // 4  # so that each can be looked at
        spent += few * len(blocks)
        seen = [residual.variances(x) if few else (0.0, 0.0) for x in blocks]
        self._moved[key] = {}
        layers: dict[int, bool] = {}
        for i, block in enumerate(blocks):
            if (noise := seen[i]) is None:
                continue
            if block.layer and (layer := id(block.layer[0].delta)) not in layers:
                # What meets in a layer is the model's doing: one batch tells for all.
                place = len(blocks), i if few else _ALL
                if place not in self._met:
                    those = [block] if few else [b for b in blocks if b.layer]
                    *found, cost = self._meetings(residual, those)
                    self._met[place] = found[0], found[1]
                    spent += cost
                apart, coupled = self._met[place]
                layers[layer] = apart if few else _once(block)
                if coupled:
                    self._coupled.append(key)
                    moved, variances, more = self._look(net, key)
                    return moved, variances, spent + more
            apart = bool(block.layer) and layers[layer]
            self._moved[key][i] = apart
            moved[self._place(block)] = 1.0
            variances[self._place(block)] += noise[apart]
        return moved, variances, spent

    def _meetings(
        self, residual: Residual, blocks: list[Block]
    ) -> tuple[bool, bool, int]:
        """Whether positions are apart (of one layer), samples meet, and the cost."""
        layers = [dataclasses.replace(block, piece=None) for block in blocks]
        once = all(map(_once, layers))
        look = len(layers) == 1 and not once
        if look and residual.apart(layers[0]):
            return True, False, 1
        return once, residual.couples(layers), 1 + look

    def _place(self, block: Block) -> int:
        return self._places[block.owner] + (block.piece or 0)

    def _drawn(self, net: Layerwise, key: Key, counts: list[int]) -> Tensor:
        """Draw each group as often as counted."""
        net.coupled = key in self._coupled
        sampled = net.sampled or net.width > self._most // 2
        draw = net.sampler() if sampled or net.others else None
        blocks = net.blocks() if (known := self._moved.get(key)) else []
        own = [
            dataclasses.replace(blocks[i], apart=apart)
            for i, apart in (known or {}).items()
        ]
        residual = net.residual(own) if own else Residual({})
        drawn, spent = [], OVERHEAD
        for group, count in zip(self._groups, counts, strict=True):
            mine = [block for block in own if self._place(block) in group]
            for _ in range(count):
                found = torch.zeros((), dtype=torch.float64, device="cpu")
                if group == _SAMPLED and draw is not None:
                    roots = draw()
                    found += net.gauss_newton(roots) if sampled else 0.0
                    found += net.sampled_elsewhere(roots)
                elif mine:
                    found += residual.form(mine)
                drawn.append(found)
            spent += count * int(bool(mine) or group == _SAMPLED)
        head = torch.tensor([0.0, spent, 1.0, 0.0], dtype=torch.float64, device="cpu")
        return torch.cat((head, torch.stack(drawn)))


def _once(block: Block) -> bool:
    """Whether each sample meets the parameters at one position."""
    return all(use.once for use in block.layer)
