"""What the graph of a pass tells about samples that meet."""

from functools import reduce

import pytest
import torch
from torch import nn

from torch_dropout_ir.regularizers import clean_pass, gauss_newton
from torch_dropout_ir.sites import ROW_WISE

N = 6
safe_softmax = torch.ops.aten._safe_softmax


class Lambda(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.inner)


class Attention(nn.Module):
    """Five positions a sample, of one number; None takes samples for positions."""

    def __init__(self, first):
        super().__init__()
        self.up, self.first = nn.Linear(1, 4), first
        self.attention = nn.MultiheadAttention(
            4, 2, 0.0 if first is None else 0.2, batch_first=bool(first)
        )

    def forward(self, x):
        x = self.up(x[..., None])
        x = x if self.first or self.first is None else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0] + x
        return x if self.first or self.first is None else x.transpose(0, 1)


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
    "instances": images(nn.InstanceNorm2d(4, affine=True)),
    "groups": images(nn.GroupNorm(2, 4)),
    "attention": [nn.Dropout(0.3), Attention(True)],
    "attention, positions first": [nn.Dropout(0.3), Attention(False)],
    "turned and back": square(lambda x: (x.T.exp() * 2).T),
    "columns of a product": square(lambda x: (torch.ones(N, N).tril() @ x.T).T),
    "rows of many": square(lambda x: (x[None] @ torch.ones(2, N, N).tril()).sum(0)),
    "joined": square(lambda x: torch.cat([x, x.exp()], 1).chunk(2, -1)[1]),
    "softmax": [nn.Dropout(0.3), Lambda(lambda x: x.softmax(-1).select(-1, 0))],
    "softmax in attention": [nn.Dropout(0.3), Lambda(lambda x: safe_softmax(x, -1))],
    "enlarged": images(nn.Upsample(scale_factor=2)),
    "enlarged smoothly": images(nn.Upsample(scale_factor=2, mode="bilinear")),
    "transposed": [nn.Dropout(0.3), Lambda(lambda x: x.transpose(1, -1).mean(1))],
    "added": [Lambda(lambda x, d: d(x) + x.exp() * d(x[:, :1]), nn.Dropout(0.3))],
    "once more": [nn.Dropout(0.3), Lambda(lambda x, a: a(a(x)), nn.Linear(5, 5))],
}
MEET = {
    "batch norm": images(nn.BatchNorm2d(4)),
    "channels of samples": square(lambda x: nn.BatchNorm1d(N)(x.T)),
    "attention among samples": [nn.Dropout(0.3), Attention(None)],
    "joined along samples": square(lambda x: torch.cat([x, x.exp()])[::2]),
    "a half of them": square(lambda x: torch.cat([x, x], 1).view(2 * N, N)[:N]),
    "turned": square(lambda x: x[:, :, None].permute(1, 0, 2).flatten(1)),
    "transposed square": square(lambda x: x.T),
    "mean over samples": square(lambda x: x - x.mean(0, keepdim=True)),
    "transposed by name": square(lambda x: x.transpose(0, 1).clone()),
    "means as samples": square(lambda x: x.mean(0).view(N, 1) * x),
    "a bias of the batch": square(
        lambda x: nn.functional.linear(x, torch.ones(N, N), x.mean(1))
    ),
    "broadcast": square(lambda x: x * x.mean(1)),
    "softmax over samples": square(lambda x: x.softmax(0)),
    "softmax in attention over samples": square(lambda x: safe_softmax(x, 0)),
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
        clean.row_wise = False  # of what the graph tells
        if asked:
            patch.setattr(clean_pass, "rows_meet", lambda *_: None)
        outputs = clean.outputs
        return clean.samples_meet(outputs), clean.couples_samples([outputs])


@pytest.mark.parametrize("name", APART)
def test_the_graph_of_usual_layers_tells_that_samples_are_apart(name, monkeypatch):
    assert meet(APART[name], False, monkeypatch) == (False, False)
    assert meet(APART[name], True, monkeypatch) == (None, False)


@pytest.mark.parametrize("name", MEET)
def test_samples_that_meet_are_never_taken_for_apart(name, monkeypatch):
    assert meet(MEET[name], True, monkeypatch) == (None, True)
    told = True if name == "batch norm" else None
    assert meet(MEET[name], False, monkeypatch) == (told, True)


def test_batch_norm_that_lets_nothing_pass_lets_nobody_meet(monkeypatch):
    """Residual branches begin with a scale of zero: above it samples are apart."""
    inner, outer = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    residual = Lambda(lambda x, a, b, c: x + c(b(a(x))), inner, nn.Linear(5, 5), outer)
    net = [nn.Dropout(0.3), residual, nn.Linear(5, 3)]
    assert meet(net, False, monkeypatch) == (True, True)
    nn.init.zeros_(outer.weight)
    assert meet(net, False, monkeypatch) == (None, False)
    batch = torch.randn(N, 5), torch.randint(3, (N,))
    assert gauss_newton(nn.Sequential(*net), batch, "cross_entropy").standard_error > 0


STEPS = [
    lambda x: x.transpose(0, 1), lambda x: x.transpose(-1, -2), lambda x: x.exp(),
    lambda x: x.permute(*range(1, x.ndim), 0), lambda x: x.flatten(0, 1),
    lambda x: x.flatten(1), lambda x: x.unflatten(-1, (2, -1)), lambda x: x[None],
    lambda x: x.unflatten(0, (-1, 2)), lambda x: x.squeeze(0), lambda x: x[..., None],
    lambda x: x.softmax(-1), lambda x: x.softmax(0), lambda x: x.mean(-1),
    lambda x: x.mean(0, keepdim=True) * x, lambda x: x.mean(1, keepdim=True) * x,
    lambda x: x[..., 0], lambda x: x[1:], lambda x: torch.cat([x, -x], -1),
    lambda x: torch.cat([x, -x]), lambda x: x.split(2)[0] if len(x) > 2 else x,
    lambda x: x @ x.transpose(-1, -2), lambda x: x @ torch.ones(x.shape[-1], 4),
    lambda x: nn.functional.layer_norm(x, x.shape[1:]), lambda x: x.reshape(N, -1),
    lambda x: nn.functional.batch_norm(x, None, None, training=True),
]  # fmt: skip


def test_whatever_is_done_to_a_tensor_the_graph_says_no_more_than_derivatives():
    torch.manual_seed(0)
    told = 0
    for _ in range(400):
        chosen = [STEPS[i] for i in torch.randint(len(STEPS), (5,))]
        net = nn.Sequential(
            nn.Dropout(0.3), Lambda(lambda x, of=chosen: reduce(call, of, x))
        )
        try:
            with clean_pass.clean_pass(net, torch.rand(N, 4, 6).double()) as clean:
                found = clean.samples_meet(clean.outputs)
                if found is None or clean.count(clean.outputs) != N:
                    continue
                told += 1
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(clean_pass, "rows_meet", lambda *_: None)
                    assert clean.couples_samples([clean.outputs]) == found
        except (IndexError, RuntimeError, TypeError, ValueError):  # no such step here
            continue
    assert told > 20


def call(x, step):
    return step(x)


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


MADE = {nn.Linear: (4, 4), nn.Threshold: (0.1, 0.2), nn.Dropout: (0.0,)}


@pytest.mark.parametrize("kind", sorted(ROW_WISE, key=lambda x: x.__name__))
def test_a_row_of_what_these_layers_make_is_of_that_row_alone(kind):
    torch.manual_seed(0)
    layer, x = kind(*MADE.get(kind, ())).double(), torch.randn(5, 3, 4).double()
    y = x.clone()
    y[2] = torch.randn(3, 4).double()
    same = (layer(x) == layer(y)).flatten(1).all(1)
    changed = [i for i, alike in enumerate(same.tolist()) if not alike]
    assert changed == [2]


def dense(*layers):
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 4), *layers, nn.Linear(4, 3))


def test_only_where_all_layers_keep_rows_apart_the_graph_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(clean_pass, "rows_meet", lambda *_: asked.append(1) or True)
    hooked, own = dense(nn.ReLU()), dense(nn.ReLU())
    hooked[1].register_forward_hook(lambda _, __, y: y - y.mean(0))
    own[2].forward = lambda x: x - x.mean(0)
    everywhere = nn.modules.module.register_module_forward_hook
    for net, apart in (
        (dense(nn.ReLU(), nn.Sequential(nn.Tanh())), True), (hooked, False),
        (dense(nn.BatchNorm1d(4)), False), (dense(nn.Softmax(0)), False),
        (dense(Lambda(torch.tanh)), False), (own, False),
    ):  # fmt: skip
        asked.clear()
        gauss_newton(net, (torch.randn(N, 5), torch.randn(N, 3)), "mse")
        assert bool(asked) == (not apart), net
    handle = everywhere(lambda _, __, y: y)
    try:
        gauss_newton(dense(nn.ReLU()), (torch.randn(N, 5), torch.randn(N, 3)), "mse")
    finally:
        handle.remove()
    assert len(asked) == 2
