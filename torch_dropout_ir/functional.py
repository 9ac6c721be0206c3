"""Floor 1: a model as a pure function of parameters and inputs, left as it was.

Semantics:

* ``R_S`` is the loss of the network as it trains, with dropout off: dropout modules run
  as in evaluation mode, calls of dropout functions are replaced, and every other module
  keeps its mode, batch normalization too.
* Buffers are cloned before every pass, so running statistics never move.
* Modes and hooks are restored when the context ends, after an exception too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_dropout_ir.collectives import go_on
from torch_dropout_ir.dropout_calls import DropoutCalls, SiteFunction
from torch_dropout_ir.hooks import Undo, after_call, before_call, give_back
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.sites import Site, uncompiled
from torch_dropout_ir.substitution import call_with, copied_buffers, keep_buffers
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.turns import alone_with, in_turn

Batch = tuple[Any, Any]
_MODES: Final = threading.Lock()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of ``model`` that require a gradient, one at least."""
    named = uncompiled(model).named_parameters()
    params = {n: x for n, x in named if x.requires_grad}
    if not params:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: "
            "there is nothing to differentiate with respect to"
        )
    return params  # type: ignore[return-value]


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of ``model``, by name, as tensors that nobody asks of."""
    return {n: x.detach() for n, x in model.named_parameters()}


def _switching() -> contextlib.AbstractContextManager[Any]:
    """Return the lock of modes; a compiled function is not to hold one."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _MODES


def switch_off(module: nn.Module, modes: dict[nn.Module, bool], undo: Undo) -> None:
    """Switch a dropout module off in its calls; ``undo`` is told how to give it back.

    A model may ask for its mode or set it: ``modes`` is told the one that it has when
    it is called.
    """
    own = vars(module)  # to set an attribute asks what it is
    under_way = list[None]()  # calls, of several threads

    def switch(module: nn.Module, *_: Any) -> None:
        with _switching():
            if not under_way:
                modes[module] = own["training"]
            own["training"] = False
            under_way.append(None)

    def back(module: nn.Module, *_: Any) -> None:
        with _switching():
            under_way.pop()
            if not under_way:
                own["training"] = modes[module]

    modes[module] = module.training
    undo.append(functools.partial(own.__setitem__, "training", module.training))
    # Before that of a pass around this one, which would have switched it off.
    before_call(module, switch, undo)
    after_call(module, back, undo, always=True)


@contextlib.contextmanager
def at_sites(
    model: nn.Module,
    apply: SiteFunction,
    *,
    move_buffers: bool = False,
    outlives: bool = False,
    survey: Survey | None = None,
    copies: bool = False,
) -> Iterator[DropoutCalls]:
    """Switch dropout off and put ``apply(site, h)`` in the place of each site.

    Every noise that an estimator needs is a choice of ``apply``: :func:`fresh` gives
    ``R_S``, multiplication by a mask gives ``R_drop``, ``h + delta`` the derivatives.
    It is called where a site draws noise in training (or the whole model is in
    evaluation mode before). Backward passes belong inside too: a checkpointed block
    runs forward again in them. With ``move_buffers`` running statistics move, as in a
    step of training; with ``copies`` each pass is one of :func:`call`, which moves
    copies of buffers; the graph of one that ``outlives`` is used after the context.

    Yields:
        What acts on the calls.
    """
    if survey is None:
        with in_turn():  # before there are hooks
            survey = Survey.of(model)
    with alone_with(survey.model):
        yield from _at_sites(survey, apply, move_buffers, outlives, copies)


def _at_sites(
    seen: Survey, apply: SiteFunction, move_buffers: bool, outlives: bool, copies: bool
) -> Iterator[DropoutCalls]:
    calls = DropoutCalls(seen.callers, apply, move_buffers, outlives)
    undo: Undo = []
    try:
        # Layers of torch alone run nothing again in a backward pass.
        if seen.has_buffers and not (move_buffers or (copies and calls.absent)):
            undo.append(keep_buffers(seen.model))
        place = _replace if calls.absent else _hook
        place(seen, apply, undo)
        with calls:
            yield calls
    finally:
        give_back(undo)


def _replace(seen: Survey, apply: SiteFunction, undo: Undo) -> None:
    """Put ``apply`` in the place of each site of a model of torch's layers alone."""
    evaluated = not seen.model.training
    for site in seen.sites:  # of which nobody asks the mode
        if site.p != 0 and (site.module.training or evaluated):
            own = vars(site.module)  # a hook takes as long as a small layer
            own["forward"] = functools.partial(_act, site, apply, evaluated)
            undo.append(functools.partial(own.pop, "forward"))


def _act(site: Site, apply: SiteFunction, evaluated: bool, h: Tensor) -> Tensor:
    # A loss that runs the model may set its mode.
    return apply(site, h) if evaluated or site.module.training else h


def _hook(seen: Survey, apply: SiteFunction, undo: Undo) -> None:
    """Switch dropout modules off, and let each site pass on what ``apply`` returns."""
    modes: dict[nn.Module, bool] = {}
    evaluated = not seen.model.training  # now: a model may set its mode

    def act(site: Site, _: nn.Module, __: Any, h: Tensor) -> Tensor:
        acts = site.p != 0 and (modes[site.module] or evaluated)
        return apply(site, h) if acts else h

    for module in seen.noise:
        switch_off(module, modes, undo)
    for site in seen.sites:  # before hooks of the model's own
        hook = functools.partial(act, site)
        after_call(site.module, hook, undo, first=True)


def fresh(_: Site, h: Tensor) -> Tensor:
    """Pass on a copy, as dropout in training does and dropout switched off does not."""
    return h.clone()  # what follows may write on it, not on the model's inputs


def call(
    model: nn.Module,
    inputs: Any,
    params: Mapping[str, Tensor] | None = None,
    *,
    move_buffers: bool = False,
    survey: Survey | None = None,
) -> Any:
    """Return what ``model`` makes of ``inputs``, run with cloned buffers.

    Of a model with modules that write in place, on a copy of the inputs: another pass
    may read them. So it may lists and dictionaries, which any model may write on.
    Inputs are a tensor; a tuple or list of positional arguments; a mapping of keyword
    arguments; or an :class:`Inputs` with both. Tensors of ``params`` take the place of
    the model's parameters; with ``move_buffers`` it is run with its own buffers.
    """
    go_on("forward")
    seen = Survey.of(model) if survey is None else survey
    model, arguments = seen.model, Inputs.of(inputs).renewed()
    if seen.in_place:
        arguments = arguments.copied()
    own = functools.partial(call_with, model, params) if params else None
    run = own or (lambda args, kwargs: model(*args, **kwargs))
    if move_buffers or not seen.has_buffers:
        return arguments.call(run)
    with copied_buffers(seen.modules, seen.alone):
        return arguments.call(run)


def batch_size(batch: Batch) -> int:
    """Return the number of samples of a batch: the first dimension of its inputs."""
    inputs = Inputs.of(batch[0])
    for packed in (x for x in inputs.args if isinstance(x, PackedSequence)):
        return int(packed.batch_sizes[0])
    first = inputs.first_tensor()
    return first.shape[0] if first.ndim else 1
