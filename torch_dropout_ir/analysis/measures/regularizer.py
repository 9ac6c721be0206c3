"""R_1 and R_2 of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir import collectives
from torch_dropout_ir.analysis.records import Record
from torch_dropout_ir.analysis.sharded import gathered, is_sharded
from torch_dropout_ir.analysis.snapshot import NO_SITE, Need, Snapshot
from torch_dropout_ir.arguments import check_count, check_even
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.regularizers import Estimate, gradient_norm
from torch_dropout_ir.regularizers.excess import TOO_ALIKE
from torch_dropout_ir.regularizers.gradient_norm import ALIKE
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.sharpness.reading import terms

_PIECE: Final = 2**15  # entries that are taken to double precision at a time
_R1: Final = "regularizer/R1"
_ERROR: Final = "regularizer/R1_standard_error"
_NOISE: Final = "regularizer/R2_dropout_noise"
_ONE_PAIR: Final = (
    "two masks are one difference, which has no error: `DropoutNoise(num_masks=4)`"
)


class Regularizer:
    r"""R_1 with its error and its parts, and R_S on the same batch.

    .. math:: R_1 = E[R_{drop}] - R_S

    in the units of the loss: in closed form where that is exact (squared loss, dropout
    straight before the last linear layer), with the error 0; else the mean over masks
    with its standard error. Of several sites each has the part that it adds along the
    path from no noise to all of it, :math:`E \int_0^1 \langle h \eta, g(t \eta) \rangle
    dt` with the derivative :math:`g` in what the site passes on: parts add up to R_1.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. 4, Lemma 1; Aumann &
        Shapley, *Values of non-atomic games*, 1974 (parts).

    Args:
        num_masks: Masks to average over where R_1 has no closed form, and half as many
            for the parts; up to eight times as many where they hardly differ
            (stochastic depth of a small batch).
    """

    name = "regularizer"
    needs: frozenset[Need] = frozenset({"inputs", "loss"})

    def __init__(self, num_masks: int = 8) -> None:
        check_count("Regularizer", "num_masks", num_masks, 2)
        self.num_masks = num_masks
        self.passes = float(num_masks)

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R1``, its sites and errors, ``loss/R_S``, modified."""
        assert snapshot.loss is not None  # by `needs`
        # Ranks may meet in a pass: all make the same number of them.
        most = 8 * self.num_masks if snapshot.ranks.size == 1 else self.num_masks
        share = snapshot.ranks.share(weight(snapshot, [snapshot.batch]))
        together = collectives.together(
            snapshot.ranks.most, lambda x: snapshot.ranks.sum_of(share * x)
        )
        with together, snapshot.ranks.own_draws(snapshot.model):
            found, how, clean = online(
                snapshot.model, snapshot.batch, snapshot.loss,
                num_masks=self.num_masks, most_masks=most,
            )  # fmt: skip
        joined = _joined(snapshot, found, clean)
        records: dict[str, Record] = {**_told(snapshot, joined)}
        if snapshot.sites:
            snapshot.notes[_R1] = how
            if not found.per_site:
                snapshot.absent[f"{_R1}/<site>"] = "; ".join(found.notes)
        else:
            records = {tag: joined[tag] for tag in joined if tag == "loss/R_S"}
            snapshot.absent[_R1] = NO_SITE
        if clean is not None:
            records |= _modified_loss(snapshot, joined)
        return records


def _joined(
    snapshot: Snapshot, found: Estimate, clean: Tensor | None
) -> dict[str, float]:
    """R_1 and R_S of the batches of all ranks as one, and the errors of R_1."""
    means = {f"{_R1}/{site}": float(x) for site, x in found.per_site.items()}
    means[_R1] = float(found.value)
    if clean is not None:
        means["loss/R_S"] = float(clean)
    errors = {f"{_ERROR}/{s}": x for s, x in found.per_site_standard_error.items()}
    errors[_ERROR] = found.standard_error
    joined, squared = snapshot.ranks.join(
        weight(snapshot, [snapshot.batch]),
        means,
        {tag: float(x) ** 2 for tag, x in errors.items()},
    )
    joined |= {tag: x**0.5 for tag, x in squared.items()}
    if clean is not None and not found.exact:  # by the draws of all ranks already
        joined |= {_R1: means[_R1], _ERROR: float(found.standard_error)}
        if len(found.per_site) == 1:  # it is R_1 itself
            (site,) = found.per_site
            joined |= {f"{tag}/{site}": joined[tag] for tag in (_R1, _ERROR)}
    return joined


def _told(snapshot: Snapshot, joined: Mapping[str, float]) -> dict[str, float]:
    """Return what there is a number for; say once what there is none for, and why."""
    unknown = [tag for tag, x in joined.items() if math.isnan(x)]
    if _ERROR in unknown:
        snapshot.absent[_ERROR] = TOO_ALIKE
    if {*unknown} - {_ERROR}:
        snapshot.absent[f"{_ERROR}/<site>"] = TOO_ALIKE
    return {tag: x for tag, x in joined.items() if tag not in unknown}


