"""What users test the formula with, itself tested."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_dropout_ir as tdi
from tests.reference.enumeration import expected_risk
from torch_dropout_ir import testing
from torch_dropout_ir.losses import resolve_loss


@given(st.lists(st.integers(0, 3), min_size=0, max_size=2), st.floats(0, 1))
def test_masks_are_all_there_with_probabilities_that_add(shape, p):
    masks = list(testing.enumerate_masks(shape, p))
    size = torch.Size(shape).numel()
    assert sum(chance for _, chance in masks) == pytest.approx(1.0)
    assert len({tuple(m.flatten().tolist()) for m, _ in masks}) == len(masks)
    assert len(masks) == (2**size if 0 < p < 1 else 1)
    mean = sum(chance * int(m.sum()) for m, chance in masks)
    assert float(mean) == pytest.approx(size * (1 - p))
    assert all(m.dtype == torch.bool and m.shape == tuple(shape) for m, _ in masks)


@given(testing.problems(max_width=3, sites="everywhere", loss="cross_entropy"))
def test_expected_loss_equals_the_reference(problem):
    """Whose noise layers stand in the place of the dropout."""
    net, batch = problem
    found = float(testing.expected_dropout_loss(net, batch, "cross_entropy"))
    widths = [net[-1].in_features] * sum(isinstance(m, nn.Dropout) for m in net)
    truth = expected_risk(net, widths, batch, F.cross_entropy)
    assert found == pytest.approx(truth, rel=1e-10)


def test_samples_that_meet_get_a_mask_each():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    expected = sum(
        chance * F.mse_loss(net[2](F.batch_norm(
            x * mask / 0.7, None, None, net[1].weight, net[1].bias, training=True
        )), y)
        for mask, chance in testing.enumerate_masks((3, 2), 0.3)
    )  # fmt: skip
    before = net[1].running_mean.clone()
    found = testing.expected_dropout_loss(net, (x, y), "mse")
    torch.testing.assert_close(found, expected.detach())
    assert torch.equal(net[1].running_mean, before)
    other = testing.expected_dropout_loss(net, (x, y), "mse", coupled=False)
    assert (other - found).abs() > 1e-3


def test_samples_that_meet_in_the_loss_alone_get_a_mask_each():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 1)).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    loss = lambda f, y: (f - y).mean().square()  # noqa: E731
    expected = sum(
        chance * loss(net[1](x * mask / 0.7), y)
        for mask, chance in testing.enumerate_masks((3, 2), 0.3)
    )
    found = testing.expected_dropout_loss(net, (x, y), loss)
    torch.testing.assert_close(found, expected.detach())


def test_samples_may_meet_where_derivatives_do_not_reach():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(2, 1)

        def forward(self, x):
            with torch.no_grad():
                h = self.drop(x)
                h = h - h.mean(0)
            return self.last(h)

    torch.manual_seed(0)
    net = Cut().double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    expected = 0
    for mask, chance in testing.enumerate_masks((3, 2), 0.3):
        h = x * mask / 0.7
        expected = expected + chance * F.mse_loss(net.last(h - h.mean(0)), y)
    found = testing.expected_dropout_loss(net, (x, y), "mse")
    torch.testing.assert_close(found, expected.detach())


def test_samples_may_meet_where_no_graph_leads():
    class Centred(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            return self[1](h - h.mean(0).detach())

    torch.manual_seed(0)
    net = Centred(nn.Dropout(0.3), nn.Linear(2, 1)).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    expected = 0
    for mask, chance in testing.enumerate_masks((3, 2), 0.3):
        h = x * mask / 0.7
        expected = expected + chance * F.mse_loss(net[1](h - h.mean(0)), y)
    found = testing.expected_dropout_loss(net, (x, y), "mse")
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("first", [-2.4, -2.5, -2.6, -2.7])
def test_samples_may_meet_at_few_masks_alone(first):
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 1, bias=False)).double()
    nn.init.ones_(net[1].weight)
    x, y = torch.ones(2, 2).double(), torch.tensor([[first], [0.0]]).double()
    # The largest is that of the second sample at one mask of sixteen.
    loss = lambda f, y: (f - y).square().amax()  # noqa: E731
    expected = sum(
        chance * loss(net[1](x * mask / 0.7), y)
        for mask, chance in testing.enumerate_masks((2, 2), 0.3)
    )
    found = testing.expected_dropout_loss(net, (x, y), loss)
    torch.testing.assert_close(found, expected.detach())


def test_rounding_of_large_losses_breaks_no_claim():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    batch = torch.randn(4, 2).double(), torch.full((4, 1), 1e6).double()
    report = testing.check_regularizer(net, batch, "mse", num_masks=100)
    by_name = {f.name: f for f in report.findings}
    assert by_name["last_layer"].relative_error > report.rtol
    report.assert_holds()
    assert "last_layer" in report.agreeing


def test_too_many_masks_are_refused():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 1))
    batch = torch.randn(2, 30), torch.randn(2, 1)
    with pytest.raises(ValueError, match=r"2\^30 \(`0` \[1, 30\]\)"):
        testing.expected_dropout_loss(net, batch, "mse")


@settings(max_examples=15)
@given(testing.problems(max_width=4))
def test_claims_hold_on_small_networks(problem):
    net, batch = problem
    before = torch.get_rng_state()
    report = testing.check_regularizer(net, batch, "mse", num_masks=200)
    report.assert_holds()
    too_few = {f.name for f in report.findings if "too alike" in f.reason}
    expected = {"gauss_newton", "second_order", "monte_carlo"} - too_few
    assert expected <= set(report.agreeing)
    assert too_few <= {"monte_carlo"}
    assert torch.equal(before, torch.get_rng_state())


SQUARES = {
    "half a mean": lambda f, y: 0.5 * F.mse_loss(f, y),
    "a sum": lambda f, y: 0.3 * ((f - y) ** 2).sum() + f.mean(),
    "weighed": lambda f, y: (y.exp() * F.mse_loss(f, y, reduction="none")).mean(),
    "one output": lambda f, y: (2 * f[:, 1] - y[:, 0]).pow(2).mean(),
    "negative": lambda f, y: (y.sin() * (f - y).square()).sum(),
}
NO_SQUARES = {
    "weights of the outputs": lambda f, y: (f.detach().abs() * (f - y) ** 2).mean(),
    # As far as dropout moves them, not as far as they are large.
    "from a size on": lambda f, y: (
        f.detach().square().clamp(min=25) * (f - y) ** 2
    ).mean(),
    "a constant of them": lambda f, y: F.mse_loss(f, y) + f.detach().square().sum(),
    "beside a number": lambda f, y: 1e5 + F.mse_loss(f, y) + f.detach().square().mean(),
    "norms": lambda f, y: (f - y).square().sum(1).sqrt().mean(),
    "nearly": lambda f, y: (1e-3 * (f - y)).sin().square().sum(),
}


def before_the_last(p, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(p), nn.Linear(5, 2))
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    return net.to(dtype), (x.to(dtype), y.to(dtype))


@pytest.mark.parametrize("p", [0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SQUARES)
def test_formulas_that_add_squares_are_exact_by_hand(name, dtype, p):
    loss, (net, batch) = SQUARES[name], before_the_last(p, dtype)
    wide, (x, y) = copy.deepcopy(net).double(), [t.double() for t in batch]
    risk = float(loss(wide.eval()(x), y).detach())
    truth = expected_risk(wide.train(), [5], (x, y), loss) - risk
    close = {"rel": 1e-9 if dtype == torch.float64 else 1e-4}
    state = torch.get_rng_state()
    for form in (tdi.regularizers.gauss_newton, tdi.regularizers.second_order):
        found = form(net, batch, loss, num_samples=None)
        assert found.exact and float(found.value) == pytest.approx(truth, **close)
        assert not form(net, batch, loss, num_samples=1).exact
        torch.set_rng_state(state)
        form(net, batch, loss, num_samples=None)
        assert torch.equal(torch.get_rng_state(), state), "an exact sum draws nothing"
    report = testing.check_regularizer(net, batch, loss, num_masks=400)
    claims = {f.name: f.claim for f in report.findings}
    names = "last_layer", "leave_one_out", "gauss_newton", "second_order"
    assert {claims[name] for name in names} == {"exact"}
    assert {*claims.values()} == {"exact", "unbiased"}
    report.assert_holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NO_SQUARES)
def test_formulas_that_do_not_are_second_order_by_hand(name, dtype):
    loss, (net, batch) = NO_SQUARES[name], before_the_last(0.9, dtype)
    for form in (tdi.regularizers.gauss_newton, tdi.regularizers.second_order):
        assert not form(net, batch, loss, num_samples=None).exact
    claims = {f.claim for f in testing.check_regularizer(net, batch, loss).findings}
    assert "exact" not in claims


def test_a_broken_estimator_is_found(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    batch = torch.randn(4, 2).double(), torch.randn(4, 2).double()

    def doubled(*args, **kwargs):
        return 2 * tdi.regularizers.last_layer(*args, **kwargs)

    monkeypatch.setattr("torch_dropout_ir.testing.report.last_layer", doubled)
    report = testing.check_regularizer(net, batch, "mse", num_masks=100)
    assert [f.name for f in report.broken] == ["last_layer"]
    assert "last_layer" not in report.agreeing
    with pytest.raises(AssertionError, match="not what they claim"):
        report.assert_holds()
    assert " no" in str(report) and "every mask" in str(report)


ESTIMATORS = (
    "last_layer", "leave_one_out", "gauss_newton", "second_order", "monte_carlo",
)  # fmt: skip


def lemma_1(p, width=4, dtype=torch.float64):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, 2)
    ).to(dtype)  # fmt: skip
    return net, (torch.randn(4, 2, dtype=dtype), torch.randn(4, 2, dtype=dtype))


@pytest.mark.parametrize("name, width", [
    *((name, 4) for name in ESTIMATORS),  # every mask
    *((name, 40) for name in ESTIMATORS[:4]),  # masks at random, which are the truth
])  # fmt: skip
def test_estimators_that_are_off_by_a_factor_are_found(name, width, monkeypatch):
    p = 0.5
    net, batch = lemma_1(p, width)
    real = getattr(tdi.regularizers, name)

    def mutant(factor):
        def run(*args, **kwargs):
            found = real(*args, **kwargs)
            if isinstance(found, torch.Tensor):
                return factor * found
            return dataclasses.replace(
                found,
                value=factor * found.value,
                standard_error=abs(factor) * found.standard_error,
            )

        run.__name__ = name
        return run

    # Twice, a half (p for p / (1 - p)), the sign, a mean for a sum, a site left out.
    for factor in (2.0, 1 - p, -1.0, 0.25, 0.0) if width == 4 else (1 - p,):
        monkeypatch.setattr(f"torch_dropout_ir.testing.report.{name}", mutant(factor))
        report = testing.check_regularizer(net, batch, "mse", num_masks=400)
        assert {f.name.removesuffix(", sampled") for f in report.broken} == {name}


def test_an_estimator_that_fails_is_broken(monkeypatch):
    net, batch = lemma_1(0.5)

    def fails(*_, **__):
        raise RuntimeError("out of order")

    fails.__name__ = "gauss_newton"
    monkeypatch.setattr("torch_dropout_ir.testing.report.gauss_newton", fails)
    report = testing.check_regularizer(net, batch, "mse", num_masks=100)
    with pytest.raises(AssertionError, match="out of order"):
        report.assert_holds()
    assert [f.name for f in report.broken] == ["gauss_newton", "gauss_newton, sampled"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_precision_rounds_breaks_no_claim(dtype):
    for p in (0.02, 0.3, 0.8):
        net, batch = lemma_1(p, dtype=dtype)
        testing.check_regularizer(net, batch, "mse", num_masks=400).assert_holds()


def test_few_samples_break_no_claim():
    """Two draws tell little of their spread, and squares less."""
    for seed in range(40):
        net, (x, y) = lemma_1(0.5, width=2)
        one = nn.Sequential(*net[:3], nn.Linear(2, 1)).double()
        for count in (2, 3):
            testing.check_regularizer(
                one, (x[:1], y[:1, :1]), "mse", num_masks=50, num_samples=count,
                seed=seed,
            ).assert_holds()  # fmt: skip


def test_what_is_not_finite_has_no_truth():
    net, batch = lemma_1(0.5)
    with torch.no_grad():
        net[3].weight[0, 1] = float("nan")
    for run in (testing.check_regularizer, testing.expected_dropout_loss):
        with pytest.raises(ValueError, match=r"parameter `3\.weight`"):
            run(net, batch, "mse")


def test_sites_that_are_used_at_some_masks_alone():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(2, 1)

        def forward(self, x):
            h = self.drop(x)
            return self.last(self.drop(h) if bool((h == 0).any()) else h)

    batch = torch.ones(1, 2), torch.ones(1, 1)
    with pytest.raises(ValueError, match="one more of site `drop`"):
        testing.expected_dropout_loss(Flow(), batch, "mse")


def test_reports_say_what_no_number_holds():
    net, batch = lemma_1(0.5)
    report = testing.check_regularizer(net, batch, "mse", num_masks=50)
    assert report.notes == () and "note" not in str(report)
    net[2] = nn.AlphaDropout(0.5)
    report = testing.check_regularizer(net.eval(), batch, "mse", num_masks=50)
    assert len(report.notes) == 3
    for said in ("AlphaDropout", "no dropout site", "evaluation mode"):
        assert f"{said}" in str(report)
    for count in ("num_masks", "num_samples"):
        with pytest.raises(ValueError, match=count):
            testing.check_regularizer(net, batch, "mse", **{count: 1})


def test_approximations_are_told_from_the_truth():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4), nn.Tanh(),
        nn.Dropout(0.5), nn.Linear(4, 3),
    ).double()  # fmt: skip
    batch = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0])
    report = testing.check_regularizer(net, batch, "cross_entropy", num_masks=500)
    report.assert_holds()
    by_name = {f.name: f for f in report.findings}
    assert by_name["last_layer"].claim == "not applicable"
    assert "single site" in by_name["last_layer"].reason
    for name in ("second_order", "gauss_newton, sampled", "second_order, sampled"):
        assert by_name[name].claim == "second order"
    assert not by_name["second_order"].agrees
    assert "monte_carlo" in report.agreeing
    loose = testing.check_regularizer(
        net, batch, "cross_entropy", num_masks=500, rtol=1.0
    )
    assert "second_order" in loose.agreeing


def test_models_too_large_to_enumerate_are_held_against_masks_at_random():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
    batch = torch.randn(16, 5), torch.randn(16, 3)
    report = testing.check_regularizer(net, batch, "mse", num_masks=500)
    assert report.truth_standard_error > 0
    report.assert_holds()
    assert "at random" in str(report)
    clean = F.mse_loss(net.eval()(batch[0]), batch[1])
    assert report.risk == pytest.approx(float(clean.detach()))
    assert resolve_loss("mse").kind == "squared"


@given(st.data())
def test_strategies_make_what_they_say(data):
    net = data.draw(testing.networks(max_width=4, sites="everywhere"))
    drops = [m for m in net if isinstance(m, nn.Dropout)]
    hidden = [m for m in net if isinstance(m, nn.Linear)][:-1]
    assert len(drops) == len(hidden) and all(0 <= d.p <= 0.95 for d in drops)
    assert isinstance(net[-2], nn.Dropout) and isinstance(net[-1], nn.Linear)
    for loss in ("mse", "cross_entropy"):
        x, y = data.draw(testing.batches(net, loss=loss))
        assert resolve_loss(loss)(net(x), y).isfinite()


def test_hypothesis_is_needed_for_strategies_alone():
    script = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import torch_dropout_ir as tdi\n"
        "assert len(list(tdi.testing.enumerate_masks(2, 0.5))) == 4\n"
        "try: tdi.testing.networks()\n"
        "except ImportError as e: assert 'pip install hypothesis' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class Jittered(nn.Module):
    """Dropout behind noise of another kind."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.first = noise, nn.Linear(3, 4)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.drop(self.noise(self.first(x)).tanh()))


