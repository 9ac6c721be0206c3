"""Tensors that are sharded over ranks, and a copy of their model with whole ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(x: object) -> bool:
    """Whether a tensor is distributed over ranks."""
    return hasattr(x, "full_tensor") and hasattr(x, "device_mesh")


def gathered(x: Any) -> Tensor:
    """Return the whole of a tensor that is distributed over ranks; else itself."""
    return x.full_tensor() if is_sharded(x) else x


def gathered_model(model: nn.Module) -> nn.Module:
    """Return a model that measures can run alone: itself, or a copy with whole tensors.

    A sharded model gathers its parameters in hooks of its own, which the transforms of
    ``torch.func`` cannot follow. The copy has the same classes, names and modes.
    """
    if any(is_sharded(x) for x in model.parameters()):
        return _Copy().module(model)
    return model


class _Copy:
    """Copies modules; what is shared stays shared."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        kind = type(module)
        if kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2:
            kind = kind.__bases__[1]  # what `fully_shard` has made a subclass of
        twin = self._modules[id(module)] = kind.__new__(kind)
        twin.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers"):
            own = module.__dict__[name].items()
            twin.__dict__[name] = {n: self._tensor(x) for n, x in own}
        inner = module._modules.items()
        twin._modules = {n: m and self.module(m) for n, m in inner}
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = module.__dict__[name]
            places = {k: getattr(h, "__module__", None) or "" for k, h in hooks.items()}
            own = [k for k in hooks if not places[k].startswith("torch.distributed")]
            kept = {k: hooks[k] for k in own}
            twin.__dict__[name] = type(hooks)(kept)
        return twin

    def _tensor(self, x: Tensor | None) -> Tensor | None:
        if x is None or id(x) in self._tensors:
            return None if x is None else self._tensors[id(x)]
        whole: Tensor = gathered(x.detach()).clone()
        if isinstance(x, nn.Parameter):
            whole = nn.Parameter(whole, requires_grad=x.requires_grad)
        self._tensors[id(x)] = whole
        return whole
