"""What the theory says of R_1 and R_2, held against enumeration and by construction."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import torch_dropout_ir as tdi
from tests.largest import Largest
from tests.reference.enumeration import every_mask
from tests.test_regularizers import two_layer_closed_form
from torch_dropout_ir.kernels import pack
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.testing import expected_dropout_loss, networks, problems


def truth(net, batch, loss):
    """R_1 from every mask."""
    clean = clean_risk(net, batch, resolve_loss(loss)).detach()
    return float(expected_dropout_loss(net, batch, loss) - clean)


def closed_form(form, net, batch, loss):
    h = net[:-2](batch[0])
    return float(
        form(h, net[-1].weight, net[-2].p, loss=loss, outputs=net[-1](h),
             targets=batch[1]).detach()
    )  # fmt: skip


def softmax_net(p, scale=3.0):
    """Eight units of a size that the quadratic form does not see."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3))
    net = net.double()
    with torch.no_grad():
        net[-1].weight.mul_(scale)
    return net, (torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 1, 0]))


def test_leave_one_out_tends_to_the_truth_and_the_quadratic_form_does_not():
    errors = {}
    for p in (1e-2, 1e-3, 1e-4):
        net, batch = softmax_net(p)
        r1 = truth(net, batch, "cross_entropy")
        for form in (leave_one_out, last_layer):
            found = closed_form(form, net, batch, "cross_entropy")
            errors.setdefault(form.__name__, []).append(abs(found / r1 - 1))
    first, second, third = errors["leave_one_out"]
    assert 8 < first / second < 12 and 8 < second / third < 12  # falls as p
    assert third < 1e-4
    assert min(errors["last_layer"]) > 0.01


def test_a_unit_left_out_of_a_margin_tends_to_the_truth():
    """Its second derivative is 0: the form by that does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3))
    net, found = net.double(), []
    batch = torch.randn(3, 4).double(), torch.tensor([0, 2, 1])
    with torch.no_grad():
        net[-1].weight.mul_(3)
    for net[-2].p in (1e-2, 1e-3):
        with torch.no_grad():
            value = closed_form(leave_one_out, net, batch, F.multi_margin_loss)
        found.append(abs(value / truth(net, batch, F.multi_margin_loss) - 1))
    assert found[0] < 0.1 and 8 < found[0] / found[1] < 12
    with torch.no_grad(), pytest.raises(ValueError, match="couples rows"):
        closed_form(
            leave_one_out, net, batch, lambda f, y: F.multi_margin_loss(f, y) ** 2
        )
    trained = closed_form(leave_one_out, net, batch, F.multi_margin_loss)
    assert trained == pytest.approx(value)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "smoothed, weighted": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]).double(), label_smoothing=0.1
    ),
    "smoothed, weighted sum": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]).double(),
        label_smoothing=0.2,
        reduction="sum",
    ),
    "ignored": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=2
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form", [last_layer, leave_one_out])
def test_known_losses_equal_the_same_losses_unknown(form, name):
    """The closed forms against products with the loss's own second derivative."""
    net, batch = softmax_net(0.3)
    loss = LOSSES[name]
    known = closed_form(form, net, batch, loss)
    assert resolve_loss(loss).kind == "cross_entropy"
    assert known == pytest.approx(
        closed_form(form, net, batch, lambda f, t: loss(f, t)), rel=1e-9
    )


def test_a_partial_function_is_known_by_what_it_fills_in():
    loss = functools.partial(F.cross_entropy, label_smoothing=0.2, reduction="sum")
    resolved = resolve_loss(loss)
    assert (resolved.kind, resolved.reduction) == ("cross_entropy", "sum")
    net, batch = softmax_net(0.3)
    known = closed_form(last_layer, net, batch, loss)
    unknown = closed_form(last_layer, net, batch, lambda f, t: loss(f, t))
    assert known == pytest.approx(unknown, rel=1e-9)


def test_weighted_soft_targets_equal_the_unknown_loss():
    net, (x, _) = softmax_net(0.3)
    soft = torch.rand(5, 3).double()
    loss = LOSSES["smoothed, weighted"]
    for form in (last_layer, leave_one_out):
        known = closed_form(form, net, (x, soft), loss)
        unknown = closed_form(form, net, (x, soft), lambda f, t: loss(f, t))
        assert known == pytest.approx(unknown, rel=1e-9)


@pytest.mark.parametrize(
    "loss",
    [nn.BCEWithLogitsLoss(), nn.HuberLoss(), nn.SmoothL1Loss(reduction="sum")],
    ids=lambda x: type(x).__name__,
)
def test_losses_of_one_output_each_equal_the_unknown(loss):
    net, (x, _) = softmax_net(0.3)
    batch = x, torch.rand(5, 3).double()
    assert resolve_loss(loss).kind == "elementwise"
    for run in (
        lambda loss: closed_form(last_layer, net, batch, loss),
        lambda loss: closed_form(leave_one_out, net, batch, loss),
        lambda loss: float(gauss_newton(net, batch, loss, num_samples=None).value),
        lambda loss: float(second_order(net, batch, loss, num_samples=None).value),
    ):
        assert run(loss) == pytest.approx(run(lambda f, t: loss(f, t)), rel=1e-9)
    draws = gauss_newton(net, batch, loss, num_samples=400)
    exact = gauss_newton(net, batch, loss, num_samples=None).value
    assert (draws.value - exact).abs() < 5 * draws.standard_error


