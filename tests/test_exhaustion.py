"""Where memory runs out nothing is tried that needs more."""

import re

import pytest
import torch
from torch import nn

from tests.passes import take_in_parts
from torch_dropout_ir import sharpness
from torch_dropout_ir.regularizers import (
    gradient_norm,
    gradient_pairs,
    modified_loss,
)
from torch_dropout_ir.sharpness import curvature

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"),
    MemoryError("no room"),
]
LOSS = "cross_entropy"


class Exhausts(nn.Module):
    """Runs out of memory in one of its calls."""

    def __init__(self, norm):
        super().__init__()
        norms = [nn.BatchNorm1d(6)] if norm else []
        self.body = nn.Sequential(
            nn.Linear(4, 6), *norms, nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6),
            nn.GELU(), nn.Dropout(0.3), nn.Linear(6, 3),
        )  # fmt: skip
        self.calls, self.last, self.error = 0, 0, None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.last:
            raise self.error
        return self.body(x)


def modified(kind):
    given = {"lr": 0.1} if kind == "regu" else {"r1": "gauss_newton"}
    return lambda net, batch: modified_loss(
        net, batch, LOSS, kind=kind, max_bytes=0, **given
    )


CALLS = {
    "regu": modified("regu"),
    "L1": modified("L1"),
    "gradient_norm": lambda net, batch: gradient_norm(net, batch, LOSS, lr=0.1),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=range(4))
@pytest.mark.parametrize("name", CALLS)
def test_it_is_raised_at_once(monkeypatch, name, error, norm):
    monkeypatch.setattr(gradient_pairs, "LEAST", 0)
    take_in_parts(monkeypatch)
    net, call = Exhausts(norm), CALLS[name]
    batch = torch.randn(40, 4), torch.arange(40) % 3
    call(net, batch)
    total, net.error = net.calls, error
    for net.last in range(1, total + 1):
        net.calls = 0
        with pytest.raises(type(error), match=re.escape(str(error))):
            call(net, batch)
        assert net.calls == net.last


def test_so_it_is_where_curvature_is_looked_at_for_a_few_samples(monkeypatch):
    monkeypatch.setattr(curvature, "_WORTH", 0)
    net = Exhausts(norm=False)
    op = sharpness.hessian(net, LOSS, (torch.randn(64, 4), torch.arange(64) % 3))
    net.last, net.error = net.calls + 2, ERRORS[0]  # behind the look at the samples
    with pytest.raises(torch.OutOfMemoryError):
        op.thinned()
