"""What a line through layers that are not torch's alone holds, against a step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.line_functions import Applied
from tests.test_regularizer_memory import peak
from torch_dropout_ir.regularizers import second_order


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


def shifted(x):
    found = torch.zeros_like(x)
    found[:, :4, 1:] = x[:, :4, :-1]
    found[:, 4:] = x[:, 4:]
    return found


def convolutions(function):
    layers = [nn.Dropout(0.1)]
    for i in range(6):
        layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.BatchNorm2d(16),
                   Applied(function)]  # fmt: skip
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers, *ends), torch.randn(24, 3, 32, 32)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.1), kind(32, 64, 2, batch_first=True)
        self.norm, self.end = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.end(self.norm(self.layer(self.drop(x))[0].mean(1)))


NETS = {
    "own": lambda: convolutions(Own.apply), "views": lambda: convolutions(shifted),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(32, 64, 32)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(32, 64, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_a_line_holds_no_more_than_a_step(name):
    torch.manual_seed(0)
    net, x = NETS[name]()
    y = torch.randint(10, (len(x),))
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()
    found, most = [], 1.01 * step
    assert (
        peak(lambda: found.append(second_order(net, (x, y), "cross_entropy"))) <= most
    )
    assert found[0].notes == ()
