"""Losses and models that take derivatives of their own."""

import itertools
import math

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi

R = tdi.regularizers


def _penalized(outputs, targets):
    """A penalty on the gradient of a critic in the outputs."""
    (slope,) = torch.autograd.grad(outputs.pow(3).sum(), outputs, create_graph=True)
    return _half(outputs, targets) + slope.square().sum(1).mean()


def _by_formula(outputs, targets):
    return _half(outputs, targets) + 9 * outputs.pow(4).sum(1).mean()


def _half(outputs, targets):
    return (outputs - targets).square().mean() / 2


def _net():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
    return nn.Sequential(*layers).double()


def _batch():
    return torch.randn(8, 4).double(), torch.randn(8, 2).double()


def _leave_one_out(loss, differentiable):
    torch.manual_seed(2)
    h, w = torch.randn(8, 3).double(), torch.randn(2, 3).double()
    h.requires_grad_(differentiable)
    y = torch.zeros(8, 2).double()
    value = R.leave_one_out(h, w, 0.3, outputs=h @ w.T, targets=y, loss=loss)
    if not differentiable:
        return value
    (slope,) = torch.autograd.grad(value, h)
    return torch.cat((value.detach().reshape(1), slope.flatten()))


def _trained(kind, r1, model, batch, loss):
    R.modified_loss(model, batch, loss, kind=kind, lr=0.1, r1=r1).backward()
    return torch.cat([x.grad.flatten() for x in model.parameters()])


ESTIMATORS = {
    "second_order": lambda *of: R.second_order(*of).value,
    "second_order, exact": lambda *of: R.second_order(*of, num_samples=None).value,
    "gauss_newton": lambda *of: R.gauss_newton(*of).value,
    "gauss_newton, exact": lambda *of: R.gauss_newton(*of, num_samples=None).value,
    "monte_carlo": lambda *of: R.monte_carlo(*of).value,
    "gradient_norm": lambda *of: R.gradient_norm(*of, lr=0.1).value,
    "L1, leave_one_out": lambda *of: _trained("L1", "leave_one_out", *of),
    "L1, gauss_newton": lambda *of: _trained("L1", "gauss_newton", *of),
    "L4, second_order": lambda *of: _trained("L4", "second_order", *of),
    "L4, monte_carlo": lambda *of: _trained("L4", "monte_carlo", *of),
    "L3": lambda *of: _trained("L3", "last_layer", *of),
}
OF_A_PASS = ("gradient_norm", "L4, monte_carlo", "L3")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_penalty_on_the_gradient_in_the_outputs_is_a_loss_like_any_other(name):
    found = []
    for loss in (_penalized, _by_formula):
        model, batch = _net(), _batch()
        torch.manual_seed(1)
        found.append(ESTIMATORS[name](model, batch, loss))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("differentiable", [False, True])
def test_one_unit_dropped_at_a_time_under_such_a_penalty(differentiable):
    found = [_leave_one_out(loss, differentiable) for loss in (_penalized, _by_formula)]
    torch.testing.assert_close(*found)


def test_derivatives_by_transforms_under_one_unit_dropped_at_a_time():
    def by_transform(outputs, targets):
        slope = torch.func.grad(lambda f: f.pow(3).sum())(outputs)
        return _half(outputs, targets) + slope.square().sum(1).mean()

    found = [_leave_one_out(loss, False) for loss in (by_transform, _by_formula)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in OF_A_PASS])
def test_a_penalty_on_the_gradient_in_the_inputs_says_what_to_do(name):
    x, y = _batch()
    x.requires_grad_()

    def loss(outputs, targets):
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return _half(outputs, targets) + slope.square().mean()

    with pytest.raises(
        RuntimeError, match=r"in the outputs alone.*take `gradient_norm`"
    ):
        ESTIMATORS[name](_net(), (x, y), loss)


class _Forces(nn.Module):
    """Forces as the gradient of an energy, at one sample."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        first = {
            "linear": (nn.Linear(4, 6),),
            "convolution": (nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten()),
        }[body]
        layers = *first, nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
        self.energy = nn.Sequential(*layers).double()

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def _mean_square_of_gradients(model, batch, loss):
    """R_2 over the learning rate of 0.1, over all masks of six units."""
    dropout = next(m for m in model.modules() if type(m) is nn.Dropout)
    p, total = dropout.p, 0.0
    params = list(model.parameters())
    for mask in itertools.product((0.0, 1.0), repeat=6):
        kept = torch.tensor(mask).double() / (1 - p)
        handle = dropout.register_forward_hook(lambda _, h, __, k=kept: h[0] * k)
        value = loss(model(batch[0]), batch[1])
        handle.remove()
        slopes = torch.autograd.grad(value, params, allow_unused=True)
        square = sum(g.square().sum().item() for g in slopes if g is not None)
        total += math.prod(1 - p if x else p for x in mask) * square
    return 0.1 / 4 * total


@pytest.mark.parametrize("body", ["linear", "convolution"])
def test_gradients_of_models_that_differentiate_against_enumeration(body):
    model, (x, _) = _Forces(body), _batch()
    batch = x[:1], torch.randn(1, 4).double()
    torch.manual_seed(1)
    found = R.gradient_norm(model, batch, _half, lr=0.1, num_masks=600)
    off = found.value - _mean_square_of_gradients(model, batch, _half)
    assert off.abs() < 4 * found.standard_error


def test_gradients_of_a_penalty_in_the_inputs_against_enumeration():
    model, (x, y) = _net(), _batch()
    batch = x[:1].requires_grad_(), y[:1]

    def loss(outputs, targets):
        (slope,) = torch.autograd.grad(outputs.sum(), batch[0], create_graph=True)
        return _half(outputs, targets) + 10 * slope.square().mean()

    torch.manual_seed(1)
    found = R.gradient_norm(model, batch, loss, lr=0.1, num_masks=600)
    off = found.value - _mean_square_of_gradients(model, batch, loss)
    assert off.abs() < 4 * found.standard_error
