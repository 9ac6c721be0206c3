"""Models that return their own loss: parts of sites by the outputs that it is of."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, second_order
from torch_dropout_ir.regularizers.online import online

LOSSES = {
    "labels": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()),
    "soft labels": lambda f, y: -(f.log_softmax(-1).flatten(0, 1) * F.one_hot(
        y.flatten(), 3)).sum(1).mean(),
    "focal": lambda f, y: (
        (1 - torch.exp(-F.cross_entropy(f.mT, y, reduction="none"))) ** 2
        * F.cross_entropy(f.mT, y, reduction="none")
    ).mean(),
    "squares": lambda f, y: (f - F.one_hot(y, 3)).square().sum(-1).mean() / 4,
    "lengths": lambda f, y: (f - F.one_hot(y, 3)).norm(dim=-1).mean(),
    "coupled": lambda f, y: (f - f.mean(0)).square().mean() * f.exp().mean(),
    "hard": lambda f, y: (F.hardsigmoid(f) - F.one_hot(y, 3)).square().mean(),
}  # fmt: skip


class Net(nn.Module):
    """Symbols of five texts; the loss is made inside where targets are given."""

    def __init__(self, loss, beside=False, norm=False, parts=False, hidden=True):
        super().__init__()
        first = [nn.BatchNorm1d(4)] if norm else []
        self.body = nn.Sequential(
            nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4), *first,
            nn.Tanh(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head, self.loss = nn.Linear(4, 3), loss
        self.beside, self.parts, self.hidden = beside, parts, hidden

    def forward(self, x, y=None):
        h = self.body(x)
        logits = self.head(h)
        if y is None:
            return logits
        loss = self.loss(logits, y)
        if self.beside:
            loss = loss + 0.1 * h.square().mean()
        if self.parts:
            logits = logits.unbind(1)
        found = {"hidden": h} if self.hidden else {}
        return {**found, "logits": logits, "loss": loss}


def made(name, **options):
    torch.manual_seed(0)
    net = Net(LOSSES[name], **options).double()
    return net, (torch.randn(5, 4, 2).double(), torch.randint(3, (5, 4)))


def measured(net, batch, loss):
    torch.manual_seed(3)
    return online(net, batch, resolve_loss(loss))


def inside(net, batch):
    return measured(net, (batch, batch), lambda out, _: 0.5 * out["loss"])


def outside(net, batch):
    return measured(net, batch, lambda f, y: 0.5 * net.loss(f, y))


def close(a, b):
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_and_errors_are_those_of_a_loss_outside(name):
    found, how, _ = inside(*made(name))
    expected, said, _ = outside(*made(name))
    assert "Gauss-Newton" in how and "Gauss-Newton" in said
    assert list(found.per_site) == list(expected.per_site) == ["body.2", "body.5"]
    close(found.per_site, expected.per_site)
    close(found.per_site_standard_error, expected.per_site_standard_error)
    assert ("two draws" in how) == (name == "coupled")
    assert all(x > 0 for x in found.per_site.values())


def test_of_samples_that_meet_two_draws_tell_the_error():
    """Its square is unbiased."""
    net, batch = made("labels", norm=True)
    loss = resolve_loss(lambda f, y: 0.5 * net.loss(f, y))
    exact = gauss_newton(net, batch, loss.function, num_samples=None)
    off, squared = [], []
    for seed in range(150):
        torch.manual_seed(seed)
        found, how, _ = online(net, batch, loss)
        assert "of two draws" in how
        off.append(found.per_site["body.2"] - exact.per_site["body.2"])
        squared.append(found.per_site_standard_error["body.2"] ** 2)
    off, squared = torch.stack(off), torch.stack(squared)
    assert abs(off.mean()) < 4 * off.std() / 150**0.5
    assert float(squared.mean() / off.square().mean()) == pytest.approx(1, abs=0.4)
    close(inside(net, batch)[0].per_site, outside(net, batch)[0].per_site)


@pytest.mark.parametrize("count", [1, 5])
def test_few_outputs_of_a_batch_are_all_sent_back(count):
    """Those of one sample, or of a few that meet: there is a sum, without an error."""
    torch.manual_seed(0)
    below = nn.Sequential(nn.Linear(2, 6), nn.Tanh())
    meet = [nn.BatchNorm1d(4)] if count > 1 else []
    above = nn.Sequential(nn.Linear(6, 4), *meet, nn.Tanh(), nn.Linear(4, 3)).double()
    net = nn.Sequential(below, nn.Dropout(0.3), above).double()
    x, y = torch.randn(count, 2).double(), torch.arange(count) % 3
    found, how, _ = measured(net, (x, y), F.cross_entropy)
    h = below(x).detach()
    f = above(h).detach()
    jacobian = torch.autograd.functional.jacobian(above, h).view(f.numel(), h.numel())
    hessian = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, y), f)
    curved = jacobian.T @ hessian.view(f.numel(), f.numel()) @ jacobian
    exact = 0.3 / 0.7 / 2 * (h.flatten() ** 2 * curved.diagonal()).sum()
    torch.testing.assert_close(found.per_site["1"], exact)
    assert found.per_site_standard_error["1"] == 0
    assert "masks; by site: second-order parts (approximate), Gauss-Newton" in how


def test_two_draws_that_are_the_same_tell_no_error(monkeypatch):
    """Of one sample with three outputs there are few roots."""
    monkeypatch.setattr(sys.modules[online.__module__], "_FEW", 0)
    net, (x, y) = made("labels")
    loss = resolve_loss(lambda f, t: net.loss(f, t))
    errors = []
    for seed in range(40):
        torch.manual_seed(seed)
        found, _, _ = online(net, (x[:1, :1], y[:1, :1]), loss)
        errors.append(found.per_site_standard_error["body.2"])
    errors = torch.stack(errors)
    assert errors.isnan().any() and not (errors == 0).any()
    assert not errors.isnan().all()


@pytest.mark.parametrize("how", ["beside", "parts"])
def test_where_no_output_is_all_that_the_loss_is_of_it_is_the_whole_loss(how):
    """A term of hidden units; a list of parts."""
    net, batch = made("labels", hidden=False, **{how: True})
    found, said, _ = inside(net, batch)
    assert "sampled form of the whole loss" in said
    exact = second_order(
        net, (batch, batch), lambda out, _: 0.5 * out["loss"], num_samples=400
    )
    for name, x in exact.per_site.items():
        error = exact.per_site_standard_error[name]
        assert abs(found.per_site[name] - x) < 5 * 20 * error + 5 * error


def test_hidden_units_may_be_all_that_the_loss_is_of():
    net, batch = made("labels", beside=True)
    found, _, _ = inside(net, batch)
    whole = net.forward
    net.forward = lambda x, y=None: whole(x, batch[1])["hidden"]

    def loss(h, y):
        return 0.5 * net.loss(net.head(h), y) + 0.05 * h.square().mean()

    expected, _, _ = measured(net, batch, loss)
    close(found.per_site, expected.per_site)


def test_a_loss_that_is_linear_in_what_it_is_of_is_the_whole_loss():
    net, batch = made("labels")
    net.loss = lambda f, y: f.gather(2, y[..., None]).mean()
    assert "whole loss" in inside(net, batch)[1]


@pytest.mark.parametrize("kind", ["labels", "focal"])
@pytest.mark.parametrize("beside", ["losses", "logarithms"])
def test_what_a_loss_makes_of_outputs_is_no_output(kind, beside):
    """Losses of each symbol, whose curvature in the loss is not that of the logits."""
    net, batch = made("labels")

    def loss(f, y, found=None):
        logarithms = f.mT.log_softmax(1)
        losses = F.nll_loss(logarithms, y, reduction="none")
        if found is not None:
            found[beside] = losses if beside == "losses" else logarithms
        if kind == "focal":
            losses = (1 - torch.exp(-losses)) ** 2 * losses
        return losses.mean()

    class Telling(nn.Module):
        def forward(self, x, y):
            logits, found = net.head(net.body(x)), {}
            return {"loss": loss(logits, y, found), "logits": logits, **found}

    found, how, _ = measured(Telling(), (batch, batch), lambda out, _: out["loss"])
    assert "Gauss-Newton" in how
    expected, _, _ = measured(net, batch, loss)
    assert sorted(found.per_site.values()) == sorted(expected.per_site.values())


BY_HAND = {
    "squares": lambda f, y: (f - F.one_hot(y, 3)).square().sum(-1),
    "labels": lambda f, y: f.logsumexp(-1) - f.gather(2, y[..., None])[..., 0],
    "margins": lambda f, y: (1 - f.gather(2, y[..., None])[..., 0]).relu(),
}
BENT = {
    "root": lambda losses: losses.mean().sqrt(),
    "worst": lambda losses: losses.logsumexp((0, 1)),
    "weighed": lambda losses: (losses.sigmoid() * losses).mean(),
}


@pytest.mark.parametrize("bent", BENT)
@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("logits", [False, True])
def test_losses_of_samples_that_a_model_writes_itself_are_no_output(kind, bent, logits):
    net, batch = made("labels")

    class Telling(nn.Module):
        def forward(self, x, y):
            outputs = net.head(net.body(x))
            losses = BY_HAND[kind](outputs, y)
            found = {"loss": BENT[bent](losses), "losses": losses}
            return {**found, "logits": outputs} if logits else found

    found, how, _ = measured(Telling(), (batch, batch), lambda out, _: out["loss"])
    if not logits:
        assert "sampled form of the whole loss" in how
        return
    assert "Gauss-Newton" in how
    expected, _, _ = measured(net, batch, lambda f, y: BENT[bent](BY_HAND[kind](f, y)))
    assert sorted(found.per_site.values()) == sorted(expected.per_site.values())


@pytest.mark.parametrize("last", ["tanh", "sigmoid", "softmax", "scaled"])
def test_what_is_made_of_layers_and_bounded_is_an_output(last):
    net, batch = made("labels")
    bound = {
        "tanh": lambda f: 30 * (f / 30).tanh(), "sigmoid": torch.sigmoid,
        "softmax": lambda f: f.softmax(-1), "scaled": lambda f: f / 0.7 - 0.2,
    }[last]  # fmt: skip

    class Telling(nn.Module):
        def forward(self, x, y):
            outputs = bound(net.head(net.body(x)))
            return LOSSES["squares"](outputs, y), outputs

    class Bounded(nn.Module):
        def forward(self, x):
            return bound(net.head(net.body(x)))

    found, how, _ = measured(Telling(), (batch, batch), lambda out, _: out[0])
    assert "Gauss-Newton" in how
    outside = LOSSES["squares"]
    expected, _, _ = measured(Bounded(), batch, lambda f, y: 1.0 * outside(f, y))
    own, other = sorted(found.per_site.values()), sorted(expected.per_site.values())
    torch.testing.assert_close(own, other)
