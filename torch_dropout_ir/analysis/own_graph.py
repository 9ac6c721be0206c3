"""Whether a tensor that a loss reads depends on the model's own parameters."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor

_LEAF: Final = "torch::autograd::AccumulateGrad"


class OwnGraph:
    """What the parameters of a model lead to.

    Args:
        model: The model. Where its parameters are sharded, passes use other tensors,
            and everything that is differentiated counts as its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: set[int] | None = None
        self._sharded = False
        self._found: dict[Any, bool] = {}

    def leads_to(self, x: Tensor) -> bool:
        """Whether ``x`` may depend on a parameter of the model.

        Args:
            x: A tensor that is differentiated.

        Returns:
            False only of another leaf, and of what comes of such alone by functions
            whose inputs autograd knows; an ``autograd.Function`` may have more.
        """
        if self._own is None:
            parameters = list(self._model.parameters())
            self._own = {id(p) for p in parameters}
            self._sharded = any(isinstance(p, DTensor) for p in parameters)
        if self._sharded:
            return True
        return id(x) in self._own if x.is_leaf else self._reached(x.grad_fn)

    def _reached(self, root: Any) -> bool:
        seen, waiting = {root}, [root]
        while waiting:
            node = waiting.pop()
            if self._found.get(node) or self._is_own(node):
                self._found[root] = True
                return True
            behind = {n for n, _ in node.next_functions if n is not None} - seen
            waiting += [n for n in behind if self._found.get(n, True)]
            seen |= behind
        self._found |= dict.fromkeys(seen, False)
        return False

    def _is_own(self, node: Any) -> bool:
        if isinstance(node, BackwardCFunction):
            return True
        leaf = node.name() == _LEAF
        return leaf and self._own is not None and id(node.variable) in self._own
