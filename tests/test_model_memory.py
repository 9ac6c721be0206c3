"""What estimators hold of models with code of their own, against a training step."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_regularizer_memory import peak
from torch_dropout_ir.nn import convert_dropout_
from torch_dropout_ir.regularizers import gauss_newton, monte_carlo, second_order


class Block(nn.Module):
    """Attention and two layers, each added to what comes in, with dropout before."""

    def __init__(self, wide, causal=False):
        super().__init__()
        self.first, self.second = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.given, self.out = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        act = nn.GELU()
        self.layers = nn.Sequential(
            nn.Linear(wide, 4 * wide), act, nn.Linear(4 * wide, wide)
        )
        self.drop, self.drop_again = nn.Dropout(0.1), nn.Dropout(0.1)
        self.causal = causal

    def forward(self, x):
        heads = [
            h.unflatten(-1, (4, -1)).transpose(1, 2)
            for h in self.given(self.first(x)).chunk(3, -1)
        ]
        found = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.drop(self.out(found.transpose(1, 2).flatten(2)))
        return x + self.drop_again(self.layers(self.second(x)))


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.drop = nn.Conv2d(3, 64, 4, stride=4), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block(64) for _ in range(4)))
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        return self.out(self.blocks(self.drop(h)).mean(1))


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(100, 64), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block(64, causal=True) for _ in range(2)))
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(self.blocks(self.drop(self.embedding(x)))).flatten(0, 1)


class Symbols(nn.Module):
    """Recurrent layers, whose steps are one operation on a CPU."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(100, 64), nn.Dropout(0.1)
        self.layers = nn.LSTM(64, 64, 2, batch_first=True)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(self.layers(self.drop(self.embedding(x)))[0][:, -1])


class Signals(nn.Module):
    """Dropout of channels behind what keeps no result for its derivative."""

    def __init__(self):
        super().__init__()
        layers = []
        for wide in (4, 32, 32, 32):
            layers += [nn.Conv1d(wide, 32, 5, padding=2), nn.GroupNorm(4, 32)]
            layers += [nn.SiLU(), nn.Dropout1d(0.1)]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(32, 6)

    def forward(self, x):
        return self.out(self.body(x).mean(2))


