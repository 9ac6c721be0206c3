"""Gradients that are given away as factors are those of autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi
from tests.live import Live
from torch_dropout_ir import ops, weight_parts
from torch_dropout_ir.gradient_factors import Factors, address, row_blocks
from torch_dropout_ir.regularizers.gradient_pairs import GradientPairs, compared
from torch_dropout_ir.weight_parts import WeightParts


class Twice(nn.Module):
    """Uses a weight in two layers, and another one in a layer and by itself."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.shared(torch.tanh(self.shared(x)))
        return self.own(x) + self.own.weight.sum() * x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.mix(x, x, x)[0]


class Tokens(nn.Module):
    """Positions of an image as the rows of a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(x).flatten(2).mT)


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
               (4, 6), {"0.weight", "2.weight"}),
    "positions": (lambda: nn.Linear(6, 5, bias=False), (4, 2, 3, 6), {"weight"}),
    "one sample": (lambda: nn.Linear(6, 5), (6,), set()),
    "convolution": (lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, (2, 1), dilation=2, padding=(1, 0), bias=False)),
        (2, 3, 9, 9), {"0.weight", "2.weight"}),
    "line": (lambda: nn.Conv1d(3, 5, 3, padding=2), (2, 3, 9), {"weight"}),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), set()),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5), set()),
    "tokens of one image": (Tokens, (1, 4, 3, 3), {"out.weight"}),
    "twice": (Twice, (4, 6), set()),
    "attention": (Attention, (3, 4, 6), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_factors_are_of_the_gradient(case):
    make, shape, expected = CASES[case]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    named = dict(model.named_parameters())
    names, targets = list(named), list(named.values())
    given = {}
    with WeightParts(targets, given.__setitem__) as parts:
        value = model(x).square().mean()
        parts.settle(value)
        found = torch.autograd.grad(value, targets, allow_unused=True)
    truth = torch.autograd.grad(model(x).square().mean(), targets)
    assert {names[i] for i in given} == expected
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert (a is None) == (i in given)
        whole = given[i][:] if i in given else a
        torch.testing.assert_close(whole, b)
        if i in given:
            torch.testing.assert_close(given[i][1:3], b[1:3])


def factors(rows, out, into):
    weight = torch.randn(out, into)
    return Factors(torch.randn(rows, out), torch.randn(rows, into), weight, None)


def test_gradients_are_compared_by_rows():
    weight = torch.randn(9, 7)
    assert [s.start for s in row_blocks(weight, 20)] == [0, 2, 4, 6, 8]
    a, b = factors(4, 9, 7), factors(4, 9, 7)
    x, y = a[:].double(), b[:].double()
    zero, turned = torch.zeros_like(x), a[:].T.contiguous().T
    for (one, other), (u, v) in (
        ((a, b), (x, y)), ((a[:], b), (x, y)), ((None, b), (zero, y)),
        ((a, None), (x, zero)), ((a[:], b[:]), (x, y)), ((turned, b[:]), (x, y)),
        ((None, b[:]), (zero, y)), ((a[:].half(), b), (x, y)),
    ):  # fmt: skip
        kept = [z.clone() if torch.is_tensor(z) else z for z in (one, other)]
        found = compared(one, other, weight, 20).double()
        expected = torch.stack([
            u.square().sum(), v.square().sum(), (u * v).sum(), (u - v).square().sum()
        ])  # fmt: skip
        half = torch.is_tensor(one) and one.dtype == torch.half
        close = {"rtol": 1e-2, "atol": 1e-1} if half else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found, expected, **close)
        for z, before in zip((one, other), kept, strict=True):
            assert not torch.is_tensor(z) or torch.equal(z, before)
    x = torch.tensor(3.0)
    assert compared(x, None, x, 20).tolist() == [9.0, 0.0, 0.0, 9.0]


def test_a_gradient_is_held_as_what_is_smaller():
    weight = torch.randn(5, 6)
    pairs = GradientPairs(nn.Linear(6, 5), None, [1.0, 1.0], False)
    for rows, given, whole in ((20, False, True), (1, False, False), (5, True, False)):
        g = factors(rows, 5, 6)
        inputs = {address(g._x)} if given else set()
        found = pairs._smaller(0, g, inputs)
        assert torch.is_tensor(found) == whole
        torch.testing.assert_close(found[:], g[:].view_as(weight))


@pytest.mark.parametrize("num_masks", [2, 4])
def test_of_two_batches_neighbours_are_compared_whatever_their_form(
    monkeypatch, num_masks
):
    shared = torch.randn(5, 6)
    rows = (  # of each parameter its gradient at each pass
        [shared, factors(1, 5, 6), None, shared.clone()],
        [shared.clone() for _ in range(4)],
        [factors(1, 5, 6), factors(9, 5, 6), shared, factors(1, 5, 6)],
        [None, factors(1, 5, 6), None, None],
        [None] * 4,
    )
    model = nn.ParameterList([torch.zeros(5, 6) for _ in rows])
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    pairs, seen = GradientPairs(model, None, rates, False), []

    def gradients(batch, receive):
        k = len(seen)
        seen.append(batch[1])
        for i, row in enumerate(rows):
            if row[k % 4] is not None:
                receive(i, row[k % 4])

    monkeypatch.setattr(pairs, "_gradients", gradients)
    before = shared.clone()
    a, b = [(torch.ones(1), name) for name in "ab"]
    value, mean, noise, rest = pairs.across(a, b, num_masks)
    zero = torch.zeros(5, 6)
    scaled = [
        torch.stack([
            (rate / 4) ** 0.5 * (zero if row[k % 4] is None else row[k % 4][:])
            for rate, row in zip(rates, rows, strict=True)
        ])
        for k in range(len(seen))
    ]  # fmt: skip
    both = [*zip(itertools.pairwise(scaled), itertools.pairwise(seen), strict=True)]
    inner = [(x * y).sum() for (x, y), (one, other) in both if one != other]
    away = [(x - y).square().sum() / 2 for (x, y), (one, other) in both if one == other]
    assert (len(seen), len(inner), len(away)) == (
        2 * num_masks, num_masks - 1, num_masks,
    )  # fmt: skip
    squares = torch.stack([x.square().sum() for x in scaled]).mean()
    torch.testing.assert_close(value, squares)
    torch.testing.assert_close(mean, sum(inner) / len(inner))
    torch.testing.assert_close(noise, sum(away) / len(away))
    torch.testing.assert_close(rest, value - mean - noise)
    assert seen.count("a") == num_masks and torch.equal(shared, before)


@pytest.mark.parametrize("function", sorted(weight_parts._HOLD_INPUT, key=str))
@pytest.mark.parametrize("dropped", [False, True])
def test_what_holds_its_input_is_made_again(function, dropped):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    targets = [*first.parameters(), *second.parameters()]
    given = {}

    def value(note=None):
        h = function(first(x))
        if dropped:
            y = h * 2
            if note:
                note(y, h, lambda h: h * 2)
            h = y
        return second(h).square().mean()

    with WeightParts(targets, given.__setitem__, remake=True) as parts:
        made = value(parts.note)
        assert len(parts._taken) == 1 and parts._taken[0].inputs.grad_fn is None
        assert not parts.overwritten()
        parts.settle(made)
        found = torch.autograd.grad(made, targets, allow_unused=True)
    for i, (a, b) in enumerate(
        zip(found, torch.autograd.grad(value(), targets), strict=True)
    ):
        torch.testing.assert_close(given[i][:] if i in given else a, b)


@pytest.mark.parametrize("case", [c for c in CASES if c != "one sample"])
def test_the_noise_of_masks_is_that_of_whole_gradients(monkeypatch, case):
    make, shape, _ = CASES[case]
    model = nn.Sequential(nn.Dropout(0.4), make()).double()
    x = torch.randn(shape, dtype=torch.float64)
    batch = x, torch.zeros_like(model(x))
    found = []
    for settled in (True, False):
        if not settled:
            monkeypatch.setattr(WeightParts, "settle", lambda *_: None)
        torch.manual_seed(0)
        found.append(tdi.regularizers.gradient_norm(model, batch, "mse", lr=0.1))
    torch.testing.assert_close(found[0].value, found[1].value)
    torch.testing.assert_close(found[0].dropout_noise, found[1].dropout_noise)
    torch.testing.assert_close(found[0].mean_gradient, found[1].mean_gradient)


def test_the_noise_of_masks_holds_no_gradient_of_a_large_layer():
    net = nn.Sequential(nn.Dropout(), *(nn.Linear(500, 500) for _ in range(4)))
    batch = torch.randn(8, 500), torch.randn(8, 500)
    own = sum(x.nbytes for x in net.parameters())
    with Live(net.parameters()) as seen:
        found = tdi.regularizers.gradient_norm(net, batch, "mse", lr=0.1)
    assert found.dropout_noise > 0 and seen.most < 0.5 * own


def test_nothing_is_given_without_graph_or_under_autocast():
    layer, given = nn.Linear(4, 3), {}
    with WeightParts(list(layer.parameters()), given.__setitem__) as parts:
        with torch.no_grad():
            assert not layer(torch.randn(2, 4)).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            value = F.mse_loss(layer(torch.randn(2, 4)).float(), torch.zeros(2, 3))
        parts.settle(value)
        value.backward()
    assert not given and layer.weight.grad is not None


def test_a_gradient_that_the_second_masks_lack_is_zero_there():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)
            self.drop, self.calls = nn.Dropout(0.0), 0

        def forward(self, x):
            self.calls += 1
            x = self.drop(self.b(x))
            return x + self.a(x) if self.calls % 2 else x

    torch.manual_seed(0)
    net, batch = Once().double(), (torch.randn(4, 40).double(),) * 2
    found = tdi.regularizers.gradient_norm(net, batch, "mse", lr=4.0)
    both = []
    for _ in range(2):
        value = nn.functional.mse_loss(net(batch[0]), batch[1])
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        pairs = zip(grads, net.parameters(), strict=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]
        both.append(torch.cat(flat))
    expected = (both[0] - both[1]).square().sum() / 2
    torch.testing.assert_close(found.dropout_noise, expected)


class Checkpointed(nn.Module):
    """A block of square layers, of which nothing tells a weight from its transpose."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.below, self.above = nn.Linear(4, 8), nn.Linear(8, 2)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.4))

    def forward(self, x):
        h = torch.tanh(self.below(x))
        if self.again:
            return self.above(checkpoint(self.block, h, use_reentrant=False))
        return self.above(self.block(h))


