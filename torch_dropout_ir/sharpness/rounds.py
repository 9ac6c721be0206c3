"""Rounds of the layer-by-layer trace over all batches, masks and ranks."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.sharpness.layerwise import Block, Layerwise, Residual, merged
from torch_dropout_ir.sharpness.linearization import Kind
from torch_dropout_ir.sharpness.surface import Surface

OVERHEAD: Final = 4  # passes of one run over the batches, besides its rounds
_HEAD: Final = 4  # exact part, cost of a round, passes spent, one


class Rounds:
    """What is exact, once, and as many random rounds of the rest as are asked for.

    Args:
        surface: The loss.
        kind: Whether there is a residual.
        num_matvecs: Passes that may be spent.
        state: What :meth:`state` returned; None starts with the exact part.

    Attributes:
        exact: The part that is exact.
        forms: Totals of the random rounds: each is an estimate of the rest.
        per_round: Passes that a round costs; 0 where nothing is left to chance.
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
        self._moved: dict[tuple[int, int | None], list[int]] = (
            dict(state["moved"]) if state else {}
        )
        self._coupled: list[tuple[int, int | None]] = (
            list(state["coupled"]) if state else []
        )
        self._most = state["most"] if state else num_matvecs
        self.forms: list[float] = list(state["forms"]) if state else []
        if state:
            self.exact, self.spent = state["exact"], state["spent"]
            self.per_round = state["per_round"]
        else:
            self.exact, self.spent, self.per_round = 0.0, 0, 0
            self._run(0)

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on."""
        return {
            "method": "layerwise",
            "most": self._most,
            "exact": self.exact,
            "forms": self.forms,
            "per_round": self.per_round,
            "moved": self._moved,
            "coupled": self._coupled,
            "spent": self.spent,
        }

    def more(self, rounds: int) -> None:
        """Take more random rounds."""
        self._run(rounds)

    def _run(self, rounds: int) -> None:
        first = not self.spent

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            with torch.enable_grad():
                net = Layerwise(self._surface, batch, place, seed)
                return self._batch(net, rounds, first, (place, seed))

        seeds = self._surface.seeds
        found = [self._surface.average(one, seed).cpu() for seed in seeds]
        total = torch.stack(found).mean(0)
        exact, cost, spent, weight = total[:_HEAD].tolist()
        if first:
            self.exact, self.per_round = exact, math.ceil(cost / weight - 1e-6)
        self.spent += math.ceil(spent / weight - 1e-6)
        self.forms += total[_HEAD:].tolist()

    def _batch(
        self, net: Layerwise, rounds: int, first: bool, key: tuple[int, int | None]
    ) -> Tensor:
        """Exact part (the first time), cost of a round, passes spent, 1, the rounds."""
        sampled = net.width > self._most // 2
        total = torch.zeros(_HEAD + rounds, dtype=torch.float64)
        spent = OVERHEAD - 1
        if first and net.uses and not sampled:
            total[0] = net.gauss_newton(net.roots())
            spent += net.width
        drawn = bool(net.others) or sampled
        residual, groups, probes = self._residual(net, key)
        draw = net.sampler() if drawn and rounds else None
        for k in range(_HEAD, _HEAD + rounds):
            roots = [] if draw is None else draw()
            total[k] = net.gauss_newton(roots) if sampled else 0.0
            total[k] += net.sampled_elsewhere(roots)
            for group in groups:
                total[k] += residual.form(group)
        cost = len(groups) + int(drawn)
        total[1], total[2], total[3] = cost, spent + probes + rounds * cost, 1.0
        return total.to(next(iter(self._surface.params.values())).device)

    def _residual(
        self, net: Layerwise, key: tuple[int, int | None]
    ) -> tuple[Residual, list[list[Block]], int]:
        """Blocks of the residual that are not zero, and the passes to find them."""
        if self._kind == "ggn":
            return Residual({}), [], 0
        net.coupled = key in self._coupled
        blocks, spent = net.blocks(), 1
        residual = net.residual(blocks)
        if key not in self._moved:
            moved = list(range(len(blocks)))
            if len(blocks) <= self._most // 4:
                spent += len(blocks)
                moved = [i for i in moved if not residual.vanishes(blocks[i])]
            spent += len(moved)
            if any([residual.couples(blocks[i]) for i in moved]):
                self._coupled.append(key)
                residual, groups, more = self._residual(net, key)
                return residual, groups, spent + more
            self._moved[key] = moved
        left = [blocks[i] for i in self._moved[key]]
        return residual, merged(left, max(1, self._most // 8)), spent
