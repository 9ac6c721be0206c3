"""Whether samples meet: roots of powers of two, one a sample; roots apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import uneven
from torch_dropout_ir.output_products import Root
from torch_dropout_ir.row_powers import by_powers, weighs_alike


def row_weight(g: Tensor) -> Tensor:
    """Return the sum of magnitudes of each row."""
    return g.abs().flatten(1).sum(1) if g.ndim > 1 else g.abs()


def even_root(like: Tensor, dims: int = 1, first: int = 0) -> Tensor:
    """Return a root without zeros, the same for all samples, which ``dims`` count."""
    own = like[(0,) * dims] if like.numel() else like
    return uneven(own, first).expand(like.shape).contiguous()


def telling_roots(outputs: Tensor, count: int) -> Iterator[Tensor]:
    """Yield two roots, of which :func:`alike` tells whether samples meet."""
    even = even_root(outputs.unflatten(0, (count, -1))).flatten(0, 1)
    yield even
    yield by_powers(even, count=count)


def row_weights(
    pull: Callable[..., None], outputs: Tensor, root: Tensor, keep: bool = True
) -> dict[int, Tensor]:
    """Return, by use, the sum of magnitudes of each row of what a root is there."""
    found: dict[int, Tensor] = {}

    def receive(use: int, g: Tensor) -> None:
        found[use] = row_weight(g)

    pull(outputs, root, receive, keep=keep)
    return found


def told_by_powers(pull: Callable[..., None], outputs: Tensor, count: int) -> bool:
    """Return whether samples meet, as two roots tell; the graph is kept."""
    roots = telling_roots(outputs, count)
    even, scaled = [row_weights(pull, outputs, root) for root in roots]
    return not alike(even, scaled, count)


def alike(
    plain: Mapping[int, Tensor], scaled: Mapping[int, Tensor], count: int
) -> bool:
    """Whether a root by powers gave, to the bit, what the plain one did by them."""
    return all(weighs_alike(x, scaled[key], 1, count) for key, x in plain.items())


def nearly_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal but for the order of their sums."""
    if found.shape != expected.shape:
        return False
    off = (found.detach() - expected).abs().max()
    return bool(off <= torch.finfo(found.dtype).eps ** (2 / 3) * expected.abs().max())


def apart(count: int, coupled: bool | None, roots: Iterator[Root]) -> Iterator[Root]:
    """Yield a root for each row where samples meet; else one for a row of each."""
    for root, sign in roots:
        rows = root.shape[0] if root.ndim else 1
        parts = rows if coupled else rows // max(1, count)
        if parts < 2:
            yield root, sign
            continue
        for i in range(parts):
            alone = torch.zeros_like(root)
            alone[i::parts] = root[i::parts]
            yield alone, sign[i::parts] if isinstance(sign, Tensor) else sign