def test_blocks_that_run_twice_have_the_same_gradients():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        net = Checkpointed(again).double()
        batch = torch.randn(6, 4).double(), torch.randn(6, 2).double()
        found.append(
            tdi.regularizers.gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
        )
    for name in ("value", "mean_gradient", "dropout_noise"):
        expected, same = (getattr(r2, name) for r2 in found)
        torch.testing.assert_close(same, expected)


def dropped(act=None):
    behind = () if act is None else (act,)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), *behind, nn.Linear(8, 8),
        nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("act", [None, nn.ReLU(inplace=True)])
def test_what_dropout_returned_is_made_again(monkeypatch, shared, act):
    torch.manual_seed(0)
    net, batch = dropped(act), (torch.randn(5, 6).double(), torch.randn(5, 3).double())
    run, taken = tdi.regularizers.gradient_norm, WeightParts._taken_of
    made, found = [], []

    def seen(parts, x):
        made.append(taken(parts, x))
        return made[-1]

    for each in (seen, lambda *_: None):
        monkeypatch.setattr(WeightParts, "_taken_of", each)
        torch.manual_seed(1)
        found.append(run(net, batch, "mse", lr=0.1, num_masks=4, shared_mask=shared))
    layers = [each is not None for each in made[:3]]
    assert layers == [False, act is None, True]
    assert torch.equal(found[0].value, found[1].value) and found[0].dropout_noise > 0
    assert torch.equal(found[0].dropout_noise, found[1].dropout_noise)


class Written(nn.Module):
    """Writes on what it has dropped, or does not."""

    def __init__(self, writes):
        super().__init__()
        self.writes, self.calls = writes, 0
        self.below, self.above = nn.Linear(6, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        h = self.below(x)
        y = self.above(self.drop(h))
        return y + (h.add_(1) if self.writes else h + 1)


def test_a_model_may_write_on_what_it_has_dropped():
    torch.manual_seed(0)
    net, other = (Written(writes).double() for writes in (True, False))
    other.load_state_dict(net.state_dict())
    batch, run = (torch.randn(5, 6).double(), torch.randn(5, 4).double()), []
    for each in (net, other):
        torch.manual_seed(1)
        if each is other:
            ops.draw(torch.ones(1), 0.5, None)  # of the pass that did not go backward
        found = tdi.regularizers.gradient_norm(each, batch, "mse", lr=1.0, num_masks=4)
        run.append((found.value, found.dropout_noise, each.calls))
    assert run[0][2] == run[1][2] + 1
    torch.testing.assert_close(run[0][:2], run[1][:2])
