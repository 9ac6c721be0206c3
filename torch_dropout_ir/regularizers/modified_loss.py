"""The paper's modified losses, to be trained on."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_choice, check_differentiable, check_real
from torch_dropout_ir.functional import Batch, at_sites, call, fresh
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers.checks import (
    as_pair,
    check_batch,
    check_reachable,
    explained,
    noise_left_out,
    read_beside,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import last_layer_form
from torch_dropout_ir.regularizers.last_layer import last_layer
from torch_dropout_ir.regularizers.leave_one_out import leave_one_out
from torch_dropout_ir.regularizers.line_pass import masks_of
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.penalty import with_penalty
from torch_dropout_ir.regularizers.site_forms import LINEAR, not_reached, total
from torch_dropout_ir.regularizers.trained_roots import TrainedForm, parted, rooted
from torch_dropout_ir.sites import find_sites, uncompiled
from torch_dropout_ir.substitution import buffers_moved
from torch_dropout_ir.tracing import checkpointed
from torch_dropout_ir.written_parameters import unwritten

Kind: TypeAlias = Literal["L1", "L2", "L3", "L4", "regu"]
R1: TypeAlias = Literal[
    "last_layer", "leave_one_out", "gauss_newton", "second_order", "monte_carlo"
]


def modified_loss(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    *,
    kind: Kind,
    lr: float | Mapping[str, float] | None = None,
    r1: R1 = "last_layer",
    max_bytes: int | None = 2**26,
) -> Tensor:
    r"""Return a loss with dropout's regularizers put in or taken out, to be minimized.

    .. math::
        L_1 &= R_S + R_1 & L_2 &= R_S + \tilde R_2 \\
        L_3 &= R_{drop} - \tilde R_2 & L_4 &= R_{drop} - R_1 \\
        R_{regu} &= R_{drop} + \tilde R_2 & \tilde R_2 &= \frac{\epsilon}{4}
        \lVert \nabla_\theta R_{drop}(\theta, \eta) \rVert^2

    with :math:`\tilde R_2` at the masks of this very step: in ``L3`` and ``"regu"`` the
    loss and its penalty see the same ones. ``R_drop`` is the model as the script calls
    it, all of its noise included; ``R_S`` is the model with dropout off, and R_1 that
    of the sites; a warning names other noise, and sites with ``p = 1``. Of the passes
    that a kind takes, the one that gives ``R_S`` or ``R_drop`` moves batch-norm
    statistics, and writes on parameters if the model does, once a step.

    Differentiable in the parameters: call ``.backward()`` on it in the place of the
    loss. ``L1`` with ``"last_layer"`` costs a plain step; a penalty on the gradient a
    second backward pass through the first, and so does ``"gauss_newton"``. What a
    double backward holds at the least is every activation and its derivative, twice a
    plain step's, which is what it takes on a CPU; with batch normalization torch's own
    took 3.3, for it puts that derivative together from parts.
    Beyond ``max_bytes`` the graph is that of parts of the batch, one after the other,
    which run again at their masks: a step's memory, and of a penalty the gradient once
    more, at 1.4 times the time (``"gauss_newton"``: 1.2). Where samples meet, a penalty
    goes by parts of the pass, at some three times the time, if a single tensor cuts it.
    Both need full precision, one process, no activation checkpointing, and nothing but
    parameters that learns. The gradient, that of ``L2`` too, is taken with the value.
    ``L1`` by ``"monte_carlo"`` is one pass. Sites under activation checkpointing cannot
    be trained with ``L2``, ``L4`` and any other ``L1``: they would run again with
    dropout on. Not-a-number in gives not-a-number out.

    Args:
        model: The model, in training mode.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        kind: Which of the five.
        lr: ``epsilon`` of ``L2`` and ``L3``, ``lambda`` of ``"regu"``: one number, or
            one a parameter name.
        r1: How ``L1`` and ``L4`` take R_1. ``"last_layer"`` and ``"leave_one_out"``
            need one ``nn.Dropout`` straight before the last linear layer;
            ``"gauss_newton"`` draws signs on the outputs of a squared loss or a
            cross-entropy, and takes second derivatives alone; of other losses it
            draws signs on the units, as ``"second_order"`` does, and both compute
            layer, batch and instance normalization in elementary operations, for
            torch has no right third derivative of them;
            ``"monte_carlo"`` draws one mask and is unbiased for every model; ``L1`` is
            then ``R_drop`` itself.
        max_bytes: Memory of the graph of a second derivative, of a penalty or a form
            that is drawn, beyond which it is made of parts of batch or pass. None
            keeps the graph of all, for a derivative of the loss's gradient too.

    Returns:
        Scalar in the units of the loss; not finite where the model is not.

    Raises:
        TypeError: If ``batch`` is no pair, or ``max_bytes`` or ``lr`` no number.
        ValueError: If ``kind`` or ``r1`` is none of these, ``lr`` is missing,
            ``max_bytes`` is negative, the model is in evaluation mode, its sites do not
            fit ``r1``, or the batch is empty.
        RuntimeError: If ``R_S`` is needed and a site is under activation checkpointing,
            or autograd is off.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (7) and Figs. 2, 3, 13
        and 14.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        >>> batch = torch.ones(8, 2), torch.zeros(8, 1)
        >>> for kind in ("L1", "L2", "L3", "L4", "regu"):
        ...     modified_loss(net, batch, "mse", kind=kind, lr=0.1).backward()
    """  # noqa: DOC502 (raised by the checks)
    _check(model, kind, lr, r1)
    if max_bytes is not None:
        check_real("modified_loss", "max_bytes", max_bytes, least=0, finite=False)
    batch = as_pair(batch)
    check_batch(model, batch[0])
    resolved = resolve_loss(loss)
    written = unwritten(model, stays="last" if kind in ("L2", "L4") else "first")
    with written, explained("modified_loss"):
        if kind in ("L1", "L4"):
            with _not_checkpointed(model):
                return _with_r1(model, batch, resolved, kind, r1, max_bytes)
        assert lr is not None  # by `_check`
        clean = functools.partial(
            _clean_risk, model, batch, resolved, move_buffers=True
        )
        return with_penalty(
            model, batch, resolved, lr,
            weight=float(kind != "L2"), sign=-1.0 if kind == "L3" else 1.0,
            move_buffers=kind != "L2", max_bytes=max_bytes,
            beside=clean if kind == "L2" else None,
        )  # fmt: skip


def _check(model: nn.Module, kind: str, lr: Any, r1: str) -> None:
    check_choice("modified_loss", "kind", kind, get_args(Kind))
    check_choice("modified_loss", "r1", r1, get_args(R1))
    if lr is None and kind in ("L2", "L3", "regu"):
        raise ValueError(
            f"modified_loss: expected `lr`, the coefficient of the squared gradient in "
            f"{kind!r}, got None"
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "modified_loss: expected autograd to be on, got torch.no_grad or inference "
            "mode: the loss is there to be differentiated"
        )
    if not uncompiled(model).training:
        raise ValueError(
            "modified_loss: expected a model in training mode, got one in evaluation "
            "mode, whose dropout is off. Call `model.train()` first."
        )
    for site in find_sites(model):
        if site.p == 1:
            said = f"modified_loss: site `{site.name}` drops everything (p = 1)"
            warnings.warn(said, stacklevel=3)


@contextlib.contextmanager
def _not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Raise where a site with dropout off would run again in the backward pass.

    The pass is over by then, dropout is on again, and the gradient would be of another
    function, without a word.
    """

    def look(module: nn.Module, _: Any, __: Any) -> None:
        again = checkpointed() or not torch.is_grad_enabled()
        if not module.training and again:
            raise RuntimeError(
                "modified_loss: expected every dropout site outside of activation "
                "checkpointing and torch.no_grad, for `R_S` would be computed again "
                f"with dropout on, got {type(module).__name__} within. Use 'L3' or "
                "'regu', or switch checkpointing off."
            )

    with contextlib.ExitStack() as stack:
        for site in find_sites(model):
            stack.callback(site.module.register_forward_hook(look).remove)
        yield


