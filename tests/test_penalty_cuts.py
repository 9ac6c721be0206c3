"""Penalties by parts of passes whose samples meet, against those of a whole graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests.test_modified_loss_parts import KINDS, check
from tests.test_pass_parts import Clamp
from tests.test_regularizer_memory import peak
from torch_dropout_ir.regularizers import modified_loss, penalty_cuts
from torch_dropout_ir.regularizers.penalty_products import Products


class Residual(nn.Module):
    """Two convolutions, added to what comes in."""

    def __init__(self, few, many, stride=1, act=F.relu):
        super().__init__()
        self.first = nn.Conv2d(few, many, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(many, many, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(many) for _ in range(2))
        self.drop, self.act = nn.Dropout(0.1), act
        self.beside = nn.Identity() if few == many else nn.Conv2d(few, many, 1, stride)

    def forward(self, x):
        h = self.drop(self.act(self.norms[0](self.first(x))))
        return self.act(self.norms[1](self.second(h)) + self.beside(x))


def residual(wide=4, act=F.relu, depth=1):
    sizes = [(wide, wide)] * depth + [(wide, 2 * wide, 2)]
    sizes += [(2 * wide, 2 * wide)] * depth
    body = [Residual(*size, act=act) for size in sizes]
    return nn.Sequential(
        nn.Conv2d(2, wide, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(2 * wide, 3),
    )  # fmt: skip


def layers(act=nn.Tanh, site=nn.Dropout):
    body = []
    for _ in range(4):
        body += [nn.Linear(6, 6), nn.BatchNorm1d(6), act(), site(0.2)]
    return nn.Sequential(*body, nn.Linear(6, 3))


class Shares(nn.Module):
    """A weight that first and last layers share, and layers between them."""

    def __init__(self):
        super().__init__()
        self.own, self.body = nn.Linear(6, 6), layers()[:-1]
        self.end = nn.Linear(6, 3)

    def forward(self, x):
        return self.end(self.own(self.body(self.own(x))))


class Counts(nn.Module):
    """Is another in each pass."""

    def __init__(self):
        super().__init__()
        self.body, self.count = layers(), 0

    def forward(self, x):
        self.count += 1
        return self.body(x) * (1 + (self.count == 4))


class Moves(nn.Module):
    """Moves a buffer that it reads, by its own count perhaps."""

    def __init__(self, counts=False):
        super().__init__()
        self.body, self.count, self.counts = layers(), 0, counts
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        self.count += self.counts
        self.factor.add_(0.1 * (1 + (self.count == 5)))
        return self.body(x * self.factor)


class Replaces(Moves):
    """Puts another buffer in the place of its own."""

    def forward(self, x):
        self.factor = self.factor + 0.1 * x.detach().std()
        return self.body(x * self.factor)


class Weighs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class Changes(nn.Module):
    """Changes what is sent back between layers."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how, self.calls = layers(), how, 0

    def forward(self, x):
        self.calls += 1
        for layer in self.body:
            x = self.between(layer(x))
        return x

    def between(self, h):
        if self.how == "function":
            return Clamp.apply(h)
        if self.how == "counts":
            return Weighs.apply(h, 1.0 + 0.5 * (self.calls in (2, 3)))
        if self.how == "node":
            h.grad_fn.register_prehook(lambda g: (g[0].clamp(-1e-2, 1e-2),))
        elif self.how == "halved":
            h.register_hook(lambda g: g / 2)
        else:
            h.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
        return h


def rows():
    return torch.randn(9, 6).double()


def images():
    return torch.randn(5, 2, 8, 8).double()


NETS = {
    "residual": (residual, images), "smooth": (lambda: residual(act=F.gelu), images),
    "layers": (layers, rows), "ours": (lambda: layers(nn.ReLU, tdi.Dropout), rows),
    "in place": (lambda: layers(lambda: nn.ReLU(inplace=True)), rows),
    "attention": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2)), nn.Linear(2, 4),
            nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True), nn.Flatten(),
            nn.Linear(12, 6), *layers(),
        ), rows,
    ),
}  # fmt: skip


@pytest.fixture
def cuts(monkeypatch):
    """How many parts were taken to their end."""
    seen, kept = [], []
    products, whole = penalty_cuts.CutPasses.products, Products.whole

    def look(self, *args):
        found = products(self, *args)
        seen.append(len(self._cuts) + 1)
        return found

    monkeypatch.setattr(penalty_cuts.CutPasses, "products", look)
    monkeypatch.setattr(Products, "whole", lambda x: kept.append(whole(x)) or kept[-1])
    yield seen
    assert len(kept) == len(seen) and all(kept)


