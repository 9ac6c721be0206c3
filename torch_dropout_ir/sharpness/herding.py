r"""A few samples on which the loss curves as on all of them.

The curvature of a sample's loss is made of its outputs, the derivative of the loss in
them, and the derivatives of the outputs in the parameters. Of the first two all is
known after one forward pass. So samples are taken whose means of both, and of all
products of two of their entries, are those of all samples:

.. math:: \min_S \Bigl\lVert \frac{1}{|S|} \sum_{i \in S} \phi(u_i)
    - \frac{1}{N} \sum_i \phi(u_i) \Bigr\rVert, \qquad
    \phi(u)^\top \phi(v) = (1 + u^\top v)^2

One at a time, each where the distance is least, then exchanged one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from torch_dropout_ir.functional import Batch

if TYPE_CHECKING:
    from torch_dropout_ir.sharpness.surface import Surface

_POOL: Final = 2048  # samples to choose from
_ENTRIES: Final = 2**27  # of all samples' outputs
_EXCHANGES: Final = 2  # times that each sample may be exchanged


def representatives(surface: Surface, batch: Batch, size: int, every: int) -> Tensor:
    """Return places of one in ``every`` samples of a batch, out of no more than 2048.

    Ascending; evenly spaced where the model does not return one tensor with samples in
    front.
    """
    features = _features(surface, batch, size)
    if features is None:
        return torch.arange(0, size, every, device="cpu")
    step = -(-size // _POOL)
    found = herded(
        features,
        torch.arange(0, size, step, device="cpu"),
        -(-min(size, _POOL) // every),
    )
    return found.sort().values


def _features(surface: Surface, batch: Batch, size: int) -> Tensor | None:
    """Outputs, and derivatives of the loss in them, each of unit mean square."""
    seed = surface.seeds[0]
    with surface.held(seed):
        with torch.no_grad():
            outputs = surface.outputs(surface.params, batch, 0, seed)
        if not (
            isinstance(outputs, Tensor)
            and outputs.is_floating_point()
            and outputs.ndim > 0
            and outputs.shape[0] == size
            and outputs.numel() <= _ENTRIES
        ):
            return None
        with torch.enable_grad():
            root = outputs.detach().requires_grad_()
            # A loss may write on what it is given.
            risk = surface.loss_of(root.clone(), batch[1])
            (derivative,) = torch.autograd.grad(risk, root)
    parts = [x.detach().reshape(size, -1).cpu().double() for x in (outputs, derivative)]
    tiny = torch.finfo(torch.float64).tiny
    scaled = [x / x.square().sum(1).mean().sqrt().clamp(min=tiny) for x in parts]
    features = torch.cat(scaled, 1)
    return features if bool(features.isfinite().all()) else None


def herded(features: Tensor, places: Tensor, count: int) -> Tensor:
    """Return ``count`` of ``places``: samples that have the moments of all.

    ``features`` are those of each sample, ``[N, D]``.

    References:
        Chen, Welling & Smola, *Super-samples from kernel herding*, UAI 2010.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 100.0])[:, None] / 10
        >>> herded(x[:5], torch.arange(5), 1)
        tensor([2])
    """
    pool = features[places]
    kernel = (1 + pool @ pool.T).square()
    wanted = torch.zeros_like(kernel[0])
    for piece in features.split(_POOL):
        wanted += (1 + pool @ piece.T).square().sum(1)
    wanted /= len(features)
    return places[
        torch.tensor(_nearest(kernel.numpy(), wanted.numpy(), count), device="cpu")
    ]


def _nearest(kernel: Any, wanted: Any, count: int) -> list[int]:
    """Rows of the kernel whose mean is nearest to what is wanted."""
    # In NumPy: on so few numbers an operation of torch's is mostly its call.
    taken = np.zeros_like(wanted)  # infinite where it is
    own, total = kernel.diagonal(), np.zeros_like(wanted)
    chosen: list[int] = []

    def nearest(size: int) -> int:
        """What brings the mean of so many closest to that of all."""
        return int((2 * (total - size * wanted) + own + taken).argmin())

    def move(place: int, sign: int) -> None:
        taken[place] = np.inf if sign > 0 else 0.0
        total[:] += sign * kernel[place]

    for size in range(1, count + 1):
        chosen.append(nearest(size))
        move(chosen[-1], 1)
    for turn in range(_EXCHANGES * count):
        move(chosen[turn % count], -1)
        chosen[turn % count] = nearest(count)
        move(chosen[turn % count], 1)
    return chosen
