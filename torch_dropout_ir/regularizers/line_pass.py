"""The second derivative of a loss along a line, by forward mode: no graph is kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_dropout_ir.collectives import every, some
from torch_dropout_ir.functional import Batch, at_sites, call, constants
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.estimate import Asked, Estimate
from torch_dropout_ir.regularizers.line_calls import STILL, Line, NoRuleError, tensors
from torch_dropout_ir.regularizers.line_functions import whole_functions
from torch_dropout_ir.regularizers.line_mode import Moving
from torch_dropout_ir.regularizers.line_tape import Tape
from torch_dropout_ir.regularizers.outputs import OutputsRead, read_outputs, real_leaves
from torch_dropout_ir.regularizers.site_forms import Form, Known, assemble, signs
from torch_dropout_ir.sites import Site
from torch_dropout_ir.survey import Survey

Mask = tuple[Site, Tensor, torch.Size]
# Made when its site is met: nothing is held before, or after.
Noise = Callable[[], Tensor]


class LossTape(NamedTuple):
    """A loss as the operations that it ran on some leaves of the outputs."""

    tape: Tape
    places: Sequence[int]

    @classmethod
    def of(cls, read: OutputsRead) -> LossTape | None:
        """Run a loss and record it; None where lines do not go through it."""
        try:
            return cls(Tape(read.risk, read.tensors), read.places)
        except (RuntimeError, ValueError, TypeError):  # ours, torch's and the loss's
            return None


def curvature_along(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    uses: Sequence[Mask],
    use: int,
    noise: Noise,
    tape: LossTape | None = None,
    linear: bool = False,
) -> Tensor | None:
    r"""Return the second derivative of the loss where a use of a site moves.

    .. math:: \frac{d^2}{dt^2} R_S(h + t v) = v^\top A v

    with :math:`v = \sqrt{p / (1 - p)}\, z \circ h`, of which ``noise`` makes :math:`z`,
    shaped as the mask. Three values of each activation at hand take the place of a
    graph: its own and its derivatives. ``linear``, it is :math:`v^\top J^\top H J v`:
    second derivatives begin at the loss. ``tape`` is the loss as it ran; None takes its
    derivatives by a graph. None where the outputs do not depend on the use.
    """
    outputs, moving = _moved(model, batch, uses, use, noise, linear)
    if tape is None:
        read = read_outputs(outputs, loss, batch[1])
        lines = [moving.line(x) for x in read.tensors]
        still = all([line is STILL for line in lines])
        return None if still else _of_loss(read.tensors, read.slopes, lines)
    leaves = real_leaves(outputs)[0]
    tensors = [leaves[i] for i in tape.places]
    lines = [moving.line(x) for x in tensors]
    del outputs, leaves, moving  # to the tape alone
    still = all([line is STILL for line in lines])
    return None if still else tape.tape.curvature(tensors, lines)


def _moved(
    model: nn.Module,
    batch: Batch,
    uses: Sequence[Mask],
    use: int,
    noise: Noise,
    linear: bool,
) -> tuple[Any, Moving]:
    survey = Survey.of(model)
    moving, used = Moving((True, not linear)), 0

    def perturb(site: Site, h: Tensor) -> Tensor:
        nonlocal used
        used, now = used + 1, used
        if [(s.name, n) for s, _, n in uses[now : now + 1]] != [(site.name, h.shape)]:
            raise NoRuleError("other uses of sites than in the pass before")
        out = h.clone()
        if now == use:
            v = noise().mul_(site.variance**0.5)
            own = v.shape == h.shape
            moving.move(out, (v.mul_(h.detach()) if own else v * h.detach(), None))
        return out

    none = contextlib.nullcontext()
    kernels = differentiable(thrice=False) if survey.once else none
    with (
        torch.enable_grad(),
        kernels,
        whole_functions(moving),  # of attention and recurrent layers without dropout
        at_sites(model, perturb, survey=survey, copies=True),
    ):
        with moving, moving.constants:
            outputs = call(model, batch[0], constants(survey.model), survey=survey)
    if any([x.is_complex() for x in tensors(flatten(outputs)[0])]):
        raise NoRuleError("complex outputs")
    return outputs, moving


def draws_along(
    asked: Asked,
    uses: Sequence[Mask],
    tape: LossTape | None = None,
    linear: bool = False,
) -> list[list[Form]] | None:
    """Return draws of the second-order forms, a pass a use: of one, or of an element.

    The exact sum is a single draw. ``tape`` is the loss as it ran; None takes its
    derivatives by a graph, as where lines do not go through it after all. ``linear``
    leaves out the curvature of the network. None where derivatives do not go through an
    operation.
    """
    given, num_samples = asked[:3], asked.num_samples

    def forms(noise: Iterable[tuple[int, Noise]]) -> list[Form]:
        found = []
        for use, z in noise:
            curved = curvature_along(*given, uses, use, z, tape, linear)
            if curved is not None:
                found.append((uses[use][0].name, curved.view(1) / 2))
        return found

    try:
        if num_samples is None:
            return [forms(_elements(uses))]
        draws = []
        for _ in range(num_samples):
            drawn = [functools.partial(signs, s, x.expand(n)) for s, x, n in uses]
            draws.append(forms(enumerate(drawn)))
        return draws
    except (RuntimeError, ValueError, TypeError):  # ours, and torch's and the model's
        if tape is None:
            return None
        return draws_along(asked, uses, None, linear)


def _elements(uses: Sequence[Mask]) -> Iterator[tuple[int, Noise]]:
    """Yield each element of each mask, as a tensor of zeros with a one."""

    def one(x: Tensor, shape: torch.Size, place: int) -> Tensor:
        found = x.new_zeros(shape.numel())
        found[place] = 1.0
        return found.view(shape)

    for use, (site, x, shape) in enumerate(uses):
        own = torch.Size(site.mask_shape(shape))
        for place in range(own.numel()):
            yield use, functools.partial(one, x, own, place)


def _of_loss(
    outputs: Sequence[Tensor],
    slopes: Callable[[Sequence[Tensor]], list[Tensor]],
    lines: Sequence[Line],
) -> Tensor:
    """Return what the loss's first two derivatives make of those of its outputs."""
    at = [x.detach().requires_grad_() for x in outputs]
    gradient = slopes(at)
    total = outputs[0].new_zeros(())
    live = [
        (g, u)
        for g, (u, _) in zip(gradient, lines, strict=True)
        if u is not None and g.requires_grad
    ]
    curved: Sequence[Tensor | None] = [None] * len(at)
    if live:
        heads, roots = zip(*live, strict=True)
        curved = torch.autograd.grad(heads, at, roots, allow_unused=True)
    for g, c, (u, w) in zip(gradient, curved, lines, strict=True):
        if c is not None and u is not None:
            total = total + (c * u).sum()
        if w is not None:
            total = total + (g.detach() * w).sum()
    return total


