"""The protocol of a measure: what it may look at, and what it lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.records import Histogram, Image, Record
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.sites import Site
from torch_dropout_ir.substitution import unmoved_buffers, unmoved_gradients
from torch_dropout_ir.vectors import full_precision

Need = Literal[
    "sites", "inputs", "loss", "targets", "lr", "gradients", "masks", "batches"
]


@dataclasses.dataclass
class Snapshot:
    """What a measure may look at: the state just before an optimizer step.

    Attributes:
        model: The model.
        step: Optimizer steps made before.
        sites: The dropout sites.
        loss: The loss; None where it is not known.
        inputs: Arguments of the last training pass, or of another batch where only that
            one's targets are known; None before the first.
        targets: Its targets; None where they were not seen.
        batches: Batches for measures of the loss surface; None where there are none.
        given: Whether they are those of ``data=``.
        lr: Learning rate by parameter name; None before an optimizer is known.
        gradients: Gradient that the optimizer is about to use, by parameter name.
        statistics: Mask statistics by site name.
        source: Which batch that is, in words.
        missed: Why the last training pass cannot be measured, where there was one.
        notes: Where a measure says by tag how a number was obtained.
        absent: Where a measure says by tag why it left a number out.
        ranks: The processes that train together, each with a batch of its own. All
            take a measure at once, from one seed; it merges its sums over them. What
            the first one returns is written.
    """

    model: nn.Module
    step: int
    sites: tuple[Site, ...]
    loss: Loss | None = None
    inputs: Any = None
    targets: Any = None
    batches: Any = None
    given: bool = False
    lr: dict[str, float] | None = None
    gradients: dict[str, Tensor] | None = None
    statistics: dict[str, MaskStatistics] = dataclasses.field(default_factory=dict)
    source: str = "this step's batch"
    missed: str = ""
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    ranks: Ranks = dataclasses.field(default_factory=Ranks)

    @property
    def batch(self) -> Batch:
        """The last batch as ``(inputs, targets)``."""
        return self.inputs, self.targets

    def agree(self) -> Snapshot:
        """Let go of what not all ranks have, and return itself."""
        names = ("loss", "inputs", "targets", "batches", "lr", "gradients")
        missing = {name: float(getattr(self, name) is None) for name in names}
        for name, count in self.ranks.sum(missing).items():
            if count:
                setattr(self, name, None)
        return self

    def said(self, records: Mapping[str, Record]) -> dict[str, str]:
        """Return the notes; that on the loss, which is of this batch, where it is new.

        Args:
            records: What was measured.
        """
        kept = self.notes.items()
        return {t: x for t, x in kept if t != "loss/R_S" or t in records}

    def lacks(self, needs: frozenset[Need]) -> str | None:
        """Return the reason why a measure with these needs cannot be taken, or None."""
        for need, reason in _LACKING.items():
            value = getattr(self, "statistics" if need == "masks" else need)
            missing = value is None or (isinstance(value, (tuple, dict)) and not value)
            if need in needs and missing:
                # Calls of dropout functions, masks and the loss are seen in a pass.
                unseen = need not in {"lr", "gradients"} and self.inputs is None
                if unseen:
                    return self.missed or _LACKING["inputs"]
                return self.notes.get(need) or reason  # why masks were not observed
        return None


NO_SITE: Final = (
    "no dropout with p > 0 was found, neither a module nor a call, of those that are "
    "measured (`analysis.sites` lists what is not, and why)"
)
_LACKING: Final[dict[Need, str]] = {
    "sites": NO_SITE,
    "inputs": (
        "no call of the model as `model(...)` in training mode was seen yet: call "
        "`model.train()` where it is in evaluation mode, and attach to the module that "
        "the script calls so (of Lightning: `DropoutAnalysis(module=...)`). Where it "
        "calls a method of another name, "
        "as `model.encode(...)`, attach to the part of the model that drops: what "
        "follows that counts as loss. A model that was compiled since is measured from "
        "the next time on; one that runs inside `torch.func` transforms or a compiled "
        "function alone cannot be measured"
    ),
    "loss": (
        "the loss is not known: no path was found from the model's outputs to the "
        "number on which the script calls `backward()`. What cuts it: outputs that the "
        "model keeps and does not return, random numbers "
        "drawn behind the model (dropout there), a gradient as part of the loss "
        "(`torch.autograd.grad`), parameters of this model used once more, functions "
        "with a derivative of their own (compiled code), tensors that change in place "
        "before the optimizer steps, and comparing many passes, unless one `forward` "
        "makes them all. Pass `loss=`, and `data=` where targets are needed"
    ),
    "targets": (
        "the targets were not seen: the script must hand them with the model's output "
        "to a loss, and leave them as they are until the optimizer steps; else pass "
        "`data=`"
    ),
    "batches": "no batch with targets was seen: pass `data=`",
    "lr": (
        "no optimizer step of this model was seen yet, or the optimizer is gone, or "
        "has no number `lr` in a group of parameters"
    ),
    "gradients": (
        "no optimizer step with gradients of this model was seen yet, or they are "
        "cleared, or the optimizer is gone, or has no number `lr` in a group of "
        "parameters; `analysis.measure()` sees them between `backward()` and "
        "`zero_grad()`"
    ),
    "masks": "no mask was observed yet; those of a compiled model are not seen",
}


def labels(inputs: Inputs) -> Any:
    """Return the argument ``labels`` of a pass, as models are called that take them."""
    return inputs.kwargs.get("labels")


def rate_of(group: dict[str, Any]) -> float | None:
    """Return the learning rate of a group of parameters.

    None where there is no number: some optimizers find the size of their steps.
    """
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None


def received_gradients(
    model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, float] | None, dict[str, Tensor] | None]:
    """Return learning rates and gradients by parameter name, as the optimizer has them.

    Rates are 0 for parameters that it does not step. Both are None where there is no
    optimizer, or one that has no rate; gradients where there are none.
    """
    if optimizer is None:
        return None, None
    names = {id(x): name for name, x in model.named_parameters()}
    rates = dict.fromkeys(names.values(), 0.0)
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for x in group["params"]:
            if id(x) not in names:
                continue
            if (rate := rate_of(group)) is None:
                return None, None
            rates[names[id(x)]] = rate
            if x.grad is not None:
                found[names[id(x)]] = x.grad.detach()
    # A fused optimizer unscales by itself, in its step.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        found = {name: g / scale for name, g in found.items()}
    return rates, found or None


def theory_note(
    model: nn.Module, optimizer: Optimizer | None, moved: bool
) -> dict[str, str]:
    """Say what R_2 leaves out, where it is a diagnostic, or all is ``moved`` before."""
    if optimizer is None:
        return {}
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    said, named = [], kind
    if type(optimizer) is torch.optim.SGD:
        used = {x for g in groups for x in ("momentum", "weight_decay") if g.get(x)}
        named = f"SGD with {' and '.join(sorted(used))}" if used else ""
    if named:
        said += [
            f"R_2 is the theory of gradient descent; under {named} it is a diagnostic"
        ]
    stepped = {id(x) for group in groups for x in group["params"]}
    trained = [x for x in model.parameters() if x.requires_grad]
    count = sum(id(x) in stepped for x in trained)
    if count < len(trained):
        said += [
            f"R_2 is of the parameters that this {kind} steps, {count} of "
            f"{len(trained)} tensors"
        ]
    if moved:
        said += [
            f"this {kind} calls its closure with parameters that it has moved: all is "
            "measured there"
        ]
    return {"optimizer": "; ".join(said)}


class Measure(Protocol):
    """What to compute, and what must have been captured for it.

    One that takes long can say so by ``passes``, about the number of forward and
    backward passes that a measurement takes: with ``every="auto"`` its first one waits
    until it can be paid.

    One that keeps something between measurements can have ``state_dict`` and
    ``load_state_dict``: they are part of the analysis's own.

    Attributes:
        name: Name under which its cost is recorded.
        needs: What it cannot do without; where something lacks, it is left out and the
            summary says why.

    Example:
        >>> class WeightNorm:
        ...     name, needs = "norm", frozenset()
        ...
        ...     def __call__(self, snapshot):
        ...         weights = snapshot.model.state_dict().values()
        ...         squares = [x.square().sum() for x in weights]
        ...         return {"own/norm": float(sum(squares)) ** 0.5}
        >>> analysis = tdi.attach_analysis(
        ...     nn.Linear(4, 2), measures=[WeightNorm()], log_dir=False
        ... )
        >>> analysis.measure()["own/norm"] > 0
        True
    """

    name: str
    needs: frozenset[Need]

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return records by tag."""


def take(measure: Measure, snapshot: Snapshot, seed: int) -> dict[str, Record]:
    """Take a measure, and give back generators, buffers and gradients that it moved."""
    model = snapshot.model
    with (
        torch.inference_mode(False),  # which switches autograd on
        preserved_rng(model, seed),
        unmoved_buffers(model),
        unmoved_gradients(model),
        full_precision(),
    ):
        found = measure(snapshot).items()
        kept = (Histogram, Image)
        return {tag: x if isinstance(x, kept) else float(x) for tag, x in found}
