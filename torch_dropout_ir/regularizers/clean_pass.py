"""A forward pass without noise, whose derivatives reach every dropout site."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import at_sites, call
from torch_dropout_ir.sites import Site, active_sites, unobservable

Use = tuple[Site, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """What a pass without noise shows.

    Attributes:
        outputs: What the model returned.
        uses: Each use of a site: the site, its input, and a zero added to its output.
        last_layer: The linear layer that makes the outputs, where the only source of
            noise is one site that feeds it directly; else None.
        unreachable: Names of sites that ran without autograd (``torch.no_grad`` or
            reentrant checkpointing): derivatives cannot reach them.
    """

    outputs: Tensor
    uses: list[Use]
    last_layer: nn.Linear | None
    unreachable: tuple[str, ...]

    def gradients(self, root: Tensor) -> list[Tensor | None]:
        """Send ``root`` back from the outputs to each use of a site."""
        deltas = [delta for _, _, delta in self.uses]
        if not deltas or not self.outputs.requires_grad:
            return [None] * len(deltas)
        found = torch.autograd.grad(
            self.outputs, deltas, root, retain_graph=True, allow_unused=True
        )
        return list(found)

    def couples_samples(self) -> bool:
        """Whether an output of one sample depends on another sample at some site.

        Batch normalization in training mode does that, and message passing, and outputs
        whose first dimension is not the batch. One backward pass from one sample tells.

        Returns:
            Whether a derivative across samples is not zero.
        """
        if self.outputs.ndim == 0 or self.outputs.shape[0] < 2:
            return False
        alone = torch.zeros_like(self.outputs)
        alone[0] = torch.randn_like(alone[0])
        for (_, h, _), g in zip(self.uses, self.gradients(alone), strict=True):
            if h.ndim == 0 or h.shape[0] != self.outputs.shape[0]:
                return True
            if g is not None and bool(g[1:].any()):
                return True
        return False


@contextlib.contextmanager
def clean_pass(model: nn.Module, inputs: Any) -> Iterator[CleanPass]:
    """Run ``model`` without noise; take derivatives inside the context.

    Args:
        model: The model; left as it is.
        inputs: Its inputs.

    Yields:
        The pass.

    Raises:
        TypeError: If the model's output is no tensor.
    """  # noqa: DOC502 (`_check_tensor` raises)
    uses: list[Use] = []
    passed: list[tuple[Tensor, int]] = []
    reads: list[tuple[nn.Linear, bool, Tensor, int]] = []
    unreachable: list[str] = []

    def perturb(site: Site, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            unreachable.append(site.name)
        delta = torch.zeros_like(h, requires_grad=True)
        out = h + delta
        uses.append((site, h.detach(), delta))
        passed.append((out, out._version))
        return out

    def read(layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        # Identity is not enough: an operation in place leaves the tensor the same.
        direct = bool(args and passed) and args[0] is passed[0][0]
        direct = direct and args[0]._version == passed[0][1]
        reads.append((layer, direct, output, output._version))

    with torch.enable_grad(), contextlib.ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear:
                stack.callback(module.register_forward_hook(read).remove)
        stack.enter_context(at_sites(model, perturb, active_sites(model)))
        outputs = call(model, inputs)
        _check_tensor(outputs)
        last = [
            layer
            for layer, direct, output, version in reads
            if direct and output is outputs and output._version == version
        ]
        only = len(uses) == 1 == len(last) and not unobservable(model)
        # A copy: recomputation under checkpointing passes the sites again.
        yield CleanPass(
            outputs, list(uses), last[0] if only else None, tuple(unreachable)
        )


def _check_tensor(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "expected the model to return one tensor, got "
            f"{type(outputs).__name__}. Wrap it in one that returns its logits."
        )
