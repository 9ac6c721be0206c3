"""Modified losses by parts of the batch, against those of all of it."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi
from tests.passes import take_in_parts
from tests.test_regularizer_memory import peak
from torch_dropout_ir.regularizers import modified_loss, penalty
from torch_dropout_ir.regularizers.masked import MaskedRows
from torch_dropout_ir.regularizers.output_rows import chunks
from torch_dropout_ir.regularizers.penalty_products import learns_alone
from torch_dropout_ir.regularizers.row_chunks import RowChunks

KINDS = {"L2": (0.0, 1.0), "L3": (1.0, -1.0), "regu": (1.0, 1.0)}


class Called(nn.Module):
    """Dropout called as a function, a weight that is tied, one that is not used."""

    def __init__(self):
        super().__init__()
        self.inner, self.spare = nn.Linear(4, 4), nn.Linear(4, 1)
        self.out = nn.Linear(4, 3)
        self.inner.bias.requires_grad_(False)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.inner(x)), 0.3, self.training)
        return self.out(F.dropout1d(h[..., None], 0.2, self.training)[..., 0]
                        @ self.inner.weight)  # fmt: skip


class Again(nn.Module):
    """A site in a block that backward passes compute again."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.GELU())
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(checkpoint(self.block, x, use_reentrant=False))


class Language(nn.Module):
    """Attention under dropout; positions that are flattened."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.body = nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True)

    def forward(self, x):
        return self.head(self.body(self.embedding(x))).view(-1, 3)


class Tokens(nn.Module):
    """Positions of images, normalized one by one, as tokens of a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.InstanceNorm2d(4, affine=True), nn.Dropout(0.3)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(self.norm(x)).flatten(2).mT).mean(1)


