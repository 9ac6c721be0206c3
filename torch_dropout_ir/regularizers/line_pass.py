"""The second derivative of a loss along a line, by forward mode: no graph is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_dropout_ir.functional import Batch, at_sites, call, constants
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    NoRuleError,
    aten,
    shared,
    tensors,
)
from torch_dropout_ir.regularizers.line_rules import through
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.regularizers.site_forms import Form, signs
from torch_dropout_ir.sites import Site
from torch_dropout_ir.survey import Survey

Mask = tuple[Site, Tensor, torch.Size]


class Constants(TorchFunctionMode):
    """Knows what the model runs under ``torch.no_grad``: there nothing moves.

    The forward pass of a function with a derivative of its own runs without autograd
    too, which nobody has asked for.

    Attributes:
        asked: Whether the model has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            on = torch.is_grad_enabled()
            if args[0] and not on and not self.asked:
                raise NoRuleError(
                    "gradients in a function with a derivative of its own"
                )
            self.asked = not args[0] and (on or self.asked)
        return func(*args, **(kwargs or {}))


class Moving(TorchDispatchMode):
    """Carries the derivatives along a line beside the tensors that move.

    Those of what an operation returns are taken when the next one begins: until then
    its caller holds what it was given, whose derivatives theirs may then replace. Where
    they cannot be taken, nothing that follows is known, should the model go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants = Constants()
        self._lines = WeakTensorKeyDictionary()
        self._last: tuple[Call, Any] | None = None
        self._lost = False

    def line(self, x: Tensor) -> Line:
        """Return the first and second derivative of a tensor, None for zero."""
        self._settle()
        return self._line(x)

    def _line(self, x: Tensor) -> Line:
        found: Line = self._lines.get(x, STILL)
        return found

    def move(self, x: Tensor, line: Line) -> None:
        """Let a tensor move.

        Raises:
            NoRuleError: If its derivatives are of another kind than the tensor.
        """
        for u in line:
            if u is not None and (u.shape != x.shape or u.dtype != x.dtype):
                raise NoRuleError(f"{list(x.shape)} moves by {list(u.shape)}")
        if x.is_floating_point() and any([u is not None for u in line]):
            self._lines[x] = line

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._settle()
        moves = any([x in self._lines for x in tensors([args, kwargs])])
        if not moves:
            return func(*args, **kwargs)
        plain = not func._schema.is_mutable
        if not torch.is_grad_enabled():  # what autograd does not see
            if plain and self.constants.asked:
                return func(*args, **kwargs)
            self._lost = True
            raise NoRuleError(f"{func} without autograd")
        if not plain:
            self._lost = True
            self._write(func, args, kwargs)
            self._lost = False
            return args[0]
        value = func(*args, **kwargs)
        self._last = Call(func, args, kwargs, self._line), value
        return value

    def _settle(self) -> None:
        """Take the derivatives of what the last operation returned."""
        last, self._last = self._last, None
        if self._lost:
            raise NoRuleError("what follows an operation without a rule")
        if last is not None:
            self._lost = True
            lines = through(*last)
            for x, line in zip(tensors(last[1]), lines, strict=True):
                self.move(x, line)
            self._lost = False

    def _write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Do what an operation does in place, which no other tensor may show."""
        x, name = args[0], func.overloadpacket.__name__
        plain = getattr(aten, name.removesuffix("_"), None)
        instead = getattr(plain, func._overloadname, None)
        if not name.endswith("_") or instead is None or shared(x):
            raise NoRuleError(str(func))
        call = Call(instead, args, kwargs, self._line, over=x)
        self._lines.pop(x, None)  # nobody reads how it moved
        (line,) = through(call, x)
        func(*args, **kwargs)
        self.move(x, line)


def curvature_along(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    uses: Sequence[Mask],
    use: int,
    noise: Tensor,
) -> Tensor | None:
    r"""Return the second derivative of the loss where a use of a site moves.

    .. math:: \frac{d^2}{dt^2} R_S(h + t v) = v^\top A v

    with :math:`v = \sqrt{p / (1 - p)}\, z \circ h`. Three values of each activation at
    hand take the place of a graph: its own and its derivatives.

    Args:
        model: The model.
        batch: The batch.
        loss: The loss.
        uses: Each use of a site: the site, a tensor like its input, and its shape.
        use: The number of that which moves.
        noise: :math:`z`, shaped as the mask, to multiply ``h``.

    Returns:
        Scalar; None where the outputs do not depend on the use.

    Raises:
        NoRuleError: If derivatives do not go through an operation.
    """  # noqa: DOC502 (the mode raises)
    survey = Survey.of(model)
    moving, used = Moving(), 0

    def perturb(site: Site, h: Tensor) -> Tensor:
        nonlocal used
        used, now = used + 1, used
        if [(s.name, n) for s, _, n in uses[now : now + 1]] != [(site.name, h.shape)]:
            raise NoRuleError("other uses of sites than in the pass before")
        out = h.clone()
        if now == use:
            v = noise.to(h.dtype, copy=True).mul_(site.variance**0.5)
            own = v.shape == h.shape
            moving.move(out, (v.mul_(h.detach()) if own else v * h.detach(), None))
        return out

    none = contextlib.nullcontext()
    kernels = differentiable(thrice=False) if survey.callers else none
    with (
        torch.enable_grad(),
        kernels,
        at_sites(model, perturb, survey=survey, copies=True),
    ):
        with moving, moving.constants:
            outputs = call(model, batch[0], constants(survey.model), survey=survey)
    read = read_outputs(outputs, loss, batch[1])
    lines = [moving.line(x) for x in read.tensors]
    if all([line is STILL for line in lines]):
        return None
    return _of_loss(read.tensors, read.slopes, lines)


def draws_along(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    uses: Sequence[Mask],
    num_samples: int | None,
) -> list[list[Form]] | None:
    """Return draws of the second-order forms, a pass a use: of one, or of an element.

    Args:
        model: The model.
        batch: The batch, whose samples meet.
        loss: The loss.
        uses: Each use of a site: the site, a tensor like its input, and its shape.
        num_samples: Draws of signs; None for the exact sum, as a single draw.

    Returns:
        The draws; None where derivatives do not go through an operation.
    """

    def forms(noise: Iterable[tuple[int, Tensor]]) -> list[Form]:
        found = []
        for use, z in noise:
            curved = curvature_along(model, batch, loss, uses, use, z)
            if curved is not None:
                found.append((uses[use][0].name, curved.view(1) / 2))
        return found

    try:
        if num_samples is None:
            return [forms(_elements(uses))]
        draws = []
        for _ in range(num_samples):
            drawn = [signs(s, x.expand(n)) > 0 for s, x, n in uses]
            noise = ((i, z.to(torch.int8) * 2 - 1) for i, z in enumerate(drawn))
            draws.append(forms(noise))
        return draws
    except (RuntimeError, ValueError, TypeError):  # ours, and torch's and the model's
        return None


def _elements(uses: Sequence[Mask]) -> Iterator[tuple[int, Tensor]]:
    """Yield each element of each mask, as a tensor of zeros with a one."""
    for use, (site, x, shape) in enumerate(uses):
        own = torch.Size(site.mask_shape(shape))
        for place in range(own.numel()):
            one = x.new_zeros(own.numel())
            one[place] = 1.0
            yield use, one.view(own)


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