def taken(name):
    torch.manual_seed(3)
    make, data = NETS[name]
    net, x = make().double(), data()
    return net, (x, torch.arange(len(x)) % 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_it_is_what_a_graph_of_all_gives(cuts, name, kind):
    net, batch = taken(name)
    if kind == "L2" and name == "attention":
        kind = "regu"  # by hand, dropout cannot be switched off in all of it
    rates = [0.3 * (k % 3) for k in range(40)] if kind == "regu" else None
    check(net, batch, F.cross_entropy, kind, rates)
    assert len(cuts) == 1 and cuts[0] > 2


def test_what_no_tensor_cuts_is_taken_whole(cuts):
    torch.manual_seed(3)
    net, x = Shares().double(), rows()
    check(net, (x, torch.arange(9) % 3), F.cross_entropy, "regu")
    assert len(cuts) < 2 and all(n < 4 for n in cuts)


def test_passes_that_turn_out_to_differ_are_taken_whole(cuts):
    torch.manual_seed(3)
    net, x = Counts().double(), rows()
    y = torch.arange(9) % 3
    value = modified_loss(net, (x, y), F.cross_entropy, kind="L3", lr=0.1, max_bytes=0)
    assert cuts == [] and value.isfinite()
    value.backward()


HOW = "function", "counts", "node", "halved", "clamped"


@pytest.mark.parametrize("how", HOW)
def test_what_is_sent_back_may_be_changed_on_its_way(how):
    torch.manual_seed(3)
    net, x = Changes(how).double(), rows()
    check(net, (x, torch.arange(9) % 3), F.cross_entropy, "regu")


@pytest.mark.parametrize("counts", [False, True])
def test_buffers_that_are_read_are_what_they_were(cuts, counts):
    torch.manual_seed(3)
    net, x = Moves(counts).double(), rows()
    check(net, (x, torch.arange(9) % 3), F.cross_entropy, "regu")
    assert len(cuts) == (not counts)
    torch.testing.assert_close(net.factor, torch.tensor(1.1).double())


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_counted_once(cuts, kind, alike):
    torch.manual_seed(3)
    net, x = Counts().double(), rows()
    tdi.convert_dropout_(net)
    net.count = -100 if alike else 0
    y = torch.arange(9) % 3
    modified_loss(net, (x, y), F.cross_entropy, kind=kind, lr=0.1, max_bytes=0)
    assert len(cuts) == alike
    for site in (m for m in net.modules() if isinstance(m, tdi.Dropout)):
        assert site.statistics.num_calls == 1
        assert site.statistics.num_kept == site.last_mask.sum()


@pytest.mark.parametrize("kind", ["L3", "regu"])
def test_buffers_that_are_replaced_are_what_they_were(cuts, kind):
    torch.manual_seed(3)
    net, x = Replaces().double(), rows()
    check(net, (x, torch.arange(9) % 3), F.cross_entropy, kind)
    assert len(cuts) == 1
    torch.testing.assert_close(net.factor, 1 + 0.1 * x.std())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_second_derivative_is_named(kind, norm):
    norms = [nn.BatchNorm1d(6)] if norm else []
    net = nn.Sequential(
        nn.EmbeddingBag(5, 6, scale_grad_by_freq=True), *norms, nn.Tanh(),
        nn.Dropout(0.2), nn.Linear(6, 3),
    )  # fmt: skip
    batch = torch.randint(5, (40, 3)), torch.arange(40) % 3
    with pytest.raises(NotImplementedError, match="EmbeddingBag"):
        modified_loss(net, batch, "cross_entropy", kind=kind, lr=0.1, max_bytes=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_where_samples_meet_holds_little_more_than_a_step(kind):
    """Of a graph of all two steps."""
    torch.manual_seed(0)
    net, x = residual(16, depth=3), torch.randn(8, 2, 32, 32)
    y = torch.arange(8) % 3
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()

    def run(max_bytes):
        net.zero_grad()
        loss = modified_loss(
            net, (x, y), "cross_entropy", kind=kind, lr=0.1, max_bytes=max_bytes
        )
        loss.backward()

    run(0)
    assert peak(lambda: run(2**40)) > 1.7 * step
    assert peak(lambda: run(0)) < 1.15 * step