class DroppedWeight(nn.Module):
    """All rows share the mask of a weight, which has as many rows as a later part."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(12, 4)), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(F.linear(x, F.dropout(self.weight, 0.3, self.training)).tanh())


class Marked(nn.Module):
    """Rows that are marked see all of them."""

    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.out(self.drop(x))
        return h + (x[:, :1] > 9) * h.mean(0)


def convolutional(*norm):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), *norm, nn.ReLU(), nn.Dropout2d(0.3),
        nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(16, 3),
    )  # fmt: skip


class Drifts(nn.Linear):
    """Its buffer moves by less than outputs are compared to."""

    def __init__(self):
        super().__init__(4, 6)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        self.factor.add_(1e-13)
        return super().forward(x) * self.factor


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def rows(n=40):
    return lambda: torch.randn(n, 4)


def images():
    return torch.randn(9, 2, 6, 6)


# Model, inputs, and whether rows run apart.
MODELS = {
    "convolutional": (convolutional, images, True),
    "channels last": (
        convolutional,
        lambda: images().to(memory_format=torch.channels_last),
        True,
    ),
    "ours": (
        lambda: nn.Sequential(tdi.Dropout(0.3), nn.Linear(4, 6), nn.Softplus(),
                              tdi.Dropout(0.5), nn.Linear(6, 3)), rows(), True,
    ),
    "called": (Called, rows(), True),
    "dropped weight": (DroppedWeight, rows(), True),
    "tokens of images": (Tokens, lambda: torch.randn(4, 4, 3, 3), True),
    "language": (Language, lambda: torch.randint(5, (30, 3)), True),
    "again": (Again, rows(), None),
    "batch norm": (lambda: convolutional(nn.BatchNorm2d(4)), images, False),
    "no statistics": (
        lambda: convolutional(nn.BatchNorm2d(4, track_running_stats=False)),
        images, False,
    ),
    "noise": (lambda: convolutional(nn.RReLU(0.1, 0.9)), images, False),
    "other noise": (lambda: nn.Sequential(Noise(), *convolutional()), images, True),
    "buffers that move": (
        lambda: nn.Sequential(Drifts(), nn.Dropout(0.3), nn.Linear(6, 3)), rows(), False
    ),
}  # fmt: skip


def batch_of(make, data):
    torch.manual_seed(3)
    net, x = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    return net, (x, torch.arange(len(net(x))) % 3)


def by_hand(net, batch, loss, kind, rates):
    """What a script would write."""
    x, y = batch
    params = [p for p in net.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        risk = loss(net(x), y)
    found = torch.autograd.grad(risk, params, create_graph=True, allow_unused=True)
    pairs = zip(rates, found, strict=True)
    penalty = sum(r / 4 * g.square().sum() for r, g in pairs if g is not None)
    weight, sign = KINDS[kind]
    value = weight * risk + sign * penalty
    if kind == "L2":
        drops = [
            m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        ]
        for m in drops:
            m.eval()
        value = value + loss(net(x), y)
        for m in drops:
            m.train()
    return value


def slopes(value, net):
    params = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)


@pytest.fixture
def taken(monkeypatch):
    """What was found of whether rows run apart."""
    seen = []
    own = MaskedRows.apart
    monkeypatch.setattr(
        MaskedRows, "apart", lambda *x: seen.append(own(*x)) or seen[-1]
    )
    return seen


@pytest.fixture
def kept(monkeypatch):
    """Whether parts of the batch were what the whole is."""
    seen, own = [], penalty._by_rows

    def look(*args):
        found = own(*args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(penalty, "_by_rows", look)
    return seen


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def check(net, batch, loss, kind, rates=None, max_bytes=0):
    named = [n for n, p in net.named_parameters() if p.requires_grad]
    rates = [0.3] * len(named) if rates is None else rates[: len(named)]
    state = {n: x.clone() for n, x in net.state_dict().items()}
    seed_all(8)
    expected = by_hand(net, batch, loss, kind, rates)
    after, gradient = torch.get_rng_state(), slopes(expected, net)
    net.load_state_dict(state)
    seed_all(8)
    lr = dict(zip(named, rates, strict=True))
    value = modified_loss(net, batch, loss, kind=kind, lr=lr, max_bytes=max_bytes)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes(value, net), gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [0, 2**26])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_the_whole_batch_gives_by_hand(taken, kept, name, kind, max_bytes):
    make, data, apart = MODELS[name]
    if kind == "L2" and name in (
        "again",
        "called",
        "dropped weight",
        "language",
        "noise",
        "buffers that move",
    ):
        kind = "regu"  # by hand, dropout cannot be switched off in all of them
    net, batch = batch_of(make, data)
    rates = [0.3 * k for k in range(40)] if kind == "regu" else None
    check(net, batch, F.cross_entropy, kind, rates, max_bytes)
    assert taken == ([] if max_bytes or apart is None else [apart])
    assert kept == [True] * any(taken)


def test_rows_that_turn_out_to_meet_are_taken_together(taken):
    net, batch = batch_of(Marked, rows())
    first = next(chunks(40, 3)).tolist()
    batch[0][next(i for i in range(40) if i not in first), 0] = 10
    check(net, batch, F.cross_entropy, "regu")
    assert taken == [True]


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Derived(nn.Module):
    """Rows that meet in derivatives, and in no value."""

    def __init__(self, how, bias=True):
        super().__init__()
        self.first, self.drop = nn.Linear(4, 4, bias), nn.Dropout(0.3)
        self.out, self.how = nn.Linear(4, 3, bias), how

    def forward(self, x):
        h = self.drop(self.first(x)).tanh()
        if self.how == "straight through":
            h = h + (h.mean(0) - h.mean(0).detach())
        elif self.how == "of all rows":
            share = len(x) ** -0.5
            h = h * share + (h * (1 - share)).detach()
        elif self.how == "function":
            h = Centred.apply(h)
        elif h.requires_grad:
            h.register_hook(HOOKS[self.how])
        return self.out(h)


def in_pairs(g):
    return g + g.view(-1, 2, g.shape[1]).flip(1).view(g.shape) if not len(g) % 2 else g


HOOKS = {
    "hook": lambda g: g / g.norm(),
    "next": in_pairs,
    "half a batch": lambda g: g if len(g) % 2 else g + g.roll(len(g) // 2, 0),
    "mirrored": lambda g: g + g.flip(0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["straight through", "of all rows", "function", "hook"])
def test_rows_that_meet_in_derivatives_alone_are_taken_together(taken, how, bias, kind):
    net, batch = batch_of(lambda: Derived(how, bias), rows())
    check(net, batch, F.cross_entropy, kind)
    assert taken == [True] * (how != "hook")


@pytest.mark.parametrize("how", ["straight through", "of all rows", "function"])
def test_so_are_those_that_meet_below_what_is_penalized(taken, how):
    net, batch = batch_of(lambda: Derived(how), rows())
    check(net, batch, F.cross_entropy, "regu", [0.0, 0.0, 0.3, 0.3])
    assert taken == [True]


class Calls(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return tdi.dropout(x, self.p, self.training)


@pytest.mark.parametrize("site", [nn.Dropout, tdi.Dropout, Calls])
@pytest.mark.parametrize("kind", ["L3", "regu"])
def test_noise_behind_a_site_is_drawn_again(kept, kind, site):
    layers = nn.Linear(4, 4), site(0.3), Noise(), nn.Tanh(), site(0.2), Noise()
    net, batch = batch_of(lambda: nn.Sequential(*layers, nn.Linear(4, 3)), rows())
    check(net, batch, F.cross_entropy, kind)
    assert kept == [True]


class Skips(nn.Module):
    """Skips a layer, and weighs, by numbers that are none of torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.drop(torch.tanh(self.first(x)))
        h = self.second(h) if random.random() < 0.5 else h
        return self.out(h * np.random.uniform(0.5, 2))


