"""Floor 4: the demonstration: one network, with and without dropout."""

from torch_dropout_ir.demo.data import Settings
from torch_dropout_ir.demo.run import run_demo

__all__ = ["Settings", "run_demo"]
