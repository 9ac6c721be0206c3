"""Whether samples meet, where the graph of a loss or a network does not tell."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.second_order import second_order_form
from torch_dropout_ir.regularizers import gauss_newton, second_order
from torch_dropout_ir.regularizers.coupling import told_by_powers


class Pairs(nn.Module):
    """The first half of a batch looks at the second, and the second at the first."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)
        self.outer = nn.Linear(2, 2)

    def forward(self, x):
        a, b = self.drop(self.inner(x).tanh()).chunk(2)
        return self.outer(torch.cat([a + b.tanh(), b - a.tanh()]))


def compared(f, _):
    a, b = f.chunk(2)
    return (a - b).square().mean()


def multiplied(f, _):
    a, b = f.chunk(2)
    return (a * b).mean()


@pytest.mark.parametrize("rows", [16, 30, 32, 48, 64, 96])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)), compared),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)), multiplied),
        (Pairs(), F.mse_loss),
    ],
)
def test_samples_that_are_half_a_batch_apart_meet(net, loss, form, rows):
    torch.manual_seed(0)
    net = copy.deepcopy(net).double()
    batch = torch.randn(rows, 2).double(), torch.randn(rows, 2).double()
    expected = second_order_form(
        copy.deepcopy(net), [(rows, 2)], batch, loss, linearized=form is gauss_newton
    )
    found = form(net, batch, loss, num_samples=None)
    torch.testing.assert_close(found.value, expected.detach())
    # One draw does not tell how far it is off where samples meet.
    assert form(net, batch, loss).standard_error.isnan()


class Exponentials(nn.Sequential):
    def forward(self, x):
        return self[2](self[1](x).logcumsumexp(1))


@pytest.mark.parametrize("loss", [compared, F.mse_loss])
def test_what_has_no_derivative_of_a_zero_root(loss):
    torch.manual_seed(0)
    net = Exponentials(nn.Identity(), nn.Dropout(0.3), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = second_order_form(
        copy.deepcopy(net), [(4, 3)], batch, loss, linearized=True
    )
    found = gauss_newton(net, batch, loss, num_samples=None)
    torch.testing.assert_close(found.value, expected.detach())


@pytest.mark.parametrize("meet", [False, True])
def test_samples_whose_rows_cancel_are_told_apart_by_their_magnitudes(meet):
    """Of two rows each, which meet in any case."""
    h = torch.randn(8, 2, requires_grad=True)
    away = (h[:, :1] - h[:, 1:]).view(4, 2)  # whose derivatives are opposite
    made = away - away.flip(1) ** 2 - meet * away.mean(0) ** 2

    def pull(outputs, root, receive, keep):
        (found,) = torch.autograd.grad(outputs, h, root, retain_graph=keep)
        receive(0, found.view(4, -1))

    assert told_by_powers(pull, made.view(8, 1), 4) == meet
