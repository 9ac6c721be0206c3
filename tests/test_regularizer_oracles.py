"""The estimators of R_1 against dense curvature and every mask, where no other test is.

Dense: each noise element's second derivative by autograd, none of the package's forms.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes import take_in_parts
from tests.reference.enumeration import every_mask
from tests.reference.second_order import second_order_form
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, monte_carlo, second_order
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.testing import expected_dropout_loss


def truth(net, batch, loss):
    """R_1 from every mask."""
    clean = clean_risk(net, batch, resolve_loss(loss)).detach()
    return float(expected_dropout_loss(net, batch, loss) - clean)


class Beside(nn.Module):
    """Two sites side by side; ``scale`` makes their noise small."""

    def __init__(self, p, q):
        super().__init__()
        self.left, self.right = nn.Dropout(p), nn.Dropout(q)
        self.one, self.two = nn.Linear(2, 3), nn.Linear(2, 3)
        self.last, self.scale = nn.Linear(3, 2), 1.0

    def forward(self, x):
        noisy = self.one(self.left(x)) + self.two(self.right(x.cos()))
        return self.last(torch.tanh(1 + self.scale * noisy))


@settings(max_examples=10)
@given(st.floats(0.05, 0.8), st.floats(0.05, 0.8), st.integers(0, 2**16))
def test_sites_add_to_second_order(p, q, seed):
    """What is missing is of third order in the noise; without curvature, of second."""
    torch.manual_seed(seed)
    net = Beside(p, q).double()
    batch = torch.randn(2, 2).double(), 5 + torch.randn(2, 2).double()
    off = {second_order: [], gauss_newton: []}
    for net.scale in (1e-2, 1e-3):
        r1 = truth(net, batch, "mse")
        for form, seen in off.items():
            found = form(net, batch, "mse", num_samples=None)
            torch.testing.assert_close(sum(found.per_site.values()), found.value)
            seen.append(abs(float(found.value) - r1) / net.scale**2)
            for name, other in (("left", "right"), ("right", "left")):
                alone = copy.deepcopy(net)
                getattr(alone, other).p = 0.0
                only = form(alone, batch, "mse", num_samples=None)
                torch.testing.assert_close(only.value, found.per_site[name])
    at, near = off[second_order]
    assert near < 0.2 * at + 1e-8
    at, near = off[gauss_newton]
    assert near > 0.5 * at


LOSSES = {
    "mse": nn.MSELoss(),
    "sum of squares": nn.MSELoss(reduction="sum"),
    "cross-entropy": nn.CrossEntropyLoss(label_smoothing=0.1),
    "binary": nn.BCEWithLogitsLoss(),
    "mixed": lambda f, t: (f.logsumexp(1) - (f * t).sum(1)).exp().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("norm", [False, True], ids=["apart", "meet"])
def test_draws_are_spread_around_the_dense_form(name, norm, monkeypatch):
    """z-scores of 200 draws against exact derivatives; those of each site too."""
    take_in_parts(monkeypatch, parts=False)  # a line for each takes time
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 4),
        nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Softplus(), nn.Dropout(0.4),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    batch, loss = (torch.randn(5, 3).double(), torch.rand(5, 3).double()), LOSSES[name]
    shapes = [(5, 4), (5, 4)]
    for form in (gauss_newton, second_order):
        dense = second_order_form(
            copy.deepcopy(net), shapes, batch, loss, linearized=form is gauss_newton
        ).detach()
        exact = form(net, batch, loss, num_samples=None)
        torch.testing.assert_close(exact.value, dense)
        assert not exact.exact and exact.standard_error == 0
        drawn = [form(net, batch, loss, num_samples=4) for _ in range(200)]
        values = torch.stack([d.value for d in drawn])
        claimed = torch.stack([d.standard_error for d in drawn])
        # A few draws tell an error badly, and its square without bias.
        z = (values - dense) / claimed.square().mean().sqrt()
        assert abs(float(z.mean())) < 4 * float(z.std()) / 200**0.5
        assert 0.8 < float(z.std()) < 1.25
        assert exact.per_site.keys() == {"1", "6"}
        for site, part in exact.per_site.items():
            parts = torch.stack([d.per_site[site] for d in drawn])
            assert (parts.mean() - part).abs() < 4 * parts.std() / 200**0.5


CHANNELS = {
    1: (nn.Dropout1d, nn.Conv1d, (3,)),
    2: (nn.Dropout2d, nn.Conv2d, (3, 2)),
    3: (nn.Dropout3d, nn.Conv3d, (2, 2, 2)),
}


@settings(max_examples=10)
@given(
    st.sampled_from(sorted(CHANNELS)), st.integers(1, 3), st.integers(1, 3),
    st.floats(0.05, 0.9), st.integers(0, 2**16),
)  # fmt: skip
def test_channels_are_dropped_whole(dims, samples, channels, p, seed):
    """Every mask of channels; linear above the site, so that two orders are all."""
    drop, conv, size = CHANNELS[dims]
    torch.manual_seed(seed)
    net = nn.Sequential(
        conv(2, channels, 1), nn.Tanh(), drop(p), conv(channels, 2, 2, padding=1),
        nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    x = torch.randn(samples, 2, *size)
    net(x)
    net, batch = net.double(), (x.double(), torch.randn(samples, 2).double())
    h = net[:2](batch[0]).detach()
    r1 = -float(F.mse_loss(net[3:](h), batch[1]).detach())
    for mask, chance in every_mask(channels, p):
        noisy = h * (mask / (1 - p)).view(channels, *(1,) * dims)
        r1 += chance * float(F.mse_loss(net[3:](noisy), batch[1]).detach())
    assert truth(net, batch, "mse") == pytest.approx(r1, rel=1e-9, abs=1e-12)
    for form in (gauss_newton, second_order):
        found = form(net, batch, "mse", num_samples=None)
        assert float(found.value) == pytest.approx(r1, rel=1e-9, abs=1e-12)
    found = monte_carlo(net, batch, "mse", num_masks=400)
    if found.standard_error.isfinite():
        assert abs(float(found.value) - r1) < 6 * float(found.standard_error)


@pytest.mark.parametrize("how", ["evaluated", "frozen", "trained"])
def test_batch_norm_as_the_script_has_it(how):
    """Evaluated it is linear, and R_1 the form; else samples have a mask each."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 2), nn.Dropout(0.3), nn.BatchNorm1d(2), nn.Linear(2, 2)
    ).double()
    with torch.no_grad():
        net[2].running_mean.normal_()
        net[2].running_var.uniform_(0.5, 2)
    if how != "trained":
        net[2].eval()
    if how == "frozen":
        net[2].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    r1 = truth(net, batch, "mse")
    for form in (gauss_newton, second_order):
        found = form(net, batch, "mse", num_samples=None)
        dense = second_order_form(
            copy.deepcopy(net), [(4, 2)], batch, F.mse_loss,
            linearized=form is gauss_newton,
        )  # fmt: skip
        torch.testing.assert_close(found.value, dense.detach())
        if how != "trained":
            assert float(found.value) == pytest.approx(r1, rel=1e-9)
    found = monte_carlo(net, batch, "mse", num_masks=2000)
    assert abs(float(found.value) - r1) < 4 * float(found.standard_error)
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
