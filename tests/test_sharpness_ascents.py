"""Ascents and valleys where the loss is no parabola, and at frozen masks."""

import pytest
import torch
from torch import nn

from torch_dropout_ir import sharpness


class Place(nn.Module):
    """``model(x)`` is the parameter itself."""

    def __init__(self, *theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta).double())

    def forward(self, x):
        return self.theta.expand(x.shape[0], -1)


BATCH = torch.zeros(1, 1).double(), torch.zeros(1, 1).double()


def of(function):
    """A loss that is a function of the parameter."""
    return lambda f, t: function(f[0])


def dropping():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    batches = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (2, 5)]
    return net, batches


@pytest.mark.parametrize("masks", ["off", 7, range(3)])
@pytest.mark.parametrize("steps", [None, 1, 4])
def test_an_ascent_is_read_off_a_slice_at_the_same_masks(masks, steps):
    net, batches = dropping()
    if steps is None:
        found = sharpness.sam_sharpness(net, "mse", batches, 0.3, masks=masks)
    else:
        found = sharpness.adaptive_sharpness(
            net, "mse", batches, 0.3, steps, masks=masks
        )
    both = sharpness.loss_slice(
        net, "mse", batches, [0.0, 1.0], found.direction, masks=masks
    )
    assert found.loss == pytest.approx(float(both[0]))
    assert found.ascended == pytest.approx(float(both[1]))
    assert found.value == found.ascended - found.loss > 0


def test_an_ascent_is_along_the_slope_of_the_loss_over_all_masks():
    """The slope by differences, one parameter after the other."""
    net, batches = dropping()
    found = sharpness.sam_sharpness(net, "mse", batches, 0.3, masks=range(3))
    slope, h = [], 1e-5
    for name, x in net.named_parameters():
        for place in range(x.numel()):
            d = {n: torch.zeros_like(y) for n, y in net.named_parameters()}
            d[name].view(-1)[place] = 1.0
            low, high = sharpness.loss_slice(
                net, "mse", batches, [-h, h], d, masks=range(3)
            )
            slope.append((high - low) / (2 * h))
    slope = torch.stack(slope)
    along = torch.cat([e.flatten() for e in found.direction.values()])
    torch.testing.assert_close(along, 0.3 * slope / slope.norm(), rtol=0, atol=1e-7)


def test_valleys_are_those_of_a_slice_at_the_same_masks():
    net, batches = dropping()
    d = sharpness.filter_normalized_direction(net)
    length = sum(x.square().sum() for x in d.values()).sqrt()
    found = sharpness.interval_flatness(net, "mse", batches, d, masks=7)
    ends = [0.0, found.left / length, found.right / length]
    low, left, right = sharpness.loss_slice(net, "mse", batches, ends, d, masks=7)
    assert found.level == pytest.approx(2 * float(low))
    assert float(left) == pytest.approx(found.level, rel=1e-3)
    assert float(right) == pytest.approx(found.level, rel=1e-3)


@pytest.mark.parametrize("rho", [0.5, 3.0])
@pytest.mark.parametrize("steps", [2, 7])
def test_the_highest_place_on_the_way_up_counts(rho, steps):
    """Against the climb by hand, where a step too far leads down again."""

    def height(x):
        return 2 - (3 * x).cos().mean()

    theta = torch.tensor([0.4, -0.7]).double()
    found = sharpness.adaptive_sharpness(
        Place(0.4, -0.7), of(height), BATCH, rho, steps
    )
    e, seen = torch.zeros(2).double(), [float(height(theta))]
    for _ in range(steps):
        at = (theta + theta.abs() * e).requires_grad_()
        (g,) = torch.autograd.grad(height(at), at)
        g = g * theta.abs()
        e = e + 2 * rho / steps * g / g.norm()
        e = e * min(1.0, rho / float(e.norm()))
        seen.append(float(height(theta + theta.abs() * e)))
    assert found.value == pytest.approx(max(seen) - seen[0])
    reached = float(height(theta + found.direction["theta"]))
    assert reached == pytest.approx(max(seen))


def test_a_ridge_before_the_first_of_the_places_on_the_way_is_bisected():
    def ridge(x):
        return 1 + 3 * torch.exp(-(((x[0] - 0.1) / 0.03) ** 2)) + x[0].square()

    found = sharpness.interval_flatness(
        Place(0.0, 0.8 * 2**10), of(ridge), BATCH, {"theta": torch.tensor([1.0, 0.0])}
    )
    places = torch.linspace(0, 0.2, 100_001)[None]
    nearest = float(places[0, ridge(places) >= 2][0])
    assert found.right == pytest.approx(nearest, rel=1e-3)