def test_noise_that_no_mask_holds_has_no_exact_mean():
    torch.manual_seed(0)
    net = Jittered(lambda h: h + torch.randn_like(h)).double()
    batch = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    with pytest.raises(ValueError, match="draws random numbers besides"):
        testing.expected_dropout_loss(net, batch, "mse")
    report = testing.check_regularizer(net, batch, "mse", num_masks=500)
    assert report.truth_standard_error > 0
    assert any("as it was drawn" in note for note in report.notes)
    report.assert_holds()


@pytest.mark.parametrize("noise", [nn.AlphaDropout(0.2), F.rrelu])
def test_a_mean_without_known_noise_is_said(noise):
    torch.manual_seed(0)
    off = (lambda h: F.leaky_relu(h, 11 / 48)) if noise is F.rrelu else nn.Identity()
    random = (lambda h: F.rrelu(h, training=True)) if noise is F.rrelu else noise
    net, plain = Jittered(random).double(), Jittered(off).double()
    plain.load_state_dict(net.state_dict())
    batch = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    expected = testing.expected_dropout_loss(plain, batch, "mse")
    with pytest.warns(UserWarning, match="not in it"):
        found = testing.expected_dropout_loss(net, batch, "mse")
    torch.testing.assert_close(found, expected)


def test_a_site_that_drops_everything_breaks_no_claim():
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(1.0), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    report = testing.check_regularizer(net, batch, "mse", num_masks=10)
    report.assert_holds()
    assert report.agreeing == ("monte_carlo",)
    lacking = [f for f in report.findings if f.name not in report.agreeing]
    assert {f.claim for f in lacking} == {"not applicable"}
    assert all("site `1`" in f.reason for f in lacking)


