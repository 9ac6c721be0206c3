"""Passes of large models, in which nobody asks a derivative in matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.test_line_memory import Heads, of_both
from tests.test_model_memory import Mixes, Patches, Texts, Translates
from tests.test_regularizer_memory import peak
from torch_dropout_ir.nn import Dropout
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


class Bare(nn.Module):
    """Parameters that its own code multiplies by, each in another way."""

    def __init__(self):
        super().__init__()
        self.given = nn.Linear(32, 64)
        self.own = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(8))
        self.drops = nn.ModuleList(Dropout(0.1) for _ in range(8))
        self.out = nn.Parameter(torch.randn(10, 64) / 8)

    def forward(self, x):
        ways = [
            lambda h, w: h @ w, torch.matmul, torch.mm, lambda h, w: h.matmul(w.T)
        ]  # fmt: skip
        h = self.given(x)
        for i, (drop, w) in enumerate(zip(self.drops, self.own, strict=True)):
            h = F.gelu(ways[i % 4](drop(h), w))
        return h @ self.out.mT


MODELS = {
    "patches": lambda: (Patches(), torch.randn(16, 3, 32, 32)),
    "mixes": lambda: (Mixes(), torch.randn(16, 3, 32, 32)),
    "texts": lambda: texts(500),
    "pairs": lambda: (Translates(), torch.randint(100, (16, 64))),
    "wide": lambda: (wide(), torch.randn(16, 512)),
    "bare": lambda: (Bare(), torch.randn(512, 32)),
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


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_code_multiplies_by_are_constant(form):
    """Behind what keeps no result: the input of each site is there beside its own."""
    torch.manual_seed(0)
    net, x, y = Bare(), torch.randn(4096, 32), torch.arange(4096) % 10
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()
    FORMS[form](net, (x, y), "cross_entropy")
    assert peak(lambda: FORMS[form](net, (x, y), "cross_entropy")) <= 1.005 * step


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


@pytest.mark.parametrize("alone", [True, False])
def test_nobody_sees_a_constant(alone, monkeypatch):
    """But torch's layers, whose code compares and keeps none."""
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    net, x, y = (
        (wide(), torch.randn(4, 512), torch.randint(6, (4,))) if alone else tied()
    )
    own = dict(net.named_parameters())

    def loss(f, y):
        assert all(p is own[n] for n, p in net.named_parameters())
        return F.cross_entropy(f, y)

    gauss_newton(net, (x, y), loss)
    monte_carlo(net, (x, y), loss, num_masks=2)

    def fails(f, y):
        raise OSError

    with pytest.raises(OSError):
        gauss_newton(net, (x, y), fails)
    assert all(p is own[n] for n, p in net.named_parameters())


class Looks(nn.Module):
    """Has dropout, and two layers of one matrix, above it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.kept = how, None
        self.drop, self.layer = nn.Dropout(0.3), nn.Linear(4, 4, bias=False)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.inner[2].weight = self.inner[0].weight
        self.beside = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 4))
        self.fast = {n: nn.Parameter(2 * x) for n, x in self.beside.named_parameters()}

    def forward(self, x):
        return getattr(self, self.how)(x)

    def tied(self, x):
        given = {"0.weight": self.layer.weight}
        return torch.func.functional_call(self.inner, given, (self.drop(x),))

    def same(self, x):
        h = self.inner(self.drop(x))
        return h if self.inner[0].weight is self.inner[2].weight else 2 * h

    def learns(self, x):
        h = self.layer(self.drop(x))
        return h if self.layer.weight.requires_grad else 2 * h

    def caches(self, x):
        h = self.drop(x)
        if self.kept is None:
            self.kept = self.layer.weight @ self.inner[0].weight
        return F.linear(h, self.kept)

    def puts(self, x):
        h, own = self.drop(x), self.layer.weight
        self.layer.weight = nn.Parameter(2 * own.detach())
        h = self.layer(h)
        self.layer.weight = own
        return h

    def lends(self, x):
        return torch.func.functional_call(self.beside, self.fast, (x,))

    def trains(self, x):
        h = self.drop(x)
        self.layer(h).square().sum().backward()
        g, self.layer.weight.grad = self.layer.weight.grad, None
        return h if g is None else F.linear(h, self.layer.weight - 0.1 * g)


LOOKS = "tied", "same", "learns", "caches", "puts", "lends"


@pytest.mark.parametrize("how", LOOKS)
def test_a_model_may_look_at_its_matrices(how, monkeypatch):
    found = []
    for least in (1, 2**62):
        torch.manual_seed(0)
        net, batch = Looks(how), (torch.randn(5, 4), torch.randn(5, 4))
        own = [*net.named_parameters(), *net.fast.items()]
        monkeypatch.setattr(recorder, "CONSTANT", least)
        found.append(gauss_newton(net, batch, "mse").value)
        now = [*net.named_parameters(), *net.fast.items()]
        pairs = zip(now, own, strict=True)
        assert all(a is b and a.requires_grad for (_, a), (_, b) in pairs)
        net(batch[0]).sum().backward()
        assert how != "caches" or net.layer.weight.grad is not None
    assert found[0] == found[1] != 0


def test_a_model_may_take_a_step_in_its_forward_pass(monkeypatch):
    found = []
    for least in (1, 2**62):
        torch.manual_seed(0)
        net, batch = Looks("trains"), torch.randn(5, 4)
        monkeypatch.setattr(recorder, "CONSTANT", least)
        with clean_pass(net, batch) as clean:
            found.append(clean.outputs.detach())
        assert all(x.grad is None for x in net.parameters())
    assert torch.equal(*found)


def test_recurrent_layers_keep_no_constant(monkeypatch):
    """They hold their parameters in a list besides."""
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    layer = nn.LSTM(3, 3, batch_first=True)
    with clean_pass(nn.Sequential(nn.Dropout(0.3), layer), torch.randn(2, 3, 3)):
        pass
    names = layer._flat_weights_names
    pairs = zip(layer._flat_weights, names, strict=True)
    assert all(x is getattr(layer, n) for x, n in pairs)


def test_a_loss_may_differentiate_in_a_matrix(monkeypatch):
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    torch.manual_seed(0)
    net, batch = Looks("learns"), (torch.randn(5, 4), torch.randn(5, 4))

    def loss(f, y):
        if not f.requires_grad:
            return F.mse_loss(f, y)
        torch.autograd.grad(f.sum(), net.layer.weight, retain_graph=True)
        return F.mse_loss(f, y)

    monte_carlo(net, batch, loss, num_masks=2)


class RunAgain(torch.autograd.Function):
    """Runs a layer again in its derivative, and differentiates in its matrix."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x, weight = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            own = nn.Parameter(weight)
            return torch.autograd.grad(F.linear(x, own), (x, own), g)


class Runs(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.3), nn.Linear(4, 4)

    def forward(self, x):
        h = RunAgain.apply(self.drop(x), self.layer.weight)
        return checkpoint(self.layer, torch.tanh(h), use_reentrant=False)


def test_a_layer_may_run_again_in_its_derivative(monkeypatch):
    monkeypatch.setattr(recorder, "CONSTANT", 1)
    torch.manual_seed(0)
    batch = torch.randn(5, 4), torch.randn(5, 4)
    assert gauss_newton(Runs(), batch, "mse").value != 0


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