def _with_r1(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    kind: str,
    r1: str,
    max_bytes: int | None,
) -> Tensor:
    if r1 == "monte_carlo" and kind == "L1":  # R_S + (R_drop - R_S)
        return _dropout_risk(model, batch, loss, move_buffers=True)
    if r1 == "monte_carlo":
        clean = _clean_risk(model, batch, loss, move_buffers=False)
        excess = _dropout_risk(model, batch, loss, move_buffers=False) - clean
    else:
        twice = r1 in ("gauss_newton", "second_order")
        thrice = twice and (r1 == "second_order" or not rooted(loss, batch[1]))
        moved = buffers_moved(model) if twice else None
        with clean_pass(
            model, batch[0], twice=twice, thrice=thrice, move_buffers=kind == "L1",
            lean=twice and not thrice and max_bytes is not None, outlives=True,
            find_last=not twice,
        ) as passed:  # fmt: skip
            met = bool(passed.uses) or bool(find_sites(model))  # else p = 0
            for said in noise_left_out(model, passed.noisy, met, drawn=passed.drawn):
                warnings.warn(f"modified_loss: R_1: {said}", stacklevel=3)
            clean = loss(passed.outputs, batch[1])
            check_differentiable(clean, "parameters", "modified_loss")
            parts = None
            if moved is not None and max_bytes is not None and not moved():
                weight = float(kind == "L1")
                of = model, batch, loss
                parts = parted(of, r1, passed, clean, weight, max_bytes)
            if parts is None:
                excess = _r1(passed, batch[1], loss, r1)
            else:
                clean = clean.detach()
        del passed  # its graph
        if parts is not None:
            excess = parts.value(clean)
            if kind == "L1":
                return excess
    if kind == "L1":
        return clean + excess
    return _dropout_risk(model, batch, loss, move_buffers=True) - excess


