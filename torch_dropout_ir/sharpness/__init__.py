"""Floor 2: flatness of the loss, with dropout off and errors stated."""

from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.density import Density, spectral_density
from torch_dropout_ir.sharpness.lanczos import Eigen, top_eigenvalues
from torch_dropout_ir.sharpness.landscape import (
    filter_normalized_direction,
    loss_slice,
)
from torch_dropout_ir.sharpness.operators import ggn, hessian, used_parameters
from torch_dropout_ir.sharpness.trace import TraceEstimate, trace

__all__ = [
    "CurvatureOperator",
    "Density",
    "Eigen",
    "TraceEstimate",
    "filter_normalized_direction",
    "ggn",
    "hessian",
    "loss_slice",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "used_parameters",
]
