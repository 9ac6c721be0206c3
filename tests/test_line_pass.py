"""The second derivative of a loss along a line, rule by rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.line_functions import FUNCTIONS, Halved
from tests.line_oracle import line_and_graph, noise_of
from tests.passes import take_in_parts
from tests.test_line_tape import LOSSES, K, N
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import line_slabs, second_order
from torch_dropout_ir.regularizers.estimate import Asked
from torch_dropout_ir.regularizers.line_calls import NoRuleError
from torch_dropout_ir.regularizers.line_pass import curvature_along, draws_along
from torch_dropout_ir.regularizers.line_rules import _CONSTANT, _LINEAR, _RULES


class Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace),
            nn.Conv2d(6, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, affine=False),
        )  # fmt: skip
        self.inplace = inplace

    def forward(self, x):
        y = self.body(x)
        if self.inplace:
            y += x
            return F.relu_(y)
        return F.relu(x - 0.5 * y)


class Messages(nn.Module):
    """Samples that meet as neighbours, in sums and products."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        near = torch.stack([x.roll(1, 0), x.roll(-1, 0)]).mean(0)
        gate = torch.sigmoid(self.other(near))
        return torch.cat([x * gate, self.own(x) / 2, 1 - gate.square()], 1)


class Across(nn.Module):
    """Attention of samples to each other, by itself and as torch has it."""

    def forward(self, x):
        h = x.unflatten(1, (2, -1)).transpose(0, 1)
        found = F.scaled_dot_product_attention(h, h.sin(), h)
        weights = (h @ h.mT).softmax(-1)
        return F.pad(
            (found + weights @ h).transpose(0, 1).flatten(1), (1, 0), value=3.0
        )


def images(*layers):
    return nn.Sequential(nn.Dropout(0.3), *layers), torch.randn(6, 3, 8, 8)


def vectors(*layers):
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), *layers), torch.randn(6, 4)


def ends(width):
    return nn.Flatten(), nn.Linear(width, 3)


def frozen(layer):
    layer.running_var.uniform_(0.5, 2.0)
    return layer.eval()


NETS = {
    "convolutions": lambda: images(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3),
    ),
    "residual": lambda: images(
        Residual(False), Residual(True), nn.AdaptiveAvgPool2d(1), *ends(3)
    ),
    "pools": lambda: images(
        nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.GELU(), nn.Upsample(scale_factor=2),
        nn.MaxPool2d(3, 2, return_indices=False), *ends(27),
    ),
    "frozen": lambda: images(
        nn.BatchNorm2d(3), nn.SiLU(), frozen(nn.BatchNorm2d(3)), nn.ReLU(), *ends(192)
    ),
    "groups": lambda: images(
        nn.GroupNorm(3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, groups=3),
        nn.ConvTranspose2d(3, 2, 3), nn.LeakyReLU(), *ends(128),
    ),
    "instances": lambda: images(nn.InstanceNorm2d(3), nn.BatchNorm2d(3), *ends(192)),
    "layer norm": lambda: vectors(
        nn.BatchNorm1d(5), nn.Softplus(), nn.LayerNorm(5), nn.ELU(), nn.Linear(5, 3)
    ),
    "messages": lambda: vectors(Messages(), nn.Linear(15, 3)),
    "attention": lambda: vectors(nn.Linear(5, 4), Across(), nn.Linear(5, 3)),
}  # fmt: skip


def softened(f, y):
    return (f.log_softmax(1) * F.one_hot(y, 3)).sum(1).exp().add(1).log().mean() * f[
        0, 0
    ]


