"""What a forward pass does to its dropout modules, and what hooks make of a loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.regularizers import gauss_newton, monte_carlo
from torch_dropout_ir.testing import enumerate_masks, expected_dropout_loss


class Changes(nn.Module):
    """One module, called twice, of which each call has its own p and mode."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.drop = calls, nn.Dropout(calls[-1][0])
        self.drop.train(calls[-1][1])
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)

    def noises(self):
        """Mean, over masks of both calls, of what is done with their noises."""
        acting = [p if training else 0.0 for p, training in self.calls]
        for a, chance in enumerate_masks(2, acting[0]):
            for b, other in enumerate_masks(2, acting[1]):
                yield chance * other, a / (1 - acting[0]), b / (1 - acting[1])

    def at(self, x, a, b):
        return self.outer(b * (a * self.inner(x)).tanh())

    def forward(self, x):
        layers = self.inner, nn.Identity()
        for (p, training), layer in zip(self.calls, layers, strict=True):
            self.drop.p = p
            self.drop.train(training)
            x = self.drop(layer(x))
            x = x.tanh() if layer is self.inner else self.outer(x)
        return x


@pytest.mark.parametrize(
    "calls",
    [
        ((0.1, True), (0.6, True)),
        ((0.3, True), (0.0, True)),
        ((0.0, True), (0.3, True)),
        ((0.3, False), (0.3, True)),
        ((0.3, True), (0.3, False)),
    ],
)
def test_each_call_has_the_p_and_the_mode_that_it_was_made_with(calls):
    torch.manual_seed(0)
    net = Changes(*calls).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    expected = sum(w * F.mse_loss(net.at(x, a, b), y) for w, a, b in net.noises())
    found = expected_dropout_loss(net, (x, y), "mse", coupled=False)
    torch.testing.assert_close(found, expected.detach())
    r1 = expected - F.mse_loss(net.at(x, 1.0, 1.0), y)
    drawn = monte_carlo(net, (x, y), "mse", num_masks=1000)
    assert (drawn.value - r1).abs() < 4 * drawn.standard_error
    form = gauss_newton(net, (x, y), "mse", num_samples=None)
    if form.exact:
        torch.testing.assert_close(form.value, r1.detach())
    assert form.exact == (calls[0] in ((0.0, True), (0.3, False)))
    assert net.drop.training == calls[-1][1] and net.drop.p == calls[-1][0]


def hooked(place):
    loss = nn.MSELoss()
    if place == "forward":
        loss.forward = lambda f, y: (f - y).pow(4).mean()
    elif place == "output":
        loss.register_forward_hook(lambda _, __, output: output**2)
    else:
        loss.register_forward_pre_hook(lambda _, given: (given[0].sin(), given[1]))
    return loss


@pytest.mark.parametrize("place", ["forward", "output", "input"])
def test_a_loss_with_hooks_is_not_what_its_class_says(place):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 2)).double()
    batch = torch.randn(2, 2).double(), torch.randn(2, 2).double()
    loss = hooked(place)
    found = gauss_newton(net, batch, loss, num_samples=None)
    plain = gauss_newton(net, batch, lambda f, y: loss(f, y), num_samples=None)
    assert not found.exact
    torch.testing.assert_close(found.value, plain.value)
    expected = expected_dropout_loss(net, batch, loss, coupled=True)
    torch.testing.assert_close(expected_dropout_loss(net, batch, loss), expected)
