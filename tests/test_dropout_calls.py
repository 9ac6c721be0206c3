"""Dropout that is no module: functions, attention, stochastic depth, other noise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.functional import at_sites, call, fresh
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.module_calls import measuring
from torch_dropout_ir.regularizers import gauss_newton, monte_carlo, second_order
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.testing import expected_dropout_loss

torchvision = pytest.importorskip("torchvision")


class Functional(nn.Module):
    """Two linear layers with a dropout function of choice between them."""

    def __init__(self, drop, width=4):
        super().__init__()
        self.one, self.two = nn.Linear(3, width), nn.Linear(width, 2)
        self.drop = drop

    def forward(self, x):
        return self.two(self.drop(torch.tanh(self.one(x)), self.training))


CALLS = {
    "F.dropout": lambda h, on: F.dropout(h, 0.3, on),
    "keywords": lambda h, on: F.dropout(input=h, p=0.3, training=on),
    "torch.dropout": lambda h, on: torch.dropout(h, 0.3, on),
    "in place": lambda h, on: F.dropout(h, 0.3, on, inplace=True),
    "torch.native_dropout": lambda h, on: torch.native_dropout(h, 0.3, on)[0],
    "written": lambda h, on: (torch.dropout_(h, 0.3, on), h)[1],
    "ours": lambda h, on: tdi.dropout(h, 0.3, on),
}


def batch_for(net, n=4):
    torch.manual_seed(3)
    return torch.randn(n, 3).double(), torch.randn(n, 2).double()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_site_like_a_module(name):
    torch.manual_seed(0)
    net = Functional(CALLS[name]).double()
    batch = batch_for(net)
    twin = nn.Sequential(net.one, nn.Tanh(), nn.Dropout(0.3), net.two)
    for form in (gauss_newton, second_order):
        found = form(net, batch, "mse", num_samples=None)
        expected = form(twin, batch, "mse", num_samples=None)
        torch.testing.assert_close(found.value, expected.value)
        assert list(found.per_site) == [":dropout#0"]
        # Written in place the input of the last layer is no longer what passed on.
        assert found.exact is (name not in ("in place", "written"))
    r1 = expected_dropout_loss(net, batch, "mse")
    torch.testing.assert_close(r1, expected_dropout_loss(twin, batch, "mse"))
    drawn = monte_carlo(net, batch, "mse", num_masks=500)
    assert (drawn.value - expected.value).abs() < 4 * drawn.standard_error


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"in place", "written"}))
def test_the_mask_of_a_call_is_observed(name):
    torch.manual_seed(0)
    net = Functional(CALLS[name], width=200).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(batch_for(net)[0]), batch_for(net)[1]).backward()
        sgd.step()
    assert [(site.name, site.reason) for site in analysis.sites] == [(":dropout#0", "")]
    kept = analysis.latest["mask/keep_rate/:dropout#0"]
    assert abs(kept - 0.7) < 4 * (0.21 / 800) ** 0.5


class OneCall(nn.Module):
    """A branch dropped by a mask that torch's own function draws."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.4

    def forward(self, x):
        rows = x.new_ones(len(x), *[1] * (x.ndim - 1))
        return x * F.dropout(rows, self.drop_prob, self.training)


OneCall.__name__ = "OneCallDropPath"


@pytest.mark.parametrize("kind", ["row", "batch", "own", "one call"])
def test_the_mask_of_a_branch_that_begins_at_zero_is_observed(kind):
    """Its output is zero whether it is kept or not."""
    net = Path() if kind in ("own", "one call") else Residual(kind)
    if kind == "one call":
        net.drop = OneCall()
    for weight in net.branch.parameters():
        nn.init.zeros_(weight)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    x = torch.randn(400, 2)
    kept, drawn = 0, 1 if kind == "batch" else 400
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        for step in range(3):
            torch.manual_seed(step)
            kept += int((net.drop(torch.ones(400, 2)) != 0).sum()) // (800 // drawn)
            torch.manual_seed(step)
            F.mse_loss(net(x), x + 1).backward()
            sgd.step()
    assert analysis.latest["mask/keep_rate/drop"] == pytest.approx(kept / (3 * drawn))


