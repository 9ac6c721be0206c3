"""What dropout does to a network, measured while it trains.

The public names, grouped by subject. Formulas follow Zhang & Xu, *Implicit
regularization of dropout*, IEEE TPAMI 46(6), 2024 (arXiv:2207.05952).
"""

# The layer
# Measures, usable alone, and what tests them on a model of one's own
from torch_dropout_ir import condensation, regularizers, sharpness, sinks, testing

# One call for any model
from torch_dropout_ir.analysis import Analysis
from torch_dropout_ir.attach import attach_analysis
from torch_dropout_ir.losses import half_squared_error
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.nn import (
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    convert_dropout_,
    restore_dropout_,
)
from torch_dropout_ir.ops import dropout
from torch_dropout_ir.sharpness.frozen import frozen_masks

__all__ = [
    "Analysis",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "MaskStatistics",
    "attach_analysis",
    "condensation",
    "convert_dropout_",
    "dropout",
    "frozen_masks",
    "half_squared_error",
    "regularizers",
    "restore_dropout_",
    "sharpness",
    "sinks",
    "testing",
]
