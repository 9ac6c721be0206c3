"""Floor 2: flatness of the loss, with dropout off and errors stated."""

from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.density import Density, spectral_density
from torch_dropout_ir.sharpness.directions import filter_normalized_direction
from torch_dropout_ir.sharpness.flatness import (
    Ascent,
    IntervalFlatness,
    adaptive_sharpness,
    interval_flatness,
    sam_sharpness,
)
from torch_dropout_ir.sharpness.lanczos import Eigen, top_eigenvalues
from torch_dropout_ir.sharpness.landscape import interpolate, loss_plane, loss_slice
from torch_dropout_ir.sharpness.operators import ggn, hessian, used_parameters
from torch_dropout_ir.sharpness.trace import TraceEstimate, trace

__all__ = [
    "Ascent",
    "CurvatureOperator",
    "Density",
    "Eigen",
    "IntervalFlatness",
    "TraceEstimate",
    "adaptive_sharpness",
    "filter_normalized_direction",
    "ggn",
    "hessian",
    "interpolate",
    "interval_flatness",
    "loss_plane",
    "loss_slice",
    "sam_sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "used_parameters",
]
