"""Floor 1: what a pass has to know of a model's modules, seen in one walk.

A small pass is run through in less time than a few such walks take.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import nn

from torch_dropout_ir.sites import (
    LAYERS,
    QUIET,
    ROW_WISE,
    Site,
    is_noise,
    is_site,
    named_modules,
    uncompiled,
)

_ONCE: Final = (nn.Hardsigmoid, nn.EmbeddingBag)


@dataclasses.dataclass
class Survey:
    """What a walk of a model's modules shows; it is stale when the model has changed.

    Attributes:
        model: The model, inside of a wrapper of :func:`torch.compile`.
        modules: Its modules by name, in the order of ``model.named_modules()``.
        sites: Those that may draw noise in training.
        noise: Those that do nothing but draw noise, of a kind that is known.
        callers: Those that may call dropout, by name.
        others: Those that are no layers of torch, by name.
        has_buffers: Whether one of them holds a buffer.
        in_place: Whether one of them writes on its input.
        foreign: Whether one of them may run code that does more than draw noise.
        may_write: Whether a pass may write on parameters.
        row_wise: Whether rows stay apart in all of them, with nobody's hooks.
        alone: Whether no code runs in it but that of torch's layers.
        once: Whether one of them may run what torch differentiates but once.
    """

    model: nn.Module
    modules: list[tuple[str, nn.Module]]
    sites: list[Site] = dataclasses.field(default_factory=list)
    noise: list[nn.Module] = dataclasses.field(default_factory=list)
    callers: list[tuple[str, nn.Module]] = dataclasses.field(default_factory=list)
    others: list[tuple[str, nn.Module]] = dataclasses.field(default_factory=list)
    has_buffers: bool = False
    in_place: bool = False
    foreign: bool = False
    may_write: bool = False
    row_wise: bool = True
    alone: bool = True
    once: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Walk the modules of a model as it is now."""
        model = uncompiled(model)
        seen = cls(model, named_modules(model))
        compiling = torch.compiler.is_compiling()
        for named in seen.modules:
            module = named[1]
            kind, own = type(module), module.__dict__
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
            altered = hooked or "forward" in own or "_compiled_call_impl" in own
            if kind not in LAYERS:
                seen.others.append(named)
                altered = True
            noise = kind not in QUIET and seen._add_noise(*named)
            if kind not in ROW_WISE:
                seen.row_wise = False
            if kind in _ONCE:
                seen.once = True
            if altered or compiling:
                seen.callers.append(named)
                if hooked or not noise:
                    seen.foreign = True
            if own.get("max_norm") is not None:
                seen.may_write = True
            if module._buffers:  # which a traced one holds elsewhere
                seen.has_buffers = True
            if own.get("inplace"):
                seen.in_place = True
        seen.may_write = seen.may_write or seen.foreign
        place = nn.modules.module  # where hooks on every module are
        hooked = place._global_forward_hooks or place._global_forward_pre_hooks
        if seen.callers or hooked:  # they may do anything
            seen.row_wise = seen.alone = False
            seen.once = True
        return seen

    def _add_noise(self, name: str, module: nn.Module) -> bool:
        """Add a module that draws noise; whether it does."""
        plain = type(module) in LAYERS  # torch's own dropout, as it is
        noise = plain or is_noise(module)
        if noise:
            self.noise.append(module)
            if plain or is_site(module):
                self.sites.append(Site(name, module))
        return noise