@pytest.mark.parametrize("kind", ["L3", "regu"])
def test_so_is_what_generators_of_python_and_numpy_draw(kept, kind):
    net, batch = batch_of(Skips, rows())
    check(net, batch, F.cross_entropy, kind)
    assert kept == [True]


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_which_nobody_makes_the_gradient_tell_too(kept, bias):
    net, batch = batch_of(lambda: Derived("hook", bias), rows())
    net.how = "function"
    check(net, batch, F.cross_entropy, "regu")
    net.forward = lambda x: net.out(net.drop(net.first(x)).tanh())
    check(net, batch, F.cross_entropy, "regu")
    assert kept == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_of_no_weight_is_none(taken, kind):
    net, batch = batch_of(convolutional, images)
    check(net, batch, F.cross_entropy, kind, [0.0] * 6)
    assert taken == [True]


class Last(nn.Module):
    """Linear in its only parameters: their gradient has no graph."""

    def __init__(self):
        super().__init__()
        self.drop, self.weight = nn.Dropout(0.3), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.drop(x.double()) * self.weight


@pytest.mark.parametrize("kind", ["L3", "regu"])
def test_a_gradient_without_a_graph_adds_nothing(taken, kind):
    net, batch = batch_of(Last, lambda: torch.randn(40, 6))
    check(net, batch, lambda f, t: f.mean(), kind)


def decay(net):
    return lambda f, t: F.cross_entropy(f, t) + net[-1].weight.square().sum()


LOSSES = {
    "classes that weigh": (
        lambda _: nn.CrossEntropyLoss(
            torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=1, label_smoothing=0.1
        ),
        True,
    ),
    "summed": (lambda _: nn.CrossEntropyLoss(reduction="sum"), True),
    "by itself": (lambda _: lambda f, t: f[range(9), t].exp().mean(), True),
    "pairs": (lambda _: lambda f, t: F.cross_entropy(f - f.mean(0), t), False),
    "decay": (decay, False),
    "noise": (
        lambda _: lambda f, t: F.cross_entropy(f + torch.rand_like(f), t), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_all_rows(taken, name):
    loss, apart = LOSSES[name]
    net, batch = batch_of(convolutional, images)
    check(net, batch, loss(net), "L3")
    assert taken == [apart]


@pytest.mark.parametrize("kind", ["L2", "regu"])
def test_what_is_below_the_model_learns_too(taken, kind):
    net, batch = batch_of(convolutional, images)
    x = batch[0].requires_grad_()
    options = {"kind": kind, "lr": 0.3, "max_bytes": 0}
    found = []
    for form in (
        lambda: modified_loss(net, (x, batch[1]), "cross_entropy", **options),
        lambda: by_hand(net, batch, F.cross_entropy, kind, [0.3] * 6),
    ):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(form(), x))
    torch.testing.assert_close(*found)
    assert taken == []


@pytest.mark.parametrize("max_bytes", [0, 2**26])
def test_backward_adds_to_gradients_and_can_be_scaled_and_repeated(max_bytes):
    net, batch = batch_of(convolutional, images)
    options = {"kind": "regu", "lr": 0.3, "max_bytes": max_bytes}
    value = modified_loss(net, batch, "cross_entropy", **options)
    found = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
    kept = [g.clone() for g in found]
    (8 * value).backward(retain_graph=True)
    value.backward()
    for p, g, before in zip(net.parameters(), found, kept, strict=True):
        torch.testing.assert_close(p.grad, 9 * before)
        assert torch.equal(g, before)


def test_a_gradient_is_taken_early_where_nothing_else_looks_on():
    given, plain, half = torch.randn(4, 6), nn.Linear(6, 3), nn.Linear(6, 3).half()
    hooked = nn.Linear(6, 3)
    hooked.weight.register_hook(lambda g: 2 * g)

    def alone(net, x):
        return learns_alone(net(x).square().sum(), list(net.parameters()))

    assert alone(plain, given)
    assert not alone(hooked, given) and not alone(half, given.half())
    assert not alone(plain, given.clone().requires_grad_())
    assert not learns_alone(plain(given).half().sum(), list(plain.parameters()))
    risk = plain(given).square().sum()
    with torch.autocast("cpu"):
        assert not learns_alone(risk, list(plain.parameters()))


@pytest.mark.parametrize("kind", ["L2", "L3", "regu"])
def test_hooks_on_parameters_see_a_gradient_once(kind):
    net, batch = batch_of(convolutional, images)
    found = []
    for most in (None, 0):
        torch.manual_seed(1)
        handle = net[-1].weight.register_hook(lambda g: 2 * g)
        net.zero_grad()
        options = {"kind": kind, "lr": 0.3, "max_bytes": most}
        modified_loss(net, batch, "cross_entropy", **options).backward()
        handle.remove()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_derivative_of_the_gradient_needs_its_graph(kind):
    net, batch = batch_of(*MODELS["ours"][:2])
    params, found = list(net.parameters()), []
    options = {"kind": kind, "lr": 0.3}
    for form in (
        lambda: modified_loss(net, batch, "cross_entropy", max_bytes=None, **options),
        lambda: by_hand(net, batch, F.cross_entropy, kind, [0.3] * len(params)),
    ):
        torch.manual_seed(2)
        first = torch.autograd.grad(form(), params, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), params))
    torch.testing.assert_close(*found)
    with pytest.raises(RuntimeError, match="max_bytes=None"):
        value = modified_loss(net, batch, "cross_entropy", max_bytes=0, **options)
        value.backward(create_graph=True)


