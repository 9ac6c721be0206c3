"""Expectations over dropout masks by all of them: slow, and exact."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_flag
from torch_dropout_ir.functional import Batch, at_sites, call
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers.checks import (
    as_pair,
    check_finite,
    noise_left_out,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.loss_graph import joins_rows
from torch_dropout_ir.regularizers.outputs import OutputsRead, read_outputs, real_leaves
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import batched
from torch_dropout_ir.written_parameters import unwritten

MAX_MASKS: Final = 2**20
# Masks of all samples that are taken where no graph shows samples apart; times else.
_FEW: Final = 2**12
_ROUNDS: Final = 4


def enumerate_masks(
    shape: Sequence[int] | int, p: float
) -> Iterator[tuple[Tensor, float]]:
    """Yield every mask of a shape with its probability.

    Args:
        shape: The mask's shape, or its number of elements.
        p: Probability of dropping, in ``[0, 1]``. The paper's ``p`` is our ``1 - p``.

    Yields:
        A BoolTensor, True where kept, and ``(1 - p)^kept p^dropped``; masks of
        probability 0 are left out.

    Raises:
        ValueError: If ``p`` or ``shape`` is none.

    Example:
        >>> [(mask.tolist(), chance) for mask, chance in enumerate_masks(1, 0.25)]
        [([False], 0.25), ([True], 0.75)]
    """
    if not 0 <= p <= 1:
        raise ValueError(f"enumerate_masks: expected `p` in [0, 1], got {p}")
    size = torch.Size([shape] if isinstance(shape, int) else shape)
    if any(n < 0 for n in size):
        raise ValueError(f"enumerate_masks: expected a shape, got {list(size)}")
    choices = [bit for bit, chance in ((False, p), (True, 1 - p)) if chance > 0]
    for bits in itertools.product(choices, repeat=size.numel()):
        kept = sum(bits)
        chance = (1 - p) ** kept * p ** (len(bits) - kept)
        yield torch.tensor(bits, dtype=torch.bool, device="cpu").view(size), chance


def expected_dropout_loss(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    *,
    max_masks: int = MAX_MASKS,
    coupled: bool | None = None,
) -> Tensor:
    r"""Return ``E[R_drop]`` exactly, from every mask.

    .. math::
        E_\eta R_{drop} = \sum_m (1 - p)^{|m|} p^{d - |m|} \, R_{drop}(\theta, m)

    over the masks of all sites together. Less ``R_S`` it is R_1, for any model and
    loss. Where samples do not meet (neither in the network nor in the loss), one mask
    for all of them has the same mean as a mask each, and ``d`` is the number of units;
    else it is that of units times samples. Of other noise, known kinds (alpha dropout,
    that between recurrent layers) are switched off with a warning; what is not known
    has no exact mean.

    Args:
        model: A small model; left as it is. Of one in training mode those sites count
            that are too; of one in evaluation mode all modules and no calls.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        max_masks: Most forward passes to spend.
        coupled: Whether samples meet. If None, it is found from derivatives, and from
            the loss at some masks; they are taken to where no graph shows them apart,
            as of the largest of some losses, if that makes no more than 4096 masks.

    Returns:
        0-d float64.

    Raises:
        TypeError: If ``batch`` is no pair, or ``coupled`` no bool.
        ValueError: If there are more masks than ``max_masks``, the model draws random
            numbers besides its sites, the loss is not finite, which sites are used
            depends on the masks, or one is inside ``torch.func.vmap``.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Lemma 1.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)).double()
        >>> batch = torch.ones(4, 3).double(), torch.zeros(4, 1).double()
        >>> expected = expected_dropout_loss(net, batch, "mse")
        >>> r1 = expected - nn.functional.mse_loss(net[1](batch[0]), batch[1])
        >>> torch.testing.assert_close(r1, net[1].weight.square().sum())
    """  # noqa: DOC502 (the checks raise too)
    check_count("expected_dropout_loss", "max_masks", max_masks, 0)
    if coupled is not None:
        check_flag("expected_dropout_loss", "coupled", coupled)
    resolved, batch = resolve_loss(loss), as_pair(batch)
    with unwritten(model):
        uses = uses_of_sites(model, batch, resolved, coupled)
    if uses.drawn:
        raise ValueError(
            "expected_dropout_loss: expected a model whose only noise is that of its "
            "sites, got one that draws random numbers besides: no set of masks has "
            "its mean. Use `regularizers.monte_carlo`."
        )
    if uses.count > max_masks:
        sizes = ", ".join(f"`{s.name}` {list(shape)}" for s, shape in uses.masks)
        raise ValueError(
            f"expected_dropout_loss: expected at most {max_masks} masks, got 2^"
            f"{uses.count.bit_length() - 1} ({sizes}). Use `regularizers.monte_carlo`."
        )
    for note in uses.left_out:
        warnings.warn(f"expected_dropout_loss: {note}", stacklevel=2)
    with unwritten(model):
        return average(model, batch, resolved, uses)


@dataclasses.dataclass(frozen=True)
class Uses:
    """What a pass without noise has shown of the masks to enumerate.

    Attributes:
        masks: Each use of a site, with the shape of its mask.
        drawn: Whether it drew random numbers besides, which have no masks.
        left_out: What there is to say of noise that was switched off.
    """

    masks: list[tuple[Site, torch.Size]]
    drawn: bool
    left_out: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of sets of masks."""
        return _count(self.masks)