@given(problems(), st.integers(0, 2**16))
def test_on_the_last_layer_all_forms_are_one(problem, seed):
    net, batch = problem
    assume(net[-2].p > 0)
    torch.manual_seed(seed)
    r1 = closed_form(last_layer, net, batch, "mse")
    for form in (gauss_newton, second_order):
        exact = form(net, batch, "mse", num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9, abs=1e-12)
        assert exact.exact
        drawn = form(net, batch, "mse", num_samples=64)
        assert not drawn.exact
        assert abs(float(drawn.value) - r1) <= 6 * float(drawn.standard_error) + 1e-12
    one_by_one = closed_form(leave_one_out, net, batch, "mse")
    assert one_by_one == pytest.approx(r1, rel=1e-9, abs=1e-12)


@given(
    networks(max_width=3, max_depth=2, sites="everywhere", probabilities=st.just(0.0)),
    st.integers(0, 2**16),
)
def test_sites_add_to_first_order_in_p(net, seed):
    """Several sites, any activation, by enumeration: rare drops come one by one."""
    torch.manual_seed(seed)
    batch = torch.randn(3, net[0].in_features), torch.randn(3, net[-1].out_features)
    batch = tuple(x.double() for x in batch)
    sites = [m for m in net if isinstance(m, nn.Dropout)]
    errors = []
    for p in (1e-3, 1e-5):
        for i, site in enumerate(sites):
            site.p = p * (1 + i)
        # One site alone: the mask of one unit is all that p sees to first order.
        limit = sum(only(net, sites, batch, i) for i in range(len(sites)))
        errors.append(abs(truth(net, batch, "mse") - limit) / p)
    assert errors[1] < 0.05 * errors[0] + 1e-9  # sites add to first order in p


def only(net, sites, batch, i):
    rates = [site.p for site in sites]
    for j, site in enumerate(sites):
        site.p = rates[j] if i == j else 0.0
    found = truth(net, batch, "mse")
    for site, p in zip(sites, rates, strict=True):
        site.p = p
    return found


