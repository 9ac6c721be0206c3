"""What a line through layers that are not torch's alone holds, against a step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.line_functions import Applied
from tests.passes import take_in_parts
from tests.test_regularizer_memory import peak
from torch_dropout_ir.regularizers import gauss_newton, second_order


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


def shifted(x):
    found = torch.zeros_like(x)
    found[:, :4, 1:] = x[:, :4, :-1]
    found[:, 4:] = x[:, 4:]
    return found


def convolutions(function):
    layers = [nn.Dropout(0.1)]
    for i in range(6):
        layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.BatchNorm2d(16),
                   Applied(function)]  # fmt: skip
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers, *ends), torch.randn(24, 3, 32, 32)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.1), kind(32, 64, 2, batch_first=True)
        self.norm, self.end = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.end(self.norm(self.layer(self.drop(x))[0].mean(1)))


NETS = {
    "own": lambda: convolutions(Own.apply), "views": lambda: convolutions(shifted),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(32, 64, 32)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(32, 64, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_a_line_holds_no_more_than_a_step(name):
    torch.manual_seed(0)
    net, x = NETS[name]()
    y = torch.randint(10, (len(x),))
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()
    found, most = [], 1.01 * step
    assert (
        peak(lambda: found.append(second_order(net, (x, y), "cross_entropy"))) <= most
    )
    assert not any("double backward" in note for note in found[0].notes)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Heads(nn.Module):
    """Classes of what does not tell the domain."""

    def __init__(self, wide):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(32, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Dropout(0.5)
        )
        self.classes = nn.Linear(wide, 3)
        self.domains = nn.Sequential(
            nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.Tanh(), nn.Linear(wide, 2)
        )

    def forward(self, x):
        h = self.body(x)
        return self.classes(h), self.domains(Reversed.apply(h))


def of_both(f, y):
    return F.cross_entropy(f[0], y) + F.cross_entropy(f[1], y % 2)


def test_a_loss_of_several_outputs_holds_no_more_than_a_step():
    torch.manual_seed(0)
    net, x, y = Heads(256), torch.randn(2048, 32), torch.randint(3, (2048,))
    step = peak(lambda: of_both(net(x), y).backward())
    net.zero_grad()
    found = min(peak(lambda: gauss_newton(net, (x, y), of_both)) for _ in "12")
    assert found <= 1.005 * step


def test_a_loss_of_several_outputs_is_the_exact_sum_on_average(monkeypatch):
    torch.manual_seed(0)
    net, x, y = Heads(4).double(), torch.randn(5, 32).double(), torch.randint(3, (5,))
    expected = gauss_newton(net, (x, y), of_both, num_samples=None)
    take_in_parts(monkeypatch)
    found = gauss_newton(net, (x, y), of_both, num_samples=200)
    assert found.notes == () and 0 < found.standard_error < 0.2 * expected.value
    assert abs(found.value - expected.value) <= 4 * found.standard_error


class Quantized(nn.Module):
    """Pictures by a code book, and what the book is off by: a scalar beside rows."""

    def __init__(self):
        super().__init__()

        def layer(kind, a, b):
            return kind(a, b, 4, 2, 1)

        self.book = nn.Parameter(torch.randn(64, 64))
        self.given = nn.Sequential(
            layer(nn.Conv2d, 3, 64), nn.ReLU(), nn.Dropout(0.1),
            layer(nn.Conv2d, 64, 64),
        )  # fmt: skip
        self.made = nn.Sequential(
            layer(nn.ConvTranspose2d, 64, 64), nn.ReLU(), nn.Dropout(0.1),
            layer(nn.ConvTranspose2d, 64, 3),
        )  # fmt: skip

    def forward(self, x):
        z = self.given(x).movedim(1, -1)
        nearest = torch.cdist(z.detach().flatten(0, 2), self.book).argmin(1)
        found = self.book[nearest].view_as(z)
        off = F.mse_loss(found, z.detach()) + 0.25 * F.mse_loss(z, found.detach())
        return self.made((z + (found - z).detach()).movedim(-1, 1)), off


def of_pictures(f, x):
    return F.mse_loss(f[0], x) + f[1]


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_a_scalar_beside_rows_is_held_within_a_step(form):
    torch.manual_seed(0)
    net, x = Quantized(), torch.randn(16, 3, 32, 32)
    step = peak(lambda: of_pictures(net(x), x).backward())
    net.zero_grad()
    form(net, (x, x), of_pictures)
    assert peak(lambda: form(net, (x, x), of_pictures)) <= step


def test_a_scalar_beside_rows_gives_the_exact_sum_on_average(monkeypatch):
    torch.manual_seed(0)
    net, x = Quantized().double(), torch.randn(1, 3, 4, 4).double()
    expected = gauss_newton(net, (x, x), of_pictures, num_samples=None)
    take_in_parts(monkeypatch)
    found = gauss_newton(net, (x, x), of_pictures, num_samples=400)
    assert found.notes == () and 0 < found.standard_error < 0.1 * expected.value
    assert abs(found.value - expected.value) <= 4 * found.standard_error


class Coded(nn.Module):
    """A variational autoencoder: what it makes of a code, its mean and its width."""

    def __init__(self):
        super().__init__()
        self.given = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Dropout(0.2))
        self.code = nn.Linear(400, 40)
        self.made = nn.Sequential(
            nn.Linear(20, 400), nn.ReLU(), nn.Dropout(0.2), nn.Linear(400, 784)
        )

    def forward(self, x):
        mean, log = self.code(self.given(x)).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log / 2).exp()
        return self.made(z), mean, log


def bound(f, x):
    made, mean, log = f
    own = F.binary_cross_entropy_with_logits(made, x, reduction="sum") / len(x)
    return own - (1 + log - mean**2 - log.exp()).sum(1).mean() / 2


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_a_loss_that_is_one_operation_is_held_within_a_step(form):
    """Nothing of the outputs' size is made of them, but for derivatives."""
    torch.manual_seed(0)
    net, x = Coded(), torch.rand(512, 784)
    step = peak(lambda: bound(net(x), x).backward())
    net.zero_grad()
    form(net, (x, x), bound)
    assert peak(lambda: form(net, (x, x), bound)) <= step


class Attends(nn.Module):
    """Attention alone, below a head that normalizes over the batch."""

    def __init__(self):
        super().__init__()
        self.drop, self.given = nn.Dropout(0.1), nn.Linear(64, 192)
        self.norm, self.end = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        heads = [
            h.unflatten(-1, (4, 16)).transpose(1, 2)
            for h in self.given(self.drop(x)).chunk(3, -1)
        ]
        found = F.scaled_dot_product_attention(*heads)
        return self.end(self.norm(found.transpose(1, 2).flatten(2).mean(1)))


def test_weights_of_attention_are_not_all_there_at_once():
    """A step's fused kernel keeps none; a line has three numbers for each."""
    torch.manual_seed(0)
    net, x, y = Attends(), torch.randn(16, 128, 64), torch.randint(10, (16,))
    step = peak(lambda: F.cross_entropy(net(x), y).backward())
    net.zero_grad()
    own = peak(lambda: second_order(net, (x, y), "cross_entropy"))
    assert own <= 1.2 * step
