"""Floor 2: what dropout adds to the loss (R_1), and a finite step to that (R_2)."""

from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.gauss_newton import gauss_newton
from torch_dropout_ir.regularizers.gradient_norm import GradientNorm, gradient_norm
from torch_dropout_ir.regularizers.last_layer import last_layer
from torch_dropout_ir.regularizers.leave_one_out import leave_one_out
from torch_dropout_ir.regularizers.modified_loss import modified_loss
from torch_dropout_ir.regularizers.monte_carlo import monte_carlo
from torch_dropout_ir.regularizers.second_order import second_order

__all__ = [
    "Estimate",
    "GradientNorm",
    "gauss_newton",
    "gradient_norm",
    "last_layer",
    "leave_one_out",
    "modified_loss",
    "monte_carlo",
    "second_order",
]
