"""Floor 2: forward passes that all see the same masks, of whatever draws them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from torch_dropout_ir.arguments import check_count, check_module
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.hooks import after_call, before_call


@contextlib.contextmanager
def frozen_masks(model: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """Make every forward pass of ``model`` inside the context see the same masks.

    Before each forward pass the generators of torch, Python and NumPy are seeded, after
    it they are given back, so any kind of dropout in the model is frozen (torch's
    modules and functions too) and the random streams outside do not move. Masks are the
    same for inputs of the same shape. Calls of a submodule alone are not frozen, nor
    are those of what ``torch.compile(model)`` returned: give that instead.

    Args:
        model: The model.
        seed: Chooses the masks.

    Yields:
        ``model``.

    Raises:
        TypeError: If it is no module, or the seed no integer.
        ValueError: If the seed is negative.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with frozen_masks(layer):
        ...     torch.equal(layer(torch.ones(99)), layer(torch.ones(99)))
        True
    """  # noqa: DOC502 (the checks raise)
    check_module("frozen_masks", model)
    check_count("frozen_masks", "seed", seed, 0)
    forks: list[contextlib.AbstractContextManager[None]] = []

    def begin(_: nn.Module, __: Any) -> None:
        fork = preserved_rng(model, seed)
        fork.__enter__()  # when passes of other threads have ended
        forks.append(fork)

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        if forks:
            forks.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        stack.callback(before_call(model, begin))
        stack.callback(after_call(model, end, always=True))
        yield model