@pytest.mark.parametrize(
    "loss",
    [
        nn.L1Loss(),
        lambda f, y: (f - y).abs().mean(),
        lambda f, y: F.multi_margin_loss(f, y.argmax(1)),
    ],
)
def test_where_no_site_drops_a_loss_without_curvature_breaks_no_claim(loss):
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.0), nn.Linear(3, 2)).double()
    batch = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    report = testing.check_regularizer(net, batch, loss)
    report.assert_holds()
    assert {"gauss_newton", "second_order", "monte_carlo"} <= set(report.agreeing)


def test_a_closed_form_that_channels_do_not_have_breaks_no_claim():
    net = nn.Sequential(nn.Dropout1d(0.3), nn.Linear(2, 2)).double()
    batch = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 2).double()
    report = testing.check_regularizer(net, batch, "mse", num_masks=50)
    report.assert_holds()
    claims = {f.name: f.claim for f in report.findings}
    assert claims["last_layer"] == claims["leave_one_out"] == "not applicable"
    assert claims["gauss_newton"] == "exact"


def test_few_masks_of_a_loss_that_seldom_is_large_break_no_claim():
    """Fifty are six of their own errors off here, and are drawn again."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Linear(1, 2), nn.ReLU(), nn.Dropout(0.75), nn.Linear(2, 2), nn.ReLU(),
        nn.Dropout(0.75), nn.Linear(2, 2),
    ).double()  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 1, generator=draw), torch.randn(1, 2, generator=draw)
    report = testing.check_regularizer(
        net, (x.double(), y.double()), "mse", num_masks=50, num_samples=30
    )
    report.assert_holds()
    assert "monte_carlo" in report.agreeing


def test_a_report_says_which_site_is_idle_or_drops_everything():
    class Idle(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.idle, self.drop = nn.Dropout(0.5), nn.Dropout(p)
            self.last = nn.Linear(2, 1)

        def forward(self, x):
            self.idle(x)
            return self.last(self.drop(x))

    batch = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    for p, said in ((0.3, "note: site `idle`: 0"), (1.0, "note: site `drop` drops")):
        report = testing.check_regularizer(Idle(p).double(), batch, "mse", num_masks=40)
        assert str(report).count(said) == 1


@given(st.data())
def test_strategies_keep_to_what_they_are_given(data):
    chances = st.sampled_from([0.25, 0.5])
    limits = {"max_width": 2, "max_depth": 1, "max_outputs": 2}
    net = data.draw(testing.networks(probabilities=chances, **limits))
    assert [type(m) for m in (net[0], net[2], net[3])] == [
        nn.Linear, nn.Dropout, nn.Linear
    ]  # fmt: skip
    assert len(net) == 4 and net[2].p in (0.25, 0.5)
    assert net[3].in_features <= 2 and net[3].out_features <= 2
    x, _ = data.draw(testing.batches(net, max_samples=2))
    assert 1 <= len(x) <= 2


class Whole(nn.Sequential):
    """Goes another way where nothing was dropped, of all samples together."""

    def forward(self, x):
        h = super().forward(x)
        return h if bool((h == 0).any()) else 2 * h


def test_samples_that_meet_in_a_branch_have_masks_of_their_own():
    """No derivative tells, and at half of the units that branch is not taken."""
    net = Whole(nn.Dropout(0.1)).double()
    batch = torch.ones(3, 5).double(), torch.zeros(3, 5).double()
    found = float(testing.expected_dropout_loss(net, batch, "mse"))
    chance = 0.9**15
    assert found == pytest.approx(1 / 0.9 + 3 * chance / 0.81, rel=1e-12)


class Empty(nn.Sequential):
    """Goes another way where all was dropped, of all samples together."""

    def forward(self, x):
        h = super().forward(x)
        return h if bool(h.any()) else h + 1


@pytest.mark.parametrize("units", [2, 3, 4])
def test_samples_that_meet_where_nothing_is_left_do_so(units):
    """Two such sets of masks make others: rows of one among any tell."""
    net = Empty(nn.Dropout(0.5)).double()
    batch = torch.ones(3, units).double(), torch.zeros(3, units).double()
    found = float(testing.expected_dropout_loss(net, batch, "mse"))
    assert found == pytest.approx(2 + 0.5 ** (3 * units), rel=1e-12)


class Labels(nn.Sequential):
    def forward(self, x):
        return super().forward(x).argmax(1)


def test_outputs_without_derivatives_have_a_mean():
    torch.manual_seed(0)
    net = Labels(nn.Linear(2, 3), nn.Dropout(0.4), nn.Linear(3, 3)).double()
    batch = torch.randn(2, 2).double(), torch.zeros(2).double()
    found = testing.check_regularizer(net, batch, risk_of_labels)
    h, w, b = net[0](batch[0]).detach(), net[2].weight, net[2].bias
    means = [
        sum(
            chance * float((h[i] * mask / 0.6 @ w.T + b).argmax() ** 2)
            for mask, chance in testing.enumerate_masks(3, 0.4)
        )
        for i in range(2)
    ]
    assert found.truth + found.risk == pytest.approx(sum(means) / 2, rel=1e-12)
    with pytest.raises(TypeError, match=r"floating-point tensor.*torch\.int64"):
        tdi.regularizers.gauss_newton(net, batch, risk_of_labels)


def risk_of_labels(labels, targets):
    return (labels - targets).square().mean()
