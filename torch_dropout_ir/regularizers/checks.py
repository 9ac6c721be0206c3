"""Inputs of which no estimate can be made, said by name."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.arguments import check_derivatives
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import Standing
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.loss_terms import nodes_of
from torch_dropout_ir.output_products import HessianProduct, few
from torch_dropout_ir.output_scales import alike
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.sites import Site, named_modules, uncompiled, unobservable
from torch_dropout_ir.tracing import unasked

Later: TypeAlias = Sequence[tuple[Site, torch.Size]]
# As torch, and extensions of it, say that a derivative has none.
_TORCH_LACKS: Final = re.compile(
    r"derivative for \S+ is not implemented|ouble backward"
)
_DRAWN: Final = (
    "the model draws noise besides its sites: what that adds is not in it, and it is "
    "at that noise as it was drawn"
)
_BESIDE: Final = (
    "the loss also reads what the model keeps beside its outputs (in an attribute or a "
    "closure): what dropout adds by way of that is left out. Return it with the "
    "outputs, or use `second_order` or `monte_carlo`"
)
_CALLED: Final = (
    "the loss runs the model again, whose sites {} drop in it: what that adds is left "
    "out. Return both with the outputs, or use `monte_carlo`"
)


@contextlib.contextmanager
def explained(caller: str) -> Iterator[None]:
    """Say what to do about an operation that torch differentiates once, inside."""
    try:
        yield
    except RuntimeError as err:
        if type(err) is not RuntimeError or not _TORCH_LACKS.search(str(err)):
            raise
        raise NotImplementedError(
            f"{caller}: expected a model and a loss that torch can differentiate "
            f"twice, got an operation that it cannot ({str(err).rstrip('.')}). Use "
            "`monte_carlo`, which takes no derivative, or write it in others."
        ) from err


def as_pair(batch: Any) -> Batch:
    """Return a batch, or raise a TypeError if it is no pair of inputs and targets."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    got = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        got = f"{got} of {len(batch)}"
    raise TypeError(
        f"expected a batch `(inputs, targets)`, got {got}. Several inputs are a tuple: "
        "`((a, b), targets)`."
    )


def check_reachable(name: str, unreachable: Sequence[str]) -> None:
    """Raise a RuntimeError if derivatives cannot reach a site."""
    if unreachable:
        raise RuntimeError(
            f"{name}: derivatives cannot reach the sites {list(unreachable)}, which "
            "run under torch.no_grad, reentrant checkpointing or torch.func, or in a "
            "model that differentiates in its forward pass. Use `monte_carlo`, or "
            "checkpoint with use_reentrant=False."
        )


def check_batch(
    model: nn.Module,
    inputs: Any,
    modules: Iterable[tuple[str, nn.Module]] | None = None,
) -> None:
    """Raise if a batch has no sample, or values or derivatives are out of reach.

    Raises:
        ValueError: If a tensor among the inputs has no element in its first dimension,
            or something is on the meta device.
        RuntimeError: Under ``torch.inference_mode``.
    """  # noqa: DOC502 (`check_derivatives` raises)
    check_derivatives()
    arguments = Inputs.of(inputs)
    given = (*arguments.args, *arguments.kwargs.values())
    tensors = [x for x in given if isinstance(x, Tensor)]
    modules = named_modules(uncompiled(model)) if modules is None else modules
    own = [x for _, m in modules for x in m._parameters.values()]
    with unasked():
        if any([x is not None and x.is_meta for x in (*own, *tensors)]):
            raise ValueError(
                "expected a model and a batch with values, got tensors on the meta "
                "device. Use `model.to_empty(device=...)` and load weights first."
            )
    for value in tensors:
        if value.ndim and value.shape[0] == 0:
            raise ValueError(
                "expected a batch with at least one sample, got an input of shape "
                f"{list(value.shape)}"
            )


def check_site(site: Site, h: Tensor) -> None:
    """Raise a TypeError if what a site drops is complex or integer."""
    if not h.is_floating_point():
        raise TypeError(
            f"dropout site `{site.name}`: expected a real floating-point input, got "
            f"{h.dtype}"
        )


def check_risk(
    name: str, read: OutputsRead, model: nn.Module, inputs: Any, later: Later
) -> None:
    """Raise if the loss draws or is not finite: its derivatives may still be, or 0.

    ``later`` are the sites that have acted when the pass was over, as it runs.
    """
    began = Standing(model)
    with torch.no_grad():
        check_finite(name, read.risk(read.tensors), model, inputs)
    _check_drawn(name, began, later)


