"""Parts of sites along the path from no noise to all: against every mask."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir.collectives import together
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import monte_carlo
from torch_dropout_ir.regularizers.first_order import FirstOrder
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.regularizers.path_parts import PathParts

NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(60))


class Net(nn.Module):
    """Two sites, the second used twice; a mask of the first serves all positions."""

    def __init__(self, act, p=0.3, channels=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.first = nn.Dropout1d(p) if channels else nn.Dropout(p)
        self.second, self.act = nn.Dropout(0.4), act

    def forward(self, x, noise=None):
        drop = noise or (lambda i, h: (self.first if i == 0 else self.second)(h))
        h = drop(0, self.act(self.a(x)))
        h = drop(1, self.act(self.b(h)))
        return self.c(drop(2, self.act(h)))


class Blocks(nn.Module):
    """A net that may be computed again in the backward pass."""

    def __init__(self, net, again):
        super().__init__()
        self.net, self.again = net, again

    def forward(self, x):
        run = functools.partial(checkpoint, self.net, use_reentrant=False)
        return run(x) if self.again else self.net(x)


def enumerated(net, row, loss, rates, shapes):
    """The part of each site, and R_1, of a row by all masks and quadrature in ``t``."""
    x, y = row
    sizes = [int(np.prod(shape)) for shape in shapes]
    kept = torch.tensor([*itertools.product((0.0, 1.0), repeat=sum(sizes))]).double()
    rate = torch.cat([torch.full((n,), p) for n, p in zip(sizes, rates, strict=True)])
    chance = (kept * (1 - rate) + (1 - kept) * rate).prod(1)
    noise = (kept / (1 - rate)).nan_to_num(0.0) - 1
    noise = [
        part.view(-1, *shape)
        for part, shape in zip(noise.split(sizes, 1), shapes, strict=True)
    ]

    def values(t):
        """The loss at each mask, with a share of each use's noise."""
        by = t.view(*t.shape, *(1,) * (noise[0].ndim - 1))
        f = net(
            x.expand(len(kept), *x.shape), lambda i, h: h * (1 + by[:, i] * noise[i])
        )
        return torch.func.vmap(lambda f: loss(f[None], y[None]))(f)

    parts = torch.zeros(3).double()
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        t = ((node + 1) / 2).expand(len(kept), 3).clone().requires_grad_()
        slope = torch.autograd.grad((chance * values(t)).sum(), t)[0].sum(0)
        parts += weight / 2 * slope
    ones = torch.ones(len(kept), 3).double()
    total = (chance * (values(ones) - values(0 * ones))).sum().detach()
    return {"first": parts[0], "second": parts[1] + parts[2]}, total


LOSSES = {
    "squares": F.mse_loss,
    "labels": lambda f, y: F.cross_entropy(f, y.softmax(-1)),
    "lengths": lambda f, y: (f - y).norm(dim=-1).mean(),
    "piecewise": lambda f, y: (f - y).abs().mean(),
}
CASES = [
    ("tanh", "squares", {}), ("tanh", "labels", {}), ("tanh", "lengths", {}),
    ("relu", "squares", {}), ("tanh", "piecewise", {}),
    ("tanh", "squares", {"p": 1.0}), ("tanh", "squares", {"channels": True}),
]  # fmt: skip


def case(act, loss, channels=False, p=0.3, copies=400):
    """A net, one row in many copies, each with masks of its own, and the truth."""
    torch.manual_seed(3)
    net = Net(getattr(torch, act), p, channels).double()
    for x in net.parameters():
        x.data *= 3
    shape = (2, 2) if channels else (2,)
    row = torch.randn(shape).double(), torch.randn(shape).double()
    shapes = [(2, 1) if channels else shape, shape, shape]
    truth = enumerated(net, row, LOSSES[loss], (p, 0.4, 0.4), shapes)
    batch = [x.expand(copies, *shape).contiguous() for x in row]
    return net, tuple(batch), resolve_loss(LOSSES[loss]), *truth


@pytest.mark.parametrize(("act", "loss", "options"), CASES)
def test_parts_are_those_of_all_masks_and_add_up(act, loss, options):
    net, batch, loss, truth, total = case(act, loss, **options)
    assert sum(truth.values()) == pytest.approx(float(total), rel=1e-2)
    found, how, _ = online(net, batch, loss, num_masks=120)
    assert "of 60 other masks along the path" in how
    assert list(found.per_site) == ["first", "second"]
    size = max(map(abs, truth.values()))
    for name, x in truth.items():
        error = found.per_site_standard_error[name]
        assert 0 < error < 0.15 * size
        assert abs(found.per_site[name] - x) < 4 * error + 5e-3 * size