def average(model: nn.Module, batch: Batch, loss: Loss, uses: Uses) -> Tensor:
    """Return the mean loss over every set of masks, 0-d float64."""
    choices = [list(enumerate_masks(shape, site.p)) for site, shape in uses.masks]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for combination in itertools.product(*choices):
            chance = math.prod(c for _, c in combination)
            risk = _risk_at(model, batch, loss, [mask for mask, _ in combination])
            total += chance * risk.double().cpu()
    check_finite("expected_dropout_loss", total, model, batch[0])
    return total


def _count(masks: list[tuple[Site, torch.Size]]) -> int:
    return math.prod(2 ** shape.numel() if site.p < 1 else 1 for site, shape in masks)


def uses_of_sites(
    model: nn.Module, batch: Batch, loss: Loss, coupled: bool | None = None
) -> Uses:
    """Return each use of a site and the mask to enumerate there.

    Whether samples meet is found out where ``coupled`` does not tell.

    Raises:
        ValueError: If a site is inside ``torch.func.vmap``.
    """
    look, shown = coupled is None, False
    with clean_pass(model, batch[0]) as clean:
        with torch.no_grad():
            loss(clean.outputs, batch[1])  # raises, where it is none
        acted = [(s, h.shape) for s, h, _ in clean.uses] + clean.later
        coupled = True if clean.later else coupled  # in a loss that runs the model
        leaves = real_leaves(clean.outputs)[0]
        if not any(torch.is_tensor(x) and x.is_floating_point() for x in leaves):
            coupled = coupled is not False  # no derivative can tell
        if coupled is None:
            read = read_outputs(clean.outputs, loss, batch[1])
            coupled = bool(clean.unreachable) or clean.couples_samples(read.tensors)
            coupled = coupled or not _a_row_each(clean, read) or _meet_in_loss(read)
            shown = not coupled and _shown_apart(clean, read)
        if inside := [s.name for s, h, _ in clean.uses if batched(h)]:
            raise ValueError(
                "expected_dropout_loss: expected sites outside of `torch.func.vmap`, "
                f"which hides masks, got {inside}. Use `regularizers.monte_carlo`."
            )
        each = [(s, torch.Size(s.mask_shape(shape))) for s, shape in acted]
        drawn, other = clean.drawn, clean.noisy or bool(clean.out_of_sight)
        left_out = noise_left_out(model, clean.noisy, True) if other else ()
    one = [(s, torch.Size((1, *shape[1:])) if shape else shape) for s, shape in each]
    if look and not coupled and not drawn and _count(one) <= MAX_MASKS:
        coupled = not shown and _count(each) <= _FEW
        coupled = coupled or _meet_at_masks(model, batch, loss, each)
    return Uses(each if coupled else one, drawn, left_out)


