r"""Floor 1: the user's loss, and its Hessian in the outputs.

Semantics:

* A regularizer is in the units of the user's loss, so it is defined through that
  loss's own Hessian :math:`H_i = \partial^2 \ell / \partial f_i^2` in the outputs of
  sample ``i``, with the user's reduction folded in.
* ``"mse"`` is :func:`torch.nn.functional.mse_loss` (the mean over all ``n d'``
  entries, without 1/2) and ``"cross_entropy"`` is
  :func:`torch.nn.functional.cross_entropy`. The paper's risk is
  :func:`half_squared_error`.
* Squared errors, cross-entropy (with class weights and label smoothing) and losses of
  one output each (binary cross-entropy, Huber) have closed forms of :math:`H_i`. That
  of any other callable comes from derivatives of it, as few as its graph allows.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_dropout_ir.inner_derivatives import lacks_graph, with_graph

LossFunction = Callable[[Any, Any], Tensor]
Kind: TypeAlias = Literal["squared", "cross_entropy", "elementwise", "general"]

# Sums (or means) of terms of one output each: their Hessian is diagonal.
_ELEMENTWISE_MODULES: Final = (
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
_ELEMENTWISE_FUNCTIONS: Final = (
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.huber_loss,
    F.l1_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Return the paper's risk of a batch.

    .. math:: R_S = \frac{1}{2n} \sum_i \lVert f(x_i) - y_i \rVert^2

    Args:
        outputs: Network outputs, ``[n, ...]``.
        targets: Targets of the same shape.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, section III.

    Example:
        >>> half_squared_error(torch.ones(4, 2), torch.zeros(4, 2))
        tensor(1.)
    """
    if has_torch_function_variadic(outputs, targets):
        found: Tensor = handle_torch_function(  # one call, as of torch's own losses
            half_squared_error, (outputs, targets), outputs, targets
        )
        return found
    if outputs.shape != targets.shape:
        raise ValueError(
            "half_squared_error: expected `targets` of the shape of `outputs`, got "
            f"{list(targets.shape)} and {list(outputs.shape)}"
        )
    return (outputs - targets).square().sum() / (2 * outputs.shape[0])


