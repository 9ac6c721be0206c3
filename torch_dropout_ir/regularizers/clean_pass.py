"""A forward pass without noise, whose derivatives reach every dropout site."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.functional import at_sites, call
from torch_dropout_ir.normalization import ComposedNormalization
from torch_dropout_ir.regularizers.checks import check_batch, check_site
from torch_dropout_ir.regularizers.coupling import by_powers, even_root, weighs_alike
from torch_dropout_ir.sites import Site, uncompiled, unobservable
from torch_dropout_ir.tracing import random_state

Use = tuple[Site, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """What a pass without noise shows.

    Attributes:
        outputs: What the model returned.
        uses: Each use of a site: the site, its input (with its graph where the pass
            outlives its context), and a zero added to its output.
        last_layer: The linear layer that makes the outputs, where the only source of
            noise is one site that feeds it directly; else None.
        noisy: Whether it drew random numbers, or other noise was switched off in it.
        unreachable: Names of sites that ran without autograd (``torch.no_grad`` or
            reentrant checkpointing): derivatives cannot reach them.
    """

    outputs: Any
    uses: list[Use]
    last_layer: nn.Linear | None
    noisy: bool
    unreachable: tuple[str, ...]

    @property
    def deltas(self) -> list[Tensor]:
        """The zeros added to the output of each use."""
        return [delta for _, _, delta in self.uses]

    @property
    def names(self) -> list[str]:
        """The site of each use."""
        return [site.name for site, _, _ in self.uses]

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

        Batch normalization in training mode does that, and message passing, outputs
        whose first dimension is not the batch, and masks that samples share. Two
        backward passes tell: where each sample's outputs weigh another power of two, so
        do its derivatives, to the bit, if they come from that sample alone.

        Args:
            outputs: The tensors of the outputs that the loss reads.

        Returns:
            Whether a derivative across samples is not zero.
        """
        return any(self._couples(x) for x in outputs)

    def _couples(self, outputs: Tensor) -> bool:
        if outputs.ndim == 0:
            return bool(self.uses)
        count = outputs.shape[0]
        for site, h, _ in self.uses:
            if h.ndim == 0 or h.shape[0] != count:
                return True
            if site.mask_shape(h.shape)[0] != count:
                return True
        if count < 2:
            return False
        even = even_root(outputs)
        plain = self.gradients(outputs, even)
        scaled = self.gradients(outputs, by_powers(even))
        return any(
            p is not None and s is not None and not weighs_alike(p, s)
            for p, s in zip(plain, scaled, strict=True)
        )

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
    model: nn.Module,
    inputs: Any,
    *,
    twice: bool = False,
    move_buffers: bool = False,
    outlives: bool = False,
) -> Iterator[CleanPass]:
    """Run ``model`` without noise; take derivatives inside the context.

    Args:
        model: The model; left as it is.
        inputs: Its inputs.
        twice: Whether second derivatives will be taken.
        move_buffers: Whether the pass moves running statistics as training does.
        outlives: Whether its graph is used after the context, and down to the
            parameters; else it begins at the first site.

    Yields:
        The pass.

    Raises:
        TypeError: If a site's input is not real.
        ValueError: If the batch is empty.
    """  # noqa: DOC502 (raised by the checks)
    check_batch(model, inputs)
    model = uncompiled(model)
    passed: list[_Passed] = []
    reads: list[tuple[nn.Linear, bool, Tensor, int]] = []
    unreachable: list[str] = []

    def perturb(site: Site, h: Tensor) -> Tensor:
        check_site(site, h)
        if not torch.is_grad_enabled():
            unreachable.append(site.name)
        delta = h.new_zeros((), requires_grad=True).expand(h.shape)  # one element
        held = h if outlives else h.detach()
        # Nothing below the first site is asked for: what it keeps is let go now.
        out = (h if passed else held) + delta
        passed.append(_Passed(site, held, held._version, delta, out, out._version))
        return out

    def read(layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        # Identity is not enough: an operation in place leaves the tensor the same.
        direct = bool(args and passed) and args[0] is passed[0].out
        direct = direct and args[0]._version == passed[0].out_version
        reads.append((layer, direct, output, output._version))

    with torch.enable_grad(), contextlib.ExitStack() as stack:
        if twice:
            stack.enter_context(_differentiable(outlives))
        for module in model.modules():
            if type(module) is nn.Linear:
                stack.callback(module.register_forward_hook(read).remove)
        placed = at_sites(model, perturb, move_buffers=move_buffers, outlives=outlives)
        calls = stack.enter_context(placed)
        before = random_state(model)
        outputs = call(model, inputs, move_buffers=move_buffers)
        noisy = bool(calls.silenced) or not _alike(before, random_state(model))
        # Now: recomputation under checkpointing passes the sites again.
        uses = [_use(p) for p in passed]
        alone = len(uses) == 1 and not unobservable(model) and not noisy
        last = _maker(reads, outputs) if alone else None
        yield CleanPass(outputs, uses, last, noisy, tuple(unreachable))


@contextlib.contextmanager
def _differentiable(outlives: bool) -> Iterator[None]:
    """Let a pass be differentiated twice, and once more in the parameters after it."""
    # The fused attention kernels have no second derivative.
    third = ComposedNormalization() if outlives else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), third:
        yield


class _Passed(NamedTuple):
    """A use of a site, and what tells whether something was written over it."""

    site: Site
    h: Tensor
    h_version: int
    delta: Tensor
    out: Tensor
    out_version: int


def _use(passed: _Passed) -> Use:
    """Return a use with its input as it was: itself, or what passed on.

    Raises:
        RuntimeError: If both were overwritten.
    """
    if passed.h._version == passed.h_version:
        return passed.site, passed.h, passed.delta
    if passed.out._version == passed.out_version:
        return passed.site, passed.out, passed.delta
    raise RuntimeError(
        f"expected the input of dropout site `{passed.site.name}` or its output to "
        "stay as they are in the forward pass, got both overwritten in place. Use "
        "`monte_carlo`."
    )


def _alike(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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
