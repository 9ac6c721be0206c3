"""Floor 1: the dropout op, right under every transform.

Semantics:

* The mask is drawn once, in the forward pass, and is an output. Backward, double
  backward and the user's statistics read that mask; nothing regenerates it.
* In eager mode one fused kernel draws, scales, stores and packs, and an
  ``autograd.Function`` keeps the packed mask only: one bit an element.
* Under ``torch.func`` transforms, forward-mode AD and ``torch.compile`` the same bits
  come from ``mask_draw``, whose inputs are not differentiable, and everything after
  it is ``torch.where``. No rule of ours stands between the transform and the formula.
* The key is drawn by ``torch.randint`` on the device of ``x``, so ``manual_seed``,
  checkpointing and the randomness rules of ``vmap`` hold. On the CPU, where nothing
  looks on, the kernel calls it, which costs less than a way through Python.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_dropout_ir import kernels, registration
from torch_dropout_ir.arguments import check_flag
from torch_dropout_ir.tracing import eager, transformed, unseen

COMPILED = registration.COMPILED
_dropout_forward = registration.dropout_forward
_dropout_counted = registration.dropout_counted
_mask_apply = registration.mask_apply
_mask_draw = registration.mask_draw
unit_counts = registration.unit_counts
draw_key = kernels.draw_key
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class _Dropout(torch.autograd.Function):
    """The fused op; backward is linear in the gradient and reads the packed mask.

    A second output would cost: the mask leaves through ``call``, which came with the
    operator and what it takes beside ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: list[Any]) -> Tensor:
        op, rest = call
        y, packed = op(x, *rest)
        ctx.save_for_backward(packed)
        ctx.p = rest[1]
        call.append(packed)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        # No graph and no transform, as nearly always: the kernel itself.
        watched = torch.is_grad_enabled() or transformed()
        apply = mask_apply if watched else _mask_apply
        return apply(grad, packed, kernels.keep_scale(ctx.p)), None


class _MaskApply(torch.autograd.Function):
    """Linear in ``x``: its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.scale = scale
        return _mask_apply(x, packed, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return mask_apply(grad, packed, ctx.scale), None, None


def _where_kept(x: Tensor, packed: Tensor, scale: float | Tensor) -> Tensor:
    kept = kernels.unpack(packed, x.shape)
    if isinstance(scale, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        scaled = (x.float() * scale.float()).to(x.dtype)
    else:
        scaled = x * scale
    return torch.where(kept, scaled, torch.zeros_like(scaled))


def mask_apply(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Return ``where(kept, x * scale, 0)``, differentiable in ``x`` to any order.

    Contiguous; ``packed`` has at least ``x.numel()`` bits.
    """
    if not eager():
        _check_mask("mask_apply", packed, x.numel())
        return _where_kept(x, packed, scale)
    if x.requires_grad and torch.is_grad_enabled():
        return _MaskApply.apply(x, packed, scale)
    return _mask_apply(x, packed, scale)


def _check_mask(op: str, packed: Tensor, numel: int | None = None) -> None:
    got = type(packed).__name__
    wanted = "whole words" if numel is None else f"{numel} elements"
    if isinstance(packed, Tensor):
        size = kernels.packed_size(8 * packed.numel() if numel is None else numel)
        if packed.dtype == torch.uint8 and packed.shape == (size,):
            return
        got = f"{packed.dtype} {list(packed.shape)}"
    raise ValueError(
        f"{op}: expected `packed` to be a packed mask of {wanted}, uint8 in one "
        f"dimension, got {got}. There is none before a first forward pass."
    )


