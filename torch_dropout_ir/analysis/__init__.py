"""Floor 3: the analysis that is attached to a model; all state lives on it."""

from torch_dropout_ir.analysis.analysis import Analysis
from torch_dropout_ir.analysis.records import Histogram, Image, Record, Sink
from torch_dropout_ir.analysis.snapshot import Measure, Snapshot

__all__ = ["Analysis", "Histogram", "Image", "Measure", "Record", "Sink", "Snapshot"]
