"""Operations of a pass whose derivatives are differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.sharpness.derivatives import lean_derivatives


@contextlib.contextmanager
def pass_kernels(needed: bool, thrice: bool, lean: bool) -> Iterator[None]:
    """Run operations that can be differentiated as often as is wanted.

    Args:
        needed: Whether there may be some that torch differentiates once.
        thrice: Whether third derivatives are wanted.
        lean: Whether second ones are ours, which hold less.
    """
    with contextlib.ExitStack() as stack:
        if needed:
            stack.enter_context(differentiable(thrice, again=not lean))
        if lean:
            stack.enter_context(lean_derivatives())
        yield
