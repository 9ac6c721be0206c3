"""Slices, planes, interpolation, interval flatness and ascent against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import sharpness


class Bowl(nn.Module):
    """A loss that is a function of the parameters alone: ``model(x)`` is theta."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.double())

    def forward(self, x):
        return self.theta.expand(x.shape[0], -1)


BATCH = torch.zeros(1, 1).double(), torch.zeros(1, 1).double()


def bowl(theta, curvatures, rest=0.0):
    """``rest + sum_j c_j theta_j^2 / 2``."""
    return Bowl(theta), lambda f, t: rest + 0.5 * (curvatures * f[0].square()).sum()


def network():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.4),
        nn.Flatten(), nn.Linear(12, 2),
    ).double()  # fmt: skip


def images(n=6):
    return torch.randn(n, 1, 3, 3).double(), torch.randn(n, 2).double()


@pytest.mark.parametrize("per", ["filter", "neuron", "layer"])
def test_directions_have_the_norms_of_what_they_stand_for(per):
    net = network()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[5].bias.zero_()
    d = sharpness.filter_normalized_direction(net, per=per)
    for name in ("0.weight", "5.weight"):
        got, x = d[name], dict(net.named_parameters())[name].detach()
        if per == "layer" or (per == "filter" and x.ndim == 2):
            got, x = got[None], x[None]
        torch.testing.assert_close(got.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    for name in ("0.bias", "1.weight", "1.bias", "5.bias"):
        assert not d[name].any()
    d = sharpness.filter_normalized_direction(net, norms="scaled", per=per)
    assert d["1.weight"].norm() == pytest.approx(3**0.5) and not d["0.bias"].any()
    d = sharpness.filter_normalized_direction(net, biases="scaled", per=per)
    assert d["0.bias"].norm() == pytest.approx(float(net[0].bias.detach().norm()))
    assert not d["1.weight"].any() and not d["5.bias"].any()
    assert all(bool(x.isfinite().all()) for x in d.values())
    for bad in ({"per": "row"}, {"biases": "no"}, {"norms": "no"}):
        with pytest.raises(ValueError, match="expected"):
            sharpness.filter_normalized_direction(net, **bad)


def test_plane_and_slice_agree_and_leave_the_model():
    net, (x, y) = network(), images()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    d, e = (sharpness.filter_normalized_direction(net) for _ in range(2))
    alphas, betas = [-0.5, 0.0, 1.0], [0.0, 0.3]
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    net.eval()
    plane = sharpness.loss_plane(net, "mse", batches, alphas, betas, (d, e))
    assert plane.shape == (3, 2)
    line = sharpness.loss_slice(net, "mse", batches, alphas, d)
    torch.testing.assert_close(plane[:, 0], line)
    moved = {n: before[n] + 1.0 * d[n] + 0.3 * e[n] for n in d}
    expected = F.mse_loss(torch.func.functional_call(net, moved, (x,)), y)
    torch.testing.assert_close(plane[2, 1], expected.detach())
    assert sharpness.loss_plane(net, "mse", batches, alphas).shape == (3, 3)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_no_steps_and_no_model_are_told():
    net = nn.Linear(2, 1)
    for ask in (
        lambda: sharpness.loss_slice(net, "mse", BATCH, []),
        lambda: sharpness.loss_plane(net, "mse", BATCH, [0.0], torch.zeros(0)),
        lambda: sharpness.interpolate(net, net, "mse", BATCH, ()),
    ):
        with pytest.raises(ValueError, match="to have a number, got none"):
            ask()
    with pytest.raises(TypeError, match=r"direction: expected `model` .* got int"):
        sharpness.filter_normalized_direction(3)


def test_buffers_lie_between_two_models_and_not_beyond():
    """A variance that goes on along the line would be negative."""

    def net(variance):
        found = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).eval()
        found[0].running_var.fill_(variance)
        return found

    torch.manual_seed(0)
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    a, b, at = net(1.0), net(3.0), [-0.5, 0.25, 1.5]
    found = sharpness.interpolate(a, b, "mse", (x, y), at)
    for alpha, variance, value in zip(at, [1.0, 1.5, 3.0], found, strict=True):
        between = net(variance)
        for own, first, last in zip(
            between.parameters(), a.parameters(), b.parameters(), strict=True
        ):
            own.data = (1 - alpha) * first.data + alpha * last.data
        wanted = F.mse_loss(between(x), y).double()
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-6, atol=0)