def _a_row_each(clean: CleanPass, read: OutputsRead) -> bool:
    """Whether each sample has one row at each use of a site."""
    counts = {clean.count(x) for x in read.tensors if x.ndim}
    return {h.shape[0] if h.ndim else 0 for _, h, _ in clean.uses} <= counts


def _shown_apart(clean: CleanPass, read: OutputsRead) -> bool:
    """Whether graphs show that samples are apart, at whatever masks."""
    product = read.product()
    if product is None or clean.samples_meet(read.tensors[0]) is not False:
        return False
    assert read.loss is not None  # else there is no product
    known = read.loss.kind != "general"
    return known or joins_rows(product.at, product.nodes) is False


def _meet_at_masks(
    model: nn.Module, batch: Batch, loss: Loss, uses: list[tuple[Site, torch.Size]]
) -> bool:
    """Whether samples meet at masks that are far from none, as in a hinge."""
    # If not, the loss is a sum over samples: two sets of masks have the same sum of
    # losses as the two that come of exchanging rows.
    counts = {shape[0] if shape else 0 for _, shape in uses}
    if len(counts) != 1 or counts <= {0, 1}:
        return False
    same = torch.Generator("cpu").manual_seed(0)
    uniform = functools.partial(torch.rand, generator=same, device="cpu")
    risk = functools.partial(_risk_at, model, batch, loss)
    one = 1 / max(1, *[shape.numel() for _, shape in uses])
    with torch.no_grad():
        for kept in (0.5, 1 - one, one, 1, 0) * _ROUNDS:  # a branch may ask for one
            own = uniform([*counts]).argsort() < min(counts) / 2
            pairs = [(uniform(n) < kept, uniform(n) < 0.5) for _, n in uses]
            exchanged = [_exchanged(own, a, b) for a, b in pairs]
            a, b, c, d = (
                risk([pair[i] for pair in found])
                for found in (pairs, exchanged)
                for i in (0, 1)
            )
            off = (a.double() + b - c - d).abs()
            if bool(off > precision(model, a) ** (2 / 3) * (a.abs() + b.abs())):
                return True
    return False


def precision(model: nn.Module, risk: Tensor) -> float:
    """Return the coarsest rounding of parameters and loss."""
    real = (x for x in (*model.parameters(), risk) if x.is_floating_point())
    return max(torch.finfo(x.dtype).eps for x in real)


def _exchanged(rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange some rows of two masks."""
    own = rows.view(-1, *(1,) * (a.ndim - 1))
    return torch.where(own, a, b), torch.where(own, b, a)


def _meet_in_loss(read: OutputsRead) -> bool:
    """Whether samples meet in the loss; taken to where no derivative can tell."""
    try:
        return read.couples()
    except ValueError:
        return True


def _risk_at(model: nn.Module, batch: Batch, loss: Loss, masks: list[Tensor]) -> Tensor:
    """Return the loss at given masks, one a use in their order."""
    left = iter(masks)

    def multiply(site: Site, h: Tensor) -> Tensor:
        kept = next(left, None)
        if kept is None:
            raise ValueError(
                f"expected_dropout_loss: expected the uses of the pass without noise, "
                f"got one more of site `{site.name}` at some masks. Use "
                "`regularizers.monte_carlo`."
            )
        kept = kept.to(h.device)
        scale = 1 / (1 - site.p) if site.p < 1 else 0.0
        return torch.where(kept, h * scale, torch.zeros_like(h))

    with at_sites(model, multiply):
        return loss(call(model, batch[0]), batch[1])