class AlongLine(NamedTuple):
    """What a pass shows, without its graph, for an estimate along lines."""

    uses: list[Mask]
    tape: LossTape
    like: Tensor
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, clean: CleanPass, read: OutputsRead
    ) -> AlongLine | None:
        """Record the loss of a pass; None where lines do not go through it."""
        tape = LossTape.of(read)
        if not every(tape is not None, "tape") or tape is None:
            return None
        like = read.single.new_zeros(())
        return cls(masks_of(clean), tape, like, clean.noise_left_out(model))

    def estimate(self, asked: Asked, linear: bool) -> Estimate | None:
        """Return the estimate, of all rows at once, which meet in the loss.

        ``linear`` leaves out the curvature of the network. None where derivatives do
        not go through an operation, and where all are zero: a graph may tell why.
        """
        draws = draws_along(asked, self.uses, self.tape, linear)
        if not every(draws is not None, "rules") or draws is None:
            return None
        curved = any([bool(form) for draw in draws for _, form in draw])
        if not some(curved, "curvature"):
            return None
        names = [site.name for site, _, _ in self.uses]
        known = Known(names, asked.num_samples, False, self.like, self.notes)
        return assemble(known, draws, True)


def masks_of(clean: CleanPass) -> list[Mask]:
    """Return each use of a site: the site, a tensor like its input, and its shape."""
    return [(site, h.new_empty(()), h.shape) for site, h, _ in clean.uses]