def test_second_order_sees_the_curvature_that_gauss_newton_does_not():
    """Small units, so that the noise is small: here the truth is of second order."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 4), nn.Softplus(),
        nn.Dropout(0.2), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 1),
    ).double()  # fmt: skip
    x, y = torch.randn(4, 3).double(), 20 + torch.randn(4, 1).double()
    with torch.no_grad():
        net[2].weight.mul_(0.02)
        net[5].weight.mul_(0.02)
    r1 = truth(net, (x, y), "mse")
    second = second_order(net, (x, y), "mse", num_samples=None)
    newton = gauss_newton(net, (x, y), "mse", num_samples=None)
    assert float(second.value) == pytest.approx(r1, rel=0.02)
    assert abs(float(newton.value) / r1 - 1) > 0.5
    assert set(second.per_site) == {"1", "4"}
    torch.testing.assert_close(sum(second.per_site.values()), second.value)
    drawn = [second_order(net, (x, y), "mse", num_samples=4) for _ in range(200)]
    z = torch.stack([(d.value - second.value) / d.standard_error for d in drawn])
    assert z.mean().abs() < 4 / 200**0.5 and 0.8 < z.std() < 1.3
    for name, part in second.per_site.items():
        parts = torch.stack([d.per_site[name] for d in drawn])
        assert (parts.mean() - part).abs() < 4 * parts.std() / 200**0.5


def test_shared_masks_and_sequences():
    """Channel dropout squares the sum over positions; tokens draw their own."""
    torch.manual_seed(0)
    channels = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(9, 2)
    ).double()
    batch = torch.randn(3, 2, 4).double(), torch.randn(3, 2).double()
    r1 = truth(channels, batch, "mse")
    found = second_order(channels, batch, "mse", num_samples=None)
    assert float(found.value) == pytest.approx(r1, rel=1e-9)
    tokens = nn.Sequential(nn.Dropout(0.4), nn.Linear(2, 3)).double()
    batch = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 3).double()
    r1 = truth(tokens, batch, "mse")
    for form in (gauss_newton, second_order):
        exact = form(tokens, batch, "mse", num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9)
        drawn = form(tokens, batch, "mse", num_samples=400)
        assert abs(float(drawn.value) - r1) < 5 * float(drawn.standard_error)


@given(problems(loss="cross_entropy"))
def test_reductions_and_batch_splits_scale(problem):
    net, (x, y) = problem
    assume(len(x) > 1 and net[-2].p > 0)
    mean = F.cross_entropy
    summed = nn.CrossEntropyLoss(reduction="sum")
    for run in (
        lambda b, loss: closed_form(last_layer, net, b, loss),
        lambda b, loss: closed_form(leave_one_out, net, b, loss),
        lambda b, loss: float(gauss_newton(net, b, loss, num_samples=None).value),
        lambda b, loss: float(second_order(net, b, loss, num_samples=None).value),
    ):
        whole = run((x, y), mean)
        assert run((x, y), summed) == pytest.approx(len(x) * whole, rel=1e-8, abs=1e-12)
        parts = run((x[:1], y[:1]), mean) + (len(x) - 1) * run((x[1:], y[1:]), mean)
        assert parts == pytest.approx(len(x) * whole, rel=1e-8, abs=1e-12)


def rmse(f, t):
    """A loss that is no sum over samples."""
    return (f - t).square().mean().sqrt()


def test_a_loss_that_couples_samples():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.01), nn.Linear(2, 2)).double()
    batch = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    with torch.no_grad():
        net[1].weight.mul_(0.1)
    r1 = truth(net, batch, rmse)  # a mask each, 2^6 of them
    for form in (gauss_newton, second_order):
        exact = form(net, batch, rmse, num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=0.02)
        drawn = form(net, batch, rmse, num_samples=400)
        assert abs(drawn.value - exact.value) < 5 * drawn.standard_error
    rows = batch[0], net[1](batch[0]), batch[1]
    tokens = [x[None] for x in rows]

    def by_sample(f, t):
        return (f - t).square().sum((1, 2)).sqrt().sum()

    for form in (last_layer, leave_one_out):
        for loss, (h, f, y) in ((rmse, rows), (by_sample, tokens)):
            with pytest.raises(ValueError, match="couples rows"):
                form(h, net[1].weight, 0.01, loss=loss, outputs=f, targets=y)


# ---- Monte Carlo


def test_monte_carlo_is_unbiased_and_its_error_honest_at_few_masks():
    net, batch = softmax_net(0.4, scale=1.0)
    r1 = truth(net, batch, "cross_entropy")
    draws = [monte_carlo(net, batch, "cross_entropy", num_masks=8) for _ in range(400)]
    values = torch.stack([d.value for d in draws])
    spread = values.std()
    assert (values.mean() - r1).abs() < 4 * spread / 400**0.5
    claimed = torch.stack([d.standard_error for d in draws]).square().mean().sqrt()
    assert 0.8 < claimed / spread < 1.25


@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_the_bias_of_draws_that_stop_on_their_error_is_told(name):
    from torch_dropout_ir.regularizers.excess import ExcessRisk

    runs, most, rtol = 3000, 400, 0.1
    draws = torch.from_numpy(
        1 + np.random.default_rng(0).normal(size=(runs, most))
        if name == "normal"
        else np.random.default_rng(0).exponential(size=(runs, most))
    )
    count = torch.arange(1, most + 1)
    mean = draws.cumsum(1) / count
    variance = (draws.square().cumsum(1) / count - mean.square()) * count / (count - 1)
    small = (variance / count).sqrt() <= rtol * mean.abs()
    small[:, :24] = False
    assert small.any(1).all()
    values = []
    for own, stop in zip(draws, small.int().argmax(1) + 1, strict=True):
        excess = object.__new__(ExcessRisk)
        excess._clean, excess.corrected = own[0], lambda own=own[:stop]: own
        values.append(own[:stop].mean() - excess.stopping_bias())
    values = torch.stack(values)
    stopped = mean.gather(1, small.int().argmax(1, keepdim=True))
    error = values.std() / runs**0.5
    assert (values.mean() - 1).abs() < 3 * error
    assert ((stopped.mean() - 1).abs() > 5 * error) == (name == "normal")


def test_a_slope_without_bounds_leaves_the_mean_as_it_is():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 3)).double()
    x = torch.randn(8, 40).double()
    found = monte_carlo(net, (x, net[1](x).detach()), steep, num_masks=30)
    assert found.value > 0 and found.standard_error > 0


def steep(f, t):
    """Whose slope is infinite where both are the same."""
    return (f - t).abs().sqrt().mean()


def test_the_linear_part_of_a_large_mask_is_that_of_its_parts(monkeypatch):
    from torch_dropout_ir.regularizers import first_order

    slope, kept = torch.randn(20, 10).double(), torch.rand(200) > 0.3
    expected = (slope.flatten() * (kept / 0.7 - 1)).sum()
    for bits in (first_order._BITS, 64):
        monkeypatch.setattr(first_order, "_BITS", bits)
        torch.testing.assert_close(
            first_order.Slope.of(slope).at(pack(kept), 0.3), expected
        )


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_the_linear_part_is_taken_away(p):
    """Against plain averaging: far better where noise is small, never much worse."""
    from torch_dropout_ir.regularizers.excess import ExcessRisk

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 64), nn.Tanh(), nn.Dropout(p), nn.Linear(64, 64), nn.Tanh(),
        nn.Dropout(p), nn.Linear(64, 4),
    ).double()  # fmt: skip
    batch = torch.randn(8, 5).double(), torch.randn(8, 4).double()
    excess = ExcessRisk(net, batch, resolve_loss("mse"))
    excess.draw(256)
    gain = torch.stack(excess._excess).var() / excess.corrected().var()
    assert gain > {0.02: 5, 0.5: 1.2, 0.9: 0.95}[p]


def test_each_draw_is_corrected_by_what_the_others_tell(monkeypatch):
    """By a loop over the draws; a draw alike to none corrects nothing."""
    from torch_dropout_ir.regularizers import excess as draws
    from torch_dropout_ir.regularizers.excess import ExcessRisk

    monkeypatch.setattr(draws, "_FEWEST_FOR_A_FIT", 0)  # six draws are few
    net, batch = softmax_net(0.4)
    excess = ExcessRisk(net, batch, resolve_loss("cross_entropy"))
    excess.draw(6)
    x, c = torch.stack(excess._excess), torch.stack(excess._linear)
    expected = []
    for k in range(6):
        rest = [j for j in range(6) if j != k]
        known = c[rest] - c[rest].mean()
        slope = (known * x[rest]).sum() / known.square().sum()
        expected.append(x[k] - slope * c[k])
    torch.testing.assert_close(excess.corrected(), torch.stack(expected))
    mean, error = excess.mean()
    torch.testing.assert_close(mean, torch.stack(expected).mean())
    # A fit to few draws: their variance is taken (K + 2) / (K - 1) times.
    variance = torch.stack(expected).var() / 6 * 8 / 5
    torch.testing.assert_close(error, variance.sqrt())
    excess._linear = [torch.tensor(float(k == 3)).double() for k in range(6)]
    rest = torch.stack([x[j] for j in range(6) if j != 3])
    torch.testing.assert_close(excess.corrected()[3], x[3])  # the others are alike
    first = excess.corrected()[0]  # a draw with no linear part is left as it is
    torch.testing.assert_close(first, x[0])
    assert rest.shape == (5,)


def test_a_site_that_drops_everything_has_no_linear_part():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(1.0),
        nn.Linear(6, 2),
    ).double()  # fmt: skip

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.side = net, nn.Linear(6, 2).double()

        def forward(self, x):
            h = self.net[:3](x)
            return self.side(h) + self.net[3:](h)

    model = Both()
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    r1 = truth(model, batch, "mse")
    draws = [monte_carlo(model, batch, "mse", num_masks=8).value for _ in range(200)]
    values = torch.stack(draws)
    assert (values.mean() - r1).abs() < 4 * values.std() / 200**0.5


def test_monte_carlo_stops_on_its_error():
    net, batch = softmax_net(0.1)
    found = monte_carlo(net, batch, "cross_entropy", num_masks=4000, rtol=0.1)
    assert found.converged and 24 <= found.num_samples < 4000
    assert found.standard_error <= 0.1 * found.value
    short = monte_carlo(net, batch, "cross_entropy", num_masks=11, rtol=1e-6)
    assert not short.converged and short.num_samples == 11


@pytest.mark.parametrize("skewed", [False, True])
def test_where_it_stops_does_not_move_the_mean(skewed, monkeypatch):
    """Draws of a known mean in the place of the losses: it is 0.08 too large else."""
    from torch_dropout_ir.regularizers.excess import ExcessRisk

    generator = torch.Generator().manual_seed(0)

    def draw(self, count):
        x = torch.empty(count, dtype=torch.float64)
        x.exponential_(generator=generator) if skewed else x.normal_(
            1, 1.2, generator=generator
        )
        self._excess += list(x)
        self._linear += list(torch.zeros_like(x))

    monkeypatch.setattr(ExcessRisk, "draw", draw)
    # No linear part is known here: the first look would be the last.
    monkeypatch.setattr(sys.modules[monte_carlo.__module__], "_FIRST_WITHOUT_FIT", 8)
    net, batch = softmax_net(0.1)
    form = functools.partial(
        monte_carlo, net, batch, "cross_entropy", num_masks=1000, rtol=0.2
    )
    found = [form() for _ in range(800)]
    assert len({x.num_samples for x in found}) > 3
    assert all(x.converged and x.standard_error <= 0.2 * x.value.abs() for x in found)
    values = torch.stack([x.value for x in found]).double()
    spread = float(values.std())
    assert abs(float(values.mean()) - 1) < 4 * spread / 800**0.5
    claimed = torch.stack([x.standard_error for x in found]).square().mean().sqrt()
    assert 0.85 < float(claimed) / spread < 1.15


def test_p_of_one_and_repeated_sites():
    """Everything dropped has a mean, though no variance; a module used twice adds."""
    net = nn.Sequential(nn.Dropout(1.0), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    r1 = truth(net, batch, "mse")
    found = monte_carlo(net, batch, "mse", num_masks=4)
    assert float(found.value) == pytest.approx(r1, rel=1e-9)
    assert 0 < found.standard_error < 1e-12  # what a loss rounds, and no more
    for form in (gauss_newton, second_order):
        with pytest.raises(ValueError, match="site `0`"):
            form(net, batch, "mse")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.a, self.b = (
                nn.Dropout(0.3),
                nn.Linear(3, 3),
                nn.Linear(3, 2),
            )

        def forward(self, x):
            return self.b(self.drop(self.a(self.drop(x))))

    net = Twice().double()
    r1 = truth(net, batch, "mse")
    found = monte_carlo(net, batch, "mse", num_masks=2000)
    assert abs(float(found.value) - r1) < 4 * float(found.standard_error)
    for form in (gauss_newton, second_order):
        found = form(net, batch, "mse")
        torch.testing.assert_close(found.per_site, {"drop": found.value})


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", nn.BCEWithLogitsLoss()])
def test_large_features_are_summed_block_by_block(loss, monkeypatch):
    """Values and gradients, to second order, are those of one block."""
    h = torch.randn(50, 8).double().requires_grad_()
    w = torch.randn(3, 8).double().requires_grad_()
    y = torch.randint(3, (50,)) if loss == "cross_entropy" else torch.rand(50, 3)
    y = y if loss == "cross_entropy" else y.double()

    def run(form):
        value = form(h, w, 0.3, loss=loss, outputs=h @ w.T, targets=y)
        slopes = torch.autograd.grad(value, (h, w), create_graph=True)
        curved = torch.autograd.grad(sum(s.square().sum() for s in slopes), (h, w))
        with torch.no_grad():
            plain = form(h, w, 0.3, loss=loss, outputs=h @ w.T, targets=y)
        torch.testing.assert_close(plain, value)
        return value, plain, *slopes, *curved

    whole = run(last_layer), run(leave_one_out)
    closed, one_by_one = (
        sys.modules[form.__module__] for form in (last_layer, leave_one_out)
    )
    monkeypatch.setattr(closed, "_IN_CACHE", 8 * 7)
    monkeypatch.setattr(closed, "_FOR_PRODUCTS", 8 * 7)
    for units in (8 * 7, 5):  # rows in a block; part of a row
        monkeypatch.setattr(one_by_one, "_ELEMENTS", 3 * units)
        for a, b in zip(whole, (run(last_layer), run(leave_one_out)), strict=True):
            for one, several in zip(a, b, strict=True):
                torch.testing.assert_close(one, several)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", [last_layer, leave_one_out])
def test_a_closed_form_holds_a_block_and_computes_it_once(loss, form, monkeypatch):
    """No tensor of samples by units by outputs; nothing twice without a gradient."""
    monkeypatch.delattr(sys.modules[last_layer.__module__], "checkpoint")
    h, w = torch.randn(300, 500), torch.randn(60, 500)
    f = h @ w.T
    y = f.roll(1, 0) if loss == "mse" else torch.randint(60, (300,))
    with Largest() as largest:
        form(h, w, 0.3, loss=loss, outputs=f, targets=y)
    assert largest.bytes <= 2**20


# ---- models with several outputs


class Heads(nn.Module):
    """Two heads on one site; returns whatever it is told to."""

    def __init__(self, pack):
        super().__init__()
        self.body, self.drop = nn.Linear(3, 4), nn.Dropout(0.3)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 1)
        self.pack = pack

    def forward(self, x):
        h = self.drop(torch.tanh(self.body(x)))
        return self.pack(self.one(h), self.two(h))


@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}])
def test_several_outputs_where_the_loss_takes_them(pack):
    torch.manual_seed(0)
    net = Heads(pack).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 3).double()

    def both(f, t):
        a, b = f.values() if isinstance(f, dict) else f
        return F.mse_loss(a, t[:, :2]) + 3 * F.mse_loss(b, t[:, 2:])

    def first(f, t):
        a, _ = f.values() if isinstance(f, dict) else f
        return F.mse_loss(a, t[:, :2])

    for loss in (both, first):
        r1 = truth(net, (x, y), loss)
        for form in (gauss_newton, second_order):
            exact = form(net, (x, y), loss, num_samples=None)
            assert float(exact.value) == pytest.approx(r1, rel=1e-9)
            drawn = form(net, (x, y), loss, num_samples=300)
            assert abs(float(drawn.value) - r1) < 5 * float(drawn.standard_error)
        found = monte_carlo(net, (x, y), loss, num_masks=500)
        assert abs(float(found.value) - r1) < 5 * float(found.standard_error)
    with pytest.raises(TypeError, match="one tensor for this loss"):
        gauss_newton(net, (x, y), "mse")


def test_outputs_in_a_dataclass_that_torch_does_not_know():
    import dataclasses

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        other: object

    net = Heads(lambda a, b: Output(a, [b, "text"])).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    loss = lambda f, t: F.mse_loss(f.logits, t)  # noqa: E731
    exact = gauss_newton(net, (x, y), loss, num_samples=None)
    assert float(exact.value) == pytest.approx(truth(net, (x, y), loss), rel=1e-9)


class Held:
    """An object that holds others."""

    def __copy__(self):
        raise RuntimeError("its own code is not run")

    def __getattr__(self, name):
        return self.missing


class Slotted:
    __slots__ = ("__logits", "unset")

    def __init__(self, logits):
        self.__logits = logits

    @property
    def logits(self):
        return self.__logits


def ring(f):
    first, second = Held(), Held()
    first.other, second.other, second.logits = [second], {"back": first}, f
    return first


def web(f):
    every = [Held() for _ in range(20)]
    for held in every:
        held.all = every
    every[3].logits = f
    return every[0]


def chain(f):
    first = last = Held()
    for _ in range(3000):
        last.next = Held()
        last = last.next
    last.logits, first.last = f, last
    return first


OBJECTS = {
    "ring": (ring, lambda o: o.other[0].other["back"].other[0].logits),
    "web": (web, lambda o: o.all[7].all[3].logits),
    "chain": (chain, lambda o: o.last.logits),
    "slots": (Slotted, lambda o: o.logits),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_outputs_in_objects_that_hold_each_other(name):
    make, logits = OBJECTS[name]
    net = Heads(lambda a, b: make(a)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    loss = lambda f, t: F.mse_loss(logits(f), t)  # noqa: E731
    exact = gauss_newton(net, (x, y), loss, num_samples=None)
    assert float(exact.value) == pytest.approx(truth(net, (x, y), loss), rel=1e-9)


def test_a_loss_of_nothing_that_the_model_returned_is_refused():
    kept = Heads(lambda a, b: (lambda t: F.mse_loss(a, t), b))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="reads none of them"):
        gauss_newton(kept, batch, lambda f, t: f[0](t))


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net = nn.Sequential(net, nn.Linear(8, 2))
    batch = torch.randn(3, 5, 8), torch.randn(3, 5, 2)
    found = second_order(net, batch, "mse", num_samples=8)
    assert found.value.isfinite() and found.standard_error > 0


# ---- R_2


def test_per_sample_masks_have_their_own_closed_form():
    """``E||g||^2`` with a mask each, by every mask of every sample."""
    torch.manual_seed(1)
    n, m, p = 2, 3, 0.4
    net = nn.Sequential(
        nn.Linear(2, m, bias=False), nn.ReLU(), nn.Identity(),
        nn.Linear(m, 1, bias=False),
    ).double()  # fmt: skip
    x, y = torch.randn(n, 2).double(), torch.randn(n, 1).double()
    squares, mean = 0.0, 0.0
    for mask, chance in every_mask(n * m, p):
        f = net[3](net[:2](x) * mask.view(n, m) / (1 - p))
        found = torch.autograd.grad(
            tdi.half_squared_error(f, y), list(net.parameters())
        )
        flat = torch.cat([g.flatten() for g in found])
        squares += chance * float(flat @ flat)
        mean = mean + chance * flat
    expected, drift = two_layer_closed_form(net, (x, y), p, shared=False)
    assert squares == pytest.approx(float(expected), rel=1e-10)
    assert float(mean @ mean) == pytest.approx(float(drift), rel=1e-10)


@settings(max_examples=15)
@given(
    st.integers(1, 2), st.integers(1, 2), st.floats(0.05, 0.95), st.integers(0, 2**16),
    st.booleans(),
)  # fmt: skip
def test_r2_over_all_pairs_of_masks_is_the_closed_form(n, m, p, seed, shared):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, m, bias=False), nn.ReLU(), nn.Dropout(p),
        nn.Linear(m, 1, bias=False),
    ).double()  # fmt: skip
    batch = torch.randn(n, 2).double(), torch.randn(n, 1).double()
    size = (1 if shared else n, m)
    masks = list(every_mask(size[0] * m, p))
    value, drift, noise = 0.0, 0.0, 0.0
    for (one, chance), (two, other) in itertools.product(masks, masks):
        left = iter((one, two))

        def draw(x, p, _, left=left):
            kept = next(left)
            return x * kept.view(size) / (1 - p), pack(kept.flatten().bool())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch_dropout_ir.ops.draw", draw)
            found = gradient_norm(
                net, batch, tdi.half_squared_error, lr=4.0, shared_mask=shared
            )
        value += chance * other * float(found.value)
        drift += chance * other * float(found.mean_gradient)
        noise += chance * other * float(found.dropout_noise)
    expected, mean = (float(x) for x in two_layer_closed_form(net, batch, p, shared))
    assert value == pytest.approx(expected, rel=1e-9)
    assert drift == pytest.approx(mean, rel=1e-9, abs=1e-9 * expected)
    assert noise == pytest.approx(expected - mean, rel=1e-9, abs=1e-9 * expected)


def test_the_drift_form_is_the_gradient_of_r_s_plus_r_1():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
    net = net.double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    h = net[:2](x)
    value = F.mse_loss(net[3](h), y) + last_layer(h, net[3].weight, 0.3)
    slopes = torch.autograd.grad(value, list(net.parameters()))
    drift = 0.1 / 4 * sum(float(g.square().sum()) for g in slopes)
    found = gradient_norm(net, (x, y), "mse", lr=0.1, num_masks=2000)
    error = float(found.mean_gradient_standard_error)
    assert abs(float(found.mean_gradient) - drift) < 4 * error
    assert error < 0.1 * drift


def test_noise_of_mini_batches_is_kept_apart():
    """Four batches, their mean gradients by closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
    net = net.double()
    batches = [(torch.randn(3, 2).double(), torch.randn(3, 1).double()) for _ in "abcd"]
    means = []
    for x, y in batches:
        h = net[:2](x)
        value = F.mse_loss(net[3](h), y) + last_layer(h, net[3].weight, 0.3)
        found = torch.autograd.grad(value, list(net.parameters()))
        means.append(torch.cat([g.flatten() for g in found]))
    a, b, c, d = means
    drift = (a @ b + c @ d) / 2
    noise = sum(g @ g for g in means) / 4 - drift
    draws = [
        gradient_norm(net, batches, "mse", lr=4.0, num_masks=2) for _ in range(400)
    ]
    for name, expected in (("mean_gradient", drift), ("batch_noise", noise)):
        values = torch.stack([getattr(r, name) for r in draws])
        assert (values.mean() - expected).abs() < 4 * values.std() / 400**0.5, name
    r2 = draws[0]
    torch.testing.assert_close(
        r2.value, r2.mean_gradient + r2.dropout_noise + r2.batch_noise
    )
    with pytest.raises(ValueError, match="even number"):
        gradient_norm(net, batches[:3], "mse", lr=1.0)
    net[2].p = 0.0  # then the number of masks is no matter
    few, many = (
        gradient_norm(net, batches, "mse", lr=1.0, num_masks=k) for k in (2, 6)
    )
    for name in ("value", "mean_gradient", "batch_noise", "standard_error"):
        torch.testing.assert_close(getattr(many, name), getattr(few, name))
    assert many.dropout_noise == 0 and many.batch_noise > 0


