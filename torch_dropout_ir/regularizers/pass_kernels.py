"""Operations of a pass whose derivatives are differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.sharpness.derivatives import lean_derivatives


def pass_kernels(
    needed: bool, thrice: bool, lean: bool
) -> contextlib.AbstractContextManager[None]:
    """Return the context of operations that can be differentiated as often as wanted.

    ``needed``: there may be some that torch differentiates once; ``lean``: second
    derivatives are ours, which hold less.
    """
    if not needed and not lean:
        return contextlib.nullcontext()
    return _pass_kernels(needed, thrice, lean)


@contextlib.contextmanager
def _pass_kernels(needed: bool, thrice: bool, lean: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if needed:
            stack.enter_context(differentiable(thrice, again=not lean))
        if lean:
            stack.enter_context(lean_derivatives())
        yield
