"""A forward pass without noise, whose derivatives reach every dropout site."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.functional import at_sites, call
from torch_dropout_ir.regularizers.checks import check_batch
from torch_dropout_ir.sites import Site, active_sites, unobservable

Use = tuple[Site, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """What a pass without noise shows.

    Attributes:
        outputs: What the model returned.
        uses: Each use of a site: the site, its input with its graph, and a zero added
            to its output.
        last_layer: The linear layer that makes the outputs, where the only source of
            noise is one site that feeds it directly; else None.
        unreachable: Names of sites that ran without autograd (``torch.no_grad`` or
            reentrant checkpointing): derivatives cannot reach them.
    """

    outputs: Any
    uses: list[Use]
    last_layer: nn.Linear | None
    unreachable: tuple[str, ...]

    @property
    def deltas(self) -> list[Tensor]:
        """The zeros added to the output of each use."""
        return [delta for _, _, delta in self.uses]

    def gradients(self, outputs: Tensor, root: Tensor) -> list[Tensor | None]:
        """Send ``root`` back from a tensor of the outputs to each use of a site."""
        if not self.uses or not outputs.requires_grad:
            return [None] * len(self.uses)
        found = torch.autograd.grad(
            outputs, self.deltas, root, retain_graph=True, allow_unused=True
        )
        return list(found)

    def couples_samples(self, outputs: Sequence[Tensor]) -> bool:
        """Whether an output of one sample depends on another sample at some site.

        Batch normalization in training mode does that, and message passing, and outputs
        whose first dimension is not the batch. One backward pass from one sample tells.

        Args:
            outputs: The tensors of the outputs that the loss reads.

        Returns:
            Whether a derivative across samples is not zero.
        """
        return any(self._couples(x) for x in outputs)

    def _couples(self, outputs: Tensor) -> bool:
        if outputs.ndim == 0:
            return bool(self.uses)
        if outputs.shape[0] < 2:
            return False
        alone = torch.zeros_like(outputs)
        steps = torch.linspace(1, 2, alone[0].numel())  # no draw: no trace
        alone[0] = steps.to(alone).view_as(alone[0])
        found = self.gradients(outputs, alone)
        for (_, h, _), g in zip(self.uses, found, strict=True):
            if h.ndim == 0 or h.shape[0] != outputs.shape[0]:
                return True
            if g is not None and bool(g[1:].any()):
                return True
        return False

    def check_reachable(self, name: str) -> None:
        """Raise if derivatives cannot reach a site.

        Raises:
            RuntimeError: If a site runs without autograd.
        """
        if self.unreachable:
            raise RuntimeError(
                f"{name}: derivatives cannot reach the sites {list(self.unreachable)}, "
                "which run under torch.no_grad or reentrant checkpointing. Use "
                "`monte_carlo`, or checkpoint with use_reentrant=False."
            )


@contextlib.contextmanager
def clean_pass(
    model: nn.Module, inputs: Any, *, twice: bool = False, move_buffers: bool = False
) -> Iterator[CleanPass]:
    """Run ``model`` without noise; take derivatives inside the context.

    Args:
        model: The model; left as it is.
        inputs: Its inputs.
        twice: Whether second derivatives will be taken.
        move_buffers: Whether the pass moves running statistics as training does.

    Yields:
        The pass.

    Raises:
        ValueError: If the batch is empty.
    """  # noqa: DOC502 (`check_batch` raises)
    check_batch(inputs)
    uses: list[Use] = []
    passed: list[tuple[Tensor, int]] = []
    reads: list[tuple[nn.Linear, bool, Tensor, int]] = []
    unreachable: list[str] = []

    def perturb(site: Site, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            unreachable.append(site.name)
        delta = torch.zeros_like(h, requires_grad=True)
        out = h + delta
        uses.append((site, h, delta))
        passed.append((out, out._version))
        return out

    def read(layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        # Identity is not enough: an operation in place leaves the tensor the same.
        direct = bool(args and passed) and args[0] is passed[0][0]
        direct = direct and args[0]._version == passed[0][1]
        reads.append((layer, direct, output, output._version))

    with torch.enable_grad(), contextlib.ExitStack() as stack:
        if twice:  # the fused attention kernels have no second derivative
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            if type(module) is nn.Linear:
                stack.callback(module.register_forward_hook(read).remove)
        placed = at_sites(
            model, perturb, active_sites(model), move_buffers=move_buffers
        )
        stack.enter_context(placed)
        outputs = call(model, inputs, move_buffers=move_buffers)
        last = _maker(reads, outputs)
        alone = len(uses) == 1 and not unobservable(model)
        # A copy: recomputation under checkpointing passes the sites again.
        yield CleanPass(
            outputs, list(uses), last if alone else None, tuple(unreachable)
        )


def _maker(
    reads: list[tuple[nn.Linear, bool, Tensor, int]], outputs: Any
) -> nn.Linear | None:
    """Return the linear layer that read a site directly and made the outputs."""
    made = [
        layer
        for layer, direct, output, version in reads
        if direct and output is outputs and output._version == version
    ]
    return made[0] if len(made) == 1 else None