def test_masks_of_all_batches_count_alike():
    """One batch of the two has all the noise: -2 h (1 + eta) of variance 4 h^2."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)).double()
    nn.init.zeros_(net[1].weight)
    noisy, quiet = ((torch.full((1, 1), h).double(), torch.ones(1, 1).double())
                    for h in (1.0, 0.0))  # fmt: skip
    for batches in ([noisy, quiet], [quiet, noisy]):
        found = [gradient_norm(net, batches, "mse", lr=4.0) for _ in range(200)]
        draws = torch.stack([r2.dropout_noise for r2 in found])
        assert (draws.mean() - 2).abs() < 4 * draws.std() / 200**0.5


def test_the_mean_iterate_follows_the_drift_form():
    """Every sequence of masks of three steps: third order against second."""
    torch.manual_seed(3)
    m, steps = 3, 3
    x, y = torch.randn(4, 2).double(), torch.randn(4, 1).double()
    start = 0.7 * torch.randn(4 * m).double()
    masks = 2 * torch.tensor(list(itertools.product((0.0, 1.0), repeat=m))).double()

    def risk(theta, noise):
        hidden = torch.tanh(x @ theta[: 2 * m].view(2, m) + theta[2 * m : 3 * m])
        return tdi.half_squared_error((hidden * noise) @ theta[3 * m :, None], y)

    gradient = torch.func.grad(risk)
    at_masks = torch.func.vmap(gradient, (None, 0))

    def mean_loss(theta):
        return torch.func.vmap(risk, (None, 0))(theta, masks).mean()

    def drift(theta, eps):
        return (
            mean_loss(theta)
            + eps / 4 * torch.func.grad(mean_loss)(theta).square().sum()
        )

    def papers(theta, eps):
        squares = at_masks(theta, masks).square().sum(1).mean()
        return mean_loss(theta) + eps / 4 * squares

    def flow(form, eps, substeps=8):
        slope = torch.func.grad(form)
        theta, dt = start, eps * steps / (steps * substeps)
        for _ in range(steps * substeps):
            k1 = -slope(theta, eps)
            k2 = -slope(theta + dt / 2 * k1, eps)
            k3 = -slope(theta + dt / 2 * k2, eps)
            k4 = -slope(theta + dt * k3, eps)
            theta = theta + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return theta

    errors = {drift: [], papers: []}
    for eps in (0.02, 0.01):
        states = start[None]
        for _ in range(steps):
            found = torch.func.vmap(at_masks, (0, None))(states, masks)
            states = (states[:, None] - eps * found).flatten(0, 1)
        mean = states.mean(0)
        for form, seen in errors.items():
            seen.append(float((mean - flow(form, eps)).norm()))
    third = errors[drift][0] / errors[drift][1]
    second = errors[papers][0] / errors[papers][1]
    assert 7 < third < 9
    assert 3.5 < second < 4.5
    net = nn.Sequential(nn.Linear(2, m), nn.Tanh(), nn.Dropout(0.5), nn.Linear(m, 1))
    net[3].bias = None
    with torch.no_grad():
        net.double()[0].weight.copy_(start[: 2 * m].view(2, m).T)
        net[0].bias.copy_(start[2 * m : 3 * m])
        net[3].weight.copy_(start[None, 3 * m :])
    found = gradient_norm(
        net, (x, y), tdi.half_squared_error, lr=eps, num_masks=600, shared_mask=True
    )
    for form, value, error in (
        (papers, found.value, found.standard_error),
        (drift, found.mean_gradient, found.mean_gradient_standard_error),
    ):
        assert (value - (form(start, eps) - mean_loss(start))).abs() < 4 * error


# ---- the paper's theorems


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**16))
def test_theorem_2(width, samples, seed):
    """At zero loss, descending R_1 lowers the trace of the Hessian."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(samples, 3)
    params = {
        "w": draw(width, 3).requires_grad_(),
        "a": draw(1, width).requires_grad_(),
    }
    h = torch.relu(x @ params["w"].T)
    r1 = last_layer(h, params["a"], 0.3, loss=tdi.half_squared_error)
    down = torch.autograd.grad(r1, list(params.values()), retain_graph=True)
    assume(any(bool(g.any()) for g in down))
    outputs = h @ params["a"].T
    flatness = 0.0
    for f in outputs[:, 0]:
        slopes = torch.autograd.grad(f, list(params.values()), create_graph=True)
        flatness = flatness + sum(g.square().sum() for g in slopes) / samples
    up = torch.autograd.grad(flatness, list(params.values()))
    along = -sum((u * d).sum() for u, d in zip(up, down, strict=True))
    assert along < 0