def test_parts_are_right_to_one_percent():
    net, batch, _, truth, _ = case("tanh", "labels")
    found = monte_carlo(net, batch, LOSSES["labels"], num_masks=2000, per_site=True)
    for name, x in truth.items():
        error = found.per_site_standard_error[name]
        assert (
            abs(found.per_site[name] - x)
            < 4 * error
            < 0.04 * max(map(abs, truth.values()))
        )


def test_errors_are_those_of_the_draws():
    net, batch, loss, truth, _ = case("tanh", "labels", copies=12)
    off, squared = [], []
    for seed in range(100):
        torch.manual_seed(seed)
        found, _, _ = online(net, batch, loss)
        off.append(found.per_site["second"] - truth["second"])
        squared.append(found.per_site_standard_error["second"] ** 2)
    off, squared = torch.stack(off), torch.stack(squared)
    assert abs(off.mean()) < 4 * off.std() / 10
    assert float(squared.mean() / off.square().mean()) == pytest.approx(1.2, abs=0.4)


def test_of_uses_that_the_pass_without_noise_did_not_show_they_are_unbiased():
    """As of layers that a model leaves out by chance: no linear part is taken away."""
    net, batch, loss, truth, _ = case("tanh", "squares")
    path = PathParts(net, batch, loss, FirstOrder([], ("first", "second")))
    found = path.parts(torch.ones(()), torch.ones(()), 400)
    for name, x in truth.items():
        assert abs(found.values[name] - x) < 4 * found.errors[name]
        assert found.errors[name] < 0.15 * max(map(abs, truth.values()))


def test_ranks_go_along_one_path(monkeypatch):
    """Their draws are their own, but for the share of the noise."""
    net, batch, loss, *_ = case("tanh", "squares")
    seen = []
    monkeypatch.setattr(PathParts, "_draw", lambda self, t: seen.append(t) or {})
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = PathParts(net, batch, loss, FirstOrder([], ("first", "second")))
        with together(lambda count, of: 2**40 + 12345 if of == "path" else count):
            path.parts(torch.ones(()), torch.ones(()), 4)
    assert seen[:4] == seen[4:] and seen[:4] == sorted({*seen}) and 0 < seen[0]


def test_a_part_that_is_not_finite_is_named_and_r1_is_there():
    net, batch, *_ = case("tanh", "squares")
    whole = net.forward
    # The root of a square has no derivative at 0.
    net.forward = lambda x: whole(x) + net.second(0 * net.a(x)).square().sqrt()
    with pytest.raises(ValueError, match="finite, got others by way of `second`"):
        monte_carlo(net, batch, "mse", num_masks=2, per_site=True)
    found, how, _ = online(net, batch, resolve_loss("mse"))
    assert not found.per_site and "`second`" in how and found.value.isfinite()


def test_errors_are_told_where_a_loss_is_least():
    """No site adds anything to first order there."""
    net, (x, _), *_ = case("tanh", "squares")
    batch = x, net(x, lambda i, h: h).detach()
    found, *_ = online(net, batch, resolve_loss("mse"))
    assert all(x > 0 for x in found.per_site_standard_error.values())


@pytest.mark.parametrize("act", ["tanh", "relu"])
def test_monte_carlo_tells_them_where_asked(act):
    net, batch, _, truth, total = case(act, "squares")
    found = monte_carlo(net, batch, "mse", num_masks=60, per_site=True)
    for name, x in truth.items():
        error = found.per_site_standard_error[name]
        assert abs(found.per_site[name] - x) < 4 * error < 0.8 * float(total)
    assert monte_carlo(net, batch, "mse", num_masks=2).per_site == {}
    one = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Linear(2, 2)).double()
    found = monte_carlo(one, batch, "mse", per_site=True)
    assert found.per_site == {"1": found.value}
    assert found.per_site_standard_error == {"1": found.standard_error}


def test_a_site_out_of_reach_of_derivatives_is_named():
    net, batch, *_ = case("tanh", "squares")
    whole = net.forward
    net.forward = lambda x: torch.no_grad()(whole)(x) + net.a(x)
    with pytest.raises(RuntimeError, match=r"'first', 'second'.*no_grad"):
        monte_carlo(net, batch, "mse", num_masks=2, per_site=True)


def test_parts_under_checkpointing_are_those_without():
    net, batch, loss, truth, _ = case("tanh", "squares")
    found, how, _ = online(Blocks(net, True), batch, loss, num_masks=120)
    assert "along the path" in how
    for name, x in truth.items():
        error = found.per_site_standard_error[f"net.{name}"]
        assert 0 < error < 0.15 * max(map(abs, truth.values()))
        assert abs(found.per_site[f"net.{name}"] - x) < 4 * error
