"""What the graph of a pass tells about samples that meet."""

import pytest
import torch
from torch import nn

from torch_dropout_ir.regularizers import clean_pass, gauss_newton

N = 6


class Lambda(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.inner)


def images(*layers):
    return [nn.Dropout(0.3), nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten()]


def square(function):  # as many features as samples
    return [nn.Dropout(0.3), nn.Linear(5, N), Lambda(function), nn.Linear(N, 3)]


def product(x, layer):
    return x @ (layer.weight * x.mean())


APART = {
    "mlp": [nn.Dropout(0.3), nn.Linear(5, 4), nn.GELU(), nn.LayerNorm(4)],
    "tokens": [nn.Dropout(0.3), nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.1)],
    "conv": images(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1), nn.AvgPool2d(2)),
    "evaluated": images(nn.BatchNorm2d(4).eval(), nn.AdaptiveAvgPool2d(1)),
    "softmax": [nn.Dropout(0.3), Lambda(lambda x: x.softmax(-1).select(-1, 0))],
    "transposed": [nn.Dropout(0.3), Lambda(lambda x: x.transpose(1, -1).mean(1))],
    "added": [Lambda(lambda x, d: d(x) + x.exp() * d(x[:, :1]), nn.Dropout(0.3))],
    "once more": [nn.Dropout(0.3), Lambda(lambda x, a: a(a(x)), nn.Linear(5, 5))],
}
MEET = {
    "batch norm": images(nn.BatchNorm2d(4)),
    "transposed square": square(lambda x: x.T),
    "mean over samples": square(lambda x: x - x.mean(0, keepdim=True)),
    "transposed by name": square(lambda x: x.transpose(0, 1).clone()),
    "means as samples": square(lambda x: x.mean(0).view(N, 1) * x),
    "a bias of the batch": square(
        lambda x: nn.functional.linear(x, torch.ones(N, N), x.mean(1))
    ),
    "broadcast": square(lambda x: x * x.mean(1)),
    "softmax over samples": square(lambda x: x.softmax(0)),
    "softmax over samples, from the end": square(lambda x: x.softmax(-2)),
    "one for all": square(lambda x: x + x[:1]),
    "reordered": square(lambda x: x.flip(0)),
    "a weight of the batch": [
        nn.Dropout(0.3), Lambda(product, nn.Linear(5, 5)), nn.Linear(5, 3)
    ],
    "a linear layer of the batch": square(lambda x: nn.functional.linear(x, x)),
    "message passing": square(lambda x: torch.ones(N, N) @ x),
    "over channels and samples": [
        nn.Dropout(0.3), Lambda(lambda x: x.mean((0, 1), keepdim=True) * x)
    ],
    "normalized over samples": square(lambda x: nn.functional.layer_norm(x, (N, N))),
    "counted anew": [
        nn.Dropout(0.3),
        Lambda(lambda x: x.reshape(5, N).softmax(-1).reshape(N, 5)),
    ],
}  # fmt: skip


def meet(layers, asked, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    first = next(m for m in layers if not isinstance(m, nn.Dropout))
    conv = isinstance(first, nn.Conv2d)
    x = torch.randn(N, 2, 4, 4) if conv else torch.randn(N, 5)
    with monkeypatch.context() as patch, clean_pass.clean_pass(net, x) as clean:
        if asked:
            patch.setattr(clean_pass, "rows_apart", lambda *_: False)
        outputs = clean.outputs
        return clean.samples_meet(outputs), clean.couples_samples([outputs])


@pytest.mark.parametrize("name", APART)
def test_the_graph_of_usual_layers_tells_that_samples_are_apart(name, monkeypatch):
    assert meet(APART[name], False, monkeypatch) == (False, False)
    assert meet(APART[name], True, monkeypatch) == (None, False)


@pytest.mark.parametrize("name", MEET)
def test_samples_that_meet_are_never_taken_for_apart(name, monkeypatch):
    assert meet(MEET[name], True, monkeypatch) == (None, True)
    assert meet(MEET[name], False, monkeypatch) == (None, True)


def test_a_block_that_runs_again_runs_without_noise_of_its_own():
    layer = Lambda(lambda x: nn.functional.rrelu(x, 0.1, 0.9, training=True))
    again = Lambda(
        lambda x, f: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False), layer
    )
    for body in (layer, again):
        net = nn.Sequential(nn.Dropout(0.5), body, nn.Linear(5, 1)).double()
        for p in net.parameters():
            nn.init.ones_(p)
        x = -torch.ones(4, 5, dtype=torch.float64)
        found = gauss_newton(net, (x, torch.zeros(4, 1).double()), "mse")
        same = [gauss_newton(net, (x, None), "mse", num_samples=None).value]
        torch.testing.assert_close(same[0].item(), 5 * 0.5**2)
        assert found.value >= 0