@given(st.integers(0, 2**16), st.floats(0.01, 0.99))
def test_theorem_1(seed, step):
    """Two kinks of one sign in one data interval: drawing them together lowers R_1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(-3.0, 4.0).double()  # the interval is (0, 1)
    kinks = 0.05 + 0.9 * torch.rand(2, generator=generator).double()
    slopes = 0.2 + torch.rand(2, generator=generator).double()  # one sign
    assume((kinks[0] - kinks[1]).abs() > 1e-3)

    def network(slopes, kinks):
        amplitude = slopes.sqrt()
        h = torch.relu(amplitude * (x[:, None] - kinks))
        f = h @ amplitude + 0.5 * x - 1  # the linear term sees no dropout
        r1 = last_layer(h, amplitude[None], 0.3, loss=tdi.half_squared_error)
        return f, float(r1)

    before, r1 = network(slopes, kinks)
    # Right of the interval both are lines: move each towards the other.
    offsets = -slopes * kinks
    moved = slopes - step * (slopes - slopes.flip(0))
    after, lower = network(
        moved, -(offsets - step * (offsets - offsets.flip(0))) / moved
    )
    torch.testing.assert_close(after, before)  # the loss stays zero at all data
    assert lower < r1


def test_two_neurons_turn_to_the_target():
    """Section VI-B: with R_1 both neurons become parallel to the target's."""
    torch.manual_seed(4)
    target = torch.tensor([1.0, 0.5]).double()
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double()
    batch = x, torch.relu(x @ target)[:, None]
    cosines = {}
    for kind in ("R_S", "L1"):
        net = nn.Sequential(
            nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(2, 1, bias=False),
        ).double()  # fmt: skip
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0, -0.4], [0.2, 1.0]]))
            net[3].weight.fill_(0.7)
        optimizer = torch.optim.LBFGS(
            net.parameters(), max_iter=300, tolerance_change=0
        )

        def closure(net=net, kind=kind, optimizer=optimizer):
            optimizer.zero_grad()
            if kind == "L1":
                value = tdi.regularizers.modified_loss(
                    net, batch, tdi.half_squared_error, kind="L1"
                )
            else:
                value = tdi.half_squared_error(net[3](net[:2](batch[0])), batch[1])
            value.backward()
            return value

        optimizer.step(closure)
        w = net[0].weight.detach()
        cosines[kind] = (w @ target / (w.norm(dim=1) * target.norm())).tolist()
    assert min(cosines["L1"]) > 0.9999
    assert min(cosines["R_S"]) < 0.95


