"""What a script keeps beside the tensors of its model: attributes, and hooks that look.

Semantics:

* The analysis runs the model again. What a module or parameter counts or collects in
  plain attributes is given back afterwards; a list, dict (ordered, of defaults or
  counts too), set, tensor, array of NumPy's or random generator with its contents.
* A hook that looks on (counts calls, collects activations), of a module or of all, is
  not called in such passes. One that acts (returns something, writes on tensors or on
  the module) belongs to the model and is; of the backward pass, one that changes a
  gradient. The script's own pass at a step that measures tells which is which: what the
  model itself keeps by a hook, it may read. Hooks of torch and of Hugging Face's models
  act.
* Key encoders that follow by momentum, annealed temperatures and constraints are kept
  in parameters. Version counters do not tell of writing on ``x.data``; the values do.
* Modes at dispatch level around the step (counters of operations, logs) are set aside.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils import _python_dispatch

from torch_dropout_ir.analysis.attributes import OF_TORCH, unmoved_attributes
from torch_dropout_ir.analysis.function_modes import unmoved_modes
from torch_dropout_ir.tracing import unasked
from torch_dropout_ir.written_parameters import is_plain, unwritten

# A private name; with a torch that lacks it, such modes see the measures too.
_NO_MODES: Final[Callable[[], Any]] = getattr(
    _python_dispatch, "_disable_current_modes", contextlib.nullcontext
)
# Torch's own that look on: whoever counts operations asks them where it is.
_TRACKERS: Final = ("module_tracker", "mod_tracker")
_FORWARD: Final = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD: Final = ("_backward_hooks", "_backward_pre_hooks")
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Bystanders:
    """Tells hooks that look on from those that act; ``writes`` what passes write on.

    Attributes:
        looking, acting: Keys of hooks that have looked on, and have acted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.writes = model, ParameterWrites(model)
        self.looking, self.acting = set[int](), set[int]()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Learn which hooks act, from what they do inside the context."""
        changed = []
        for back, hooks in _hook_dicts(self._model):
            for key, hook in hooks.items():
                if key not in self.acting and not _of_torch(hook):
                    changed.append((hooks, key, hook, back))
        for hooks, key, hook, back in changed:
            kept = None if back else _reached(hook, self._model)
            hooks[key] = _Told(hook, key, self, kept)
        try:
            yield
        finally:
            for hooks, key, hook, _ in changed:
                if isinstance(hooks.get(key), _Told):  # else the script removed it
                    hooks[key] = hook

    @contextlib.contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """Leave those that look on out inside the context, and give all else back.

        ``model`` is the one that runs: the own one, or its copy.
        """
        still = self.looking - self.acting
        kept = [(x, dict(x)) for _, x in _hook_dicts(model)]
        parameters = self.writes.kept(model)
        with (
            unmoved_attributes(model), parameters, _unprofiled(model), _NO_MODES(),
            unmoved_modes(),
        ):  # fmt: skip
            try:
                for module in model.modules():  # logs nothing to its trainer
                    kinds = {kind.__name__ for kind in type(module).__mro__}
                    if "LightningModule" in kinds:
                        vars(module).update(log=_unlogged, log_dict=_unlogged)
                for hooks, _ in kept:
                    for key in still.intersection(hooks):
                        del hooks[key]
                yield
            finally:
                for hooks, own in kept:  # in their order
                    if hooks.keys() != own.keys():
                        hooks.clear()
                        hooks.update(own)


def _unlogged(*_: Any, **__: Any) -> None:
    """Log nothing."""


@contextlib.contextmanager
def _unprofiled(model: nn.Module) -> Iterator[None]:
    """Run scripted code as it is: counted calls decide when it is optimized."""
    if not any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        yield
        return
    optimizes = torch._C._get_graph_executor_optimize()
    try:
        torch._C._set_graph_executor_optimize(False)
        yield
    finally:
        torch._C._set_graph_executor_optimize(optimizes)


class _Told:
    """A hook of the script's, and what it did; copies and pickles are the hook.

    ``reached`` is None of the backward pass: a gradient reads nothing of modules.
    """

    def __init__(
        self, hook: Any, key: int, of: Bystanders, reached: list[nn.Module] | None
    ) -> None:
        self._hook, self._key, self._of, self._reached = hook, key, of, reached

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._around(args)
        result = self._hook(*args, **kwargs)
        acts = result is not None or self._around(args) != before
        (self._of.acting if acts else self._of.looking).add(self._key)
        return result

    def _around(self, args: tuple[Any, ...]) -> list[Any]:
        if self._reached is None:
            return _state([x for x in args if not isinstance(x, nn.Module)])
        return _state(args) + _kept(self._reached)

    def __reduce__(self) -> Any:
        return _itself, (self._hook,)


def _itself(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _hook_dicts(model: nn.Module) -> Iterator[tuple[bool, Any]]:
    """Yield where hooks are, and whether they are of the backward pass."""
    for back, names in ((False, _FORWARD), (True, _BACKWARD)):
        yield from ((back, vars(all_modules).get(f"_global{n}", {})) for n in names)
        for module in model.modules():
            yield from ((back, vars(module).get(name, {})) for name in names)
    yield from ((True, x._backward_hooks or {}) for x in model.parameters())


def _reached(hook: Any, model: nn.Module) -> list[nn.Module]:
    """Return the model's modules that a hook could keep something in."""
    inner, near = hook, list[Any]()
    while isinstance(inner, functools.partial):
        near += [*inner.args, *inner.keywords.values()]
        inner = inner.func
    near.append(getattr(inner, "__self__", None))
    for cell in getattr(inner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            near.append(cell.cell_contents)
    ids = {id(x) for x in near if isinstance(x, (nn.Module, list, dict, deque))}
    return [
        m
        for m in model.modules()
        if id(m) in ids or not ids.isdisjoint(map(id, vars(m).values()))
    ]


def _kept(modules: Sequence[nn.Module]) -> list[Any]:
    """What modules hold in plain attributes, by identity."""
    seen: list[Any] = []
    for module in modules:
        for name, x in vars(module).items():
            if name not in OF_TORCH:
                seen += [name, id(x)]
                if isinstance(x, (list, dict, deque)):
                    seen += map(id, x.values() if isinstance(x, dict) else x)
    return seen


def _of_torch(hook: Any) -> bool:
    place = getattr(hook, "__module__", None) or type(hook).__module__
    own = place.split(".")[0] in ("torch", "torch_dropout_ir", "transformers")
    return own and not place.endswith(_TRACKERS)


def _state(args: Sequence[Any]) -> list[Any]:
    """What a hook that acts would change: tensors by version, members by identity."""
    seen: list[Any] = []
    for x in args:
        inner = x if isinstance(x, (tuple, list)) else (x,)
        tensors = (y for y in inner if isinstance(y, Tensor) and not y.is_inference())
        seen += [y._version for y in tensors]
        if isinstance(x, nn.Module):
            own = (vars(x), x._parameters, x._buffers, x._modules)
            seen += [id(y) for members in own for y in members.values()]
    return seen


class ParameterWrites:
    """Learns from the script's passes which parameters they write on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: dict[int, Tensor] = {}
        self._before: list[tuple[Tensor, Any]] = []

    def begin(self) -> None:
        """A pass of the script's begins."""
        self._before = [(x, _fingerprint(x)) for x in self._model.parameters()]

    def end(self) -> None:
        """It has ended."""
        known = [(x, was) for x, was in self._before if was is not None]
        self._written |= {id(x): x for x, was in known if _fingerprint(x) != was}
        self._before = []

    def kept(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Let each pass of a model, the own one or its copy, begin with these."""
        return unwritten(model, list(self._written.values()))


def _fingerprint(x: Tensor) -> Any:
    """What tells whether a parameter has the same values; None where nobody asks."""
    with unasked():  # by what looks on at the pass: this is none of the model's code
        if not is_plain(x):
            return None
        plain = torch.view_as_real(x.data) if x.is_complex() else x.data
        bits = plain.view(_BITS[plain.element_size()])
        kind = torch.promote_types(bits.dtype, torch.int32)
        # In no wider one: it takes longer.
        return x.data_ptr(), int(bits.sum(dtype=kind))
