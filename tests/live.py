"""Bytes of tensors that live at a time, by what operators return."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts the memory of tensors that are made inside the context.

    Args:
        known: Tensors whose memory does not count.

    Attributes:
        most: The most bytes that lived at a time.
    """

    def __init__(self, known=()):
        super().__init__()
        self.most = 0
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._given = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                held = StorageWeakRef(storage), storage.nbytes()
                self._given[storage.data_ptr()] = held
        living = {k: v for k, v in self._given.items() if not v[0].expired()}
        self._given = living
        own = sum(n for k, (_, n) in living.items() if k not in self._known)
        self.most = max(self.most, own)
        return out
