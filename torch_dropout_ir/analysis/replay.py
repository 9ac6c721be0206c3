"""The masks of a training pass, seen in a second pass from the same generator state.

Semantics:

* The script's own pass is not touched. It is run again, without autograd and with
  copies of the buffers, from the state that the generators had at its start; then they
  are given back as they were.
* A mask is what torch itself draws, as it passes at dispatch level: of dropout modules
  and functions, of attention computed in full, of recurrent kernels on the CPU.
* Every other random number that the pass draws is counted and told, by the module that
  draws it: it is noise that no measure takes away.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir.analysis.attributes import Generators
from torch_dropout_ir.analysis.followed_loss import inside
from torch_dropout_ir.dropout_calls import (
    KINDS,
    OTHER_NOISE,
    RECURRENT,
    recurrent_dropout,
)
from torch_dropout_ir.functional import call
from torch_dropout_ir.generators import Standing, preserved_rng
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.module_calls import ModuleCalls
from torch_dropout_ir.nn import Dropout, Dropout1d, Dropout2d, Dropout3d
from torch_dropout_ir.ops import mask_unpack
from torch_dropout_ir.sharpness.frozen import unrecorded
from torch_dropout_ir.sites import Site, find_sites, is_stochastic_depth, named_modules
from torch_dropout_ir.substitution import unmoved_gradients
from torch_dropout_ir.turns import alone_with

_FUSED: Final = (
    "its mask is inside a fused kernel: R_1 counts it, mask statistics do not"
)
_ALL_DROPPED: Final = "at p = 1 it drops everything, and draws no mask"
NO_DROPOUT: Final = (
    "random numbers that no dropout function draws: they stay in R_S, drawn afresh"
)
_OFF: Final = "its noise is not that of dropout: R_S and R_1 are taken with it off"
_NO_SAMPLE: Final = "no mask was drawn in the last pass looked at: its input was empty"
OURS = (Dropout, Dropout1d, Dropout2d, Dropout3d)
_aten = torch.ops.aten
_ours = torch.ops.torch_dropout_ir


class OtherDraws(RuntimeError):
    """A second pass draws other random numbers than the first."""


class Replay:
    """What a training pass drew.

    Attributes:
        statistics: Mask statistics by site name, our own layers' left out.
        calls: The calls of dropout functions, by name.
        unseen: Noise that is no mask we can see, by place, with the reason.
        outputs: What the model returned.
    """

    def __init__(self) -> None:
        self.outputs: Any = None
        self.statistics = defaultdict[str, MaskStatistics](MaskStatistics)
        self.calls: dict[str, Site] = {}
        self.unseen: dict[str, str] = {}

    def add(self, site: Site, mask: Tensor) -> None:
        """Count a mask, True where kept."""
        if not mask.numel():
            return
        units = site.num_units(mask.shape)
        kept = mask.reshape(-1, units).sum(0)
        drawn = MaskStatistics.of_units(kept, mask.numel(), site.p)
        self.statistics[site.name] += drawn


def replay(
    model: nn.Module, inputs: Inputs, start: Generators, end: Standing | None = None
) -> Replay:
    """Return what a training pass draws, run again with generators as at its ``start``.

    ``end`` is where torch's stood at its end, where that is known.

    Raises:
        OtherDraws: If it draws otherwise than the pass did.
    """
    found = Replay()
    with (
        preserved_rng(model),
        alone_with(model),
        torch.no_grad(),
        unrecorded(model),  # our own layers have counted the pass itself
        unmoved_gradients(model),
        start.autocast(),
    ):
        start.restore()
        with _Draws(model, found) as draws, _Calls(model, found, draws) as calls:
            found.outputs = call(model, inputs)
        if end is not None and end.moved():
            raise OtherDraws("a second pass draws other random numbers")
        calls.idle()
        found.unseen.update({f":{name}": NO_DROPOUT for name in start.others_moved()})
    return found


def own_statistics(model: nn.Module) -> dict[str, MaskStatistics]:
    """Return what our own layers in a model have counted, by site name."""
    ours = {s.name: s.module for s in find_sites(model) if isinstance(s.module, OURS)}
    found = {name: module.statistics for name, module in ours.items()}
    return {name: seen for name, seen in found.items() if seen.num_calls}


class _Draws(TorchDispatchMode):
    """Takes the masks of the site that draws, and counts what nobody accounts for."""

    def __init__(self, model: nn.Module, found: Replay) -> None:
        super().__init__()
        self._model = model
        self._found = found
        self.site: Site | None = None
        self.place = ""
        self.reason = NO_DROPOUT  # of what is drawn now; none where it is accounted for
        self._seen = 0

    @contextlib.contextmanager
    def of(self, site: Site, given: Any) -> Iterator[None]:
        """Read what is drawn inside, for these arguments, as the masks of a site."""
        self.site, before = site, self._seen
        try:
            yield
        finally:
            self.site = None
        if self._seen == before:
            drawn = _FUSED if site.p < 1 else _ALL_DROPPED
            some = all(x.numel() for x in inside(given, Tensor))
            self._found.unseen[site.name] = drawn if some else _NO_SAMPLE

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.site is None:
            if torch.Tag.nondeterministic_seeded in func.tags and self.reason:
                return self._counted(func, args, kwargs)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        mask = _mask_of(func, args, out)
        if mask is not None:
            self._seen += 1
            self._found.add(self.site, mask)
        return out

    def _counted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that may draw, as attention without dropout does not."""
        own = any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values()))
        before = Standing(self._model)
        out = func(*args, **kwargs)
        if own or before.moved():
            self._found.unseen[f"{self.place}:{func._schema.name[6:]}"] = self.reason
        return out