# ---- what cannot be estimated is said


def test_a_loss_without_a_second_derivative():
    net, (x, _) = softmax_net(0.3)
    batch = x, torch.randn(5, 3).double()
    h = net[:2](x)
    for loss in (nn.L1Loss(), lambda f, t: (f - t).abs().sum()):
        for form in (gauss_newton, second_order):
            with pytest.raises(ValueError, match="second derivative"):
                form(net, batch, loss)
        with pytest.raises(ValueError, match="second derivative"):
            closed_form(last_layer, net, batch, loss)
        r1 = truth(net, batch, loss)
        assert r1 > 0
        found = monte_carlo(net, batch, loss, num_masks=500)
        assert abs(float(found.value) - r1) < 4 * float(found.standard_error)
    linear = gauss_newton(net, batch, lambda f, t: f.mean(), num_samples=None)
    assert float(linear.value) == 0  # and so is R_1
    with pytest.raises(ValueError, match="cut off"):
        gauss_newton(net, batch, lambda f, t: F.mse_loss(f.detach(), t))
    assert h.shape == (5, 8)


def test_a_site_that_the_loss_does_not_depend_on():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.used = nn.Dropout(0.5), nn.Dropout(0.2)
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            self.idle(x)
            return self.last(self.used(x))

    batch = torch.randn(4, 3), torch.randn(4, 2)
    for form in (gauss_newton, second_order):
        for count in (1, None):
            found = form(Idle(), batch, "mse", num_samples=count)
            assert found.per_site["idle"] == 0 and found.per_site["used"] > 0
            assert any("`idle`" in note for note in found.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    runs = (
        lambda b: gauss_newton(net, b, "mse"),
        lambda b: second_order(net, b, "mse"),
        lambda b: monte_carlo(net, b, "mse"),
        lambda b: gradient_norm(net, b, "mse", lr=0.1),
    )
    for run in runs:
        with pytest.raises(ValueError, match="input 0"):
            run((torch.full((4, 3), value), batch[1]))
        with pytest.raises(ValueError, match="at least one sample"):
            run((torch.zeros(0, 3), torch.zeros(0, 2)))
        with pytest.raises(ValueError, match="the outputs or the loss"):
            run((batch[0], torch.full((4, 2), value)))
    with torch.no_grad():
        net[0].bias[1] = value
    for run in runs:
        with pytest.raises(ValueError, match=r"parameter `0\.bias`"):
            run(batch)


def test_class_weights_need_targets():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))
    with pytest.raises(ValueError, match="class weights"):
        gauss_newton(net, (torch.randn(4, 3), None), loss)


