"""The batch that curvature is of, cut where its graph would take too much memory.

Semantics:

* The graph of a second derivative keeps some five times what a training pass does.
  Where that is more than there is room for, the samples are cut into parts, and
  products are added up over them: it is the same curvature where samples do not see
  each other. A part's graph is let go of while its product runs, and takes some half
  of that.
* Whether they do is found out: the loss of the batch is the mean of the parts' losses,
  by samples or by what the loss counts, here and at parameters moved at random, or it
  is not.
* Batch normalization in training mode makes them see each other. Where the batch does
  not fit as a whole, its means and variances are taken once, of all samples, and held:
  the loss at the parameters is the same, and its curvature that of the network whose
  normalization is a fixed affine map, as it is in evaluation. A sentence says so.
* Samples that see each other otherwise, and do not fit, have no curvature here: what
  part of them there is room for has another one.
* A graph of at most 64 MB fits where cutting it would change the curvature: small
  networks have that of their training, whatever they see of each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from torch_dropout_ir.batches import as_batches
from torch_dropout_ir.functional import Batch, batch_size
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.row_chunks import rows_of
from torch_dropout_ir.sharpness.differentiability import Subset
from torch_dropout_ir.sharpness.reading import terms
from torch_dropout_ir.sharpness.surface import Surface

# What a pass keeps, times: a second derivative's graph for many products, one that is
# let go of, and the graph of the trace.
_OVER, _ONCE, _TRACED = 5.0, 2.75, 4.5
_HELD: Final = (
    4.25  # of the parameters: gradient, two vectors, and condensation's start
)
_LEAST: Final = 1 / 8  # of that, where parameters alone take more
_TINY: Final = 2**23  # bytes of a graph that no cut makes worth its time
_SMALL: Final = 2**26  # of one that is held whole where a cut has another curvature
_MOVED: Final = 0.1  # of the parameters' root mean square
_PADDING: Final = -100  # labels that losses of language models leave out
Coupling = Literal["auto", "batch", "fixed"]
Weigh = Callable[[Batch], float] | None
_FIXED: Final = (
    "batch normalization held at the means and variances of the batch, which are those "
    "of training, as constants: the curvature without their derivatives"
)
_MEET: Final = (
    "samples of this model or loss see each other, and the graph of all {} is larger "
    "than there is room for: set `Sharpness(max_bytes=)`, or "
    '`Sharpness(coupling="batch")` for no bound at all'
)
Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The loss surface that curvature is taken of.

    Attributes:
        batches: Batches, or parts of one.
        finer: The like for the trace, whose graph is larger.
        weigh: What each counts for; None: its samples.
        statistics: What batch normalization is held at.
        said: A sentence where it is not the loss as it is trained.
        lacking: Why there is none; empty where there is.
    """

    batches: Any
    finer: Any = None
    weigh: Weigh = None
    statistics: Statistics = dataclasses.field(default_factory=dict)
    said: str = ""
    lacking: str = ""

    def surface(
        self, model: nn.Module, loss: Loss, params: Subset = None, fine: bool = False
    ) -> Surface:
        """Return the loss at the model's own tensors, which nobody may move."""
        batches = self.finer if fine else self.batches
        found = Surface("sharpness", model, loss, batches, params=params,
                        copied=False, weigh=self.weigh)  # fmt: skip
        found.hold_statistics(self.statistics)
        return found


def fitting(
    model: nn.Module,
    loss: Loss,
    batches: Any,
    max_bytes: int | None = None,
    coupling: Coupling = "auto",
) -> Parts:
    """Return batches whose graphs of second derivatives fit, and what they are of.

    Several are taken as they are: one of them is in memory at a time. ``max_bytes`` is
    the memory of a graph below which nothing is cut; None: what is left of the memory
    of plain gradient descent, beside parameters, their gradient, two vectors of that
    size, and what condensation keeps; an eighth of that memory at least. Batches that
    cannot be cut without a change have 64 MB at least. ``coupling`` says what becomes
    of batch normalization in training mode: ``"batch"`` takes the curvature of the loss
    as it is trained, the whole batch at once whatever memory that takes; ``"fixed"``
    holds means and variances; and ``"auto"`` does so where the whole batch does not
    fit.
    """
    given = as_batches(batches)
    if not isinstance(given, list) or len(given) != 1 or coupling == "batch":
        return Parts(batches)
    batch = given[0]
    try:
        count = batch_size(batch)
    except TypeError:
        return Parts(batches)  # inputs that are objects of the script's own
    whole = Parts(given).surface(model, loss)
    kept = _kept(whole, batch)
    room = _room(whole, kept) if max_bytes is None else max_bytes
    small = max_bytes is None and _OVER * kept <= _SMALL
    fits = _OVER * kept <= room or count < 2 or (small and normalizes(model))
    held = Parts(given)
    if normalizes(model) and (coupling == "fixed" or not fits):
        found = batch_statistics(whole)
        if found is not None:
            held = Parts(given, statistics=found, said=_FIXED)
    if fits:
        return dataclasses.replace(held, batches=batches)
    if normalizes(model) and not held.statistics:
        return dataclasses.replace(held, lacking=_MEET.format(count))
    step, fine = (_even(count, room / (x * kept)) for x in (_ONCE, _TRACED))
    cut = _cut(model, loss, batch, held, step, _weights(loss, batch))
    if cut.lacking or cut is held:
        return Parts(batches) if small else cut
    finer = _cut(model, loss, batch, held, fine, [cut.weigh])
    if finer.lacking or finer is held:
        return cut
    return dataclasses.replace(cut, finer=finer.batches)


