"""What a forward pass without noise shows while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir.collectives import every
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.functional import call
from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.regularizers import step_memory
from torch_dropout_ir.regularizers.checks import check_site
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.last_weight import LastWeight
from torch_dropout_ir.regularizers.step_memory import Below
from torch_dropout_ir.sharpness.derivatives import lean_derivatives
from torch_dropout_ir.sites import Site
from torch_dropout_ir.substitution import ConstantMatrices
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.tracing import checkpointed, mapped, recomputes, unasked

# Elements of the first site's input beside which a look at the graph takes no time.
_LARGE: Final = 2**16
# Elements of it from which on matrices above are constant; so they are of part of a
# batch. A smaller pass takes little longer than that.
CONSTANT: Final = 2**13
# Added to the inputs of sites: a graph begins there.
_ZERO: Final = torch.zeros((), device="cpu", requires_grad=True)
Use = tuple[Site, Tensor, GradientEdge]


class _Passed(NamedTuple):
    """A use of a site, and what tells whether something was written over it.

    Attributes:
        site: The site.
        h: Its input, or what passed on, which is equal.
        h_version: Writes on that by then.
        edge: Where in the graph its output is.
        out: What passed on, should ``h`` be written on; None where nothing writes.
        out_version: Writes on that by then.
        kept: Whether others hold ``h``.
    """

    site: Site
    h: Tensor
    h_version: int
    edge: GradientEdge
    out: Tensor | None
    out_version: int
    kept: bool

    def known(self) -> tuple[Tensor, ...]:
        """Return what is as it was: the input, and what passed on."""
        h = (self.h,) if self.h._version == self.h_version else ()
        same = self.out is not None and self.out._version == self.out_version
        return (*h, self.out) if self.out is not None and same else h

    def settled(self) -> _Passed:
        """Hold one of them: that which others hold, if it is as it was."""
        now = self.known()
        if not now:
            return self
        held = now[0] if self.kept else now[-1]
        return self._replace(h=held.detach(), h_version=held._version, out=None)


class Recorder:
    """What a pass shows while it runs.

    Tensors of the ``inputs`` are there without it; ``matrices`` may be constant
    from the first site on. The rest is as in ``clean_pass``.
    """

    def __init__(
        self,
        outlives: bool,
        first: Tensor | None,
        weigh: bool,
        inputs: Any,
        survey: Survey,
        matrices: ConstantMatrices,
    ) -> None:
        self.below = Below(constants=matrices.sizes)
        self._matrices = matrices
        self.passed: list[_Passed] = []
        self.unreachable: list[str] = []
        self.later: list[tuple[Site, torch.Size]] = []
        self._outlives = outlives
        self._first = first
        self._weigh = weigh
        self._survey, self._inputs = survey, inputs
        self._fixed = not survey.callers  # no site has another ``p`` in another call
        # Whether something may write on the inputs or outputs of sites.
        self._writes = outlives or survey.in_place or survey.foreign
        self._settles = not outlives
        self.last = LastWeight()
        self._open = True
        # By device; what outlives the pass may be given a gradient.
        self.zeros: dict[torch.device, Tensor] = {}
        if not outlives:
            self.zeros[_ZERO.device] = _ZERO

    def perturb(self, site: Site, h: Tensor) -> Tensor:
        """Add a zero to a site's input, and record both."""
        check_site(site, h)
        if site.rate is None and not self._fixed:
            site = Site(site.name, site.module, rate=site.p)
        if not torch.is_grad_enabled() or mapped(h):
            self.unreachable.append(site.name)
        first = self._open and not self.passed
        if first and self._first is not None:
            h = _in_place_of(h, self._first)
        zero = self.zeros.get(h.device)
        if zero is None:
            zero = torch.zeros((), device=h.device, requires_grad=True)
            self.zeros[h.device] = zero
        if not self._open:
            if not recomputes():  # as a block under checkpointing; it is the loss
                self.later.append((site, h.shape))
            return h + zero
        if self._writes and self._settles and self.passed:
            last = len(self.passed) - 1  # another thread may add one meanwhile
            # Who writes does so at once.
            self.passed[last] = self.passed[last].settled()
        if first and h.numel() >= (step_memory.SOME if self._weigh else _LARGE):
            there = _there_before(self._survey.model, self._inputs)
            self.below = Below.by(h, there, self.below.constants)
        large = h.numel() >= CONSTANT or self._first is not None
        large = large and not self._outlives
        if first and large and not checkpointed():  # which runs all of a block again
            self._matrices.begin()
        held = h if self._outlives else h.detach()
        # Nothing below the first site is asked for: what it keeps is let go now.
        out = (held if first else h) + zero
        edge = _edge(out, zero)
        if first:
            self.last.begin(out)
        kept, spare = _is_kept(h, first), out if self._writes else None
        if not (self._writes or kept):
            held = out.detach()
        version = out._version
        passed = _Passed(site, held, held._version, edge, spare, version, kept)
        self.passed.append(passed)
        return out

    def run(
        self, forward: Callable[[], Any], differentiates: Callable[[], bool]
    ) -> Any:
        """Return what a forward pass does, run again where an input was lost in it.

        So it is without constants where ``differentiates`` says that a model takes
        derivatives itself, perhaps in one.
        """
        outputs, wrong = None, False
        try:
            outputs = forward()
        except Exception as err:
            raise_if_exhausted(err)
            if not self._matrices.end():
                raise
            wrong = True
        if wrong or (differentiates() and self._matrices.end()):
            del outputs
            self._clear()
            outputs = forward()
        if not (self._writes and self._settles):
            return outputs
        with unasked():
            known = all([passed.known() for passed in self.passed])
        if not every(known, "inputs of sites"):
            del outputs
            self._settles = False
            self._clear()
            outputs = forward()
        return outputs

    def forward(
        self,
        around: contextlib.AbstractContextManager[Any],
        reduce: Callable[[Any], Any] | None,
        move_buffers: bool,
    ) -> Any:
        """Return what the model makes of its inputs, or ``reduce`` of that."""
        seen = self._survey
        with around:
            outputs = call(
                seen.model, self._inputs, move_buffers=move_buffers, survey=seen
            )
        # What comes now is the loss, or ours.
        self._matrices.end()
        self.last.end(outputs)
        return outputs if reduce is None else reduce(outputs)

    def _clear(self) -> None:
        self.passed.clear()
        self.last.clear()

    def uses(self) -> list[Use]:
        """Return each use with its input as it was; raise if that is lost."""
        with unasked():
            return [_use(p) for p in self.passed]

    def close(self) -> None:
        """Let go of what was recorded, lest tensors outlive their use in the graph."""
        self._open = False
        self._clear()