BELOW = torch.tensor([-0.1, 2.0, -3.0, 0.5, 1.0]).double()


@pytest.mark.parametrize("num_samples", [None, 200])
@pytest.mark.parametrize("soft", [True, False])
def test_cross_entropy_that_weighs_below_zero_has_its_form(soft, num_samples):
    """Its closed form was a root of numbers below zero: not a number, in training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 5))
    batch = torch.randn(3, 3).double(), torch.tensor([0, 4, 2])
    loss = nn.CrossEntropyLoss(None if soft else BELOW)
    batch = (batch[0], -BELOW.expand(3, -1)) if soft else batch
    net = net.double()
    found = gauss_newton(net, batch, loss, num_samples=num_samples)
    with torch.no_grad():
        h = net[1](net[0](batch[0]))
        f, varied = net[3](h), h**2 * 0.1 / 0.9
    dense = torch.autograd.functional.hessian(lambda f: loss(f, batch[1]), f)
    w = net[3].weight.detach()
    expected = torch.einsum("iu,cu,icid,du->", varied, w, dense, w) / 2
    assert (found.value - expected).abs() <= 5 * found.standard_error + 1e-12
    assert modified_loss(net, batch, loss, kind="L1", r1="gauss_newton").isfinite()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_cross_entropy_that_weighs_below_zero_is_trained_through_norms(norm):
    """Its form takes third derivatives, of which torch has none that is right."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 5)
    ).double()
    batch = torch.randn(3, 3).double(), torch.tensor([0, 4, 2])
    weight, step = net[1].weight, torch.randn(4, 3).double() * 1e-5

    def value():
        torch.manual_seed(1)
        loss = nn.CrossEntropyLoss(BELOW)
        return modified_loss(net, batch, loss, kind="L1", r1="gauss_newton")

    (slope,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        weight += step
    ahead = value()
    with torch.no_grad():
        weight -= 2 * step
    difference = (ahead - value()).detach()
    torch.testing.assert_close(difference, 2 * (slope * step).sum(), rtol=1e-5, atol=0)
