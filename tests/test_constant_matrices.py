"""Passes of large models, in which nobody asks a derivative in matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.test_line_memory import Heads, of_both
from tests.test_model_memory import Mixes, Patches, Texts, Translates
from tests.test_regularizer_memory import peak
from torch_dropout_ir.regularizers import (
    gauss_newton,
    monte_carlo,
    recorder,
    second_order,
)
from torch_dropout_ir.regularizers.clean_pass import clean_pass

FORMS = {
    "gauss_newton": lambda *a: gauss_newton(*a),
    "gauss_newton, exact": lambda *a: gauss_newton(*a, num_samples=None),
    "second_order": lambda *a: second_order(*a),
    "monte_carlo": lambda *a: monte_carlo(*a, num_masks=2),
}


def texts(words):
    net = Texts()
    net.out = nn.Linear(64, words)
    return net, torch.randint(100, (8, 128))


def wide():
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)
    )


MODELS = {
    "patches": lambda: (Patches(), torch.randn(16, 3, 32, 32)),
    "mixes": lambda: (Mixes(), torch.randn(16, 3, 32, 32)),
    "texts": lambda: texts(500),
    "pairs": lambda: (Translates(), torch.randint(100, (16, 64))),
    "wide": lambda: (wide(), torch.randn(16, 512)),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_holds_is_told_as_if_none_were_constant(name, twice, monkeypatch):
    torch.manual_seed(0)
    net, x = MODELS[name]()
    told = []
    for least in (1, 2**62):
        monkeypatch.setattr(recorder, "CONSTANT", least)
        with clean_pass(net, x, twice=twice, weigh=True) as clean:
            told.append(clean.weighed([clean.outputs]))
    ours, plain = told
    assert 0.93 * plain.step < ours.step <= plain.step
    assert ours.kept <= plain.kept


def test_rows_that_two_layers_read_are_told_once():
    """Of which one is given them by a function with a derivative of its own."""
    torch.manual_seed(0)
    net, x, y = Heads(256), torch.randn(2048, 32), torch.randint(3, (2048,))
    step = peak(lambda: of_both(net(x), y).backward())
    net.zero_grad()
    with clean_pass(net, x, weigh=True) as clean:
        assert 0.9 * step < clean.weighed([*clean.outputs]).step <= 1.01 * step


class Tied(nn.Module):
    """Embedding and output layer are one matrix; a bare one multiplies too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(6, 4), nn.Dropout(0.3)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        h = self.drop(self.embedding(x)).mean(1)
        return self.out(self.norm(torch.tanh(h @ self.own)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, inside):
        super().__init__()
        self.drop, self.again = nn.Dropout(0.3), nn.Dropout(0.2)
        self.given, self.layer = nn.Linear(3, 4), nn.Linear(4, 4)
        self.out, self.inside, self.reentrant = nn.Linear(4, 2), inside, reentrant

    def block(self, h):
        h = self.layer(torch.tanh(self.given(h)))
        return torch.tanh(self.layer(self.again(h)))

    def forward(self, x):
        x = x if self.inside else self.drop(x)
        return self.out(checkpoint(self.block, x, use_reentrant=self.reentrant))


def tied():
    return Tied(), torch.randint(6, (5, 7)), torch.randint(6, (5,))


def with_checkpoints(inside):
    net = Checkpointed(False, inside)
    return net, torch.randn(5, 3), torch.randint(2, (5,))


SMALL = {
    "tied": tied,
    "checkpointed": lambda: with_checkpoints(False),
    "checkpointed, the first site inside": lambda: with_checkpoints(True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_numbers_are_the_same(name, form, monkeypatch):
    torch.manual_seed(0)
    net, x, y = SMALL[name]()
    net.double()
    x = x.double() if x.is_floating_point() else x
    found = []
    for least in (1, 2**62):
        monkeypatch.setattr(recorder, "CONSTANT", least)
        torch.manual_seed(1)
        found.append(FORMS[form](net, (x, y), "cross_entropy"))
    assert found[0].value == found[1].value != 0
    assert found[0].per_site == found[1].per_site


def test_parameters_are_given_back(monkeypatch):
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    net, x, y = tied()
    own = dict(net.named_parameters())

    def loss(f, y):
        assert net.own is not own["own"] and not net.own.requires_grad
        return F.cross_entropy(f, y)

    gauss_newton(net, (x, y), loss)
    assert {n: id(p) for n, p in net.named_parameters()} == {
        n: id(p) for n, p in own.items()
    }

    def fails(f, y):
        raise OSError

    with pytest.raises(OSError):
        gauss_newton(net, (x, y), fails)
    assert all(p is own[n] for n, p in net.named_parameters())


class Adapts(nn.Module):
    """Takes a step in a matrix of its own in its forward pass."""

    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.3), nn.Linear(3, 3)

    def forward(self, x):
        with torch.enable_grad():
            h = self.drop(x)
            own = self.layer(h).square().sum()
            (g,) = torch.autograd.grad(own, self.layer.weight, create_graph=True)
        return F.linear(h, self.layer.weight - 0.1 * g)


def test_a_model_may_differentiate_in_a_matrix(monkeypatch):
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    torch.manual_seed(0)
    net, batch = Adapts(), (torch.randn(5, 3), torch.randn(5, 3))
    found = monte_carlo(net, batch, "mse", num_masks=4)
    assert found.value.isfinite()
    with pytest.raises(RuntimeError, match="monte_carlo"):
        gauss_newton(net, batch, "mse")
