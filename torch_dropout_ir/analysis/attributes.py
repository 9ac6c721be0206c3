"""What runs of a measure give back: plain attributes, and states of generators."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from torch_dropout_ir.generators import SET_STATE, STATE, AllStanding
from torch_dropout_ir.substitution import rewrite
from torch_dropout_ir.tracing import is_released

OF_TORCH: Final = frozenset(vars(nn.Module()))
_MEMBERS: Final = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def unmoved_attributes(model: nn.Module) -> Iterator[None]:
    """Give back what modules hold, parameters by identity, and attributes of these."""
    plain = [vars(x) for x in model.parameters() if type(x) is nn.Parameter]
    modules = [*model.modules()]
    kept = [(x, dict(x)) for x in [*plain, *(y for m in modules for y in _places(m))]]
    contents = [(x, _contents(x)) for x in _held([*plain, *map(vars, modules)])]
    try:
        yield
    finally:
        for now, own in kept:
            for name in [n for n in now if n not in own]:
                del now[name]
            now.update({n: x for n, x in own.items() if now.get(n, now) is not x})
        for x, was in contents:
            _RESTORE[type(x)](x, was)


def _places(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield where a module holds its attributes."""
    own = vars(module)
    yield own
    yield from (own[x] for x in _MEMBERS if isinstance(own.get(x), dict))


def _held(attributes: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Yield what modules hold in plain attributes, and what is in it, once each."""
    seen: set[int] = set()
    plain = (own.items() for own in attributes)
    left = [x for items in plain for name, x in items if name not in OF_TORCH]
    while left:
        x = left.pop()
        if type(x) not in _RESTORE or id(x) in seen:
            continue
        if isinstance(x, Tensor) and (x.is_meta or x.is_nested or is_released(x)):
            continue  # its numbers cannot be compared
        seen.add(id(x))
        yield x
        if isinstance(x, (list, deque, dict)):
            left += x.values() if isinstance(x, dict) else x


def _contents(x: Any) -> Any:
    if type(x) in STATE:
        return STATE[type(x)](x)
    return x.detach().clone() if isinstance(x, Tensor) else x.copy()


def _refill(x: Any, was: Any) -> None:
    x.clear()
    x.extend(was) if isinstance(x, (list, deque)) else x.update(was)


def _rewrite_tensor(x: Tensor, was: Tensor) -> None:
    inference = x.is_inference()
    with torch.inference_mode() if inference else contextlib.nullcontext():
        if x.shape != was.shape:
            x.resize_(was.shape)
        rewrite(x, was)


def _rewrite_array(x: np.ndarray, was: np.ndarray) -> None:
    if x.flags.writeable:
        x[...] = was


_RESTORE: Final[dict[type, Callable[[Any, Any], None]]] = {
    **dict.fromkeys((list, dict, set, deque), _refill),
    **dict.fromkeys((OrderedDict, defaultdict, Counter), _refill),
    Tensor: _rewrite_tensor,
    np.ndarray: _rewrite_array,
    **SET_STATE,
}


class Generators(AllStanding):
    """The state of torch's, Python's, NumPy's and the model's generators at one moment.

    Also whether autocast is on: what is drawn can depend on it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        held = _held(vars(m) for m in model.modules())
        self._hold([x for x in held if type(x) in STATE])
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast as was done at that moment."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield
