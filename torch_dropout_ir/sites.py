"""Floor 1: the places of a model where dropout acts, by name.

Semantics:

* A site is a module of torch's ``Dropout``, ``Dropout1d``, ``Dropout2d`` or
  ``Dropout3d``, or of a subclass that has the forward pass of one of them or is ours;
  a module of stochastic depth (torchvision's, or one named ``...DropPath``); or a call
  of a dropout function, named ``<module>:<function>#<k>`` after the module whose
  forward pass makes it. It multiplies its input by ``1 + eta``.
* ``eta`` is drawn per element by ``Dropout``, per channel by the others (their mask has
  the shape ``[N, C, 1, ...]`` and is shared by all positions), per sample by stochastic
  depth.
* A site that is used several times in one forward pass is one site, whose uses add.
* A subclass of a dropout module with a forward of its own is a module like any: what it
  calls of torch's dropout functions is a site, other random numbers are noise.
* :func:`unobservable` lists what can be told from outside of other noise. Calls are
  found in a forward pass alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

CHANNEL_DROPOUT: Final = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FORWARDS: Final = tuple(kind.forward for kind in (nn.Dropout, *CHANNEL_DROPOUT))
# At any rank but this one torch reads the input as one sample without batch dimension.
_BATCHED_RANK: Final = ((nn.Dropout1d, 3), (nn.Dropout3d, 5))
_OTHER_NOISE: Final = (nn.AlphaDropout, nn.FeatureAlphaDropout)
# Torch's own layers that draw no noise, or that of dropout, and call no other module.
_FILES: Final = (
    "activation", "batchnorm", "container", "conv", "distance", "dropout", "flatten",
    "fold", "instancenorm", "linear", "normalization", "padding", "pixelshuffle",
    "pooling", "sparse", "upsampling",
)  # fmt: skip
LAYERS: Final = frozenset(
    kind
    for kind in vars(nn).values()
    if isinstance(kind, type)
    and kind.__module__ in {f"torch.nn.modules.{name}" for name in _FILES}
) - {nn.MultiheadAttention, nn.RReLU, *_OTHER_NOISE} - {
    kind for name, kind in vars(nn).items() if name.startswith("FractionalMaxPool")
}  # fmt: skip
QUIET: Final = LAYERS - {nn.Dropout, *CHANNEL_DROPOUT}
# Those of which a row of the output is of that row alone, of two dimensions and more.
ROW_WISE: Final = frozenset({
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish,
    nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Linear, nn.LogSigmoid, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.Sequential, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """One dropout module of a model, or one call of a dropout function.

    Attributes:
        name: Its name in ``model.named_modules()``, or that of the call.
        module: The module itself, or the one that makes the call.
        kind: For a call, the module class whose masks have its shape.
        rate: For a call, or a use of a module, its probability of dropping.
        keyed: Whether it is a call of our function, whose masks are made of a key.
    """

    name: str
    module: nn.Module
    kind: type[nn.Module] | None = None
    rate: float | None = None
    keyed: bool = False

    @property
    def p(self) -> float:
        """Probability of dropping, as the module has it now or the call had it."""
        if self.rate is not None:
            return self.rate
        p = getattr(self.module, "p", None)
        return float(getattr(self.module, "drop_prob", 0.0) if p is None else p)

    @property
    def variance(self) -> float:
        """Variance of the noise, ``p / (1 - p)``; raises if it drops everything."""
        p = self.p
        if not 0.0 <= p < 1.0:
            raise ValueError(
                f"dropout site `{self.name}`: the noise has a variance for `p` in "
                f"[0, 1), got {p}. A site with p = 1 cuts the network."
            )
        return p / (1.0 - p)

    def mask_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the mask that an input of ``shape`` receives."""
        if (self.kind or type(self.module)) is nn.Dropout:
            return shape
        return mask_shape(self.module, shape, self.kind)

    def num_units(self, shape: torch.Size) -> int:
        """Return the number of units that an input of ``shape`` has."""
        return num_units(self.module, shape, self.kind)


def _own_dims(
    module: nn.Module, shape: torch.Size, kind: type[nn.Module] | None
) -> int:
    """Number of leading dimensions along which mask elements are independent."""
    kind = type(module) if kind is None else kind
    if is_stochastic_depth(module) and kind is type(module):
        by_sample = getattr(module, "mode", "row") == "row"
        return min(1, len(shape)) if by_sample else 0
    if not issubclass(kind, CHANNEL_DROPOUT):
        return len(shape)
    one = any(issubclass(kind, t) and len(shape) != r for t, r in _BATCHED_RANK)
    return 1 if one else min(2, len(shape))


