"""What one training step shows: inputs, targets, masks; and nothing of it moved.

Semantics:

* Only the root module carries hooks between steps. Hooks on the sites and the global
  look-out for the loss live inside a step that measures, and are gone after it.
* Foreign dropout is observed by what it does to ones from the same generator state;
  the state after the pass is the one that the pass itself left.
* Copies and pickles of the model carry a hook that does nothing.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from torch_dropout_ir.analysis.delivery import warn
from torch_dropout_ir.functional import Inputs
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.nn import Dropout, Dropout1d, Dropout2d, Dropout3d
from torch_dropout_ir.sites import Site, mask_shape, num_units, plain_forward

OURS = (Dropout, Dropout1d, Dropout2d, Dropout3d)


class RootHook:
    """A hook whose copies are inert, so that a model can be copied and pickled.

    Args:
        call: What to call; None in copies.
        owner: What has to live as long as the model does.
    """

    def __init__(
        self, call: Callable[..., None] | None = None, owner: object = None
    ) -> None:
        self.call = call
        self.owner = owner

    def __call__(self, *args: Any) -> None:
        """Forward to the capture, if this is no copy."""
        if self.call is not None:
            self.call(*args)

    def __reduce__(self) -> tuple[type[RootHook], tuple[()]]:
        return RootHook, ()


class Capture:
    """Watches the forward passes of a model in training mode.

    Args:
        watched: The module that the script calls.
        sites: The dropout sites to observe.

    Attributes:
        inputs: Arguments of the last training pass.
        outputs: What it returned, while targets are being looked for.
        targets: Targets that a loss module received with those outputs.
        loss_module: That loss module.
        statistics: Mask statistics of the foreign sites observed.
        want_masks: Whether to observe the masks of the coming pass.
        want_targets: Whether to look for the targets of the coming pass.
        paused: True while the analysis itself runs the model.
    """

    def __init__(self, watched: nn.Module, sites: tuple[Site, ...]) -> None:
        self.watched = watched
        self.sites = sites
        self.inputs: Inputs | None = None
        self.outputs: Any = None
        self.targets: Any = None
        self.loss_module: nn.Module | None = None
        self.statistics: dict[str, MaskStatistics] = {}
        self.want_masks = True
        self.want_targets = True
        self.paused = False
        self._seconds = 0.0
        self._versions: list[int] = []
        self._states: dict[str, Tensor] = {}
        self._step = contextlib.ExitStack()
        self._pass = contextlib.ExitStack()
        self._root = contextlib.ExitStack()

    def attach(self, owner: object) -> None:
        """Put the two hooks on the root module; ``owner`` lives as long as they do."""
        before, after = RootHook(self._before, owner), RootHook(self._after, owner)
        self._keep(
            self._root,
            self.watched.register_forward_pre_hook(before, with_kwargs=True),
        )
        self._keep(
            self._root,
            self.watched.register_forward_hook(
                after, with_kwargs=True, always_call=True
            ),
        )

    def detach(self) -> None:
        """Remove every hook and let go of what was seen."""
        for stack in (self._pass, self._step, self._root):
            stack.close()
        self.inputs = self.outputs = self.targets = None

    def end_step(self) -> None:
        """Stop looking for the loss; the batch stays until the next one."""
        self._step.close()
        self.outputs = None

    def spent(self) -> float:
        """Return the seconds spent on observing masks since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @staticmethod
    def _keep(stack: contextlib.ExitStack, handle: RemovableHandle) -> None:
        stack.callback(handle.remove)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.paused or not self.watched.training or torch.compiler.is_compiling():
            return
        self.end_step()
        self._pass.close()
        self.inputs, self.targets = Inputs(args, kwargs), None
        self._versions = _versions(self.inputs)
        for site in self.sites if self.want_masks else ():
            if isinstance(site.module, OURS):
                continue
            note, observe = self._note_state(site), self._observe(site)
            before = site.module.register_forward_pre_hook(RootHook(note))
            after = site.module.register_forward_hook(RootHook(observe), prepend=True)
            self._keep(self._pass, before)
            self._keep(self._pass, after)

    def _after(
        self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], outputs: Any
    ) -> None:
        if self.paused or torch.compiler.is_compiling():
            return
        self._pass.close()
        if self.inputs is not None and _versions(self.inputs) != self._versions:
            self.inputs = None  # the model writes on its inputs: no second pass
        if self.watched.training and self.want_targets and isinstance(outputs, Tensor):
            self.outputs = outputs
            look = weakref.WeakMethod(self._look)

            def hook(*call: Any) -> None:
                method = look()
                if method is not None:
                    method(*call)

            self._keep(self._step, register_module_forward_hook(hook))

    def _look(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """See whether this module is the loss: from the outputs to one number."""
        if len(args) < 2 or args[0] is not self.outputs:
            return
        if isinstance(result, Tensor) and result.numel() == 1 and result.requires_grad:
            self.loss_module, self.targets = module, args[1]
            self.end_step()

    def _note_state(self, site: Site) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if site.module.training and args and isinstance(args[0], Tensor):
                self._states[site.name] = _generator_state(args[0].device)

        return note

    def _observe(self, site: Site) -> Callable[..., None]:
        draw = plain_forward(site.module)
        assert draw is not None  # it is a site

        def observe(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            state = self._states.pop(site.name, None)
            if state is None or not args[0].numel():
                return
            started = time.perf_counter()
            x = args[0].detach()
            shape = mask_shape(module, x.shape)
            ones = torch.ones(shape, dtype=x.dtype, device=x.device)
            after = _generator_state(ones.device)
            _set_generator_state(ones.device, state)
            try:
                with torch.no_grad():
                    mask = draw(module, ones) != 0
            finally:
                _set_generator_state(ones.device, after)
            counts = mask.reshape(-1, num_units(module, x.shape)).sum(0)
            drawn = MaskStatistics.of_units(counts, mask.numel(), site.p)
            seen = self.statistics.get(site.name, MaskStatistics())
            self.statistics[site.name] = seen + drawn
            self._seconds += time.perf_counter() - started

        def safely(*call: Any) -> None:
            try:
                observe(*call)
            except Exception as err:  # this runs inside the user's forward pass
                warn(f"the mask of site {site.name!r} was not observed: {err}")

        return safely


def _versions(inputs: Inputs) -> list[int]:
    """Version counters of the tensors among the inputs."""
    tensors = [x for x in (*inputs.args, *inputs.kwargs.values()) if _counted(x)]
    return [x._version for x in tensors]


def _counted(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_inference()


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