NOISES = {
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.4, True),
    "randomized ReLU": lambda h: F.rrelu(h, training=True),
    "a layer of it": nn.RReLU(),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_that_is_switched_off_is_not_said_to_stay_in_the_loss(name):
    net = Functional(lambda h, _: NOISES[name](h))
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(x), y).backward()
        sgd.step()
    (site,) = analysis.sites
    assert "with it off" in site.reason
    assert "random numbers" not in analysis.notes["loss/R_S"]


def real_mean(net, batch, loss, draws=3000):
    """The loss under the model's own noise, averaged."""
    with torch.no_grad():
        values = torch.stack([loss(net(batch[0]), batch[1]) for _ in range(draws)])
    return float(values.mean()), float(values.std()) / draws**0.5


class Attention(nn.Module):
    def __init__(self, weights, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(2, 1, dropout=0.4, batch_first=True)
        self.weights, self.options = weights, options

    def forward(self, x):
        return self.attend(x, x, x, need_weights=self.weights, **self.options)[0]


class Scaled(nn.Module):
    """Attention called as a function, as most models of today do."""

    def __init__(self, **options):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.options = options

    def forward(self, x):
        p = 0.4 if self.training else 0.0
        q = self.project(x)[:, None]
        found = F.scaled_dot_product_attention(q, q, q, dropout_p=p, **self.options)
        return found[:, 0]


CAUSAL = torch.tensor([[True, False], [True, True]])
MODELS = {
    "attention with weights": lambda: Attention(True),
    "attention without": lambda: Attention(False),
    "attention, masked": lambda: Attention(False, attn_mask=~CAUSAL),
    "sdpa": lambda: Scaled(),
    "sdpa, causal": lambda: Scaled(is_causal=True),
    "sdpa, masked": lambda: Scaled(attn_mask=CAUSAL, scale=0.3),
    "sdpa, biased": lambda: Scaled(attn_mask=torch.randn(2, 2).double()),
    "channels": lambda: Channels(F.dropout1d),
    "stochastic depth": lambda: Residual("row"),
    "stochastic depth, whole": lambda: Residual("batch"),
    "drop path": lambda: Path(),
}


class Channels(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.conv, self.drop = nn.Conv1d(2, 3, 1), drop

    def forward(self, x):
        return self.drop(self.conv(x), 0.4, self.training).mean(1)


class Residual(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.branch = nn.Linear(2, 2)
        self.drop = torchvision.ops.StochasticDepth(0.4, mode)

    def forward(self, x):
        return x + self.drop(self.branch(x))


class MyDropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1)) >= self.drop_prob
        return x * kept / (1 - self.drop_prob)


class Path(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.drop = nn.Linear(2, 2), MyDropPath(0.3)

    def forward(self, x):
        return x + self.drop(self.branch(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_mask_gives_what_the_models_own_noise_does_on_average(name):
    """Our place for the noise against thousands of passes with torch's own."""
    torch.manual_seed(1)
    net = MODELS[name]().double()
    for weight in net.parameters():
        weight.detach().mul_(2)
    x = torch.randn(2, 2, 2).double()
    with torch.no_grad():
        y = torch.randn_like(net(x))
    loss = resolve_loss("mse")
    expected = float(expected_dropout_loss(net, (x, y), "mse"))
    mean, error = real_mean(net, (x, y), loss)
    assert abs(mean - expected) < 4 * error
    clean = float(clean_risk(net, (x, y), loss).detach())
    off = float(loss(net.eval()(x), y).detach())
    assert clean == pytest.approx(off, rel=1e-12)
    net.train()
    r1 = expected - clean
    assert error < 0.5 * abs(r1)  # the difference is seen
    found = monte_carlo(net, (x, y), "mse", num_masks=2000)
    assert abs(float(found.value) - r1) < 5 * float(found.standard_error)
    exact = second_order(net, (x, y), "mse", num_samples=None)
    assert float(exact.value) == pytest.approx(r1, rel=1e-9)  # affine in the noise
    drawn = gauss_newton(net, (x, y), "mse", num_samples=300)
    assert abs(float(drawn.value) - r1) < 5 * float(drawn.standard_error)


def test_all_four_sites_of_an_encoder_layer():
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    batch = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    found = gauss_newton(net, batch, "mse")
    assert set(found.per_site) == {
        "dropout", "dropout1", "dropout2", "self_attn:scaled_dot_product_attention#0"
    }  # fmt: skip
    assert all(part > 0 for part in found.per_site.values())


def test_calls_are_numbered_within_a_pass_of_their_module():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional(CALLS["F.dropout"])

        def forward(self, x):
            h = F.dropout(x, 0.1, self.training)
            h = torch.dropout(F.dropout(F.dropout(h, 0.2), 0.0), p=0.5, train=False)
            return self.inner(h) + self.inner(x)

    found = gauss_newton(Several(), (torch.randn(4, 3), torch.randn(4, 2)), "mse")
    assert list(found.per_site) == [":dropout#0", ":dropout#1", "inner:dropout#0"]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [True, False])
def test_recurrent_dropout_is_off_where_it_cannot_be_seen(cell, packed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(3, 4, num_layers=3, dropout=0.5, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            if packed:
                x = nn.utils.rnn.pack_padded_sequence(x, [5, 5], batch_first=True)
                h, _ = nn.utils.rnn.pad_packed_sequence(self.cell(x)[0], True)
            else:
                h, _ = self.cell(x)
            return self.last(h[:, -1])

    net = Net()
    batch = torch.randn(2, 5, 3), torch.randn(2, 2)
    loss = resolve_loss("mse")
    clean = float(clean_risk(net, batch, loss).detach())
    off = float(loss(net.eval()(batch[0]), batch[1]).detach())
    assert clean == pytest.approx(off)
    assert not gauss_newton(net.train(), batch, "mse").exact


def test_other_noise_is_off_too():
    net = nn.Sequential(nn.Linear(3, 4), nn.RReLU(), nn.AlphaDropout(0.5))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            h = F.alpha_dropout(self.net(x), 0.5, self.training)
            return F.feature_alpha_dropout(h[..., None], 0.5, self.training)[..., 0]

    model = Net()
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    loss = resolve_loss("mse")
    clean = float(clean_risk(model, (x, y), loss).detach())
    assert clean == pytest.approx(float(loss(model.eval()(x), y).detach()))


def test_grouped_queries_and_rows_that_attend_to_nothing():
    class Grouped(nn.Module):
        def forward(self, x, p=0.5):
            mask = torch.ones(3, 3, dtype=torch.bool)
            mask[1] = False
            return F.scaled_dot_product_attention(
                x, x[:, :2], x[:, :2], mask, p, enable_gqa=True
            )

    net, x = Grouped(), torch.randn(2, 4, 3, 5)
    with at_sites(net, fresh):
        found = call(net, x)
    torch.testing.assert_close(found, net(x, p=0.0))


def test_an_exception_leaves_nothing():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            F.dropout(self.inner(x), 0.5, self.training)
            raise ZeroDivisionError

    net = Broken()
    with pytest.raises(ZeroDivisionError):
        gauss_newton(net, (torch.randn(2, 2), torch.randn(2, 2)), "mse")
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert (
        torch.overrides._len_torch_function_stack() == 0
        if hasattr(torch.overrides, "_len_torch_function_stack")
        else torch._C._len_torch_function_stack() == 0
    )
    torch.manual_seed(0)
    first = F.dropout(torch.ones(99), 0.5)
    assert 0 < int((first == 0).sum()) < 99


def test_models_of_torchs_layers_alone_are_not_looked_on():
    """Every property that a mode sees costs more than a small pass."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with at_sites(net, fresh) as calls:
        assert calls.absent and measuring() and "forward" in vars(net[1])
    assert not measuring() and net[1].training and "forward" not in vars(net[1])
    with pytest.raises(ZeroDivisionError), at_sites(net, lambda *_: 1 / 0):
        net(torch.ones(2, 3))
    assert "forward" not in vars(net[1]) and net[1].training
    hook = net[0].register_forward_hook(lambda _, __, h: F.dropout(h, 0.5))
    assert Survey.of(net).callers
    with at_sites(net, fresh) as calls:
        torch.testing.assert_close(net(torch.ones(2, 3)), net(torch.ones(2, 3)))
    hook.remove()
    assert not Survey.of(net).callers
    net[2].forward = lambda h: F.linear(F.dropout(h, 0.5), net[2].weight)
    assert Survey.of(net).callers
    del net[2].forward
    for other in (nn.RReLU(), nn.AlphaDropout(), tdi.Dropout(), nn.GRU(2, 2)):
        assert Survey.of(nn.Sequential(*net, other)).callers
