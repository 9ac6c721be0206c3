"""Floor 1: operations that torch differentiates once, put together from others.

Semantics:

* Torch's derivative of a hard sigmoid, of embedding bags, of margin losses and of
  connectionist temporal classification has none of its own; that of its kernel of
  weight normalization has one that is not even symmetric. Sparse gradients have none.
* What is put in their place has the same values and first derivatives, to rounding, and
  all further ones. The exception: torch's derivative of connectionist temporal
  classification is right only behind a log-softmax; this one is right anywhere.
* Arguments that are rare, or have been given up on (``max_norm``, ``size_average``),
  are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Nodes whose derivative has none; fused attention is left to its other kernel.
_ONCE: Final = (
    "ScaledDotProduct", "HardsigmoidBackward", "EmbeddingBagBackward",
    "MultiMarginLossBackward", "MultilabelMarginLossBackward", "CtcLossBackward",
    "CudnnCtcLossBackward",
)  # fmt: skip
_SPARSE: Final = 6  # place of that argument of an embedding
_NEVER: Final = -1e30  # the logarithm of what cannot be


class Composed(TorchFunctionMode):
    """Puts operations with all derivatives in the place of those with one."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = composed(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found


def composed(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a call returns, with all derivatives; None if it is left to torch."""
    own = _COMPOSED.get(func)
    if own is None:
        return None
    if func in _CHECKS:
        with torch.no_grad():
            func(*args, **kwargs)  # says what is wrong with what it is given
    return own(*args, **kwargs)


def differentiated_once(names: Iterable[str]) -> bool:
    """Whether one of the nodes of a graph, by name, can be differentiated only once."""
    return any([name.startswith(_ONCE) for name in names])


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(*args: Any, **kwargs: Any) -> Tensor:
    return F.embedding(*args[:_SPARSE], **{**kwargs, "sparse": False})


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq or input.is_floating_point():
        return None
    index, first = input.flatten(), offsets
    if first is None:
        first = torch.arange(0, input.numel(), input.shape[-1], device=input.device)
    elif include_last_offset:
        first = first[:-1]
    places, count = torch.arange(len(index), device=input.device), len(first)
    bags = torch.searchsorted(first, places, right=True) - 1
    if padding_idx is not None:  # into a bag that is not returned
        bags = torch.where(index == padding_idx % len(weight), count, bags)
    rows = F.embedding(index, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    found = rows.new_zeros(count + 1, rows.shape[1])
    if mode == "max":
        every = bags[:, None].expand_as(rows)
        return found.scatter_reduce(0, every, rows, "amax", include_self=False)[:count]
    found = found.index_add(0, bags, rows)
    if mode == "mean":
        found = found / torch.bincount(bags, minlength=count + 1).clamp(min=1)[:, None]
    return found[:count]


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    if size_average is not None or reduce is not None:
        return None
    x, own = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    terms = F.relu(margin - x.gather(1, own) + x) ** p
    if weight is not None:
        terms = terms * weight[own]
    terms = terms.scatter(1, own, 0.0).mean(1)
    return _reduced(terms.view(target.shape), reduction)


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    if size_average is not None or reduce is not None:
        return None
    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1, input.shape[-1])
    given = (labels >= 0).cumprod(1)  # up to the first that is none
    labels = labels.clamp(min=0)
    others = torch.zeros_like(labels).scatter_add(1, labels, given) == 0
    off = F.relu(1 - x.gather(1, labels)[:, :, None] + x[:, None, :])
    terms = (off * given[:, :, None] * others[:, None, :]).sum((1, 2)) / x.shape[1]
    return _reduced(terms.view(input.shape[:-1]), reduction)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    batched = log_probs.ndim == 3
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    p = wide if batched else wide[:, None]
    lengths = torch.as_tensor(target_lengths, device=p.device).reshape(-1)
    ends = torch.as_tensor(input_lengths, device=p.device).reshape(-1)
    labels = _padded(targets.to(p.device), lengths, blank)
    found = _of_alignments(p, labels, ends, lengths, blank)
    found = found.where(ends > 0, torch.where(lengths > 0, -_NEVER, 0.0))
    never = found > -_NEVER / 2
    found = found.where(~never, 0.0 if zero_infinity else torch.inf)
    found = found if batched else found.squeeze(0)
    if reduction == "mean":
        found = found / (lengths if batched else lengths[0]).clamp(min=1)
    return _reduced(found, reduction)


def _of_alignments(
    p: Tensor, labels: Tensor, ends: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    r"""Return minus the log-likelihood of labels, over all ways to align them.

    :math:`\alpha_t(s) = \log (e^{\alpha_{t-1}(s)} + e^{\alpha_{t-1}(s - 1)} +
    e^{\alpha_{t-1}(s - 2)}) + \log p_t(l_s)`, of labels with blanks around them, where
    the last is left out at a blank and next to an equal label (Graves et al. 2006).
    """
    steps, samples, _ = p.shape
    around = labels.new_full((samples, 2 * labels.shape[1] + 1), blank)
    around[:, 1::2] = labels
    apart = around[:, 2:] != around[:, :-2]
    apart = F.pad(apart, (2, 0))[:, -around.shape[1] :] & (around != blank)
    emitted = p.gather(2, around.expand(steps, -1, -1))
    begun = torch.arange(around.shape[1], device=p.device) < 2
    alpha = torch.where(begun, emitted[0], _NEVER)
    for t in range(1, steps):
        one = F.pad(alpha, (1, 0), value=_NEVER)[:, :-1]
        two = F.pad(alpha, (2, 0), value=_NEVER)[:, :-2].where(apart, _NEVER)
        moved = torch.stack((alpha, one, two)).logsumexp(0) + emitted[t]
        alpha = torch.where((t < ends)[:, None], moved, alpha)
    last = 2 * lengths[:, None]  # the last blank, and the label before, if any
    ways = alpha.gather(1, torch.cat((last, (last - 1).clamp(min=0)), 1))
    ways = ways.where(F.pad(lengths[:, None] > 0, (1, 0), value=True), _NEVER)
    return -ways.logsumexp(1)


def _padded(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Return the labels of each sample in a row, which may have been joined."""
    most = int(lengths.max()) if len(lengths) else 0
    places = torch.arange(most, device=targets.device)
    within = places < lengths[:, None]
    if targets.ndim == 2:
        return targets[:, :most].long().where(within, blank)
    labels = targets.new_full(within.shape, blank, dtype=torch.long)
    return labels.masked_scatter(within, targets.long())


def _reduced(terms: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum()


_COMPOSED: Final[dict[Callable[..., Any], Callable[..., Tensor | None]]] = {
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
    F.ctc_loss: _ctc_loss,
    torch._weight_norm: _weight_norm,
}
_CHECKS: Final = frozenset((
    F.embedding_bag, F.multi_margin_loss, F.multilabel_margin_loss, F.ctc_loss,
))  # fmt: skip
