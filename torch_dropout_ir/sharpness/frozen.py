"""Dropout that draws the same masks in every pass, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.arguments import check_count, check_module
from torch_dropout_ir.composed import composed
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.hooks import after_call, before_call
from torch_dropout_ir.module_calls import on_again, unchecked
from torch_dropout_ir.recomputation import Blocks
from torch_dropout_ir.sharpness.derivatives import LeanDerivatives
from torch_dropout_ir.tracing import unpacked_by_hooks
from torch_dropout_ir.weight_parts import HOOKS

Masks = Literal["off"] | int | Sequence[int]


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the modes of modules; those of frozen code have none."""
    return {m: m.training for m in model.modules() if hasattr(m, "training")}


@contextlib.contextmanager
def modes(wanted: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Put every module in its mode inside the context."""
    before = {module: module.training for module in wanted}
    try:
        for module, training in wanted.items():
            module.training = training
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Let every kind of dropout draw inside the context, and remember nothing of it.

    A model in training mode stays as it is; one in evaluation mode is trained, except
    that batch normalization keeps its mode.
    """
    trained = model.training
    wanted = {
        m: training if trained else not isinstance(m, _NormBase)
        for m, training in modes_of(model).items()
    }
    with unrecorded(model), modes(wanted):
        yield


@contextlib.contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Let our layers remember nothing of what they draw inside the context."""
    scripted = torch.jit.ScriptModule  # has no `forward` of its class
    python = (m for m in model.modules() if not isinstance(m, scripted))
    ours = [m for m in python if hasattr(type(m).forward, "draws_as_torch")]
    kept = [(module, dict(module.__dict__)) for module in ours]
    try:
        for module in ours:
            module.__dict__["track"] = False
        yield
    finally:
        for module, state in kept:
            module.__dict__.update(state)  # a module that others see is never empty
            for name in module.__dict__.keys() - state.keys():
                del module.__dict__[name]


class TwiceDifferentiable(TorchFunctionMode):
    """Puts operations that have second derivatives in the place of some that do not.

    Args:
        lean: Takes the place of what has second derivatives, if given.

    Attributes:
        again: Whether a block has been seen that backward passes compute again.
        hooked: Whether backward passes run somebody's code where they need a tensor.
        plain: Whether nobody has asked to see, or change, what is sent back.
    """

    def __init__(self, lean: LeanDerivatives | None = None) -> None:
        super().__init__()
        self._lean = lean
        self._blocks = Blocks(functools.partial(twice_differentiable, lean))
        self.again = False
        self.hooked = False
        self.plain = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:  # in which blocks may run again
            with on_again(self):
                return unchecked(torch.autograd.grad, {})(*args, **kwargs)
        self.again = self._blocks.look() or self.again
        self.hooked = self.hooked or unpacked_by_hooks()
        self.plain = self.plain and func not in HOOKS
        found = composed(func, args, kwargs)
        if found is None and self._lean is not None:
            found = self._lean.instead_of(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found


@contextlib.contextmanager
def twice_differentiable(
    lean: LeanDerivatives | None = None,
) -> Iterator[TwiceDifferentiable]:
    """Run nothing that has no second derivative, or a wrong one."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        TwiceDifferentiable(lean) as operations,
        torch.compiler.set_stance("force_eager"),
    ):
        yield operations


def mask_seeds(caller: str, masks: Masks) -> tuple[int | None, ...]:
    """Return the seeds that ``masks`` are; None alone where dropout is off."""
    if isinstance(masks, (str, bytes)):
        seeds: tuple[Any, ...] = (None,) if masks == "off" else ()
    else:
        seeds = tuple(masks) if isinstance(masks, Iterable) else (masks,)
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in seeds)
        seeds = seeds if whole and all(x >= 0 for x in seeds) else ()
    if not seeds:
        raise ValueError(
            f"{caller}: expected `masks` to be 'off', a seed (an int from 0 on) or "
            f"several seeds, got {masks!r}"
        )
    return seeds


@contextlib.contextmanager
def frozen_masks(model: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """Make every forward pass of ``model`` inside the context see the same masks.

    Before each forward pass the generators of torch, Python and NumPy are seeded, after
    it they are given back, so any kind of dropout in the model is frozen (torch's
    modules and functions too) and the random streams outside do not move. Masks are the
    same for inputs of the same shape. Calls of a submodule alone are not frozen, nor
    are those of what ``torch.compile(model)`` returned: give that instead.

    Args:
        model: The model.
        seed: Chooses the masks.

    Yields:
        ``model``.

    Raises:
        TypeError: If it is no module, or the seed no integer.
        ValueError: If the seed is negative.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with frozen_masks(layer):
        ...     torch.equal(layer(torch.ones(99)), layer(torch.ones(99)))
        True
    """  # noqa: DOC502 (the checks raise)
    check_module("frozen_masks", model)
    check_count("frozen_masks", "seed", seed, 0)
    forks: list[contextlib.AbstractContextManager[None]] = []

    def begin(_: nn.Module, __: Any) -> None:
        fork = preserved_rng(model, seed)
        fork.__enter__()  # when passes of other threads have ended
        forks.append(fork)

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        if forks:
            forks.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        stack.callback(before_call(model, begin))
        stack.callback(after_call(model, end, always=True))
        yield model
