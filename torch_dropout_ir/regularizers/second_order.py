"""R_1 to second order, the curvature of the network included."""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

from torch import nn

from torch_dropout_ir.collectives import every, most, some
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.regularizers.checks import (
    check_reachable,
    check_risk,
    checked_product,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Asked, Estimate, is_exact
from torch_dropout_ir.regularizers.graph_memory import Held
from torch_dropout_ir.regularizers.line_pass import (
    AlongLine,
    LossTape,
    Mask,
    draws_along,
    masks_of,
)
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.loss_weight import apart, makes_much, much
from torch_dropout_ir.regularizers.output_rows import count_samples
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.root_passes import again, estimated, samples_meet
from torch_dropout_ir.regularizers.row_chunks import RowChunks
from torch_dropout_ir.regularizers.site_curvature import (
    SiteCurvature,
    draws_by_chunks,
    draws_held,
)
from torch_dropout_ir.regularizers.site_forms import Form, Known, assemble
from torch_dropout_ir.survey import Survey

# Parts of the rows at most: a double backward keeps three times what a training step
# does, and the outputs of all rows and signs are held beside it.
_PARTS: Final = 8
_FEW: Final = 3  # samples, of which one holds more than a step by the same
# Values of the largest activation that are at hand where it moves along a line: that
# which an operation read, and three that it makes.
_ALONG: Final = 4

_TOGETHER: Final = (
    "memory is that of a double backward of the whole batch, whose samples meet in the "
    "network or do not run apart"
)


def second_order(
    model: nn.Module, batch: Batch, loss: Any, *, num_samples: int | None = 1
) -> Estimate:
    r"""Return R_1 to second order in the noise, at every dropout site.

    .. math::
        R_1 \approx \sum_{\text{sites}} \frac{p}{2 (1 - p)}
        \sum_i \sum_j h_{ij}^2 \,
        \Bigl[ \frac{\partial^2 R_S}{\partial h_i^2} \Bigr]_{jj}

    with the second derivative of the whole loss in the site's input, the curvature of
    the layers above included. Where a mask is shared by the positions of a channel, the
    derivative is along the channel. What is left out is of third order in what one mask
    element changes: small where units are many and each counts little. It does not
    vanish as ``p`` goes to 0, for a dropped unit is dropped whole; of the last layer
    :func:`leave_one_out` sees that. ReLU networks have no curvature
    within a linear piece, and this form then equals :func:`gauss_newton`.

    Sampled: signs :math:`z` on the mask's elements, :math:`E[(z \circ h)^\top A (z
    \circ h)] = \sum_j h_j^2 A_{jj}`; one forward and two backward passes, and one more
    backward pass of those a sample, whatever the number of sites and outputs. Exact sum
    (``num_samples=None``): one such pass a unit; where samples are coupled, one an
    element of the mask, or the pass along a line that is told of below.

    Memory: where the graph of a double backward would hold a mebibyte more than a step,
    the batch goes in parts, of an eighth of its rows at least, each with the whole loss
    in its own rows, in one more forward pass; attention makes its weights again for
    each derivative. Samples that meet, as by batch normalization in training mode above
    a site, cannot be taken apart, and one of three or less holds as much: there it is
    :math:`\frac{d^2}{dt^2} R_S(h + t v) = v^\top A v` by forward mode, a pass for each
    use of a site and sample. That keeps no graph, but three values of each activation
    at hand, of four of the largest at most. Where the model has operations that this
    does not go through, or rows of outputs are not those of the samples, it is a double
    backward of all, two to three steps, and the notes say so. A loss without a closed
    form that makes much of what a step holds is called on the rows of a part alone,
    where its graph shows a sum over rows and its gradient confirms that one number
    weighs a part (:mod:`~torch_dropout_ir.regularizers.loss_parts`); else samples go
    through network and loss along a line, as above. An exact sum keeps what the loss
    makes of all outputs.

    Args:
        model: The network. Of several outputs, those count that the loss reads.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_samples: Draws of signs; None for the exact sum.

    Returns:
        The estimate with the part of each site. Standard errors, of parts too, are
        those of the signs. With one draw the spread between the data tells them: the
        square is an upper bound in the mean, rough of few data; NaN where they meet,
        and along a line.

    Raises:
        TypeError: If the model's outputs hold no tensor, or ``batch`` is no pair.
        ValueError: If ``num_samples`` is below 1, the batch is empty, a site drops
            everything, the loss has no second derivative, or the estimate is not
            finite.
        RuntimeError: If a site runs without autograd.

    References:
        Wei, Kakade & Ma, *The implicit and explicit regularization effects of
        dropout*, ICML 2020, section 3; Zhang & Xu, *Implicit regularization of
        dropout*, Lemma 1.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
        >>> torch.nn.init.ones_(net[1].weight).shape
        torch.Size([1, 3])
        >>> round(second_order(net, (x, y), "mse", num_samples=None).value.item(), 4)
        3.0
    """  # noqa: DOC502 (raised by what is called)
    given = model, batch, loss, num_samples
    return estimated("second_order", _first_pass, _drawn, *given, linear=False)


def _drawn(seen: _Seen, asked: Asked) -> Estimate:
    draws, known, coupled = seen.draws, seen.known, seen.coupled
    if draws is None and seen.chunks is not None and not seen.few:
        draws = draws_by_chunks(seen.chunks, seen.masks, asked.num_samples, coupled)
    if draws is None:
        draws, coupled, more = _together(asked, seen)
        known = known._replace(notes=(*known.notes, *more))
    return assemble(known, draws, coupled)


class _Seen(NamedTuple):
    """What the first pass shows, without its graph; draws where that is no more."""

    known: Known
    masks: list[Mask]
    coupled: bool
    draws: list[list[Form]] | None
    chunks: RowChunks | None
    few: bool  # samples: chunks hold more than a step


def _first_pass(
    asked: Asked, survey: Survey | None, line: bool, parts: LossParts | None
) -> _Seen | AlongLine | LossParts:
    """Check model, batch and loss; take the forms at once where that holds no more."""
    model, batch, loss, num_samples = asked
    exact, bare = num_samples is None, loss.kind != "general"
    with clean_pass(  # nothing but an exact sum is called exact
        model, batch[0], twice=True, bare=bare, find_last=exact, weigh=True,
        survey=survey,
    ) as clean:  # fmt: skip
        check_reachable("second_order", clean.unreachable)
        read = read_outputs(clean.outputs, loss, batch[1])
        if parts is None and every(much(clean, read), "much of the loss"):
            parts = _parts(model, batch, clean, read)
            told = every(parts is not None, "parts of the loss")
            if told and parts is not None and parts.look(clean, read):
                return parts
        alone = parts if parts is not None and parts.weights else None
        line = line and alone is None and num_samples is not None
        if line and makes_much(clean, read, None):
            check_risk("second_order", read, model, batch[0], clean.later)
            if (found := AlongLine.of(model, clean, read)) is not None:
                return found
        return _seen(asked, clean, read, alone)


def _seen(
    asked: Asked, clean: CleanPass, read: OutputsRead, alone: LossParts | None
) -> _Seen:
    """Return what a pass shows: draws of it, or what parts of the rows are to know."""
    model, batch, loss, num_samples = asked
    number = most(_parts_of_rows(clean, read, num_samples), "parts")
    whole = alone is None and (number < 2 or not clean.uses)
    least = 0 if whole else RowChunks.least(clean, read)  # while there is a graph
    coupled = False
    if not whole:
        coupled = any([clean.samples_meet(x) for x in read.tensors])
        clean.let_go()
        read = read_outputs(clean.outputs, loss, batch[1])
    meet = coupled
    if alone is None or not alone.curved:
        check_risk("second_order", read, model, batch[0], clean.later)
        if clean.uses:
            check_curvature(read)
        coupled |= bool(clean.uses) and alone is None and read.couples()
    draws, chunks, few = None, None, False
    if whole:
        coupled |= bool(clean.uses) and clean.couples_samples(read.tensors)
        curvature = SiteCurvature(clean, read, linearized=False)
        draws = curvature.draws(num_samples, coupled)
    elif not meet and least:
        chunks = RowChunks(
            model, batch[0], clean, read, twice=True, parts=number, alone=alone,
            least=least,
        )  # fmt: skip
        few = clean.count(read.tensors[0]) <= min(_FEW, number - 1)
        few = every(few and num_samples is not None and alone is None, "few")
    exact = is_exact(clean, loss, batch[1], num_samples)
    like = read.tensors[0].detach().new_zeros(())
    notes = clean.noise_left_out(model)
    known = Known(clean.names, num_samples, exact, like, notes)
    return _Seen(known, masks_of(clean), coupled, draws, chunks, few)


def _parts_of_rows(clean: CleanPass, read: OutputsRead, num_samples: int | None) -> int:
    """Return into how many parts rows go that a step's memory may do for each."""
    first = [h.nbytes for _, h, _ in clean.uses[:1]]
    noise = draws_held(num_samples) * sum(math.prod(n) for n in clean.mask_shapes)
    beside = sum([*first, noise, *(2 * x.nbytes for x in read.tensors)])
    return clean.weighed(read.tensors).parts(_PARTS, beside)


def _parts(
    model: nn.Module, batch: Batch, clean: CleanPass, read: OutputsRead
) -> LossParts | None:
    """Return the loss as parts to be looked at, if its graph keeps rows apart."""
    product = checked_product("second_order", read, model, batch[0], clean.later)
    if product is not None and not apart(product):
        return None
    return LossParts(read, count_samples(clean, read, batch[0]))


def _together(
    asked: Asked, seen: _Seen
) -> tuple[list[list[Form]], bool, tuple[str, ...]]:
    """Return draws of the forms of all rows at once, and what is to be said of them.

    A graph of second derivatives where it holds less than what moves along a line, or
    that does not go through the model.
    """
    meet = seen.coupled or (seen.chunks is not None and seen.chunks.coupled)
    run, num_samples = functools.partial(again, asked), asked.num_samples
    meet = some(meet, "meet") or samples_meet(run)
    run = functools.partial(run, twice=True)
    with run() as (clean, read):
        above = Held.by([x.grad_fn for x in read.tensors])
        single = clean.count(read.tensors[0]) == 1
        tape = LossTape.of(read)
    del clean, read  # their graph
    # Of samples apart a graph tells the error of one draw.
    line = (meet or single or seen.few) and _ALONG * above.largest < 2 * above.made
    if every(line, "along a line"):
        draws = draws_along(asked, seen.masks, tape)
        if every(draws is not None, "rules") and draws is not None:
            return draws, meet, ()
    if seen.few and seen.chunks is not None:
        parts = draws_by_chunks(seen.chunks, seen.masks, num_samples, seen.coupled)
        if parts is not None:
            return parts, seen.coupled, ()
    draws = []
    for _ in range(num_samples or 1):
        with run(lean=True) as (clean, read):
            curvature = SiteCurvature(clean, read, linearized=False)
            draws += curvature.draws(num_samples and 1, meet)
    return draws, meet, (_TOGETHER,)
