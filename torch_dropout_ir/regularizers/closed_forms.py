"""Closed forms of R_1 from what a pass without noise has shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.sites import Site


def last_layer_form(
    clean: CleanPass, targets: Any, loss: Loss, form: Callable[..., Tensor]
) -> Tensor:
    """Return a closed form of R_1 from the features that a pass has found.

    Raises:
        ValueError: If the model has no single site straight before the last layer, or
            cross-entropy has its classes in another dimension than that layer.
    """
    layer = clean.last_layer
    if layer is None or not _by_element(*clean.uses[0][:2]):
        raise ValueError(
            f"{form.__name__}: expected a single site, an `nn.Dropout` whose output "
            "goes straight into the last `nn.Linear`, which makes all that the model "
            f"returns, got the sites {[site.name for site, _, _ in clean.uses]}. Use "
            "'gauss_newton', 'second_order' or 'monte_carlo'."
        )
    if loss.kind == "cross_entropy" and clean.outputs.ndim > 2:
        raise ValueError(
            f"{form.__name__}: expected outputs [n, C] for this loss, got "
            f"{list(clean.outputs.shape)}: its classes are in dimension 1, those of "
            "the last layer in the last. Pass a callable that flattens them."
        )
    site, features, _ = clean.uses[0]
    _ = site.variance  # names the site where it drops everything
    return form(
        features,
        layer.weight,
        site.p,
        loss=loss,
        outputs=clean.outputs,
        targets=targets,
    )


def fits_last_layer(clean: CleanPass, loss: Loss) -> bool:
    """Whether a pass has features of which the closed forms can be taken."""
    if clean.last_layer is None or not _by_element(*clean.uses[0][:2]):
        return False
    return loss.kind != "cross_entropy" or clean.outputs.ndim <= 2


def _by_element(site: Site, features: Tensor) -> bool:
    return site.mask_shape(features.shape) == tuple(features.shape)
