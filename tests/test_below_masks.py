"""Gradients below the first site at two masks are those of autograd at these masks."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import ops
from torch_dropout_ir.kernels import keep_scale
from torch_dropout_ir.regularizers import gradient_norm
from torch_dropout_ir.regularizers.below_masks import BelowMasks

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

    def counted(self, x):
        return self.rest(self.below(x * (1 + self.calls % 2)))

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


BELOW = {"first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight",
         "second.bias"}  # fmt: skip
CASES = {
    **{how: (lambda how=how: Net(how), BELOW)
       for how in ("plain", "residual", "branches", "again")},
    **{how: (lambda how=how: Net(how), set())
       for how in ("tied", "halves", "past", "clamped", "clamped_node", "clamping",
                   "random")},
    **{how: (lambda how=how: Net(how), None) for how in ("another", "counted")},
    "convolutions": (convolutional, {"1.weight", "1.bias", "3.weight", "3.bias"}),
    "clamped weights": (clamped_weights, set()),
}  # fmt: skip


def at_masks(net, batch, noise):
    """Return the gradient of a plain pass at given noise, all parameters in one."""
    for each in net.modules():
        if isinstance(each, nn.Dropout):
            each.forward = lambda h: h * noise.pop(0)
    found = torch.autograd.grad(
        F.cross_entropy(net(batch[0]), batch[1]), list(net.parameters()),
        allow_unused=True,
    )  # fmt: skip
    both = zip(found, net.parameters(), strict=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for g, p in both])


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_of_the_gradients_at_their_masks(monkeypatch, case):
    torch.manual_seed(0)
    make, expected = CASES[case]
    net = make().double()
    batch = torch.randn(8, WIDE).double(), torch.randint(3, (8,))
    plain, noise, below = make().double(), [], []
    plain.load_state_dict(net.state_dict())
    draw, back = ops.draw, BelowMasks.back

    def drawn(h, p, *rest):
        dropped, packed = draw(h, p, *rest)
        noise.append(ops.mask_apply(torch.ones_like(h), packed, keep_scale(p)))
        return dropped, packed

    def gone_back(self, *args):
        back(self, *args)
        below.append({list(dict(net.named_parameters()))[i] for i in self.found})

    monkeypatch.setattr(ops, "draw", drawn)
    monkeypatch.setattr(BelowMasks, "back", gone_back)
    random.seed(0)
    found = gradient_norm(net, batch, "cross_entropy", lr=4.0)
    random.seed(0)
    if expected is None:  # it has gone again, at the same masks
        again = noise[len(noise) // 2 :]
        torch.testing.assert_close(noise[: len(again)], again)
        noise = again
    a, b = (at_masks(plain, batch, noise) for _ in range(2))
    assert not noise
    assert all(each == expected for each in below) or expected is None
    for name, truth in (
        ("value", (a @ a + b @ b) / 2), ("mean_gradient", a @ b),
        ("dropout_noise", (a - b) @ (a - b) / 2),
    ):  # fmt: skip
        torch.testing.assert_close(getattr(found, name), truth, rtol=1e-10, atol=0)