def _mask_of(func: Any, args: tuple[Any, ...], out: Any) -> Tensor | None:
    """Return the mask that an operator has drawn, True where kept."""
    if func is _aten.bernoulli_.float:
        return out != 0
    if func is _aten.native_dropout.default:
        return out[1] != 0
    if func is _ours.dropout_forward.default:
        return mask_unpack(out[1], args[0].shape)
    return None


class _Calls(ModuleCalls):
    def __init__(self, model: nn.Module, found: Replay, draws: _Draws) -> None:
        super().__init__(named_modules(model))
        self._model = model
        self._found = found
        self._draws = draws
        self._sites = {id(site.module): site for site in find_sites(model)}
        self._called: set[int] = set()

    def idle(self) -> None:
        """Tell of modules that were not called, though they would have dropped."""
        for key, site in self._sites.items():
            if key not in self._called and site.module.training and site.p > 0:
                self._found.unseen[site.name] = "not called in the last pass looked at"

    def _begin(self, module: nn.Module, args: Any) -> None:
        super()._begin(module, args)
        self._called.add(id(module))
        self._look()
        if is_stochastic_depth(module) and module.training:
            self._take_depth(self._sites[id(module)], args)

    def _take_depth(self, site: Site, args: Any) -> None:
        """Count the mask as what it does to ones: branches may begin at zero."""
        if site.p <= 0 or not (args and isinstance(args[0], Tensor)):
            return
        with preserved_rng(self._model):
            kept = site.module.forward(torch.ones_like(args[0])) != 0
        self._found.add(site, kept.sum_to_size(site.mask_shape(kept.shape)) > 0)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        super()._end(module, args, output)
        self._look()

    def _look(self) -> None:
        """Say who would answer for a draw that is made now."""
        module = self._running[-1][0] if self._running else None
        self._draws.place = "" if module is None else self._names[id(module)]
        by_output = module is not None and is_stochastic_depth(module)
        accounted = by_output or isinstance(module, OURS)
        self._draws.reason = "" if accounted else NO_DROPOUT

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in OTHER_NOISE:
            self._draws.reason = _OFF
            output = func(*args, **kwargs)
            self._look()
            return output
        p = _rate(name, args, kwargs)
        if p <= 0 or not self._draws.reason:
            return func(*args, **kwargs)
        module = self._running[-1][0] if self._running else None
        if id(module) in self._sites:
            site = self._sites[id(module)]
        else:
            own = "dropout" if name == "native_dropout" else name.rstrip("_")
            site = self._site(own, p, KINDS.get(own))
            if name not in RECURRENT:
                self._found.calls[site.name] = site
        with self._draws.of(site, (args, kwargs)):
            return func(*args, **kwargs)


def _rate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the probability at which a call drops; 0 for any other call."""

    def given(place: int, key: str, default: Any) -> Any:
        return args[place] if len(args) > place else kwargs.get(key, default)

    if name in KINDS or name == "native_dropout":
        on = given(2, "training", kwargs.get("train", True))
        return float(given(1, "p", 0.5)) if on else 0.0
    if name == "scaled_dot_product_attention":
        return float(given(4, "dropout_p", 0.0))
    if name in RECURRENT:
        place = recurrent_dropout(args)
        return float(args[place]) if args[place + 1] else 0.0
    return 0.0