# Whose calls are known in a script; ours of the paper is seen as torch's are.
TORCH_LOSSES: Final = frozenset({
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cross_entropy,
    F.gaussian_nll_loss, F.hinge_embedding_loss, F.huber_loss, F.kl_div, F.l1_loss,
    F.mse_loss, F.multi_margin_loss, F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss, F.nll_loss, F.poisson_nll_loss, F.smooth_l1_loss,
    F.soft_margin_loss, half_squared_error,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss ``(outputs, targets) -> scalar`` with what is known of its curvature.

    Attributes:
        function: The callable.
        kind: ``"squared"`` where the Hessian is a multiple of the identity,
            ``"cross_entropy"`` where it is that of a softmax, ``"elementwise"`` where
            it is diagonal, else ``"general"``.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
    """

    function: LossFunction
    kind: Kind = "general"
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the scalar loss; raise of other tensors than it takes."""
        self.check_outputs(outputs)
        if targets is None and self.kind != "general":
            raise ValueError("expected `targets` for this loss, got None")
        try:
            value = self.function(outputs, targets)
        except (RuntimeError, ValueError) as err:
            if self.kind != "general" and type(err) in (RuntimeError, ValueError):
                raise type(err)(f"{_sizes(outputs, targets)}: {err}") from err
            if not lacks_graph(err):
                raise
            value = with_graph(self.function, outputs, targets)
        known = isinstance(value, Tensor)
        if not known or value.numel() != 1 or value.is_complex():
            got = f"{list(value.shape)} ({value.dtype})" if known else type(value)
            raise ValueError(
                f"expected `loss(outputs, targets)` to return a real scalar, got {got}"
                ". Use a reduction of 'mean' or 'sum'."
            )
        return value.reshape(()) if value.ndim else value

    def check_outputs(self, outputs: Any) -> None:
        """Raise a TypeError if a loss of one tensor is given something else."""
        if self.kind != "general" and not isinstance(outputs, Tensor):
            raise TypeError(
                "expected the model to return one tensor for this loss, got "
                f"{type(outputs).__name__}. Pass a callable `(outputs, targets) -> "
                "scalar` that picks what it needs."
            )

    def at(self, outputs: Tensor) -> Loss:
        """Return the loss with the kind that it is of at ``outputs``.

        The negative log-likelihood is a cross-entropy of log-probabilities alone; of
        anything else it is linear.
        """
        if not self._is_likelihood or not outputs.ndim or _normalized(outputs):
            return self
        return dataclasses.replace(self, kind="general")

    def of_logits(self, outputs: Tensor) -> Loss:
        """Return a cross-entropy in the place of a likelihood of log-probabilities.

        Both are one function of the parameters; its curvature lies in the outputs.
        """
        if not self._is_likelihood or outputs.ndim < 2 or not _normalized(outputs):
            return self
        function = functools.partial(
            F.cross_entropy, weight=self.option("weight", None),
            ignore_index=self.option("ignore_index", -100), reduction=self.reduction,
        )  # fmt: skip
        return dataclasses.replace(self, function=function)

    @property
    def _is_likelihood(self) -> bool:
        """Whether it is the negative log-likelihood, not altered."""
        function = getattr(self.function, "func", self.function)
        named = function is F.nll_loss or type(function) is nn.NLLLoss
        return named and self.kind == "cross_entropy"

    def num_terms(self, targets: Tensor) -> float:
        """Return the number of terms that a mean is of, or the sum of their weights.

        Labels that the loss leaves out do not count.
        """
        by_label = self.option("ignore_index", None) is not None
        by_class = self.kind == "cross_entropy"
        if by_class and targets.is_floating_point():  # probabilities of classes
            return targets.numel() / max(1, targets.shape[min(1, targets.ndim - 1)])
        if not (by_label or by_class) or targets.is_floating_point():
            return float(targets.numel())
        counted = targets[targets != self.option("ignore_index", -100)]
        weights = self.option("weight", None)
        return float(counted.numel() if weights is None else weights[counted].sum())

    def option(self, name: str, default: Any) -> Any:
        """Return a setting of the loss, of a module or of a partial function."""
        return _option(self.function, name, default)

    @property
    def is_quadratic(self) -> bool:
        """Whether the Hessian in the outputs is known to be constant."""
        return self.kind == "squared"


def resolve_loss(loss: Any) -> Loss:
    """Read the user's ``loss`` argument.

    Args:
        loss: ``"mse"``, ``"cross_entropy"``, a loss module, or a callable
            ``(outputs, targets) -> scalar``.

    Returns:
        The loss with its kind.

    Raises:
        ValueError: If ``loss`` is another string, or a module without reduction.
        TypeError: If ``loss`` cannot be called.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, (str, types.FunctionType)) and loss in _BY_NAME:
        return _BY_NAME[loss]
    if isinstance(loss, str):
        raise ValueError(
            "expected `loss` to be 'mse', 'cross_entropy', a module or a callable "
            f"`(outputs, targets) -> scalar`, got {loss!r}"
        )
    is_class = isinstance(loss, type)
    if not callable(loss) or (is_class and issubclass(loss, nn.Module)):
        got = f"the class {loss.__name__}" if is_class else type(loss).__name__
        raise TypeError(
            "expected `loss` to be 'mse', 'cross_entropy', a module or a callable "
            f"`(outputs, targets) -> scalar`, got {got}. The order is `(model, batch, "
            "loss)` in `tdi.regularizers`, `(model, loss, batches)` in "
            "`tdi.sharpness`; `attach_analysis(model, loss)` finds the optimizer itself"
        )
    reduction = _option(loss, "reduction", "mean")
    if reduction not in ("mean", "sum", "batchmean"):
        raise ValueError(
            f"expected a loss with reduction 'mean' or 'sum', got {reduction!r}: the "
            "regularizer of an unreduced loss is not defined"
        )
    return Loss(loss, _kind(loss), "sum" if reduction == "sum" else "mean")


# Those that are told by themselves.
_BY_NAME: Final[dict[Any, Loss]] = {
    "mse": Loss(F.mse_loss, "squared"),
    "cross_entropy": Loss(F.cross_entropy, "cross_entropy"),
    F.mse_loss: Loss(F.mse_loss, "squared"),
    F.cross_entropy: Loss(F.cross_entropy, "cross_entropy"),
}


def _sizes(outputs: Any, targets: Any) -> str:
    """What a loss was called with, in words."""
    names = {"outputs": outputs, "targets": targets}
    known = {n: x for n, x in names.items() if isinstance(x, Tensor)}
    said = (f"{n} {list(x.shape)} ({x.dtype})" for n, x in known.items())
    return f"the loss of {' and '.join(said)}"


def _normalized(outputs: Tensor) -> bool:
    """Whether outputs are log-probabilities."""
    sums = outputs.detach().logsumexp(min(1, outputs.ndim - 1))
    return bool((sums.abs() <= torch.finfo(outputs.dtype).eps ** 0.5).all())


def _option(loss: Any, name: str, default: Any) -> Any:
    keywords = getattr(loss, "keywords", {})  # of a functools.partial
    return keywords.get(name, getattr(loss, name, default))


def _altered(loss: Any) -> bool:
    """Whether a loss module computes something else than its class says."""
    hooks = isinstance(loss, nn.Module) and (
        loss._forward_pre_hooks or loss._forward_hooks
    )
    return bool(hooks) or "forward" in getattr(loss, "__dict__", ())


def _kind(loss: Any) -> Kind:
    if _altered(loss):
        return "general"
    weighted = _option(loss, "weight", None) is not None
    if isinstance(loss, functools.partial) and not loss.args:
        given = (loss.keywords.get(name) for name in ("size_average", "reduce"))
        if any(x is not None for x in given):  # reductions as torch 0.4 had them
            return "general"
        loss = loss.func
    if loss is F.mse_loss and weighted:
        return "elementwise"
    if loss in (F.mse_loss, half_squared_error) or type(loss) is nn.MSELoss:
        return "squared"
    # Log-probabilities are their own log-softmax: there NLL is cross-entropy.
    if loss in (F.cross_entropy, F.nll_loss):
        return "cross_entropy"
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return "cross_entropy"
    if loss in _ELEMENTWISE_FUNCTIONS or type(loss) in _ELEMENTWISE_MODULES:
        return "elementwise"
    return "general"
