"""Floor 1: algebra of parameter dictionaries ``{name: Tensor}``.

Iterative solvers work on flat vectors, users on dictionaries; these functions are
the bridge. Order is the order of the dictionary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.arguments import check_choice

Params = Mapping[str, Tensor]
_SAFE: Final = 1e-12  # the squares that make up a norm above it are no denormal numbers


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply tensors as they are, where a user's autocast would in half precision."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def to_vector(params: Params) -> Tensor:
    """Concatenate the tensors of ``params``, flattened: ``[P]``."""
    return torch.cat([x.reshape(-1) for x in params.values()])


def to_params(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """Cut ``vector`` (``[P]``) into views shaped as the tensors of ``like``."""
    pieces = vector.split([x.numel() for x in like.values()])
    return {
        name: piece.view(x.shape).to(x.dtype)
        for (name, x), piece in zip(like.items(), pieces, strict=True)
    }


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product of two dictionaries with the same keys, 0-d."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(a: Params) -> float:
    """Return the Euclidean norm of all entries together."""
    return math.hypot(*map(length, a.values()))


def length(x: Tensor) -> float:
    """Return the norm of a tensor, also where squares under- or overflow."""
    found = float(torch.linalg.vector_norm(x))
    if not _SAFE < found < 1 / _SAFE:
        largest = float(torch.linalg.vector_norm(x, torch.inf)) if x.numel() else 0.0
        found = largest and largest * float(torch.linalg.vector_norm(x / largest))
    return found


def balanced(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return ``x`` over its largest magnitudes along dimensions, and these.

    Squares of the quotient neither over- nor underflow. Both are of single precision at
    least and in the graph of ``x``; what is zero or not finite is left as it is.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return wide, torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    largest = wide.detach().abs().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    return wide / largest, largest


def random_like(params: Params, distribution: str = "rademacher") -> dict[str, Tensor]:
    """Draw independent entries of mean 0 and variance 1, shaped as ``params``."""
    known = "rademacher", "normal"
    check_choice("random_like", "distribution", distribution, known)

    def entries(x: Tensor) -> Tensor:
        draw = torch.empty_like(x, requires_grad=False)
        if distribution == "normal":
            return draw.normal_()
        return draw.bernoulli_(0.5).mul_(2).sub_(1)

    return {name: entries(x.detach()) for name, x in params.items()}
