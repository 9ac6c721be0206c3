"""Gradients that are taken by parts are those of autograd at the same masks."""

import concurrent.futures
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import collectives, ops
from torch_dropout_ir.kernels import keep_scale
from torch_dropout_ir.regularizers import gradient_norm, gradient_pairs
from torch_dropout_ir.regularizers.pass_parts import PassParts

WIDE = 64


class Net(nn.Module):
    """Two layers below dropout, one beside them, and two above."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how, self.calls = how, 0
        for name in ("first", "second", "beside", "above"):
            self.add_module(name, nn.Linear(WIDE, WIDE))
        self.norm, self.drop = nn.BatchNorm1d(WIDE), nn.Dropout(0.4)
        self.other, self.out = nn.Dropout(0.2), nn.Linear(WIDE, 3)

    def forward(self, x):
        self.calls += 1
        return getattr(self, self.how)(x)

    def below(self, x):
        return self.second(F.gelu(self.norm(self.first(x))))

    def plain(self, x):
        return self.rest(torch.tanh(self.below(x)))

    def rest(self, h):
        return self.out(self.other(self.above(self.drop(h)).relu()))

    def residual(self, x):
        h = self.below(x)
        return self.rest(h) + self.out(h)

    def branches(self, x):
        return self.rest(self.below(x)) + self.out(torch.tanh(self.beside(x)))

    def tied(self, x):
        return self.rest(self.below(x)) + self.out(self.second(x))

    def halves(self, x):
        h, k = self.below(x).relu().chunk(2, 1)
        return self.out(self.above(torch.cat((self.drop(h), k), 1)))

    def past(self, x):
        h = self.first(x).relu()
        return self.rest(self.second(h)) + self.out(h)

    def clamped(self, x):
        h = self.first(x)
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return self.rest(self.second(h))

    def clamped_node(self, x):
        h = self.first(x).relu()
        h.grad_fn.register_hook(lambda given, _: (given[0].clamp(-1e-3, 1e-3),))
        return self.rest(self.second(h))

    def clamping(self, x):
        return self.rest(Clamp.apply(self.below(x)))

    def random(self, x):
        return self.rest(self.below(x) * random.uniform(0.5, 2))

    def another(self, x):
        """Goes another way each second time."""
        return self.past(x) if self.calls % 2 == 0 else self.plain(x)

    def permuted(self, x):
        """Turns two layers around each second time."""
        a, b = (self.second, self.above)[:: -1 if self.calls % 2 else 1]
        return self.out(b(self.drop(torch.tanh(a(self.first(x).relu())))))

    def transformed(self, x):
        """Differentiates below dropout where no saved tensor may be seen."""
        h = self.first(x).relu()
        g = torch.func.grad(lambda h: self.second(h).tanh().square().sum())(h)
        return self.rest(h + g)

    def inner(self, x):
        h = self.first(x).relu()
        own = self.second(h).tanh().square().sum()
        (g,) = torch.autograd.grad(own, h, create_graph=True)
        return self.rest(h + g)

    def tangent(self, x):
        h = self.first(x)
        own = lambda h: self.second(h).tanh()  # noqa: E731
        return self.rest(torch.func.jvp(own, (h,), (torch.ones_like(h),))[1])

    def overwrites(self, x):
        """What tanh needs for its derivative."""
        h = torch.tanh(self.first(x))
        y = self.second(h)
        h.mul_(3.0)
        return self.rest(y)

    def threaded(self, x):
        """Runs a layer in a thread, whose nodes have numbers of their own."""
        h, found = self.first(x).relu(), []

        def run():
            found.append(self.second(h).relu())

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        return self.rest(found[0])

    def counted(self, x):
        return self.rest(self.below(x * (1 + self.calls % 2)))

    def settles(self, x):
        """Is another in its first pass, by the same operations."""
        return self.rest(self.below(x * (1 + (self.calls == 1))))

    def again(self, x):
        return self.rest(checkpoint(self.below, x, use_reentrant=False))


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1e-3, 1e-3)


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 64, 3, stride=3), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(256, 3),
    )  # fmt: skip


def clamped_weights():
    net = Net()
    net.first.weight.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
    return net


PARTED = (
    "plain", "residual", "branches", "again", "halves", "past", "clamping", "random",
    "counted", "tied",
)  # fmt: skip
CASES = {
    **{how: (lambda how=how: Net(how), 3) for how in PARTED},
    **{how: (lambda how=how: Net(how), 1) for how in ("clamped", "clamped_node")},
    **{
        how: (lambda how=how: Net(how), 2)
        for how in ("another", "permuted")
    },
    "threaded": (lambda: Net("threaded"), 1),
    "convolutions": (convolutional, 3),
    "clamped weights": (clamped_weights, 3),
}  # fmt: skip


def at_masks(net, batch, noise):
    """Return the gradient of a plain pass at given noise, all parameters in one."""
    for each in net.modules():
        if isinstance(each, nn.Dropout):
            each.forward = lambda h: h * noise.pop(0)
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    found = [(p * 0 if p.grad is None else p.grad).flatten() for p in net.parameters()]
    net.zero_grad()
    return torch.cat(found).detach()


def in_three(self, found, _):
    """Cut a pass at each third of where parameters are read."""
    cuts = [c for c in range(1, len(found.nodes)) if found.read_in(0, c)]
    return sorted({cuts[k * len(cuts) // 3] for k in (1, 2) if cuts})


def made_by_parts(monkeypatch):
    """Let passes of any size go by parts; return the times that they have gone."""
    seen, links = [], gradient_pairs.GradientPairs._links

    def noted(self, *args):
        seen.append(1)
        return links(self, *args)

    monkeypatch.setattr(gradient_pairs.GradientPairs, "_links", noted)
    monkeypatch.setattr(gradient_pairs, "LEAST", 0)
    monkeypatch.setattr(PassParts, "_step", lambda *_: 0)
    monkeypatch.setattr(PassParts, "_inner", in_three)
    return seen


def drawn_masks(monkeypatch):
    """Return what is told each mask that is drawn."""
    noise, draw = [], ops.draw

    def drawn(h, p, *rest):
        dropped, packed = draw(h, p, *rest)
        noise.append(ops.mask_apply(torch.ones_like(h), packed, keep_scale(p)))
        return dropped, packed

    monkeypatch.setattr(ops, "draw", drawn)
    return noise


def compare(found, g):
    """Compare with gradients at four masks of two batches, or two of one."""
    value = sum(x @ x for x in g) / len(g)
    mean = g[0] @ g[1] if len(g) == 2 else g[1] @ g[2]
    away = [a - b for a, b in zip(g[::2], g[1::2], strict=True)]
    noise = sum(x @ x for x in away) / len(away) / 2
    rest = value - mean - noise if len(g) > 2 else 0 * value
    for name, truth in (
        ("value", value), ("mean_gradient", mean), ("dropout_noise", noise),
        ("batch_noise", rest),
    ):  # fmt: skip
        torch.testing.assert_close(getattr(found, name), truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_by_parts_are_those_at_their_masks(monkeypatch, case, batches):
    torch.manual_seed(0)
    make, expected = CASES[case]
    net, plain = make().double(), make().double()
    plain.load_state_dict(net.state_dict())
    given = [
        (torch.randn(8, WIDE).double(), torch.randint(3, (8,))) for _ in range(batches)
    ]
    times, noise = made_by_parts(monkeypatch), drawn_masks(monkeypatch)
    random.seed(0)
    found = gradient_norm(
        net, given if batches > 1 else given[0], "cross_entropy", lr=4.0
    )
    random.seed(0)
    order = [given[0]] * 2 if batches == 1 else [given[i] for i in (0, 0, 1, 1)]
    assert len(times) == expected
    once = len(noise) // len(times)
    for again in range(1, len(times)):  # parts, or all of it, at the same masks
        torch.testing.assert_close(noise[:once], noise[again * once :][:once])
    del noise[once:]
    gradients = []
    for each in order[::2]:
        state = random.getstate()
        gradients.append(at_masks(plain, each, noise))
        random.setstate(state)  # both of a pair see the same
        gradients.append(at_masks(plain, each, noise))
    compare(found, gradients)
    assert not noise


def test_passes_of_another_value_are_told_and_go_whole(monkeypatch):
    torch.manual_seed(0)
    net, plain = Net("settles").double(), Net("settles").double()
    plain.load_state_dict(net.state_dict())
    plain.calls = 9
    batch = torch.randn(8, WIDE).double(), torch.randint(3, (8,))
    times, noise = made_by_parts(monkeypatch), drawn_masks(monkeypatch)
    found = gradient_norm(net, batch, "cross_entropy", lr=4.0)
    assert len(times) == 3  # two parts, of which the second differs, and all
    del noise[len(noise) // 3 :]
    compare(found, [at_masks(plain, batch, noise) for _ in range(2)])


@pytest.mark.parametrize("how", ["transformed", "tangent", "inner"])
def test_passes_whose_saved_tensors_nobody_may_see_go_whole(monkeypatch, how):
    torch.manual_seed(0)
    net, batch = Net(how).double(), (torch.randn(8, WIDE), torch.randint(3, (8,)))
    batch = batch[0].double(), batch[1]
    found = []
    for parted in (False, True):
        times = made_by_parts(monkeypatch) if parted else []
        torch.manual_seed(1)
        found.append(gradient_norm(net, batch, "cross_entropy", lr=4.0, num_masks=4))
    assert len(times) == 3  # one of parts, and two whole ones
    for name in ("value", "mean_gradient", "dropout_noise", "standard_error"):
        whole, ours = (getattr(x, name) for x in found)
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-14)


def test_what_is_written_over_is_told(monkeypatch):
    net, batch = Net("overwrites"), (torch.randn(8, WIDE), torch.randint(3, (8,)))
    made_by_parts(monkeypatch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_norm(net, batch, "cross_entropy", lr=4.0)


def test_a_rank_whose_loss_raises_says_why(monkeypatch):
    """The others ask something else by then: that is not the reason."""
    net, batch = Net(), (torch.randn(8, WIDE), torch.randint(3, (8,)))
    raised = []
    made_by_parts(monkeypatch)

    def loss(f, y):
        raised.append(1)
        raise ValueError("of its own")

    def ask(number, _):
        if raised:
            raise RuntimeError("ranks ask unlike questions")
        return number

    with collectives.together(ask), pytest.raises(ValueError, match="of its own"):
        gradient_norm(net, batch, loss, lr=4.0)


# ---- gradients that are written over while they are held


class InBuffer(torch.autograd.Function):
    """A product whose derivatives come in the same memory at each pass."""

    buffers: dict = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        pairs = {"x": (g, weight.T), "weight": (x.T, g)}
        found = []
        for name, (a, b) in pairs.items():
            buffer = InBuffer.buffers.setdefault(name, a.new_empty(len(a), b.shape[1]))
            found.append(torch.mm(a, b, out=buffer))
        return tuple(found)


class Unversioned(InBuffer):
    """The same, by a kernel that tells nobody of what it writes."""

    @staticmethod
    def backward(ctx, g):
        in_x, in_weight = InBuffer.backward(ctx, g)
        return in_x, torch.from_numpy(in_weight.numpy())


class WritesOnGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mul_(0.1)


class Overwritten(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.drop, self.out = nn.Dropout(0.4), nn.Linear(WIDE, 3)
        self.given = torch.empty(8, WIDE).double()

    def forward(self, x):
        return self.out(getattr(self, self.how)(self.drop(x)))

    def buffer(self, x):
        """Of a weight."""
        return InBuffer.apply(self.first(x).tanh(), self.second.weight)

    def unseen(self, x):
        return Unversioned.apply(self.first(x).tanh(), self.second.weight)

    def below(self, x):
        """Of what comes out of a linear layer."""
        return InBuffer.apply(self.first(x), self.second.weight.detach())

    def workspace(self, x):
        """Of two weights."""
        h = InBuffer.apply(x, self.first.weight)
        return InBuffer.apply(h.tanh(), self.second.weight)

    def static(self, x):
        """Of what goes into a linear layer."""
        with torch.no_grad():
            self.given.copy_(x)
        return self.second(self.first(self.given).tanh())

    def hook(self, x):
        """That a linear layer shares, whose gradient is made before."""
        h = self.first(x)
        h.register_hook(lambda g: g.mul_(0.1))
        return h + self.second(x)

    def node(self, x):
        h = WritesOnGiven.apply(self.first(x))
        return h + self.second(x)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    "how", ["buffer", "unseen", "below", "workspace", "static", "hook", "node"]
)
def test_gradients_that_are_written_over_while_they_are_held(monkeypatch, how, batches):
    torch.manual_seed(0)
    InBuffer.buffers.clear()
    net = Overwritten(how).double()
    given = [
        (torch.randn(8, WIDE).double(), torch.randint(3, (8,))) for _ in range(batches)
    ]
    noise = drawn_masks(monkeypatch)
    found = gradient_norm(
        net, given if batches > 1 else given[0], "cross_entropy", lr=4.0
    )
    order = [given[0]] * 2 if batches == 1 else [given[i] for i in (0, 0, 1, 1)]
    del noise[: -len(order)]  # of passes that are taken again
    compare(found, [at_masks(net, each, noise) for each in order])