def weight(snapshot: Snapshot, batches: Iterable[Batch]) -> float | None:
    """What this rank's means over ``batches`` count for; None where the loss adds."""
    assert snapshot.loss is not None  # by `needs`
    if snapshot.ranks.size == 1:
        return 1.0  # nothing to weigh it against
    if snapshot.loss.reduction == "sum":
        return None
    return sum(terms(snapshot.loss, batch) for batch in batches)


def _modified_loss(
    snapshot: Snapshot, joined: Mapping[str, float]
) -> dict[str, Record]:
    if snapshot.gradients is None or snapshot.lr is None:
        return {}
    said = f"R_S + R_1 of {snapshot.source}, R_2 of this step's batch"
    snapshot.notes["loss/modified"] = said
    value = joined["loss/R_S"] + joined[_R1]
    found: dict[str, Record] = {
        "loss/modified": value + received_r2(snapshot.gradients, snapshot.lr)
    }
    if not math.isnan(joined[_ERROR]):
        found["loss/modified_standard_error"] = joined[_ERROR]
    return found


def received_r2(gradients: Mapping[str, Tensor], lr: Mapping[str, float]) -> float:
    r"""Return :math:`\frac{\epsilon}{4} \lVert g \rVert^2` of a gradient.

    Args:
        gradients: Gradient by parameter name.
        lr: Learning rate by parameter name.

    Returns:
        The sum over parameters, each with its own learning rate.
    """
    real = {n: g.abs() if g.is_complex() else g for n, g in gradients.items()}
    parts = [gathered(lr[n] / 4 * squared_norm(g)).cpu() for n, g in real.items()]
    return float(torch.stack(parts).sum()) if parts else 0.0


def squared_norm(x: Tensor) -> Tensor:
    """Return the squared norm in double precision, 0-d, without a copy in it."""
    if is_sharded(x) or not x.is_contiguous():
        return x.double().square().sum()
    pieces = (p.double() for p in x.view(-1).split(_PIECE))
    return torch.stack([torch.dot(p, p) for p in pieces]).sum()


class ReceivedGradient:
    r"""R_2 from the gradient that the optimizer receives: no pass of its own.

    .. math:: R_2 = \frac{\epsilon}{4} \lVert g \rVert^2

    in the units of the loss, with the learning rate of each parameter. It is of that
    one gradient and has no error: its mean holds the noise of masks and mini-batches.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. 5.
    """

    name = "gradient"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2``."""
        assert snapshot.gradients is not None and snapshot.lr is not None  # by `needs`
        snapshot.notes["regularizer/R2"] = (
            "(lr/4) ||g||^2 of the gradient that the optimizer receives, clipped where "
            "the script clips, with all that was sent back (penalties too, but not the "
            "optimizer's weight decay): one unbiased sample in full-batch training; in "
            "mini-batches it holds their noise too"
        )
        return {"regularizer/R2": received_r2(snapshot.gradients, snapshot.lr)}


class DropoutNoise:
    r"""The part of R_2 that masks add, from pairs of masks on one batch.

    .. math:: \frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_\eta(g)

    in the units of the loss; unbiased, each pair gives :math:`\frac{\epsilon}{8} \lVert
    g - g' \rVert^2`.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. 5.

    Args:
        num_masks: Number of masks, even. Two are one difference of gradients, which is
            a number without an error; from four on there is one, rough of few.
    """

    name = "dropout_noise"
    needs: frozenset[Need] = frozenset({"sites", "inputs", "loss", "targets", "lr"})

    def __init__(self, num_masks: int = 4) -> None:
        check_even("DropoutNoise", "num_masks", num_masks)
        self.num_masks = num_masks
        self.passes = num_masks + 1.0

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2_dropout_noise`` and its standard error."""
        assert snapshot.lr is not None  # by `needs`
        together = collectives.together(snapshot.ranks.most)
        with together, snapshot.ranks.own_draws(snapshot.model):
            found = gradient_norm(
                snapshot.model, snapshot.batch, snapshot.loss,
                lr=snapshot.lr, num_masks=self.num_masks,
            )  # fmt: skip
        # Of a mean over ranks: a variance, and the variance of that.
        share = snapshot.ranks.share(weight(snapshot, [snapshot.batch])) ** 2
        error = float(found.dropout_noise_standard_error)
        joined = snapshot.ranks.sum({
            "noise": share * float(found.dropout_noise),
            "squared": (share * error) ** 2,
        })
        snapshot.notes[_NOISE] = "; ".join((
            f"of {self.num_masks} masks on one batch, of the last pass where a step "
            "adds up several, never clipped; the error is by the spread of "
            f"{self.num_masks // 2} pairs of them, and rough of few",
            *found.notes,
        ))
        records: dict[str, Record] = {_NOISE: joined["noise"]}
        if math.isnan(joined["squared"]):
            why = _ONE_PAIR if self.num_masks == 2 else ALIKE
            snapshot.absent[f"{_NOISE}_standard_error"] = why
        else:
            records[f"{_NOISE}_standard_error"] = joined["squared"] ** 0.5
        return records