def mask_shape(
    module: nn.Module, shape: torch.Size, kind: type[nn.Module] | None = None
) -> tuple[int, ...]:
    """Return the mask's shape for an input of ``shape``: 1 where it is shared."""
    own = _own_dims(module, shape, kind)
    return (*shape[:own], *(1,) * (len(shape) - own))


def num_units(
    module: nn.Module, shape: torch.Size, kind: type[nn.Module] | None = None
) -> int:
    """Return the number of units: features, or channels for channel dropout."""
    own = _own_dims(module, shape, kind)
    if is_stochastic_depth(module) and kind is None:
        return 1  # the branch; samples are its rows
    return shape[own - 1] if own else 1


def is_stochastic_depth(module: nn.Module) -> bool:
    """Whether a module drops whole branches and scales what it keeps."""
    name = type(module).__name__
    if name == "StochasticDepth":
        return hasattr(module, "p") and hasattr(module, "mode")
    if not name.endswith("DropPath"):  # first: what a module lacks is slow to ask for
        return False
    rate = getattr(module, "drop_prob", None)
    return isinstance(rate, (int, float)) and getattr(module, "scale_by_keep", True)


def active_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites that draw noise in training: some may be kept in evaluation.

    Where the whole model is in evaluation mode, all count.
    """
    return tuple(
        site
        for site in find_sites(model)
        if site.p != 0 and (site.module.training or not model.training)
    )


def is_site(module: nn.Module) -> bool:
    """Whether its noise is torch's: a subclass with another forward may draw others."""
    if type(module) in QUIET or isinstance(module, torch.jit.ScriptModule):
        return False
    if is_stochastic_depth(module):
        return True
    own = getattr(type(module).forward, "draws_as_torch", False)
    return own or type(module).forward in _FORWARDS


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the dropout modules of ``model`` in the order of ``named_modules()``."""
    modules = named_modules(uncompiled(model))
    return tuple(Site(name, module) for name, module in modules if is_site(module))


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``model.named_modules()`` does, several times as fast.

    Small passes are run through in less time than its nested generators are.
    """
    found, seen = [], set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        if not module._modules:
            continue
        before = f"{name}." if name else ""
        stack += [
            (before + key, x)
            for key, x in reversed(module._modules.items())
            if x is not None
        ]
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper of :func:`torch.compile`, or the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model that is an nn.Module, got {type(model).__name__}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "expected a model that runs in Python, got a scripted one (nothing sees "
            "its calls, nor changes its parameters). Give the model that was scripted."
        )
    # What a module lacks is slow to ask for.
    inner = vars(model).get("_modules", {}).get("_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def is_noise(module: nn.Module) -> bool:
    """Whether a module does nothing but draw noise, of a kind that is known."""
    if type(module) in QUIET:
        return False
    return isinstance(module, _OTHER_NOISE) or is_site(module)


def unobservable(model: nn.Module) -> dict[str, str]:
    """Return the modules that draw dropout noise out of sight, with the reason."""
    return out_of_sight(named_modules(uncompiled(model)))


def out_of_sight(named: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Return what :func:`unobservable` does, of modules by name."""
    reasons = {}
    for name, module in named:
        if type(module) in LAYERS:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            if "Dropout" in module.original_name:
                reasons[name] = "its code is scripted: calls in it are not seen"
        elif isinstance(module, _OTHER_NOISE):
            reasons[name] = (
                f"{type(module).__name__} shifts what it drops: its noise is not "
                "multiplicative, and the formulas of R_1 do not hold for it"
            )
        elif isinstance(module, nn.RNNBase) and module.dropout > 0:
            reasons[name] = f"{type(module).__name__} drops between its own layers"
    return reasons


def noise_variance(p: float) -> float:
    """Return ``p / (1 - p)``; raise a ValueError if ``p`` is outside ``[0, 1)``."""
    if math.isnan(p) or not 0.0 <= p < 1.0:
        raise ValueError(f"expected `p` (probability of dropping) in [0, 1), got {p}")
    return p / (1.0 - p)
