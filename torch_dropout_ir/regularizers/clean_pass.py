"""A forward pass without noise, whose derivatives reach every dropout site."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir.collectives import every, go_on, some
from torch_dropout_ir.functional import at_sites
from torch_dropout_ir.generators import AllStanding, Standing
from torch_dropout_ir.leaves import without_graph
from torch_dropout_ir.recomputation import Blocks, Context
from torch_dropout_ir.regularizers.checks import check_batch, noise_left_out
from torch_dropout_ir.regularizers.coupling import told_by_powers
from torch_dropout_ir.regularizers.recorder import Recorder, Use, pass_kernels, shape_of
from torch_dropout_ir.regularizers.row_graph import rows_meet
from torch_dropout_ir.regularizers.step_memory import Below, Weighed, may_hold_much
from torch_dropout_ir.sites import Site, out_of_sight
from torch_dropout_ir.substitution import ConstantMatrices
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.tracing import derivatives, unasking

_NONE: Final = contextlib.nullcontext()


@dataclasses.dataclass
class CleanPass:
    """What a pass without noise shows.

    Attributes:
        outputs: What the model returned.
        uses: Each use of a site: the site, its input (with its graph where the pass
            outlives its context), and where in the graph its output is.
        mask_shapes: The shape of the mask of each use.
        zeros: What was added to their inputs, 0-d, one for each device.
        last_weight: Of the linear layer that is all between one site and outputs.
        drawn: Whether it drew random numbers: another pass is another.
        noisy: Whether it did, or other noise was switched off in it.
        unreachable: Names of sites that derivatives cannot reach (in ``torch.no_grad``,
            reentrant checkpoints, ``torch.func``, or derivatives of the model's own).
        out_of_sight: What :func:`torch_dropout_ir.sites.unobservable` says.
        later: Sites at which a loss that runs the model has acted since, and shapes.
        below: What a step holds below the first site, where that was to be weighed.
        weigh: Whether graphs may be kept.
        began: Where torch's generators stood before it, if it drew.
        row_wise: Whether the model's layers keep rows apart, of matrices and more.
        singly: Whether derivatives go one by one; None until that is asked.
    """

    outputs: Any
    uses: list[Use]
    mask_shapes: list[tuple[int, ...]]
    zeros: list[Tensor]
    last_weight: Tensor | None
    drawn: bool
    noisy: bool
    unreachable: tuple[str, ...]
    out_of_sight: dict[str, str]
    later: list[tuple[Site, torch.Size]]
    below: Below
    weigh: bool = False
    began: Standing | None = None
    row_wise: bool = False
    singly: bool | None = None

    def noise_left_out(self, model: nn.Module) -> tuple[str, ...]:
        """Return what is to be said of noise that a form of this pass lacks."""
        met, hidden = bool(self.uses), self.out_of_sight
        return noise_left_out(model, self.noisy, met, hidden, drawn=self.drawn)

    def let_go(self) -> None:
        """Keep outputs, the first input and the shapes of others, and no way back."""
        self.outputs = without_graph(self.outputs)
        ends = {zero.device: get_gradient_edge(zero) for zero in self.zeros}
        for i, (site, h, _) in enumerate(self.uses):
            self.uses[i] = site, h.detach() if i == 0 else shape_of(h), ends[h.device]

    @property
    def edges(self) -> list[GradientEdge]:
        """Where in the graph the output of each use is."""
        return [edge for _, _, edge in self.uses]

    @property
    def matters(self) -> bool:
        """Whether derivatives go one by one, as of graphs that may be kept."""
        if self.singly is None:
            size = sum([h.numel() for _, h, _ in self.uses])
            self.singly = some(may_hold_much(size, self.outputs, self.weigh), "memory")
        return self.singly

    def weighed(self, tensors: Sequence[Tensor]) -> Weighed:
        """Weigh the graph of some outputs against a step, before derivatives."""
        return Weighed.of(tensors, self.below, self.uses, self.zeros)

    @property
    def names(self) -> list[str]:
        """The site of each use."""
        return [site.name for site, _, _ in self.uses]

    def derivatives(
        self, outputs: Tensor, root: Tensor | None, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return all at once what :meth:`pull` gives away, None where there is none."""
        if not self.uses or not outputs.requires_grad:
            return [None] * len(self.uses)
        go_on("backward")
        return derivatives(outputs, self.edges, root, keep)

    def pull(
        self,
        outputs: Tensor,
        root: Tensor | None,
        receive: Callable[[int, Tensor], None],
        *,
        keep: bool = True,
    ) -> None:
        """Send ``root`` back from a tensor of the outputs to each use of a site.

        ``receive`` is called with the number of a use and its derivative as it comes,
        in reverse order, where there is one. ``root`` is None for a scalar. Unless
        another root is to ``keep`` the graph, the inputs of sites go with it, each as
        its derivative has been received.
        """
        if not self.uses or not outputs.requires_grad:
            return
        if not self.matters:
            found = self.derivatives(outputs, root, keep)
            for i, g in reversed([*enumerate(found)]):
                if g is not None:
                    receive(i, g)
            return

        def hook(grads: Sequence[Tensor | None], use: int) -> None:
            if grads[0] is not None:
                receive(use, grads[0])
            if not keep:
                site, h, edge = self.uses[use]
                self.uses[use] = site, shape_of(h), edge

        go_on("backward")
        with contextlib.ExitStack() as stack:
            for i, edge in enumerate(self.edges):
                taken = edge.node.register_prehook(functools.partial(hook, use=i))
                stack.callback(taken.remove)
            # Of one element each: what is received is not held.
            derivatives(outputs, self.zeros, root, keep)

    def count(self, outputs: Tensor) -> int:
        """Return the number of samples, each of which may have several rows.

        It is the least number of rows at a use, where the rows of the outputs are a
        multiple of it, as those of tokens that have been flattened; else theirs.
        """
        rows = outputs.shape[0] if outputs.ndim else 1
        least = min([h.shape[0] if h.ndim else 0 for _, h, _ in self.uses], default=0)
        return least if least and not rows % least else rows

    def by_samples(self, count: int) -> bool:
        """Whether inputs and masks of all uses have rows of their own for a sample."""
        return all([
            h.ndim and not h.shape[0] % count and own[0] == h.shape[0]
            for (_, h, _), own in zip(self.uses, self.mask_shapes, strict=True)
        ])

    def couples_samples(self, outputs: Sequence[Tensor]) -> bool:
        """Return whether an output of one sample depends on another at some site.

        Batch normalization in training mode does that, and message passing, outputs
        whose first dimension is not the batch, and masks that samples share. Where the
        graph has none but operations known to keep samples apart, or has batch
        normalization in training mode, that tells; else two backward passes: where each
        sample's outputs weigh another power of two, so do derivatives of that alone.
        """
        for x in outputs:
            meet = self.samples_meet(x)
            if meet is None:
                meet = told_by_powers(self.pull, x, self.count(x))
            if some(meet, "samples meet"):
                return True
        return False

    def samples_meet(self, outputs: Tensor) -> bool | None:
        """Return that as the graph shows it; None where derivatives have to tell."""
        if outputs.ndim == 0 or not self.uses:
            return bool(self.uses)
        if self.row_wise and outputs.ndim > 1:
            return False
        count = self.count(outputs)
        meet: bool | None = True
        if count and self.by_samples(count):
            meet = False if count < 2 else rows_meet(outputs, self.edges, count)
        return meet if every(meet is not None, "graph") else None


@contextlib.contextmanager
def clean_pass(
    model: nn.Module,
    inputs: Any,
    *,
    twice: bool = False,
    thrice: bool = False,
    lean: bool = False,
    move_buffers: bool = False,
    outlives: bool = False,
    first: Tensor | None = None,
    bare: bool = False,
    reduce: Callable[[Any], Any] | None = None,
    find_last: bool = False,
    weigh: bool = False,
    survey: Survey | None = None,
    around: contextlib.AbstractContextManager[Any] = _NONE,
) -> Iterator[CleanPass]:
    """Run ``model`` without noise; take derivatives inside the context.

    Args:
        model: The model; left as it is.
        inputs: Its inputs.
        twice: Whether second derivatives will be taken.
        thrice: Whether third ones will be.
        lean: Whether second derivatives are ours, which hold less; no third ones are
            right then, and the graph does not tell whether samples meet.
        move_buffers: Whether the pass moves running statistics as training does.
        outlives: Whether its graph is used after the context, and down to the
            parameters; else it begins at the first site.
        first: What the first site is given in the place of its input, if anything.
        bare: Whether no code of the user's will run in the context, a loss for one.
        find_last: Whether to look for the layer that makes the outputs.
        weigh: Whether to weigh what a step holds below the first site.
        reduce: Makes the pass's outputs of the model's, of which it then holds none.
        survey: The modules of the model, where they have been looked at just now.
        around: A context of the model's own run.

    Yields:
        The pass.
    """
    survey = Survey.of(model) if survey is None else survey
    check_batch(model, inputs, survey.modules)
    # Nothing but other code than torch's layers runs attention.
    model, called = survey.model, thrice or (twice and survey.once)
    kernels = functools.partial(pass_kernels, bool(called), thrice, lean)
    operations: Context = kernels if called or lean else contextlib.nullcontext
    matrices = ConstantMatrices(() if survey.callers else survey.modules)
    seen = Recorder(outlives, first, weigh, inputs, survey, matrices)
    placed = at_sites(
        model, unasking(seen.perturb), move_buffers=move_buffers, outlives=outlives,
        survey=survey, copies=True,
    )  # fmt: skip
    reading = seen.last.reading(survey.modules) if find_last else _NONE
    with torch.enable_grad(), operations(), placed as calls, reading, matrices:
        if outlives:
            calls.watch = Blocks(operations).look
        if find_last:
            calls.look_on(seen.last.see)
        began = None if calls.absent else _standing(model, find_last)
        calls.given = matrices.given
        run = functools.partial(seen.forward, around, reduce, move_buffers)
        outputs = seen.run(run, lambda: calls.differentiates)
        if bare and not calls.again:
            calls.rest()  # before anything is asked of a tensor
        drawn = began is not None and began.moved()
        began = began if drawn else None
        noisy, uses = drawn or bool(calls.silenced), seen.uses()
        if calls.differentiates:  # to its inputs a zero that is added is a constant
            seen.unreachable += [site.name for site, _, _ in uses]
        hidden = out_of_sight(survey.others)
        alone = len(uses) == 1 and not hidden and not noisy
        last = seen.last.weight if alone else None
        seen.close()
        said = drawn, noisy, tuple(seen.unreachable), hidden, seen.later
        masks = [site.mask_shape(h.shape) for site, h, _ in uses]
        met = outputs, uses, masks, [*seen.zeros.values()], last
        found = CleanPass(*met, *said, seen.below, weigh, began, survey.row_wise)
        del met, outputs  # what the pass lets go of
        yield found


def _standing(model: nn.Module, every_kind: bool) -> Standing:
    """Note where torch's generators stand; before one says "exact", those of others."""
    return AllStanding(model) if every_kind else Standing(model)
