"""What derivatives are taken of, and in: of which losses and parameters they are any.

Torch takes the derivative of functions that jump to be zero, and says nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_dropout_ir.losses import Loss

_WITHOUT: Final = ("derivative", "differentiable", "double backward", "not implemented")
NO_DERIVATIVE: Final = (
    "expected a model and a loss that can be differentiated twice, got an operation "
    "that cannot: {}. Put one in its place that can, or leave out the parameters below "
    "it with `params=`."
)
_JUMPS: Final = ("Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc")
Subset = Collection[str] | Callable[[str], bool] | None


def check_penalties(
    caller: str, model: nn.Module, loss: Loss, outputs: Any, targets: Any
) -> None:
    """Raise if a loss depends on the parameters by another way than the outputs.

    Derivatives are taken at other tensors than the model's own parameters, which such
    a loss would not see. Parameters of the loss itself are constants.

    Raises:
        ValueError: If the loss reads parameters of ``model``.
    """
    fixed = tree_map_only(Tensor, Tensor.detach, outputs)
    with torch.enable_grad():
        value = loss(fixed, targets)
        if not value.requires_grad:
            return
        named = {n: x for n, x in model.named_parameters() if x.requires_grad}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    read = [n for n, g in zip(named, found, strict=True) if g is not None]
    if read:
        raise ValueError(
            f"{caller}: expected a loss of outputs and targets alone, got one that "
            f"depends on {len(read)} parameters by another way ({read[0]!r} first), as "
            "a penalty on weights does: its derivatives would be left out. Leave it "
            "out of `loss`, or let the model return it with its outputs."
        )


def check_risk(caller: str, risk: Tensor, place: int) -> None:
    """Raise if a loss is not finite or does not depend on the parameters."""
    if not bool(risk.detach().isfinite()):
        raise ValueError(
            f"{caller}: expected a finite loss, got {risk.item()} on batch "
            f"{place}. Look for it in the inputs, targets and parameters: there is "
            "no curvature to speak of."
        )
    if not risk.requires_grad:
        raise ValueError(
            f"{caller}: expected a loss that depends on the parameters, got "
            f"one without a gradient on batch {place}. Something in the model or "
            "the loss cuts it: torch.no_grad, detach, item, argmax, round, an "
            "integer dtype."
        )


def depended_on(
    value: Tensor, leaves: Mapping[str, Tensor], found: Iterable[Tensor | None]
) -> list[str]:
    """Return the names of the leaves that a value depends on smoothly.

    What is rounded, cut to an integer or made a sign has a gradient of zeros, which
    is not told from that of a minimum. A straight-through estimator leaves a way
    around the step, and counts. ``found`` is the gradient in each leaf, None for none.
    """
    left, seen, reached = [value.grad_fn], set[Any](), set[int]()
    while left:
        node = left.pop()
        if node is None or node in seen or _jumps(node):
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        left.extend(following for following, _ in node.next_functions)
    pairs = zip(leaves.items(), found, strict=True)
    return [n for (n, x), g in pairs if g is not None and id(x) in reached]


def _jumps(node: Any) -> bool:
    """Whether a node of the graph is of a step function, or of a rounded quotient."""
    if getattr(node, "_saved_rounding_mode", None):
        return True
    return node.name().rstrip("0123456789") in [f"{jump}Backward" for jump in _JUMPS]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what to do about an operation without a derivative inside the context."""
    try:
        yield
    except RuntimeError as err:
        said = str(err).rstrip(".")
        known = NO_DERIVATIVE.partition("{")[0]
        if said.startswith(known) or not any(word in said for word in _WITHOUT):
            raise
        raise NotImplementedError(NO_DERIVATIVE.format(said)) from err


def chosen_parameters(
    caller: str, params: dict[str, Tensor], subset: Subset
) -> dict[str, Tensor]:
    """Return those of ``params`` that the user's choice is of, at least one."""
    kept = params
    if callable(subset):
        kept = {name: x for name, x in params.items() if subset(name)}
    elif subset is not None:
        if not isinstance(subset, Iterable):
            raise TypeError(
                f"{caller}: expected `params` to be names, or a predicate on names, "
                f"got {type(subset).__name__}"
            )
        subset = [subset] if isinstance(subset, str) else list(subset)
        given = [x if isinstance(x, str) else type(x).__name__ for x in subset]
        if foreign := sorted(set(given) - set(params)):
            raise ValueError(
                f"{caller}: expected `params` to name parameters that require a "
                f"gradient, got {foreign}. There are {list(params)}."
            )
        kept = {name: x for name, x in params.items() if name in given}
    if not kept:
        raise ValueError(f"{caller}: `params` chooses none of {list(params)}")
    if found := [name for name, x in kept.items() if x.is_complex()]:
        raise NotImplementedError(
            f"{caller}: expected real parameters, got complex ones: {found}. Hold them "
            "as real ones that the model views with `torch.view_as_complex`, or leave "
            "them out with `params=`."
        )
    return kept