def test_slices_at_frozen_masks():
    net, (x, y) = network().train(), images()
    d = sharpness.filter_normalized_direction(net)
    a, b = (
        sharpness.loss_slice(net, "mse", (x, y), [0.0, 0.5], d, masks=7)
        for _ in range(2)
    )
    off = sharpness.loss_slice(net, "mse", (x, y), [0.0, 0.5], d)
    assert torch.equal(a, b) and not torch.allclose(a, off)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_interpolation_meets_both_models_and_their_statistics(mode):
    a, b, (x, y) = network(), network(), images()
    a(x), b(3 * x + 1)  # running statistics apart
    getattr(a, mode)(), getattr(b, mode)()
    found = sharpness.interpolate(a, b, "mse", (x, y), [0.0, 1.0, 0.25])
    ends = [sharpness.loss_slice(m, "mse", (x, y), [0.0])[0] for m in (a, b)]
    torch.testing.assert_close(found[:2], torch.stack(ends))
    mixed = {
        n: (0.75 * v + 0.25 * b.state_dict()[n]) if v.is_floating_point() else v
        for n, v in a.state_dict().items()
    }
    middle = network()
    middle.load_state_dict(mixed)
    getattr(middle, mode)()
    torch.testing.assert_close(
        found[2], sharpness.loss_slice(middle, "mse", (x, y), [0.0])[0]
    )
    whole = sharpness.interpolate(a, b, "mse", (x, y))
    assert whole.shape == (41,) and bool(whole.isfinite().all())
    torch.testing.assert_close(whole[10], ends[0])
    with pytest.raises(ValueError, match="weight"):
        sharpness.interpolate(nn.Linear(2, 1), nn.Linear(3, 1), "mse", BATCH)


@settings(max_examples=20)
@given(
    st.floats(0.01, 100), st.floats(0.001, 10), st.floats(1.1, 9), st.floats(0.1, 50)
)
def test_interval_flatness_of_a_parabola(curvature, rest, factor, length):
    net, loss = bowl(torch.zeros(3), torch.tensor([curvature, 1.0, 7.0]), rest)
    d = {"theta": torch.tensor([length, 0.0, 0.0])}
    found = sharpness.interval_flatness(net, loss, BATCH, d, factor)
    half = math.sqrt(2 * rest * (factor - 1) / curvature)
    assert found.right == pytest.approx(half, rel=1e-3)
    assert found.left == pytest.approx(-half, rel=1e-3)
    assert found.width == found.right - found.left and not found.floor_used


def test_interval_flatness_is_monotone_in_the_level_and_finds_the_nearest():
    net = Bowl(torch.zeros(1))

    def waves(f, t):
        return 1 + torch.sin(f[0, 0]).square() * 1.5 + 0.01 * f[0, 0] ** 2

    d = {"theta": torch.ones(1)}
    widths = [
        sharpness.interval_flatness(net, waves, BATCH, d, c).width
        for c in (1.2, 1.5, 2.0, 2.4)
    ]
    assert widths == sorted(widths)
    near = sharpness.interval_flatness(net, waves, BATCH, d, 2.0)
    assert near.right == pytest.approx(0.9517, abs=5e-3)


def test_interval_flatness_sees_a_ridge_that_the_last_doublings_leap_over():
    def ridge(x):
        return 1 + 3 * torch.exp(-((x - 0.75).square()) / 0.01) + 0.5 * x**2

    net = Bowl(torch.zeros(1))
    found = sharpness.interval_flatness(
        net, lambda f, t: ridge(f[0, 0]), BATCH, {"theta": torch.ones(1)}
    )
    places = torch.linspace(0, 1, 100_001)
    nearest = float(places[ridge(places) >= 2][0])
    assert nearest < 0.75 and found.right == pytest.approx(nearest, abs=1e-3)
    assert found.left == pytest.approx(-(2**0.5), abs=1e-3)


def test_the_finest_accuracy_ends_between_two_neighbouring_numbers():
    net, loss = bowl(torch.zeros(2), torch.tensor([2.0, 1.0]), 1.0)
    d = {"theta": torch.tensor([1.0, 0.0])}
    found = sharpness.interval_flatness(net, loss, BATCH, d, rtol=1e-300)
    assert found.right == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_convolutions_are_those_of_their_outputs(groups):
    net = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    d = sharpness.filter_normalized_direction(net)["weight"]
    split = [x.detach().chunk(groups) for x in (d, net.weight)]
    for got, x in zip(*split, strict=True):  # inputs first in each group
        torch.testing.assert_close(
            got.square().sum((0, 2, 3)), x.square().sum((0, 2, 3))
        )
    d = sharpness.filter_normalized_direction(net, per="layer")["weight"]
    torch.testing.assert_close(d.norm(), net.weight.detach().norm())
    apart = d.square().sum((0, 2, 3)) / net.weight.detach().square().sum((0, 2, 3))
    assert not torch.allclose(apart, torch.ones(()), atol=1e-3)


