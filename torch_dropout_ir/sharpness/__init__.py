"""Floor 2: flatness of the loss, with dropout off and errors stated."""

from torch_dropout_ir.sharpness.covariance import (
    Covariance,
    gradient_covariance,
    trajectory_covariance,
)
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
from torch_dropout_ir.sharpness.noise import (
    Alignment,
    VarianceFlatness,
    hessian_variance_alignment,
    variance_flatness,
)
from torch_dropout_ir.sharpness.operators import ggn, hessian, used_parameters
from torch_dropout_ir.sharpness.trace import TraceEstimate, trace

__all__ = [
    "Alignment",
    "Ascent",
    "Covariance",
    "CurvatureOperator",
    "Density",
    "Eigen",
    "IntervalFlatness",
    "TraceEstimate",
    "VarianceFlatness",
    "adaptive_sharpness",
    "filter_normalized_direction",
    "ggn",
    "gradient_covariance",
    "hessian",
    "hessian_variance_alignment",
    "interpolate",
    "interval_flatness",
    "loss_plane",
    "loss_slice",
    "sam_sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "trajectory_covariance",
    "used_parameters",
    "variance_flatness",
]
