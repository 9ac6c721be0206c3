"""Floor 1: the places of a model where dropout acts, by name.

Semantics:

* A site is a module of torch's ``Dropout``, ``Dropout1d``, ``Dropout2d`` or
  ``Dropout3d``, or of a subclass that has the forward pass of one of them or is ours.
  It multiplies its input by ``1 + eta``.
* ``eta`` is drawn per element by ``Dropout``, per channel by the others: their mask
  has the shape ``[N, C, 1, ...]`` and is shared by all positions.
* A module that is used several times in one forward pass is one site, whose uses add.
* Dropout that is no module of its own (inside attention, recurrent cells, or called as
  a function) is not a site; :func:`unobservable` lists what can be told from outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

CHANNEL_DROPOUT: Final = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# At any rank but this one torch reads the input as one sample without batch dimension.
_BATCHED_RANK: Final = ((nn.Dropout1d, 3), (nn.Dropout3d, 5))
_OTHER_NOISE: Final = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclasses.dataclass(frozen=True)
class Site:
    """One dropout module of a model.

    Attributes:
        name: Its name in ``model.named_modules()``.
        module: The module itself.
    """

    name: str
    module: nn.Module

    @property
    def p(self) -> float:
        """Probability of dropping, as the module has it now."""
        return float(self.module.p)  # type: ignore[arg-type]

    @property
    def variance(self) -> float:
        """Variance of the noise, ``p / (1 - p)``.

        Raises:
            ValueError: If the site drops everything.
        """
        if not 0.0 <= self.p < 1.0:
            raise ValueError(
                f"dropout site `{self.name}`: the noise has a variance for `p` in "
                f"[0, 1), got {self.p}. A site with p = 1 cuts the network."
            )
        return self.p / (1.0 - self.p)

    def mask_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the mask that an input of ``shape`` receives."""
        return mask_shape(self.module, shape)


def _own_dims(module: nn.Module, shape: torch.Size) -> int:
    """Number of leading dimensions along which mask elements are independent."""
    if not isinstance(module, CHANNEL_DROPOUT):
        return len(shape)
    one = any(isinstance(module, t) and len(shape) != r for t, r in _BATCHED_RANK)
    return 1 if one else min(2, len(shape))


def mask_shape(module: nn.Module, shape: torch.Size) -> tuple[int, ...]:
    """Return the mask's shape for an input of ``shape``: 1 where it is shared."""
    own = _own_dims(module, shape)
    return (*shape[:own], *(1,) * (len(shape) - own))


def num_units(module: nn.Module, shape: torch.Size) -> int:
    """Return the number of units: features, or channels for channel dropout."""
    own = _own_dims(module, shape)
    return shape[own - 1] if own else 1


def active_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites that draw noise in training: some may be kept in evaluation.

    Where the whole model is in evaluation mode, all count.
    """
    return tuple(
        site
        for site in find_sites(model)
        if site.p > 0 and (site.module.training or not model.training)
    )


def plain_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return torch's own forward of a dropout module's kind; None for other modules."""
    for kind in (nn.Dropout, *CHANNEL_DROPOUT):
        if isinstance(module, kind):
            return kind.forward
    return None


def _is_site(module: nn.Module) -> bool:
    """Whether the noise is torch's: a subclass with another forward may draw others."""
    own = getattr(type(module).forward, "draws_as_torch", False)
    return own or type(module).forward is plain_forward(module)


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the dropout modules of ``model`` in the order of ``named_modules()``."""
    return tuple(
        Site(name, module) for name, module in model.named_modules() if _is_site(module)
    )


def unobservable(model: nn.Module) -> dict[str, str]:
    """Return the modules that draw dropout noise out of sight, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        if plain_forward(module) is not None and not _is_site(module):
            reasons[name] = (
                f"{type(module).__name__} has a forward of its own: what it multiplies "
                "by is not known"
            )
        elif isinstance(module, _OTHER_NOISE):
            reasons[name] = (
                f"{type(module).__name__} shifts what it drops: its noise is not "
                "multiplicative, and the formulas of R_1 do not hold for it"
            )
        elif isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            reasons[name] = "attention weights are dropped inside the attention kernel"
        elif isinstance(module, nn.RNNBase) and module.dropout > 0:
            reasons[name] = f"{type(module).__name__} drops between its own layers"
    return reasons


def noise_variance(p: float) -> float:
    """Return ``p / (1 - p)``.

    Raises:
        ValueError: If ``p`` is outside ``[0, 1)``.
    """
    if math.isnan(p) or not 0.0 <= p < 1.0:
        raise ValueError(f"expected `p` (probability of dropping) in [0, 1), got {p}")
    return p / (1.0 - p)