@contextlib.contextmanager
def pass_kernels(needed: bool, thrice: bool, lean: bool) -> Iterator[None]:
    """Let operations be differentiated as often as wanted inside the context.

    ``needed``: there may be some that torch differentiates once; ``lean``: second
    derivatives are ours, which hold less.
    """
    with contextlib.ExitStack() as stack:
        if needed:
            stack.enter_context(differentiable(thrice, again=not lean))
        if lean:
            stack.enter_context(lean_derivatives())
        yield


def _there_before(model: nn.Module, inputs: Any) -> set[int]:
    """Return where in memory tensors are that are there without a pass."""
    own = Inputs.of(inputs)
    given = [x for x in flatten([own.args, own.kwargs])[0] if isinstance(x, Tensor)]
    return {address(x) for x in (*model.parameters(), *model.buffers(), *given)}


def shape_of(h: Tensor) -> Tensor:
    """Stand for an input of a site that is let go of."""
    return h.detach().new_empty(()).expand(h.shape)


def _is_kept(h: Tensor, first: bool) -> bool:
    """Whether a site's input is held by others: what made it may need it."""
    node = h.grad_fn  # below the first site it goes
    return node is None or (not first and hasattr(type(node), "_saved_result"))


def _edge(out: Tensor, zero: Tensor) -> GradientEdge:
    """Return where in the graph a sum is; where it has none, where its zero is."""
    node = out.grad_fn if type(out) is Tensor else None
    if node is not None:
        return GradientEdge(node, 0)
    return get_gradient_edge(out if out.requires_grad else zero)


def _in_place_of(h: Tensor, first: Tensor) -> Tensor:
    """Return what the first site is given; raise where the pass has something else."""
    if h.shape != first.shape:
        raise ValueError(
            f"expected the input of the first site to have the shape "
            f"{list(first.shape)}, got {list(h.shape)}"
        )
    if nearly_equal(h, first):
        return h
    if checkpointed():
        raise ValueError(
            "expected the first site outside of activation checkpointing, which would "
            "compute again what it is not given"
        )
    return first


def _use(passed: _Passed) -> Use:
    if known := passed.known():
        return passed.site, known[0], passed.edge
    raise RuntimeError(
        f"expected the input of dropout site `{passed.site.name}` or its output to "
        "stay as they are in the forward pass, got both overwritten in place. Use "
        "`monte_carlo`."
    )