def mask_unpack(packed: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a packed mask as booleans of shape ``size`` (True = kept)."""
    _check_mask("mask_unpack", packed, math.prod(size))
    return kernels.unpack(packed, size)


def fingerprint(packed: Tensor) -> int:
    """Return a 64-bit hash of a packed mask, the same on every device."""
    _check_mask("fingerprint", packed)
    words = packed.view(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=words.device)
    mixed = words + places * _GOLDEN
    for shift, factor in _MIX:  # splitmix64's finalizer; int64 arithmetic wraps
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return int(mixed.sum()) % 2**64


def draw(
    x: Tensor,
    p: float | Tensor,
    rng: Tensor | None,
    counts: Tensor | None = None,
    *,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Drop elements of ``x``; return the output and the packed mask.

    Args:
        x: Floating-point tensor of any shape and strides.
        p: Probability of dropping, a float or a 0-d tensor.
        rng: Philox key, int64 ``[2]``; drawn from torch's generator if None.
        counts: Where to add how often each unit was kept, int64 ``[units]`` on the
            device of ``x``, whose rows have as many elements. In eager mode only.
        fused: What ``eager()`` says, where the caller has asked.

    Returns:
        The output, of the shape and memory layout of ``x``, and its packed mask.
    """
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        refuse(x)
    fused = eager() if fused is None else fused
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p = check_rate(p, fused)
        fused = fused and not isinstance(p, Tensor)
    if rng is not None:
        _check_key(rng, x)
    if not fused:
        y, packed = _draw_composed(x, p, draw_key(x.device) if rng is None else rng)
    else:
        y, packed = _draw_fused(x, p, rng, counts)
    return y if x.is_contiguous() else kernels.laid_out_as(x, y), packed


def _draw_fused(
    x: Tensor, p: float | Tensor, rng: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if rng is None and not unseen(x):  # else the kernel draws it, from the same stream
        rng = draw_key(x.device)
    rest = (rng, p) if counts is None else (rng, p, counts)
    op = _dropout_forward if counts is None else _dropout_counted
    if x.requires_grad and torch.is_grad_enabled():
        call: list[Any] = [op, rest]
        return _Dropout.apply(x, call), call[2]
    return op(x, *rest)


def refuse(x: Any) -> NoReturn:
    """Raise TypeError for what is no floating-point tensor."""
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(
        "dropout: expected `x` to be a floating-point tensor (float16, bfloat16, "
        f"float32 or float64), got {kind}. Convert it first, for example with "
        "`x.float()`."
    )


def _draw_composed(x: Tensor, p: float | Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    scale: float | Tensor
    if isinstance(p, Tensor):
        rate = p.to(x.device, torch.float64)
        scale = torch.where(rate < 1, 1 / (1 - rate), 0.0)
    else:
        rate = torch.full((), p, dtype=torch.float64, device=x.device)
        scale = kernels.keep_scale(p)
    packed = _mask_draw(rng, rate, x.numel())
    return _where_kept(x, packed, scale), packed


def check_rate(p: float | Tensor, readable: bool) -> float | Tensor:
    """Return ``p`` checked and as a float, where its value may and can be looked at."""
    if isinstance(p, Tensor):
        if p.ndim:
            raise ValueError(
                "dropout: expected `p` to be a float or a 0-d tensor, got a tensor of "
                f"shape {list(p.shape)}"
            )
        p = p.detach()  # the mask's own part of a derivative is not to be had
        if not (readable and p.is_cpu):
            return p
    p = float(p)
    if not 0.0 <= p <= 1.0:  # nor is NaN
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p


def _check_key(rng: Tensor, x: Tensor) -> None:
    if not isinstance(rng, Tensor):
        raise ValueError(
            "dropout: expected `rng` to be an int64 tensor of shape [2], got "
            f"{type(rng).__name__}"
        )
    if rng.dtype != torch.int64 or rng.shape != (2,) or rng.device != x.device:
        raise ValueError(
            "dropout: expected `rng` to be an int64 tensor of shape [2] on "
            f"{x.device}, got {rng.dtype} {list(rng.shape)} on {rng.device}. "
            "Draw one with `torch.randint(2**63 - 1, (2,), device=x.device)`."
        )


def dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    rng: Tensor | None = None,
) -> Tensor:
    r"""Drop each element of ``x`` with probability ``p``.

    .. math:: y_i = x_i \, m_i / (1 - p), \qquad m_i \sim \mathrm{Bernoulli}(1 - p)

    Meaning and scaling are those of :func:`torch.nn.functional.dropout`; the mask is
    other, being a pure function of a key and of the element's index. The probability
    of keeping is exact to ``2**-32``. A dropped ``inf`` or ``nan`` gives 0.

    Args:
        x: Floating-point tensor of any shape and strides.
        p: Probability of dropping, in ``[0, 1]``: a float, or a 0-d tensor, which can
            change without recompiling. The paper's ``p`` is our ``1 - p``.
        training: If False, ``x`` itself is returned and nothing is drawn.
        rng: Philox key, int64 ``[2]`` on the device of ``x``. The same key gives the
            same mask for ever. None draws one from torch's generator.

    Returns:
        Tensor of the shape, dtype and memory layout of ``x``; differentiable in ``x``
        (not in ``p``) to any order, under ``torch.func`` and forward-mode AD too.

    Raises:
        ValueError: If ``p`` is outside ``[0, 1]`` or NaN, or ``rng`` is no such key.
        TypeError: If ``x`` is no floating-point tensor, or ``training`` no bool.

    References:
        Srivastava et al., *Dropout*, JMLR 2014. Salmon et al., *Parallel random
        numbers: as easy as 1, 2, 3*, SC 2011.

    Example:
        >>> key = torch.tensor([1, 2])
        >>> dropout(torch.ones(8), 0.5, rng=key)
        tensor([2., 2., 0., 0., 2., 2., 0., 0.])
    """  # noqa: DOC502 (raised by the checks of `draw`)
    if has_torch_function_unary(x) and not torch.compiler.is_compiling():
        return handle_torch_function(dropout, (x,), x, p, training, rng=rng)
    if training is not True:
        check_flag("dropout", "training", training)
        check_rate(p, eager())
        return x
    return draw(x, p, rng)[0]