@pytest.fixture
def chunked(monkeypatch):
    """What was found of whether rows run apart without noise, of a pass of any size."""
    seen = []
    own = RowChunks.apart
    monkeypatch.setattr(RowChunks, "apart", lambda x: seen.append(own(x)) or seen[-1])
    take_in_parts(monkeypatch)
    return seen


def drawn(net, batch, loss, kind, max_bytes, r1="gauss_newton"):
    """Value, gradient, and what is left of the generator and the model."""
    torch.manual_seed(7)
    options = {"r1": r1, "max_bytes": max_bytes}
    value = modified_loss(net, batch, loss, kind=kind, **options)
    after = torch.get_rng_state()
    return value, slopes(value, net), after, list(net.buffers())


@pytest.mark.filterwarnings("ignore:modified_loss")
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.MSELoss(), nn.CrossEntropyLoss(
    torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=1, label_smoothing=0.1
)])  # fmt: skip
@pytest.mark.parametrize("kind", ["L1", "L4"])
# Not `again`, which is refused: `R_S` would run again with dropout on.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"again"}))
def test_roots_by_parts_are_those_of_the_whole_batch(chunked, name, kind, loss):
    make, data, apart = MODELS[name]
    net, (x, y) = batch_of(make, data)
    if isinstance(loss, nn.MSELoss):
        y = F.one_hot(y, net(x).shape[1]).double()
    state = {n: x.clone() for n, x in net.state_dict().items()}
    expected = drawn(net, (x, y), loss, kind, None)
    net.load_state_dict(state)
    found = drawn(net, (x, y), loss, kind, 0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    if name == "buffers that move":
        apart = kind == "L4"  # which moves them in its last pass alone
    asked = kind == "L4" or name not in ("batch norm", "buffers that move")
    asked &= name != "dropped weight"  # samples share its mask
    assert chunked == ([apart or name == "noise"] if asked else [])


def focal(f, y):
    log = F.log_softmax(f, 1).gather(1, y[:, None])
    return -((1 - log.exp()) ** 2 * log).mean()


def contrast(f, y):
    return F.cross_entropy(f @ f.mT, torch.arange(len(y)))


PRODUCTS = {
    "second_order": ("second_order", F.cross_entropy, True),
    "second_order of a loss of rows": ("second_order", focal, True),
    "gauss_newton of a loss of rows": ("gauss_newton", focal, True),
    "rows meet in the loss": ("second_order", contrast, False),
}


@pytest.mark.filterwarnings("ignore:modified_loss")
@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("kind", ["L1", "L4"])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"again"}))
def test_products_by_parts_are_those_of_the_whole_batch(chunked, name, kind, form):
    make, data, apart = MODELS[name]
    r1, loss, rows = PRODUCTS[form]
    net, batch = batch_of(make, data)
    state = {n: x.clone() for n, x in net.state_dict().items()}
    expected = drawn(net, batch, loss, kind, None, r1)
    net.load_state_dict(state)
    found = drawn(net, batch, loss, kind, 0, r1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if name == "buffers that move":
        apart = kind == "L4"
    asked = kind == "L4" or name not in ("batch norm", "buffers that move")
    asked &= rows and name != "dropped weight"
    assert chunked == ([apart or name == "noise"] if asked else [])


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3))
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x).sigmoid()
        return self.one(h), {"two": self.two(h)}