class Pictures(nn.Module):
    """Few numbers make pictures, normalized over the batch."""

    def __init__(self):
        super().__init__()
        self.given, self.drop = nn.Linear(32, 1024), nn.Dropout(0.2)
        wide = functools.partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        self.body = nn.Sequential(
            wide(64, 32), nn.BatchNorm2d(32), nn.ReLU(), wide(32, 16),
            nn.BatchNorm2d(16), nn.ReLU(), wide(16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.body(self.drop(self.given(x).relu()).view(-1, 64, 4, 4))


class Messages(nn.Module):
    """Nodes of a graph, which receive what others send along its edges."""

    def __init__(self):
        super().__init__()
        self.ends = torch.randint(2000, (2, 10000))
        self.sent = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.own = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(32, 7)

    def forward(self, x):
        for sent, own in zip(self.sent, self.own, strict=True):
            x = self.drop(x)
            found = torch.zeros_like(x).index_add(
                0, self.ends[1], sent(x)[self.ends[0]]
            )
            x = F.relu(found / 5 + own(x))
        return self.out(x)


def enlarged():
    return nn.Sequential(
        nn.Dropout(0.3), nn.Unflatten(1, (8, 1, 1)), nn.Upsample(scale_factor=64),
        nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class Mixes(nn.Module):
    """Layers along patches and along channels in turn."""

    def __init__(self):
        super().__init__()

        def layers(wide, inner):
            return nn.Sequential(
                nn.Linear(wide, inner), nn.GELU(), nn.Dropout(0.1),
                nn.Linear(inner, wide), nn.Dropout(0.1),
            )  # fmt: skip

        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(8))
        self.along = nn.ModuleList(layers(64, 128) for _ in range(4))
        self.within = nn.ModuleList(layers(64, 256) for _ in range(4))
        self.patches, self.out = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for i in range(4):
            x = x + self.along[i](self.norms[2 * i](x).mT).mT
            x = x + self.within[i](self.norms[2 * i + 1](x))
        return self.out(x.mean(1))


class Translates(nn.Module):
    def __init__(self):
        super().__init__()
        self.given, self.made = nn.Embedding(100, 64), nn.Embedding(100, 64)
        self.body = nn.Transformer(64, 4, 1, 1, 256, dropout=0.1, batch_first=True)
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(64, 100)

    def forward(self, x):
        given, made = self.drop(self.given(x)), self.drop(self.made(x.flip(1)))
        return self.out(self.body(given, made)).flatten(0, 1)


class Noisy(nn.Module):
    """Noise of its own on what it is given, and on the code that it makes."""

    def __init__(self):
        super().__init__()
        self.given, self.out = nn.Linear(64, 128), nn.Linear(64, 10)
        self.drop, self.body = nn.Dropout(0.1), nn.ModuleList(
            nn.Linear(64, 64) for _ in range(4)
        )  # fmt: skip

    def forward(self, x):
        mean, log = self.given(self.drop(x + 0.1 * torch.randn_like(x))).chunk(2, 1)
        z = mean + torch.randn_like(mean) * log.exp()
        for layer in self.body:
            z = self.drop(F.softplus(layer(z)))
        return self.out(z)


def texts(count, length, words=10):
    net = Texts()
    net.out = nn.Linear(64, words)
    return net, torch.randint(100, (count, length))


MODELS = {
    "patches": lambda: (Patches(), torch.randn(16, 3, 32, 32)),
    "symbols": lambda: (Symbols(), torch.randint(100, (32, 64))),
    "signals": lambda: (Signals(), torch.randn(16, 4, 512)),
    "pictures": lambda: (Pictures(), torch.randn(32, 32)),
    "messages": lambda: (Messages(), torch.randn(2000, 32)),
    "enlarged": lambda: (enlarged(), torch.randn(64, 8)),
    "noisy": lambda: (Noisy(), torch.randn(2048, 64)),
    "a long text": lambda: texts(1, 768),
    "two long texts": lambda: texts(2, 384),
    "three long texts": lambda: texts(3, 384),
    "four long texts": lambda: texts(4, 384),
    "eight texts": lambda: texts(8, 256),
    "texts of 100 words": lambda: texts(4, 512, 100),
    "a long text of 100 words": lambda: texts(1, 1024, 100),
    "texts of 20,000 words": lambda: texts(4, 64, 20000),
    "pairs of texts": lambda: (Translates(), torch.randint(100, (16, 64))),
    "patches, ours": lambda: (convert_dropout_(Patches()), torch.randn(16, 3, 32, 32)),
    "mixes, ours": lambda: (convert_dropout_(Mixes()), torch.randn(16, 3, 32, 32)),
}
FORMS = {
    "gauss_newton": lambda *a: gauss_newton(*a),
    "gauss_newton, 8": lambda *a: gauss_newton(*a, num_samples=8),
    "second_order": lambda *a: second_order(*a),
    "monte_carlo": lambda *a: monte_carlo(*a, num_masks=4),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_an_estimate_holds_no_more_than_a_training_step(name, form):
    torch.manual_seed(0)
    net, x = MODELS[name]()
    outputs = net(x)
    squares = outputs.ndim > 2
    y = torch.randn_like(outputs) if squares else torch.zeros(len(outputs)).long()
    loss = F.mse_loss if squares else F.cross_entropy
    del outputs

    def step():
        loss(net(x), y).backward()

    def run():
        FORMS[form](net, (x, y), loss.__name__.removesuffix("_loss"))

    step()
    net.zero_grad()
    held = peak(step)
    net.zero_grad()
    run()
    assert peak(run) <= 1.005 * held
