"""Floor 1: normalization in elementary operations, right in derivatives of any order.

Semantics:

* torch differentiates its own layer normalization twice. The third derivative takes the
  saved mean and deviation for constants and is wrong without a word; that of batch
  normalization in training mode is refused.
* Inside the context, layer normalization and batch and instance normalization by the
  statistics of the batch are composed of means and squares. Running statistics move as
  torch moves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.attention_again import AttentionAgain
from torch_dropout_ir.composed import Composed, composed


class ComposedNormalization(TorchFunctionMode):
    """Computes normalization in operations that can be differentiated at will.

    So it does what torch differentiates once.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm):
            return layer_norm(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return _instance_norm(*args, **kwargs)
        found = composed(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found


@contextlib.contextmanager
def differentiable(thrice: bool, again: bool = False) -> Iterator[None]:
    """Let a pass be differentiated twice, or ``thrice``.

    Where it is twice, attention makes its weights ``again`` if wanted.
    """
    twice = AttentionAgain if again else Composed
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH), ComposedNormalization() if thrice else twice():
        yield


def _normalized(
    x: Tensor,
    dims: list[int],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Subtract the mean, divide by the deviation, scale and shift; float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    found = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    found = found if weight is None else found * weight
    found = found if bias is None else found + bias
    return found.to(x.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Return what :func:`torch.nn.functional.layer_norm` does, composed."""
    dims = list(range(-len(normalized_shape), 0))
    return _normalized(input, dims, eps, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    with torch.no_grad():  # checks the shape, and moves the running statistics
        F.batch_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    dims = [0, *range(2, input.ndim)]
    return _normalized(input, dims, eps, *_by_channel(input, weight, bias))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    running = running_mean, running_var
    if not use_input_stats:
        return F.instance_norm(input, *running, weight, bias, False, momentum, eps)
    with torch.no_grad():
        F.instance_norm(input, *running, None, None, True, momentum, eps)
    dims = list(range(2, input.ndim))
    return _normalized(input, dims, eps, *_by_channel(input, weight, bias))


def _by_channel(like: Tensor, *affine: Tensor | None) -> list[Tensor | None]:
    """Return what scales and shifts the channels, shaped to multiply ``like``."""
    shape = (1, -1, *(1,) * (like.ndim - 2))
    return [None if x is None else x.view(shape) for x in affine]