@pytest.mark.parametrize("form", ["gauss_newton", "second_order"])
@pytest.mark.parametrize("beside", [False, True])
def test_so_they_are_of_several_outputs_but_not_of_weights_beside(
    chunked, beside, form
):
    torch.manual_seed(0)
    net = Heads().double()
    batch = torch.randn(24, 3).double(), torch.randint(3, (24,))

    def loss(f, y):
        found = F.cross_entropy(f[0], y) + f[1]["two"].pow(4).mean()
        return found + net.one.weight.square().sum() if beside else found

    pair = [drawn(net, batch, loss, "L1", most, form) for most in (0, None)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11)
    assert chunked == ([] if beside else [True])


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("kind", ["L1", "L4"])
@pytest.mark.parametrize("how", ["straight through", "of all rows", "function", *HOOKS])
def test_roots_of_rows_that_meet_in_derivatives_alone(chunked, how, kind, below):
    net, batch = batch_of(lambda: Derived(how), rows())
    if below:
        net.drop = nn.Identity()
        net = nn.Sequential(net, nn.Dropout(0.2), nn.Linear(3, 3)).double()
    expected = drawn(net, batch, F.cross_entropy, kind, None)
    found = drawn(net, batch, F.cross_entropy, kind, 0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert len(chunked) == 1


@pytest.mark.parametrize("kind", ["L1", "L4"])
def test_forward_mode_sees_the_whole_batch(chunked, kind):
    net, (x, y) = batch_of(convolutional, images)
    tangents = []
    for most in (None, 0):
        with forward_ad.dual_level():
            moved = forward_ad.make_dual(x, torch.ones_like(x))
            value, *_ = drawn(net, (moved, y), F.cross_entropy, kind, most)
            tangents.append(forward_ad.unpack_dual(value).tangent)
    torch.testing.assert_close(*tangents)
    assert tangents[0] and not chunked


@pytest.mark.parametrize("max_bytes", [0, 2**26])
@pytest.mark.parametrize("learns", [True, False])
def test_a_model_that_does_not_learn_has_a_loss_too(chunked, learns, max_bytes):
    net, (x, y) = batch_of(convolutional, images)
    net.requires_grad_(False)
    found = []
    for most in (None, max_bytes):
        own = x.clone().requires_grad_(learns)
        torch.manual_seed(3)
        value = modified_loss(
            net, (own, y), "cross_entropy", kind="L1", r1="gauss_newton", max_bytes=most
        )
        slopes = torch.autograd.grad(value, own) if learns else ()
        found.append((value.detach(), *slopes))
    torch.testing.assert_close(*found)
    assert chunked == []


def test_rows_that_turn_out_to_meet_have_their_roots_together(chunked):
    net, batch = batch_of(Marked, rows())
    first = next(chunks(40, 3)).tolist()
    batch[0][next(i for i in range(40) if i not in first), 0] = 10
    pair = [drawn(net, batch, F.cross_entropy, "L1", n) for n in (0, None)]
    torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-12)
    assert chunked == [True]


@pytest.mark.parametrize("kind", ["L1", "L3", "regu"])
def test_parts_hold_little_more_than_a_training_step(kind):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(8192, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()

    def penalty():
        options = {"lr": 0.1, "r1": "gauss_newton", "max_bytes": 2**24}
        modified_loss(net, (x, y), "cross_entropy", kind=kind, **options).backward()

    assert peak(penalty) < 1.3 * step


def test_so_do_products_that_are_differentiated():
    """Of all rows they are five steps."""
    net = nn.Sequential(
        nn.Dropout(0.2), *[nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)] * 4,
        nn.Linear(128, 10),
    )  # fmt: skip
    batch = torch.randn(2048, 128), torch.randint(10, (2048,))
    step = peak(lambda: F.cross_entropy(net(batch[0]), batch[1]).backward())

    def run(**options):
        net.zero_grad()
        options |= {"kind": "L1", "r1": "second_order"}
        modified_loss(net, batch, "cross_entropy", **options).backward()

    net.zero_grad()
    run(max_bytes=2**22)
    assert peak(lambda: run(max_bytes=2**22)) < 1.3 * step
    assert peak(lambda: run(max_bytes=None)) > 3 * step