def test_interval_flatness_at_zero_loss_flat_sides_and_blow_ups():
    net, loss = bowl(torch.zeros(2), torch.tensor([2.0, 0.0]))
    found = sharpness.interval_flatness(
        net, loss, BATCH, {"theta": torch.tensor([1.0, 0.0])}, floor=0.5
    )
    assert found.floor_used and found.level == 1.0
    assert found.right == pytest.approx(1.0, rel=1e-3)
    flat = sharpness.interval_flatness(
        net, loss, BATCH, {"theta": torch.tensor([0.0, 1.0])}
    )
    assert flat.width == math.inf and flat.left == -math.inf

    def cliff(f, t):
        return 1 + torch.log(1 - f[0, 0]) ** 2 * 0.001

    net = Bowl(torch.zeros(1))
    found = sharpness.interval_flatness(net, cliff, BATCH, {"theta": torch.ones(1)})
    assert found.right == pytest.approx(1.0, rel=1e-3)


def test_sam_is_one_step_along_the_gradient():
    theta, c = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]).double()
    net, loss = bowl(theta, c)
    found = sharpness.sam_sharpness(net, loss, BATCH, rho=0.1)
    g = c * theta
    e = 0.1 * g / g.norm()
    expected = 0.5 * (c * (theta + e) ** 2).sum() - 0.5 * (c * theta**2).sum()
    assert found.value == pytest.approx(float(expected))
    torch.testing.assert_close(found.direction["theta"], e)
    assert found.ascended - found.loss == found.value
    at_rest, loss = bowl(torch.zeros(2), c)
    assert sharpness.sam_sharpness(at_rest, loss, BATCH).value == 0


def test_a_gradient_whose_square_underflows_is_a_direction():
    net, loss = bowl(torch.ones(2), torch.full((2,), 1e-200, dtype=torch.float64))
    found = sharpness.sam_sharpness(net, loss, BATCH, rho=2**0.5)
    assert found.value == pytest.approx(3e-200, abs=0)  # from 1 to 2
    along = {"theta": torch.full((2,), 1e-200, dtype=torch.float64)}
    wide = sharpness.interval_flatness(net, loss, BATCH, along, floor=1e-300)
    assert wide.right == pytest.approx(2 - 2**0.5, rel=1e-3)


def test_adaptive_sharpness_does_not_see_rescaling():
    """Weights of a ReLU network rescaled, its function unchanged."""
    net = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)
    ).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for steps in (1, 5):
        before = sharpness.adaptive_sharpness(net, "mse", batches, 0.2, steps)
        plain = sharpness.sam_sharpness(net, "mse", batches, 0.2)
        with torch.no_grad():
            net[0].weight.mul_(10)
            net[2].weight.div_(10)
        after = sharpness.adaptive_sharpness(net, "mse", batches, 0.2, steps)
        assert after.value == pytest.approx(before.value, rel=1e-9)
        changed = sharpness.sam_sharpness(net, "mse", batches, 0.2).value
        assert abs(changed - plain.value) > 0.1 * plain.value
    one = sharpness.adaptive_sharpness(net, "mse", batches, 0.2)
    assert sharpness.adaptive_sharpness(net, "mse", batches, 0.2, 20).value >= one.value
    inside = torch.cat([
        (e / x.abs()).flatten()
        for e, x in zip(one.direction.values(), net.parameters(), strict=True)
    ])
    assert float(inside.detach().norm()) == pytest.approx(0.2)


def test_bad_input():
    net, batch = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
    zero = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    good = sharpness.filter_normalized_direction(net)
    for call in (
        lambda d: sharpness.loss_slice(net, "mse", batch, [0.0], d),
        lambda d: sharpness.loss_plane(net, "mse", batch, [0.0], None, (d, good)),
        lambda d: sharpness.interval_flatness(net, "mse", batch, d),
    ):
        with pytest.raises(ValueError, match="not zero everywhere"):
            call(zero)
        with pytest.raises(ValueError, match=r"\['bias'\]"):
            call({"weight": net.weight})
        with pytest.raises(ValueError, match="shapes"):
            call({**good, "bias": torch.ones(5)})
        with pytest.raises(ValueError, match="finite"):
            call({**good, "bias": torch.full((1,), float("nan"))})
    for wrong in (
        {"factor": 1.0}, {"floor": 0.0}, {"rtol": 0.0}, {"reach": math.inf},
        {"reach": 0.0}, {"factor": math.inf},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` > "):
            sharpness.interval_flatness(net, "mse", batch, good, **wrong)
    with pytest.raises(ValueError, match="finite loss"):
        nans = batch[0] * float("nan"), batch[1]
        sharpness.interval_flatness(net, "mse", nans, good)
    for call in (sharpness.sam_sharpness, sharpness.adaptive_sharpness):
        with pytest.raises(ValueError, match="`rho`"):
            call(net, "mse", batch, rho=0.0)
        with pytest.raises(ValueError, match="finite loss"):
            call(net, "mse", (batch[0] * float("nan"), batch[1]))
    with pytest.raises(ValueError, match="at least one batch"):
        sharpness.loss_slice(net, "mse", [], [0.0])
