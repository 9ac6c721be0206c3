"""R_1 and R_2 of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.analysis.distributed import gathered, is_sharded
from torch_dropout_ir.analysis.records import Record
from torch_dropout_ir.analysis.snapshot import NO_SITE, Need, Snapshot
from torch_dropout_ir.functional import Batch, batch_size
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers import Estimate, gradient_norm
from torch_dropout_ir.regularizers.excess import TOO_ALIKE
from torch_dropout_ir.regularizers.online import online

_PIECE: Final = 2**17  # entries that are taken to double precision at a time


class Regularizer:
    """R_1 with its error and its parts, and R_S on the same batch.

    Args:
        num_masks: Masks to average over where R_1 has no closed form; up to eight
            times as many where they hardly differ (stochastic depth of a small batch).
    """

    name = "regularizer"
    needs: frozenset[Need] = frozenset({"inputs", "loss"})

    def __init__(self, num_masks: int = 8) -> None:
        self.num_masks = num_masks
        self.passes = float(num_masks)

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R1``, its sites and error, ``loss/R_S`` and modified."""
        assert snapshot.loss is not None  # by `needs`
        # Ranks may meet in a pass: all make the same number of them.
        most = 8 * self.num_masks if snapshot.ranks.size == 1 else self.num_masks
        with snapshot.ranks.own_draws(snapshot.model):
            found, how, clean = online(
                snapshot.model, snapshot.batch, snapshot.loss,
                num_masks=self.num_masks, most_masks=most,
            )  # fmt: skip
        joined = _joined(snapshot, found, clean)
        if math.isnan(joined["regularizer/R1_standard_error"]):
            del joined["regularizer/R1_standard_error"]
            snapshot.absent["regularizer/R1_standard_error"] = TOO_ALIKE
        records: dict[str, Record] = {**joined}
        if snapshot.sites:
            snapshot.notes["regularizer/R1"] = how
        else:
            records = {tag: joined[tag] for tag in joined if tag == "loss/R_S"}
            snapshot.absent["regularizer/R1"] = NO_SITE
        if clean is not None:
            modified = joined["loss/R_S"] + joined["regularizer/R1"]
            records |= _modified_loss(snapshot, modified)
        return records


def _joined(
    snapshot: Snapshot, found: Estimate, clean: Tensor | None
) -> dict[str, float]:
    """R_1 and R_S of the batches of all ranks as one."""
    means = {f"regularizer/R1/{site}": float(x) for site, x in found.per_site.items()}
    means["regularizer/R1"] = float(found.value)
    if clean is not None:
        means["loss/R_S"] = float(clean)
    squared = {"error": float(found.standard_error) ** 2}
    means, squared = snapshot.ranks.join(
        weight(snapshot, [snapshot.batch]), means, squared
    )
    return {**means, "regularizer/R1_standard_error": squared["error"] ** 0.5}


def terms(loss: Loss, batch: Batch) -> float:
    """Return the number of terms that a mean over ``batch`` is of, or their weights."""
    targets = batch[1]
    if not isinstance(targets, Tensor):
        return float(batch_size(batch))
    return loss.num_terms(targets)


def weight(snapshot: Snapshot, batches: Iterable[Batch]) -> float | None:
    """What this rank's means over ``batches`` count for; None where the loss adds."""
    assert snapshot.loss is not None  # by `needs`
    if snapshot.ranks.size == 1:
        return 1.0  # nothing to weigh it against
    if snapshot.loss.reduction == "sum":
        return None
    return sum(terms(snapshot.loss, batch) for batch in batches)


def _modified_loss(snapshot: Snapshot, risk: float) -> dict[str, Record]:
    if snapshot.gradients is None or snapshot.lr is None:
        return {}
    said = f"R_S + R_1 of {snapshot.source}, R_2 of this step's batch"
    snapshot.notes["loss/modified"] = said
    return {"loss/modified": risk + received_r2(snapshot.gradients, snapshot.lr)}


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
    pieces = x.view(-1).split(_PIECE)
    return torch.stack([p.double().square().sum() for p in pieces]).sum()


class ReceivedGradient:
    """R_2 from the gradient that the optimizer receives: no pass of its own."""

    name = "gradient"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2``."""
        assert snapshot.gradients is not None and snapshot.lr is not None  # by `needs`
        snapshot.notes["regularizer/R2"] = (
            "(lr/4) ||g||^2 of the gradient that the optimizer receives, clipped where "
            "the script clips: one unbiased sample in full-batch training; in "
            "mini-batches it holds their noise too"
        )
        return {"regularizer/R2": received_r2(snapshot.gradients, snapshot.lr)}


class DropoutNoise:
    """The part of R_2 that masks add, from two masks on one batch."""

    name = "dropout_noise"
    needs: frozenset[Need] = frozenset({
        "sites",
        "inputs",
        "loss",
        "targets",
        "gradients",
    })
    passes = 3.0

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2_dropout_noise``."""
        assert snapshot.lr is not None  # by `needs`
        with snapshot.ranks.own_draws(snapshot.model):
            found = gradient_norm(
                snapshot.model, snapshot.batch, snapshot.loss, lr=snapshot.lr
            )
        noise = {"noise": float(found.dropout_noise)}
        _, joined = snapshot.ranks.join(weight(snapshot, [snapshot.batch]), {}, noise)
        snapshot.notes["regularizer/R2_dropout_noise"] = (
            "of two masks on one batch, never clipped"
        )
        return {"regularizer/R2_dropout_noise": joined["noise"]}
