"""Functions whose own derivative hides what it depends on: torch takes it as constant.

A second derivative through one lacks all that comes after, and nothing says so.
"""

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    modified_loss,
    monte_carlo,
    second_order,
)


class Recomputed(torch.autograd.Function):
    """A layer that is run again for its derivative, as reversible ones are."""

    @staticmethod
    def forward(ctx, x, layer, *_):
        ctx.save_for_backward(x)
        ctx.layer = layer
        with torch.no_grad():
            return layer(x) / 2

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        own = [*ctx.layer.parameters()]
        with torch.enable_grad():
            y = ctx.layer(x)
        gx, *rest = [u / 2 for u in torch.autograd.grad(y, [x, *own], g)]
        return gx, None, *rest


class ByNumbers(torch.autograd.Function):
    """One whose derivative is somebody else's code."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        y = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(g.detach().numpy() * (1 - y * y))


class Zero(torch.autograd.Function):
    """One that nothing is sent back through, on purpose."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        if self.kind == "again":
            return x + 2 * Recomputed.apply(x, self.layer, *self.layer.parameters())
        h = self.layer[0](x)
        if self.kind == "zero":
            return x + h.tanh() + Zero.apply(h)
        return x + (ByNumbers.apply(h) if self.kind == "numbers" else h.tanh())


def made(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.3), Block(kind), nn.Linear(4, 3)
    ).double()
    return net, (torch.randn(6, 3).double(), torch.randint(3, (6,)))


def pairs(f, y):
    """A loss that couples rows."""
    return (f @ f.mT).logsumexp(1).mean() + f.square().mean()


TWICE = {
    "second_order": lambda *a: second_order(*a, "cross_entropy"),
    "second_order, sum": lambda *a: second_order(*a, "cross_entropy", num_samples=None),
    "gauss_newton": lambda *a: gauss_newton(*a, pairs, num_samples=None),
    "L1": lambda *a: modified_loss(*a, "cross_entropy", kind="L1", r1="gauss_newton"),
    "L2": lambda *a: modified_loss(*a, "cross_entropy", kind="L2", lr=0.1),
    "parts": lambda *a: modified_loss(
        *a, "cross_entropy", kind="regu", lr=0.1, max_bytes=0
    ),
    "hessian": lambda net, batch: tdi.sharpness.top_eigenvalues(
        tdi.sharpness.hessian(net, "cross_entropy", [batch])
    ),
    "ggn": lambda net, batch: tdi.sharpness.trace(
        tdi.sharpness.ggn(net, "cross_entropy", [batch]), num_matvecs=4
    ),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("kind", ["again", "numbers"])
def test_a_second_derivative_is_refused(kind, name):
    with pytest.raises(RuntimeError, match=r"cuts off what it returns"):
        found = TWICE[name](*made(kind))
        if isinstance(found, torch.Tensor):
            found.backward()


@pytest.mark.parametrize("kind", ["again", "numbers"])
def test_first_derivatives_are_those_of_the_same_network(kind):
    forms = {
        "gauss_newton": lambda *a: gauss_newton(*a, "cross_entropy", num_samples=None),
        "gradient_norm": lambda *a: gradient_norm(*a, "cross_entropy", lr=0.1),
        "monte_carlo": lambda *a: monte_carlo(*a, "cross_entropy"),
    }
    for name, form in forms.items():
        found = []
        for of in (kind, "plain"):
            torch.manual_seed(1)
            found.append(form(*made(of)).value)
        torch.testing.assert_close(*found, msg=lambda text, name=name: name + text)


def test_what_sends_nothing_back_is_no_matter():
    for form in TWICE.values():
        form(*made("zero"))
