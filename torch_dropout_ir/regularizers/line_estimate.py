"""An estimate of R_1 along lines, where a graph of the loss would hold much."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from torch_dropout_ir.collectives import every, some
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.line_pass import LossTape, Mask, draws_along
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.site_forms import assemble


class AlongLine(NamedTuple):
    """What a pass shows, without its graph, for an estimate along lines.

    Attributes:
        uses: Each use of a site.
        tape: The loss as it ran.
        like: A scalar of its kind.
        notes: What there is to say of it.
    """

    uses: list[Mask]
    tape: LossTape
    like: Tensor
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, clean: CleanPass, read: OutputsRead
    ) -> AlongLine | None:
        """Record the loss of a pass; None where lines do not go through it."""
        tape = LossTape.of(read)
        if not every(tape is not None, "tape") or tape is None:
            return None
        like = read.single.new_zeros(())
        return cls(masks_of(clean), tape, like, clean.noise_left_out(model))

    def estimate(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Loss,
        num_samples: int | None,
        *,
        linear: bool,
    ) -> Estimate | None:
        """Return the estimate, of all rows at once, which meet in the loss.

        ``linear`` leaves out the curvature of the network. None where derivatives do
        not go through an operation, and where all are zero: a graph may tell why.
        """
        draws = draws_along(
            model, batch, loss, self.uses, num_samples, self.tape, linear
        )
        if not every(draws is not None, "rules") or draws is None:
            return None
        curved = any([bool(form) for draw in draws for _, form in draw])
        if not some(curved, "curvature"):
            return None
        names = [site.name for site, _, _ in self.uses]
        return assemble(names, draws, num_samples, True, False, self.like, self.notes)


def masks_of(clean: CleanPass) -> list[Mask]:
    """Return each use of a site: the site, a tensor like its input, and its shape."""
    return [(site, h.new_empty(()), h.shape) for site, h, _ in clean.uses]
