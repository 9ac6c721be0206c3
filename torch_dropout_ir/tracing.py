"""Floor 1: who is looking on while an op runs: a transform, a compiler, a recorder.

Some of torch's names for it are private. Where a torch lacks one, the answer is that
which costs speed or statistics, never a wrong mask.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

# Private names. A torch without the first counts what checkpointing recomputes; one
# without the second takes the composed form everywhere; without the third, what is
# traced is counted too; without the fourth, keys are drawn in Python.
_BACKWARD_RUNNING = getattr(torch._C, "_current_graph_task_id", None)
_TRANSFORMS_ACTIVE = getattr(torch._C, "_are_functorch_transforms_active", None)
_WRAPPED, _BATCHED, _INNER = (
    getattr(getattr(torch._C, "_functorch", None), name, None)
    for name in ("is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped")
)
_MODE = getattr(torch._C, "_get_dispatch_mode", None)
_PROXY_MODE = _MODE and functools.partial(_MODE, torch._C._TorchDispatchModeKey.PROXY)
_FAKE_MODE = _MODE and functools.partial(_MODE, torch._C._TorchDispatchModeKey.FAKE)
_NUM_MODES = getattr(torch._C, "_len_torch_dispatch_stack", None)

# Inside, no mode and no subclass of tensors is asked about a call: each property that
# is read of a tensor is one, and takes longer than small operations do.
unasked = torch._C.DisableTorchFunction

# What takes derivatives, without the checks of ``torch.autograd.grad``, which cost a
# small pass as much again. A torch without it runs those.
_ENGINE = getattr(
    getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None
)
_FUNCTION_MODES = getattr(torch._C, "_len_torch_function_stack", None)
# Several roots at once: a dimension that is not seen, opened, given, taken, closed.
_UNSEEN_DIM = tuple(
    getattr(place, name, None)
    for place, name in (
        (torch._C, "_vmapmode_increment_nesting"), (torch, "_add_batch_dim"),
        (torch, "_remove_batch_dim"), (torch._C, "_vmapmode_decrement_nesting"),
    )
)  # fmt: skip

# What packs the tensors that autograd saves, if anything does.
_PACKING = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """Yield a frame and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def unasking(act: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return what acts on plain tensors as ``act(site, h)``, and is asked nothing."""

    def acts(site: Any, h: Tensor) -> Tensor:
        if type(h) is not Tensor:
            return act(site, h)
        with unasked():
            return act(site, h)

    return acts


def checkpointed() -> bool:
    """Whether a forward pass is in a block that will be computed again."""
    packing = _PACKING(False) if _PACKING is not None else None
    return packing is not None and "checkpoint" in packing[0].__qualname__


def checkpointed_block() -> Any:
    """Return what runs the block again that a forward pass is in, as ``recompute_fn``.

    It is private to torch. With one that keeps it elsewhere, and out of a block: None.
    """
    packing = _PACKING(False) if _PACKING is not None else None
    cells = getattr(packing and packing[0], "__closure__", None) or ()
    kept = [cell.cell_contents for cell in cells]
    return next((x for x in kept if hasattr(x, "recompute_fn")), None)


def runs_twice() -> bool:
    """Whether a forward pass is in a block that will be computed again, or is now."""
    return checkpointed() or recomputes()


def unpacked_by_hooks() -> bool:
    """Whether what autograd saves now is given back by somebody's code, or may be."""
    return _PACKING is None or _PACKING(False) is not None


def derivatives(
    output: Tensor | tuple[Tensor, ...],
    inputs: Sequence[GradientEdge] | Sequence[Tensor],
    root: Tensor | tuple[Tensor, ...] | None,
    keep: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what ``torch.autograd.grad`` does, of an output and a root of its shape.

    The root is None for a scalar; of several outputs it is sent back from each. What
    an output does not depend on has None.
    """
    if root is None or _ENGINE is None or _FUNCTION_MODES is None or _FUNCTION_MODES():
        return torch.autograd.grad(
            output, inputs, root, retain_graph=keep, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
    if isinstance(output, Tensor):
        output, root = (output,), (root,)  # type: ignore[assignment]
    return _ENGINE(
        output, root, keep, create_graph, tuple(inputs),
        allow_unreachable=True, accumulate_grad=False,
    )  # fmt: skip


def of_each(act: Callable[[Tensor], Any], roots: Tensor) -> Any:
    """Return what ``act`` makes of each of several roots, at once; None where it does.

    Roots and result have a leading index, as for ``is_grads_batched`` of torch's own.
    """
    start, add, remove, end = _UNSEEN_DIM
    if not (start and add and remove and end):
        made = [act(root) for root in roots]
        return None if any([x is None for x in made]) else torch.stack(made)
    level = start()
    try:
        found = act(add(roots, 0, level))
        return None if found is None else remove(found, level, roots.shape[0], 0)
    finally:
        end()


def mapped(x: object) -> bool:
    """Whether ``x`` is a tensor inside a transform, and means nothing outside of it."""
    if _WRAPPED is None or not isinstance(x, Tensor):
        return False
    return transformed() and bool(_WRAPPED(x))


def batched(x: Tensor) -> bool:
    """Whether a tensor is, or was, one of those that ``vmap`` takes at once."""
    while _WRAPPED and _BATCHED and _INNER and _WRAPPED(x):
        if _BATCHED(x):
            return True
        x = _INNER(x)
    return False


def transformed() -> bool:
    """Whether a ``torch.func`` transform is active; True where torch does not tell."""
    return _TRANSFORMS_ACTIVE is None or _TRANSFORMS_ACTIVE()


def eager() -> bool:
    """Whether no transform, forward-mode AD, compiler or tracer is looking on."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if _TRANSFORMS_ACTIVE is None or traced:
        return False
    return not _TRANSFORMS_ACTIVE() and getattr(forward_ad, "_current_level", 0) < 0


def recorded() -> bool:
    """Whether what runs trains nothing: a transform or tracer has it, or no data."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    modes = [m for m in (_PROXY_MODE, _FAKE_MODE) if m is not None]
    return any(mode() is not None for mode in modes) or bool(
        _TRANSFORMS_ACTIVE is not None and _TRANSFORMS_ACTIVE()
    )


def unseen(x: Tensor) -> bool:
    """Whether ``x`` is a plain CPU tensor, and no dispatch mode sees its operators."""
    return (
        type(x) is Tensor and x.is_cpu and _NUM_MODES is not None and not _NUM_MODES()
    )


def recomputes() -> bool:
    """Whether a backward pass is running: a forward pass in it is a recomputation."""
    return _BACKWARD_RUNNING is not None and _BACKWARD_RUNNING() != -1


def makes_new(x: Tensor) -> bool:
    """Whether a mask for ``x`` has data and is no recomputation and no recording."""
    # What a tracer or a CUDA graph records is to be replayed.
    if recomputes():
        return False
    if x.is_cpu and _NUM_MODES is not None and not _NUM_MODES():
        return True
    if x.is_meta or (_PROXY_MODE is not None and _PROXY_MODE() is not None):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def plain(packed: Tensor) -> Tensor | None:
    """Return the mask as no subclass; None where no data are: on `meta`, in fakes."""
    kind = type(packed)
    if kind is Tensor:
        return None if packed.is_meta else packed
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return None if own else packed.as_subclass(Tensor)


def leaves_graph() -> bool:
    """Whether a mask drawn in a compiled graph can be kept after the graph has run."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    return not (transformed() or _inside_operator())


def _inside_operator() -> bool:
    """Whether Dynamo is in the body of an operator, as a checkpoint's, or exports."""
    if torch.compiler.is_exporting():  # Dynamo of torch 2.10 itself says always
        return True
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx().output.current_tracer
        return tracer.parent is not None
    except (ImportError, AttributeError):
        return True


# Dynamo calls it and takes its word: what `torch.compiler.assume_constant_result` says,
# which imports Dynamo, longer than all of this package.
_inside_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_released(x: object) -> bool:
    """Whether a tensor's memory was given back, so that to read it ends the process."""
    held = isinstance(x, Tensor) and x.layout is torch.strided and x.numel() > 0
    return held and not x.untyped_storage().nbytes()  # type: ignore[attr-defined]
