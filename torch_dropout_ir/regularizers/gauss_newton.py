"""R_1 of any network by the Gauss-Newton form, one backward pass a sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from torch_dropout_ir.collectives import every
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.leaves import without_graph
from torch_dropout_ir.output_products import ALL, Rows
from torch_dropout_ir.regularizers.checks import (
    check_risk,
    checked_product,
    read_beside,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Asked, Estimate, is_exact
from torch_dropout_ir.regularizers.line_pass import (
    AlongLine,
    Mask,
    draws_along,
    masks_of,
)
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.loss_weight import makes_much, one_root, parts_pay
from torch_dropout_ir.regularizers.output_rows import count_samples, rows_of_samples
from torch_dropout_ir.regularizers.outputs import OutputsRead, read_outputs
from torch_dropout_ir.regularizers.root_choice import PartRoots
from torch_dropout_ir.regularizers.root_forms import RootForms
from torch_dropout_ir.regularizers.root_passes import (
    draws_by_passes,
    estimated,
    known_of,
    read_of,
)
from torch_dropout_ir.regularizers.row_chunks import RowChunks
from torch_dropout_ir.regularizers.site_forms import (
    Form,
    Known,
    assemble,
    join,
    of_sums,
)
from torch_dropout_ir.survey import Survey

# A backward pass that may be repeated holds under twice what a training step does.
_CHUNKS: Final = 2


def gauss_newton(
    model: nn.Module, batch: Batch, loss: Any, *, num_samples: int | None = 1
) -> Estimate:
    r"""Return R_1 from the Gauss-Newton form of the loss at every dropout site.

    .. math::
        R_1 \approx \sum_{\text{sites}} \frac{p}{2 (1 - p)}
        \sum_i \sum_j h_{ij}^2 \, [J_i^\top H_i J_i]_{jj}

    with :math:`J_i` the derivative of the outputs in the site's input on the network
    without noise and :math:`H_i` the loss's Hessian in the outputs. Where a mask is
    shared by the positions of a channel, the square is of the sum over positions.

    Sampled: :math:`v_i` with :math:`E[v_i v_i^\top] = H_i` is sent back to the sites;
    the sum of :math:`(h_{ij} g_{ij})^2` is unbiased for the form. One forward pass,
    and one backward pass a sample whatever the number of sites. Exact sum
    (``num_samples=None``): one an output of a sample; of the batch where samples meet.

    Equal to ``E[R_drop] - R_S`` for a squared loss and one site whose output goes
    straight into the last linear layer (``exact``); else its second-order part without
    the curvature above, off by a factor of two and more in deep networks.

    Of a loss without a closed form its graph tells what the outputs' Hessian is: of few
    outputs the block of each sample, without a derivative of it; of
    log-probabilities that of a softmax, with a diagonal; a diagonal where it is
    elementwise, by one product. Else it is taken by samples' blocks if those pay (a
    large network, few outputs, many samples), or by signs :math:`z` on the outputs,
    :math:`E[z (H z)^\top] = H`, in two backward passes, which spreads more. Curvature
    of both signs takes two too. Where the loss reads several outputs it is :math:`(z
    \circ h)^\top J^\top H J (z \circ h)` with signs on the units, in three; the exact
    sum goes unit by unit there, and of losses that couple samples.

    Memory: no more than a training step's. What has been used goes as the derivatives
    come. Where a second root needs the graph and that would hold more, half of the rows
    go at a time. Samples that meet (batch normalization in training mode above a site,
    message passing) cannot be taken apart: each root takes a pass of its own then.

    Of many single outputs, or log-probabilities, the graph tells the diagonal
    (:mod:`~torch_dropout_ir.entry_curvature`), in the memory of a step. Another loss
    without a closed form that makes much of what a step holds is called on the
    rows of a part alone, where its graph shows a sum over rows and its gradient that
    one number weighs a part (:mod:`~torch_dropout_ir.regularizers.loss_parts`), for one
    to four steps more. Else, as where it couples rows or reads several outputs, it is
    :math:`\tfrac12 u^\top H u = \tfrac12 \frac{d^2}{dt^2} L(f + t u)` of outputs
    :math:`f` that move by :math:`u = J (z \circ h) \sqrt{p / (1 - p)}`, with signs
    :math:`z`, by forward mode: a pass for each use of a site and sample. Exact sums
    of these, and losses with operations that this does not go through, hold two to four
    steps.

    Whether samples meet is seen in the graph where its operations are known to keep
    them apart, else asked of an eighth of a large batch; it is assumed if that fails.

    Args:
        model: The network. Of several outputs, those count that the loss reads.
        batch: ``(inputs, targets)``; targets may be None where the loss's Hessian does
            not depend on them (squared losses, cross-entropy).
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_samples: Backward passes with sampled outputs; None for the exact sum.

    Returns:
        The estimate with the part of each site. Standard errors, of parts too, are
        those of the sampling of outputs. With one draw the spread between the data
        tells them: the square is an upper bound in the mean, rough of few data; NaN
        where they meet, and by forward mode.

    Raises:
        TypeError: If the model's outputs hold no tensor, or ``batch`` is no pair.
        ValueError: If ``num_samples`` is below 1, the batch is empty, a site drops
            everything, the loss has no second derivative, cross-entropy is taken of
            outputs without batch dimension, or the estimate is not finite.
        RuntimeError: If a site runs without autograd.

    References:
        Wei, Kakade & Ma, *The implicit and explicit regularization effects of
        dropout*, ICML 2020; Zhang & Xu, *Implicit regularization of dropout*, eq. (4).

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
        >>> torch.nn.init.ones_(net[1].weight).shape
        torch.Size([1, 3])
        >>> round(gauss_newton(net, (x, y), "mse", num_samples=None).value.item(), 4)
        3.0
    """  # noqa: DOC502 (a site's `p` is checked by `Site.variance`)
    given = model, batch, loss, num_samples
    return estimated("gauss_newton", _first_pass, _drawn, *given, linear=True)


def _drawn(seen: _Seen, asked: Asked) -> Estimate:
    draws, coupled, num_samples = seen.draws, seen.coupled, asked.num_samples
    if draws is not None and seen.chunks is not None:
        coupled = not seen.chunks.apart()
    elif seen.chunks is not None:
        forms = None if seen.chunks.alone else seen.forms
        parts = seen.chunks.each(functools.partial(_of_chunk, forms, num_samples))
        draws = None if parts is None else join(parts, num_samples)
    if draws is None and not seen.forms.rooted and num_samples:
        draws = draws_along(asked, seen.uses, linear=True)
        draws, coupled = draws if every(draws is not None, "rules") else None, True
    if draws is None:
        run = functools.partial(_again, asked)
        meet = True if seen.chunks is not None and seen.chunks.coupled else None
        draws, coupled = draws_by_passes(seen.forms, run, meet)
    return assemble(seen.known, draws, coupled or seen.forms.loss_couples)


class _Seen(NamedTuple):
    """What the first pass shows, without its graph; draws where they take no more."""

    known: Known
    forms: RootForms
    draws: list[list[Form]] | None = None
    coupled: bool = False
    chunks: RowChunks | None = None
    uses: Sequence[Mask] = ()


def _pass(asked: Asked, **options: Any) -> contextlib.AbstractContextManager[CleanPass]:
    general, exact = asked.loss.kind == "general", asked.num_samples is None
    return clean_pass(  # nothing but an exact sum is called exact
        asked.model, asked.batch[0], twice=general, bare=not general, find_last=exact,
        **options,
    )  # fmt: skip


@contextlib.contextmanager
def _again(asked: Asked) -> Iterator[tuple[CleanPass, OutputsRead]]:
    with _pass(asked, weigh=True) as clean:
        yield clean, read_of(clean, asked.batch[1], asked.loss)


def _first_pass(
    asked: Asked, survey: Survey | None, line: bool, parts: LossParts | None
) -> Estimate | _Seen | AlongLine | LossParts:
    """Check model, batch and loss; take the forms at once where that holds no more."""
    model, (inputs, targets), loss, num_samples = asked
    with _pass(asked, weigh=num_samples != 1, survey=survey) as clean:
        read = read_of(clean, targets, loss)
        if every(not clean.uses, "no site"):  # then the loss may be bent or not
            check_risk("gauss_newton", read, model, inputs, clean.later)
            exact = is_exact(clean, loss, targets, num_samples)
            like, notes = read.single.new_zeros(()), clean.noise_left_out(model)
            none = Known(clean.names, num_samples, exact, like, notes)
            return assemble(none, [[]] * (num_samples or 1), False)
        found = _forms(asked, clean, read, parts, line)
        if isinstance(found, (AlongLine, LossParts)):
            return found
        forms, beside, parts = found
        known = functools.partial(known_of, model, clean, read, loss, forms, beside)
        if (summed := forms.sums(clean, read, keep=False)) is not None:
            return of_sums(known(), summed)
        told = forms.one_pass and clean.samples_meet(read.tensors[0]) is not None
        if forms.one_pass and not told:
            clean.weigh, clean.singly = True, None  # a graph may be kept to ask it
        rows = 0 if told else RowChunks.least(clean, read)
        parted = bool(rows or forms.rooted or num_samples)  # or along a line
        whole = told or not clean.matters or not parted
        if whole or forms.may_keep(clean, read):
            draws, coupled = forms.draws(clean, read, keep=False)
            return _Seen(known(), forms, draws, coupled)
        uses = masks_of(clean)
        if not rows:
            return _Seen(known(), forms, uses=uses)
        kept, twice = without_graph(clean.outputs), loss.kind == "general"
        kept = read_outputs(kept, loss, targets)
        chunks = RowChunks(
            model, inputs, clean, kept, twice=twice, parts=_CHUNKS, alone=parts,
            least=rows,
        )  # fmt: skip
        if not forms.one_pass:
            return _Seen(known(), forms, chunks=chunks, uses=uses)
        draws, _ = forms.draws(clean, read, coupled=False, keep=False)
        return _Seen(known(), forms, draws, chunks=chunks)


def _forms(
    asked: Asked,
    clean: CleanPass,
    read: OutputsRead,
    parts: LossParts | None,
    line: bool,
) -> tuple[RootForms, tuple[str, ...], LossParts | None] | AlongLine | LossParts:
    """Return the forms, what is to be said of the loss, and its parts, if any.

    The parts alone where finding them has used the pass up; the loss as it ran where
    its second derivative is to be taken along lines.
    """
    model, (inputs, _), _, num_samples = asked
    if parts is None or not parts.weights:
        product = checked_product("gauss_newton", read, model, inputs, clean.later)
        beside = read_beside(read, clean.edges, product, clean.later)
        if parts is not None or not parts_pay(clean, read, product, num_samples):
            line = line and num_samples is not None and not beside
            line = line and makes_much(clean, read, product)
            if line and not every(
                product is not None and one_root(product, num_samples), "one root"
            ):
                del product  # its graph
                if (found := AlongLine.of(model, clean, read)) is not None:
                    return found
                product = read.product()
            return RootForms(clean, read, num_samples, product), beside, None
        del product
        parts = LossParts(read, count_samples(clean, read, inputs), beside)
        if parts.look(clean, read):
            return parts
    clean.singly = True
    roots = PartRoots(parts, clean, read.single, num_samples)
    forms = RootForms(clean, read, num_samples, None, roots)
    return forms, parts.beside, parts


def _of_chunk(
    forms: RootForms | None,
    num_samples: int | None,
    clean: CleanPass,
    read: OutputsRead,
    rows: Tensor,
) -> list[list[Form]] | None:
    """Return the draws of a chunk of rows; None where samples meet in it.

    By its own forms if none are given, where its loss is its own.
    """
    # In a sample they add to the spread alone, and chunks have told most of that.
    if num_samples is None and clean.couples_samples(read.tensors):
        return None
    own: Rows = ALL
    if forms is None:
        forms = RootForms(clean, read, num_samples, read.product())
    else:
        own = rows_of_samples(rows, len(read.tensors[0]) // len(rows))
    return forms.draws(clean, read, coupled=False, rows=own, keep=False)[0]
