"""Floor 1: dropout that is called as a function, and what stands in its place.

Semantics:

* While the context is active, every call of a dropout function of torch's (and ours)
  by a module of the model is handed over, with the place it was made at: the module
  whose forward pass runs, the function, and the number of the call in that pass.
* Attention with dropout is computed in full, so that what acts on its weights is a site
  like any other.
* Noise that is not multiplicative (alpha dropout, randomized leaky ReLU) and dropout
  inside recurrent kernels is switched off, as it is in evaluation mode.
* The context is that of one thread: a block under checkpointing that is computed again
  on a device's own thread is not in it, and such calls are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dropout_ir.attention_again import attention_weights
from torch_dropout_ir.module_calls import LOOKED_INTO, ModuleCalls
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import runs_twice

SiteFunction = Callable[[Site, Tensor], Tensor]

KINDS: Final[dict[str, type[nn.Module]]] = {
    "dropout": nn.Dropout,
    "dropout_": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "feature_dropout": nn.Dropout2d,
    "feature_dropout_": nn.Dropout2d,
}
OTHER_NOISE: Final = (
    "alpha_dropout",
    "alpha_dropout_",
    "feature_alpha_dropout",
    "feature_alpha_dropout_",
    "rrelu",
    "rrelu_",
)
RECURRENT: Final = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_SILENCED: Final = frozenset((*OTHER_NOISE, *RECURRENT))
_HANDED_OVER: Final = _SILENCED | LOOKED_INTO | {
    "native_dropout", "scaled_dot_product_attention"
}  # fmt: skip
_LINEAR: Final = frozenset((
    "linear", "matmul", "__matmul__", "mm", "multi_head_attention_forward"
))  # fmt: skip


class DropoutCalls(ModuleCalls):
    """Hands calls of dropout functions over to ``apply(site, h)``.

    That returns what passes on. ``callers`` are the modules that make the calls, by
    name. In training (``trains``) the pass is no measurement; where its graph
    ``outlives`` the context, nothing in it may be computed again.

    Attributes:
        silenced: Functions of other noise that were switched off.
        given: Returns what products and attention are given for arguments.
    """

    given: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None

    def __init__(
        self,
        callers: Sequence[tuple[str, nn.Module]],
        apply: SiteFunction,
        trains: bool = False,
        outlives: bool = False,
    ) -> None:
        super().__init__(callers)
        self._apply = apply
        self._outlives = outlives
        self.trains = trains
        self.silenced: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in KINDS:
            return self._dropout(name, *args, **kwargs)
        # A block that runs twice saves the same both times, and may ask for more.
        if name in _LINEAR and self.given is not None and not runs_twice():
            args = self.given(args)
        if name in _HANDED_OVER:
            return super().__torch_function__(func, types, args, kwargs)
        if self.watch is not None:
            self.watch(name, args, kwargs)
        return func(*args, **kwargs)

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "native_dropout":
            output = self._dropout("dropout", *args, **kwargs)
            return output, torch.ones_like(output, dtype=torch.bool)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name in _SILENCED:
            return self._silence(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _silence(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function as it is in evaluation mode."""
        if name in RECURRENT:
            place = recurrent_dropout(args)
            if not args[place] or not args[place + 1]:
                return func(*args, **kwargs)
            self._note(name)
            return func(*args[:place], 0.0, *args[place + 1 :], **kwargs)
        self._note(name)
        if name.startswith("rrelu"):
            given = dict(zip(("input", "lower", "upper"), args, strict=False)) | kwargs
            slopes = given.get("lower", 1 / 8), given.get("upper", 1 / 3)
            return F.leaky_relu(given["input"], sum(slopes) / 2)
        return args[0] if args else kwargs["input"]

    def _note(self, name: str) -> None:
        self.silenced.add(name)
        self._check_once(name)

    def _dropout(
        self,
        name: str,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        **others: Any,
    ) -> Tensor:
        training = others.get("train", training)
        if not training or float(p) <= 0:
            return input
        site = self._site(name.rstrip("_"), float(p), KINDS[name])
        if others.get("rng", site) is None:
            site = dataclasses.replace(site, keyed=True)
        output = self._apply(site, input)
        return input.copy_(output) if inplace or name.endswith("_") else output

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        name = "scaled_dot_product_attention"
        if dropout_p <= 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
        weights = attention_weights(query, key, attn_mask, is_causal, scale)
        return self._apply(self._site(name, dropout_p, nn.Dropout), weights) @ value

    def _site(
        self, function: str, p: float, kind: type[nn.Module] | None = None
    ) -> Site:
        self._check_once(function)
        return super()._site(function, p, kind)

    def _check_once(self, function: str) -> None:
        """Raise where what is replaced would be computed again out of our sight."""
        if not self._runs_again():
            return
        if self._outlives or torch.cuda.is_initialized():
            raise RuntimeError(
                f"expected {function} outside of activation checkpointing: its block "
                "would be computed again with dropout on. Switch checkpointing off "
                "here, or use 'L3' or 'regu' of `modified_loss`."
            )


def recurrent_dropout(args: tuple[Any, ...]) -> int:
    """Return the place of ``dropout`` in the arguments of a recurrent kernel."""
    # (x, h, weights, biases, layers, dropout, ...), one more where x is packed.
    return 6 if isinstance(args[3], (list, tuple)) else 5