@pytest.mark.parametrize("loss", ["cross_entropy", softened])
@pytest.mark.parametrize("name", NETS)
def test_along_a_line_is_what_a_double_backward_gives(monkeypatch, name, loss):
    torch.manual_seed(0)
    monkeypatch.setattr(line_slabs, "_PART", 5)
    net, x = NETS[name]()
    net, x, y = net.double(), x.double(), torch.randint(3, (6,))
    uses, h, z = noise_of(net, x)
    site = uses[0][0]
    found = curvature_along(net, (x, y), resolve_loss(loss), uses, 0, z.clone)
    place = [m is site.module for m in net].index(True)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has one derivative
        moved = net[place + 1 :](h + t * site.variance**0.5 * z * h)
    (slope,) = torch.autograd.grad(resolve_loss(loss)(moved, y), t, create_graph=True)
    (expected,) = torch.autograd.grad(slope, t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


class Applied(nn.Module):
    def __init__(self, function, plain=False):
        super().__init__()
        self.function, self.plain = function, plain

    def forward(self, x):
        return self.function(x if self.plain else x.abs() + 0.1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_along_a_line(monkeypatch, name):
    torch.manual_seed(0)
    monkeypatch.setattr(line_slabs, "_PART", 5)
    layer = nn.Sequential(nn.Tanh(), Applied(FUNCTIONS[name]))
    found, expected = line_and_graph(layer, torch.randn(6, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


@pytest.mark.parametrize("function", [torch.hypot, torch.atan2])
def test_an_operation_on_numbers_of_two_precisions(monkeypatch, function):
    torch.manual_seed(0)
    monkeypatch.setattr(line_slabs, "_PART", 5)
    layer = Applied(lambda x: function(x.sin(), x.float()))
    found, expected = line_and_graph(layer, torch.randn(6, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Met(TorchDispatchMode):
    """Which operations autograd calls."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_")  # in place or not
        self.operations |= {func.overloadpacket, getattr(torch.ops.aten, name, None)}
        return func(*args, **(kwargs or {}))


def test_every_rule_is_of_an_operation_that_is_tried():
    made = [make() for make in NETS.values()]
    made.append((nn.Hardsigmoid(), torch.ones(3)))  # which has a test of its own
    with Met() as met, sdpa_kernel(SDPBackend.MATH):
        for function in FUNCTIONS.values():
            function(torch.rand(6, 4).double().requires_grad_() + 0.1)
        for net, x in made:
            net(x.requires_grad_())
        for loss in LOSSES.values():  # each along a record
            loss(*torch.rand(2, N, K).double().requires_grad_())
    missing = (_RULES.keys() | _LINEAR.keys() | _CONSTANT) - met.operations
    assert not missing, missing


def scripted(x):
    y = 1.5 * x
    z = y.sin()
    w = z.exp()
    return z * y + y.exp() + w


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_is_held_outside_of_python_keeps_its_line(monkeypatch):
    monkeypatch.setitem(FUNCTIONS, "scripted", torch.jit.script(scripted))
    test_an_operation_along_a_line(monkeypatch, "scripted")


def test_a_step_of_straight_pieces_has_a_rule_where_torch_has_no_second_derivative():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(4, 5), nn.BatchNorm1d(5),
        Applied(torch.ops.aten.hardsigmoid, plain=True), nn.Linear(5, 3),
    ).double()  # fmt: skip
    x, y = 3 * torch.randn(6, 4).double(), torch.randint(3, (6,))
    uses, _, z = noise_of(net, x)
    loss = resolve_loss("cross_entropy")
    found = curvature_along(net, (x, y), loss, uses, 0, z.clone)
    net[3] = Applied(lambda x: (x + 3).clamp(0, 6) / 6, plain=True)
    expected = curvature_along(net, (x, y), loss, uses, 0, z.clone)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # torch's 1 / 6


class Unlike(nn.Module):
    def forward(self, x):
        return Halved.apply(x) * x


def test_what_a_line_does_not_go_through_is_left_to_a_double_backward():
    torch.manual_seed(0)
    net, x = vectors(Unlike(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    batch = x, torch.randint(3, (6,))
    uses, *_ = noise_of(net, x)
    asked = Asked(net, batch, resolve_loss("cross_entropy"), 1)
    assert draws_along(asked, uses) is None


class Clamped(nn.Module):
    def forward(self, x):
        y = 1.5 * x
        with torch.no_grad():
            y.clamp_(-0.5)
            y[:, 1] = x[:, 0]
        return y * x


class Detached(nn.Module):
    def forward(self, x):
        return x * (1 + x.detach().square())


class Cut(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            with torch.no_grad():
                scale = x.abs().mean()
            with torch.enable_grad():
                y = x.sin()
            scale += y.mean()
        return x / scale + y


@pytest.mark.parametrize("layer", [Detached, Cut, Clamped])
def test_what_is_detached_does_not_move(layer):
    torch.manual_seed(0)
    net, x = vectors(layer(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net, batch = net.double(), (x.double(), torch.randint(3, (6,)))
    uses, h, z = noise_of(net, batch[0])
    found = curvature_along(net, batch, resolve_loss("cross_entropy"), uses, 0, z.clone)
    v = uses[0][0].variance ** 0.5 * z * h
    at = h.clone().requires_grad_()
    risk = F.cross_entropy(net[2:](at), batch[1])
    (slope,) = torch.autograd.grad(risk, at, create_graph=True)
    (product,) = torch.autograd.grad(slope, at, v)
    expected = (product * v).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def sites_below_batch_norm():
    return nn.Sequential(
        nn.Dropout(0.3), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


class Scaled(nn.Module):
    """Batch norm whose weight depends on what it normalizes."""

    def forward(self, x):
        return F.batch_norm(x, None, None, x.square().mean(0), training=True)


def test_a_normalization_by_what_moves_is_that_of_a_graph(monkeypatch):
    torch.manual_seed(0)
    net, x = vectors(Scaled(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net, batch = net.double(), (x.double(), torch.randint(3, (6,)))
    expected = second_order(net, batch, "cross_entropy", num_samples=None)
    take_in_parts(monkeypatch)
    found = second_order(net, batch, "cross_entropy", num_samples=None)
    torch.testing.assert_close(found.value, expected.value)


@pytest.mark.parametrize("num_samples", [None, 100])
def test_the_forms_are_those_of_a_graph(monkeypatch, num_samples):
    torch.manual_seed(0)
    net = sites_below_batch_norm()
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = second_order(net, batch, "cross_entropy", num_samples=None)
    take_in_parts(monkeypatch)
    found = second_order(net, batch, "cross_entropy", num_samples=num_samples)
    assert found.notes == ()
    off = 1e-12 if num_samples is None else 4 * found.standard_error
    assert abs(found.value - expected.value) <= off
    assert found.per_site.keys() == expected.per_site.keys()
    for name, part in found.per_site.items():
        assert abs(part - expected.per_site[name]) <= off
    assert bool(found.standard_error) == (num_samples is not None)


def test_what_a_line_does_not_go_through_has_a_graph(monkeypatch):
    torch.manual_seed(0)
    net = sites_below_batch_norm().insert(3, Unlike())
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = second_order(net, batch, "cross_entropy", num_samples=None)
    take_in_parts(monkeypatch)
    found = second_order(net, batch, "cross_entropy", num_samples=None)
    sampled = second_order(net, batch, "cross_entropy", num_samples=100)
    assert any("double backward" in note for note in found.notes)
    torch.testing.assert_close(found.value, expected.value)
    assert abs(sampled.value - expected.value) <= 4 * sampled.standard_error


class Catches(nn.Module):
    """Goes on another way where an operation fails."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        h = x * 1.0
        try:
            h = self.first(h)
            return h.sin()
        except RuntimeError:
            return h.cos() + x


def once(h):
    """What has one derivative."""
    return h * torch.segment_reduce(h, "mean", lengths=torch.tensor([len(h)]))


def without_autograd(h):
    with torch.inference_mode():
        return h.exp()


@pytest.mark.parametrize(
    "first",
    [once, lambda h: torch.sigmoid(h, out=h), without_autograd],
)
def test_a_model_that_catches_what_is_raised_inside_has_no_line(first):
    torch.manual_seed(0)
    net, x = vectors(Catches(first), nn.Linear(5, 3))
    uses, _, z = noise_of(net, x)
    batch = x, torch.randint(3, (6,))
    with pytest.raises(NoRuleError):
        curvature_along(net, batch, resolve_loss("cross_entropy"), uses, 0, z.clone)


def test_complex_outputs_have_no_line():
    net = nn.Sequential(nn.Dropout(0.3), Applied(torch.fft.fft, plain=True))
    x = torch.randn(6, 4)
    uses, _, z = noise_of(net, x)
    loss = resolve_loss(lambda f, _: f.abs().square().sum())
    with pytest.raises(NoRuleError, match="complex outputs"):
        curvature_along(net, (x, None), loss, uses, 0, z.clone)