def checked_product(
    name: str, read: OutputsRead, model: nn.Module, inputs: Any, later: Later
) -> HessianProduct | None:
    """Check the loss as :func:`check_risk` does; return its product, if not closed."""
    if read.loss is None:
        check_risk(name, read, model, inputs, later)
        return None
    if read.closed:
        f, y = read.single, read.targets
        if y is not None:
            plain = type(f) is type(y) is Tensor and alike(f, y) and f.numel()
            # Squares are finite where their sum is, which takes half the time.
            plain = plain and few(f) and read.loss.kind == "squared"
            value = torch.dist(f, y) if plain else read.loss(f, y)
            check_finite(name, value, model, inputs)
        return None
    general = read.loss.kind == "general"
    began = Standing(model) if general else None
    product = read.product()
    assert product is not None
    check_finite(name, product.value, model, inputs)
    _check_drawn(name, began, later)
    return product


def _check_drawn(name: str, began: Standing | None, later: Later) -> None:
    """Raise a ValueError if a loss has drawn random numbers, or does in training."""
    if later:
        raise ValueError(f"{name}: " + _CALLED.format(_names(later)))
    if began is not None and began.moved():
        raise ValueError(
            f"{name}: expected a loss that draws no random numbers, got one that does: "
            "it is another at each call. Put what is in it into evaluation mode, or "
            "use `monte_carlo`"
        )


def check_finite(name: str, value: Tensor, model: nn.Module, inputs: Any) -> None:
    """Raise a ValueError if an estimate is not finite, with where that comes from."""
    if math.isfinite(value.item()):
        return
    arguments = Inputs.of(inputs)
    places = {
        **{f"parameter `{n}`": x for n, x in model.named_parameters()},
        **{f"buffer `{n}`": x for n, x in model.named_buffers()},
        **{f"input {i}": x for i, x in enumerate(arguments.args)},
        **{f"input `{n}`": x for n, x in arguments.kwargs.items()},
    }
    wrong = [
        place
        for place, x in places.items()
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and not torch.isfinite(x).all()
    ]
    where = ", ".join(wrong) or (
        "the outputs or the loss (overflow, targets, or a mean over none), or a "
        "derivative of theirs, of which `with torch.autograd.set_detect_anomaly(True)` "
        "around this call names the operation"
    )
    raise ValueError(
        f"{name}: expected a finite estimate, got {value.item()}; not finite: {where}"
    )


def noise_left_out(
    model: nn.Module,
    noisy: bool,
    met: bool,
    known: Mapping[str, str] | None = None,
    *,
    drawn: bool = False,
    cut: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return what is to be said of noise that an estimate does not hold.

    A pass was ``noisy`` if it has ``drawn`` random numbers, or noise was switched off
    in it; sites were ``met``, or ``cut`` if they drop everything. ``known`` is what
    :func:`unobservable` says of the model, where it has been asked.
    """
    known = unobservable(model) if known is None else known
    said = [f"`{name}` is not in it: {why}" for name, why in known.items()]
    if drawn:
        said.append(_DRAWN)
    elif noisy and not known:
        said = ["the model draws noise besides its sites, which is not in it"]
    said += [f"site `{name}` drops everything (p = 1)" for name in cut]
    if not met:
        said.append("no dropout site acted: there is nothing to estimate")
    if not model.training:
        said.append(
            "the model is in evaluation mode: its dropout modules are taken as in "
            "training, calls of dropout functions are off"
        )
    return tuple(said)


def read_beside(
    read: OutputsRead,
    edges: Iterable[GradientEdge],
    product: HessianProduct | None,
    later: Later,
) -> tuple[str, ...]:
    """Return what is to be said of a loss that reads more of a pass than its outputs.

    ``edges`` are those by way of which that is not seen, ``later`` the sites that have
    acted when the pass was over, as it runs.
    """
    if read.loss is not None and read.loss.kind != "general":
        return ()
    sites, found = {edge.node for edge in edges}, False
    if product is not None:
        found = product.leads_to(sites)
    elif sites:
        with torch.enable_grad():
            value = read.risk([x.detach() for x in read.tensors])
        found = not sites.isdisjoint(nodes_of(value))
    called = (_CALLED.format(_names(later)),) if later else ()
    return (*called, _BESIDE) if found else called


def _names(later: Later) -> list[str]:
    return sorted({site.name for site, _ in later})
