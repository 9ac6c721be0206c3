"""One pass of a model under dropout whose masks are ours to choose."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir import ops
from torch_dropout_ir.functional import Batch, at_sites, batch_size, call, fresh
from torch_dropout_ir.kernels import keep_scale
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_batch, check_site
from torch_dropout_ir.sites import Site
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.tracing import unasking

Again: TypeAlias = Callable[[Tensor], Tensor]
_SHARED: Final = (
    "dropout site `{}`: expected one row of the mask for each of the {} samples, got "
    "{}: one mask for all samples is not defined there. Use `shared_mask=False`."
)


@dataclasses.dataclass
class NoiseSeen:
    """What passes under dropout have shown of the noise in a model.

    Attributes:
        met: Whether a site acted.
        cut: The sites that drop everything, in order.
        silenced: Functions of other noise that were switched off.
    """

    met: bool = False
    cut: dict[str, None] = dataclasses.field(default_factory=dict)
    silenced: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def dropout_risk(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    seen: NoiseSeen,
    *,
    shared_mask: bool = False,
    watch: Callable[[Site, Tensor, torch.Size], None] | None = None,
    note: Callable[[Tensor, Tensor, Again], None] | None = None,
    look: Callable[[Site, Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Yield ``R_drop`` of a batch at one draw of masks; differentiate it inside.

    ``seen`` is told what noise there is. With ``shared_mask`` one mask serves all
    samples (the paper's ``eta``); else each sample draws its own, as ``nn.Dropout``
    does. At each use of a site ``watch`` is called with it, its packed mask and the
    mask's shape, ``note`` with what it returns, its input, and what makes the one of
    the other again, ``look`` with it, its input and what it returns.
    """
    survey = Survey.of(model)
    check_batch(model, batch[0], survey.modules)

    def drop(site: Site, h: Tensor) -> Tensor:
        check_site(site, h)
        seen.met = True
        if site.p >= 1:
            seen.cut[site.name] = None
        shape = site.mask_shape(h.shape)
        if shared_mask and h.ndim:
            if shape[0] not in (1, batch_size(batch)):
                raise ValueError(_SHARED.format(site.name, batch_size(batch), shape[0]))
            shape = (1, *shape[1:])
        own = shape == tuple(h.shape)
        dropped, packed = ops.draw(h if own else h.new_ones(shape), site.p, None)
        if watch is not None:
            watch(site, packed, torch.Size(shape))
        scale = keep_scale(site.p)
        if own:
            again = functools.partial(ops.mask_apply, packed=packed, scale=scale)
        else:
            again = functools.partial(_multiplied, noise=dropped.detach())
            dropped = again(h)
        if note is not None:
            note(dropped, h, again)
        if look is not None:
            look(site, h, dropped)
        return dropped

    with at_sites(model, unasking(drop), survey=survey) as calls:
        yield loss(call(model, batch[0], survey=survey), batch[1])
        seen.silenced |= calls.silenced


def _multiplied(h: Tensor, noise: Tensor) -> Tensor:
    return torch.where(noise != 0, h, h.new_zeros(())).mul_(noise)


def clean_risk(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """Return ``R_S`` of a batch: dropout off, batch normalization as in training."""
    survey = Survey.of(model)
    with at_sites(model, fresh, survey=survey):
        return loss(call(model, batch[0], survey=survey), batch[1])