def _r1(clean: CleanPass, targets: Any, loss: Loss, r1: str) -> Tensor:
    check_reachable("modified_loss", clean.unreachable)
    if not clean.uses:  # p = 0 everywhere
        return torch.zeros((), device="cpu")
    read = read_outputs(clean.outputs, loss, targets)
    unseen = [] if r1 == "second_order" else clean.edges
    for note in read_beside(read, unseen, None, clean.later):
        warnings.warn(f"modified_loss: R_1: {note}", stacklevel=4)
    if r1 in ("gauss_newton", "second_order"):
        return _sampled_form(clean, read, targets, r1)
    form = last_layer if r1 == "last_layer" else leave_one_out
    return last_layer_form(clean, targets, loss, form)


def _sampled_form(clean: CleanPass, read: OutputsRead, targets: Any, r1: str) -> Tensor:
    """Return one draw of a second-order form; warn where it is 0 for want of one."""
    linear = not check_curvature(read) and r1 == "gauss_newton"
    form = TrainedForm.of(r1, read, targets)
    forms = form.at(clean, read, form.drawn(read, masks_of(clean)))
    said = [LINEAR] if linear else not_reached(clean.names, {name for name, _ in forms})
    for note in said:
        warnings.warn(f"modified_loss: R_1: {note}", stacklevel=5)
    return total(forms, read.tensors[0])


def _dropout_risk(
    model: nn.Module, batch: Batch, loss: Loss, *, move_buffers: bool
) -> Tensor:
    """The loss as the script has it, noise and all."""
    return loss(call(model, batch[0], move_buffers=move_buffers), batch[1])


def _clean_risk(
    model: nn.Module, batch: Batch, loss: Loss, *, move_buffers: bool
) -> Tensor:
    off = at_sites(model, fresh, move_buffers=move_buffers, outlives=True)
    with _not_checkpointed(model), off:
        return _dropout_risk(model, batch, loss, move_buffers=move_buffers)
