"""Floor 4: records as TensorBoard events."""

from torch_dropout_ir.tensorboard.sink import TensorBoardSink

__all__ = ["TensorBoardSink"]
