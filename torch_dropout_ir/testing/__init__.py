"""Floor 4: the regularizer formula, tested on a model of your own.

Truth comes from every mask, weighted by its probability; what each estimator claims is
held against it. :mod:`hypothesis` is needed for the strategies alone.
"""

from torch_dropout_ir.testing.enumeration import enumerate_masks, expected_dropout_loss
from torch_dropout_ir.testing.findings import Finding, RegularizerReport
from torch_dropout_ir.testing.report import check_regularizer
from torch_dropout_ir.testing.strategies import (
    batches,
    drop_probabilities,
    networks,
    problems,
)

__all__ = [
    "Finding",
    "RegularizerReport",
    "batches",
    "check_regularizer",
    "drop_probabilities",
    "enumerate_masks",
    "expected_dropout_loss",
    "networks",
    "problems",
]
