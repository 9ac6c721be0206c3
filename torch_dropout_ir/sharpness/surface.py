r"""The loss as a function of the parameters, fixed at the moment it is made.

Semantics:

* Parameters, buffers and modes are those at construction; the model is left as it is.
* Masks: ``"off"`` gives ``R_S``; a seed gives ``R_drop`` at masks that are the same in
  every pass, drawn by torch's own generators, so that dropout inside attention,
  recurrent cells and functions is frozen too; several seeds stand for their mean.
* A loader is read in the same order and with the same random transforms in every pass,
  also where it shuffles.
* Batches are weighted by what a loss counts in them, over all ranks of a group.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir import tracing
from torch_dropout_ir.arguments import check_derivatives
from torch_dropout_ir.collectives import go_on
from torch_dropout_ir.functional import (
    Batch,
    at_sites,
    fresh,
    parameters,
)
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.sharpness.differentiability import (
    Subset,
    check_penalties,
    check_risk,
    chosen_parameters,
    explained,
)
from torch_dropout_ir.sharpness.frozen import (
    Masks,
    TwiceDifferentiable,
    dropout_on,
    mask_seeds,
    modes,
    modes_of,
)
from torch_dropout_ir.sharpness.herding import representatives
from torch_dropout_ir.sharpness.ranks import Group, unwrapped
from torch_dropout_ir.sharpness.reading import Reading, sliced, terms
from torch_dropout_ir.substitution import call_with, substituted, unmoved_buffers
from torch_dropout_ir.turns import alone_with, in_turn
from torch_dropout_ir.vectors import full_precision, to_vector

_FEW: Final = 16  # samples that are left at least where they are thinned
_STRIDE: Final = 2**31 + 11  # between the seeds of one pass's batches


class Surface:
    """The loss of a model on batches, as a function of some of its parameters.

    Errors name the ``caller``. A model inside ``DistributedDataParallel`` is unwrapped;
    batches are spread over ``group``, ``"auto"`` for that of DDP, if any. Masks are
    ``"off"``, a seed, or several; ``params`` are names or a predicate on names; None:
    all that require a gradient. Without copies the model's own tensors are held, while
    nobody writes on them. ``weigh`` tells what a batch counts for in a mean; None: what
    a known loss counts, else its samples.

    Attributes:
        params: Copies of the chosen parameters.
        loss: The resolved loss.
        seeds: The masks' seeds; ``(None,)`` where dropout is off.
        operations: Puts operations with second derivatives in their place.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        loss: Any,
        batches: Any,
        *,
        masks: Masks = "off",
        params: Subset = None,
        group: Group = "auto",
        copied: bool = True,
        weigh: Callable[[Batch], float] | None = None,
    ) -> None:
        self.caller = caller
        self.model, self.ranks = unwrapped(model, group)
        self.loss = resolve_loss(loss)
        if weigh is None and self.loss.kind != "general":
            weigh = functools.partial(terms, self.loss)  # holds no surface
        self._batches = Reading(batches, self.model, weigh)
        one = self._batches.single
        bare = one is not None and not self._batches.samples(one)
        if (self._batches.empty or bare) and not self.ranks.spread:
            what = "batch with samples" if bare else "batch"
            raise ValueError(f"{caller}: expected at least one {what}, got none")
        self.seeds = mask_seeds(caller, masks)
        with in_turn():  # else they may be those of another's measurement
            chosen = chosen_parameters(caller, parameters(self.model), params)
            own = {n: x.detach() for n, x in chosen.items()}
            self.params = {n: x.clone() if copied else x for n, x in own.items()}
            rest = (*self.model.named_parameters(), *self.model.named_buffers())
            self._rest = {n: x.detach().clone() for n, x in rest if n not in chosen}
            self._modes = modes_of(self.model)
        self._closed = False
        self.operations = TwiceDifferentiable()

    def state(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, by name."""
        return {**self.params, **self._rest}

    def hold_statistics(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Let batch normalization, by module, use these means and variances alone."""
        modules = dict(self.model.named_modules())
        for name, (mean, variance) in found.items():
            self._modes[modules[name]] = False
            prefix = f"{name}." if name else ""
            self._rest |= {
                f"{prefix}running_mean": mean, f"{prefix}running_var": variance
            }  # fmt: skip

    @property
    def single(self) -> Batch | None:
        """The only batch, where there is one at one draw of masks."""
        return self._batches.single if len(self.seeds) == 1 else None

    def thinned(self, every: int) -> tuple[Surface, float] | None:
        """Return the same at one in ``every`` samples, and their share.

        None where less than 16 would be left, of several batches, or where no sample
        is apart.
        """
        batch = self.single
        size = 0 if batch is None else self._batches.samples(batch)
        if batch is None or self.ranks.spread or size < _FEW * every:
            return None
        chosen = representatives(self, batch, size, every)
        few = tuple(sliced(part, size, chosen) for part in batch)
        if few[0] is None or few[1] is None:
            return None
        other = copy.copy(self)
        other._batches = Reading(few, self.model)
        return other, len(chosen) / size

    @contextlib.contextmanager
    def held(self, seed: int | None) -> Iterator[None]:
        """Put modes and kernels in place: forward and backward passes go inside."""
        with alone_with(self.model), contextlib.ExitStack() as stack:
            stack.enter_context(full_precision())
            stack.enter_context(modes(self._modes))
            if seed is None:
                stack.enter_context(at_sites(self.model, fresh))
            else:
                stack.enter_context(dropout_on(self.model))
                stack.enter_context(unmoved_buffers(self.model))
            # Fused attention and recurrent kernels have no second derivative.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(self.operations)
            # Compiled code has no second derivative either.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if any(isinstance(m, nn.RNNBase) for m in self._modes):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def outputs(
        self, params: Mapping[str, Tensor], batch: Batch, place: int, seed: int | None
    ) -> Any:
        """Run the model at ``params`` on the batch of that place, inside ``held``."""
        go_on("forward")
        if torch.is_grad_enabled():  # derivatives are asked for
            check_derivatives()
        state, arguments = self._at(params), Inputs.of(batch[0]).renewed()
        # The first batch has the masks of `frozen_masks(model, seed)`.
        place = place * self.ranks.size + self.ranks.rank
        own = 0 if seed is None else seed + _STRIDE * place
        with preserved_rng(self.model, own % 2**63):
            return arguments.call(lambda *own: call_with(self.model, state, *own))

    def _at(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the model: these parameters, and buffers that may be moved."""
        buffers = {n for n, _ in self.model.named_buffers()}
        rest = {**self._rest, **params}
        return {n: x.clone() if n in buffers else x for n, x in rest.items()}

    @contextlib.contextmanager
    def backward(self, params: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Let blocks that a backward pass computes again find what they ran at.

        ``params`` are those of this surface if None.
        """
        go_on("backward")
        if not self.operations.again:
            yield
            return
        own = self.params if params is None else params
        at = self._at({n: x.detach().requires_grad_() for n, x in own.items()})
        with substituted(self.model, at):
            yield

    def risk(
        self, params: Mapping[str, Tensor], batch: Batch, place: int, seed: int | None
    ) -> Tensor:
        """Return the loss at ``params`` on one batch, inside ``held``."""
        return self.loss_of(self.outputs(params, batch, place, seed), batch[1])

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs, which must be all that it depends on."""
        if not self._closed and tracing.eager():
            check_penalties(self.caller, self.model, self.loss, outputs, targets)
            self._closed = True
        return self.loss(outputs, targets)

    def average(
        self,
        function: Callable[[Batch, int, int | None], Tensor],
        seed: int | None = None,
        bare: bool = False,
    ) -> Tensor:
        """Return the mean (or sum) over samples, of all ranks, of what a function says.

        It is called inside ``held`` with a batch, its place and the seed, and returns a
        new tensor of a fixed shape; ``bare``, it runs nothing of the model's, and is
        called outside.

        Raises:
            ValueError: If there is no sample.
        """
        total: Tensor | None = None
        weight = 0.0
        error: Exception | None = None
        try:
            with contextlib.closing(self._batches.__iter__()) as batches:
                for place, batch in enumerate(batches):
                    if not (own := self._batches.weight(batch)):
                        continue
                    share = 1.0 if self.loss.reduction == "sum" else own
                    with contextlib.nullcontext() if bare else self.held(seed):
                        found = function(batch, place, seed).mul_(share)
                    total = found if total is None else total.add_(found)
                    weight += share
        except Exception as err:
            error = err
        like = next(iter(self.params.values()))
        total, weight = self.ranks.sum(total, weight, error, like)
        if total is None or not weight:
            raise ValueError(
                f"{self.caller}: expected at least one batch with samples, got none"
            )
        return total if self.loss.reduction == "sum" else total.div_(weight)

    def shares(self) -> list[tuple[Batch, float]] | None:
        """Batches with what each counts for; None where reading them has to tell."""
        adds = self.loss.reduction == "sum"
        return None if self.ranks.spread else self._batches.shares(adds)

    def value(self, params: Mapping[str, Tensor]) -> float:
        """Return the loss at ``params``, averaged over batches and masks."""

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            found = self.risk(params, batch, place, seed).detach()
            return found.to(torch.float64, copy=True)

        with torch.no_grad():
            found = [float(self.average(one, seed)) for seed in self.seeds]
        return sum(found) / len(found)

    def gradient(
        self, seed: int | None = None, params: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the gradient at one draw of masks, averaged over batches, ``[P]``."""
        at = self.params if params is None else params

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            with torch.enable_grad():
                leaves = {n: x.detach().requires_grad_() for n, x in at.items()}
                risk = self.checked(self.risk(leaves, batch, place, seed), place)
                with explained(), self.backward(at):
                    found = torch.autograd.grad(
                        risk, list(leaves.values()), materialize_grads=True
                    )
            return to_vector(dict(zip(leaves, found, strict=True)))

        return self.average(one, seed)

    def checked(self, risk: Tensor, place: int) -> Tensor:
        """Return the loss of a batch if derivatives of it mean something."""
        check_risk(self.caller, risk, place)
        return risk