def _even(count: int, share: float) -> int:
    """Samples of a part that is at most this share of all, and half of them."""
    most = max(1, min(int(count * share), -(-count // 2)))
    return -(-count // -(-count // most))


def _cut(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    whole: Parts,
    step: int,
    weighs: Iterable[Weigh],
) -> Parts:
    """Cut a batch, if its loss is the mean of that of the parts."""
    count = batch_size(batch)
    try:
        parts = [_rows(batch, count, i, i + step) for i in range(0, count, step)]
        for weigh in weighs:
            cut = dataclasses.replace(whole, batches=parts, weigh=weigh)
            with warnings.catch_warnings():  # parts may be of shapes that do not fit
                warnings.simplefilter("ignore")
                if _same(whole.surface(model, loss), cut.surface(model, loss)):
                    return cut
    except (RuntimeError, ValueError, TypeError, IndexError):
        return whole  # a model or loss that takes no other number of samples
    return dataclasses.replace(whole, lacking=_MEET.format(count))


def _weights(loss: Loss, batch: Batch) -> Iterator[Weigh]:
    """What parts may count for: samples, what the loss counts, or labels."""
    yield None
    yield lambda part: terms(loss, part)
    labels = Inputs.of(batch[0]).kwargs.get("labels")
    if isinstance(labels, Tensor):
        for first in (0, 1):  # of the next symbol, the first label is left out

            def counted(part: Batch, first: int = first) -> float:
                own = Inputs.of(part[0]).kwargs["labels"]
                return float((own[..., first:] != _PADDING).sum())

            yield counted


def _room(surface: Surface, kept: int) -> int:
    """Bytes for a graph, such that no more is taken than the peak allows."""
    own = sum(x.nbytes for x in surface.params.values())
    training = 2 * own + kept
    return int(max(_TINY, _LEAST * training, training - _HELD * own))


def _kept(surface: Surface, batch: Batch) -> int:
    """Bytes that a pass keeps for its backward pass, besides the parameters."""
    own = {address(x) for x in surface.state().values()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.layout is not torch.strided:
            return x.detach()  # a sparse one, as of edges, comes with the inputs
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output of the node that keeps it, held as it is, would hold its node.
        return x.detach()

    leaves = {n: x.detach().requires_grad_() for n, x in surface.params.items()}
    hooks = saved_tensors_hooks(pack, lambda x: x)
    with torch.enable_grad(), surface.held(None), hooks:
        surface.risk(leaves, batch, 0, None)
    return sum(kept.values())


def _rows(batch: Batch, count: int, start: int, stop: int) -> Batch:
    rows = slice(start, stop)
    inputs = rows_of(Inputs.of(batch[0]), rows, count)
    if batch[1] is batch[0]:  # a model that computes its loss has its targets there
        return inputs, inputs
    y = batch[1]
    if isinstance(y, Tensor) and y.ndim and not len(y) % count:  # of symbols, flattened
        each = len(y) // count
        return inputs, y[start * each : stop * each]
    return inputs, rows_of(Inputs((y,), {}), rows, count).args[0]


def _same(whole: Surface, parts: Surface) -> bool:
    """Whether both are one loss: where the parameters are, and around."""
    sizes = torch.stack([x.double().square().mean() for x in whole.params.values()])
    with preserved_rng(whole.model, 0):
        moved = {
            n: x + _MOVED * float(sizes.mean().sqrt()) * torch.randn_like(x)
            for n, x in whole.params.items()
        }
    eps = max(torch.finfo(x.dtype).eps for x in moved.values())
    for params in (whole.params, moved):
        a, b = whole.value(params), parts.value(params)
        if not abs(a - b) <= eps ** (2 / 3) * max(abs(a), abs(b)):
            return False
    return True


def normalizes(model: nn.Module) -> bool:
    """Whether batch normalization makes samples of a batch see each other."""
    return any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def batch_statistics(surface: Surface) -> Statistics | None:
    """Return mean and variance that each batch normalization takes of the only batch.

    With them in the place of running statistics, in evaluation mode, the loss of the
    batch is what it is in training mode, and samples do not see each other. By name of
    the module; None where one is called twice, not at all, or holds no running
    statistics to stand in for.
    """
    batch = surface.single
    own = {
        name: module
        for name, module in surface.model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    if batch is None or any(m.running_mean is None for m in own.values()):
        return None
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in own}

    def look(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            dims = [d for d in range(x.ndim) if d != 1]
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            variance, mean = torch.var_mean(wide, dims, correction=0)
            like = module.running_mean
            found[name].append((mean.to(like), variance.to(like)))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in own.items():
            stack.callback(module.register_forward_pre_hook(look(name)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(surface.held(None))
        surface.outputs(surface.params, batch, 0, None)
    if any(len(seen) != 1 for seen in found.values()):
        return None
    return {name: seen[0] for name, seen in found.items()}
