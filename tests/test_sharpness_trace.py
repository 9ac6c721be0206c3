"""The trace: exact where it may be, unbiased elsewhere, never more than it claims."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import sharpness
from torch_dropout_ir.sharpness.layerwise import Layerwise


class Twice(nn.Module):
    """One weight used twice a sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(F.leaky_relu(self.a(F.leaky_relu(self.a(x)))))


class Tied(nn.Module):
    """A layer's weight used again as a function."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(F.leaky_relu(F.linear(F.leaky_relu(self.a(x)), self.a.weight)))


class Bare(nn.Module):
    """A parameter without a layer; bilinear in two of one module."""

    def __init__(self, power=1):
        super().__init__()
        self.u = nn.Parameter(torch.randn(3, 4))
        self.v = nn.Parameter(torch.randn(4, 2))
        self.power = power

    def forward(self, x):
        return (x @ self.u).relu() ** self.power @ self.v


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.embed(x.reshape(x.shape[0], 3, 2))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


class Splits(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(2, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x.reshape(x.shape[0], 3, 2)
        parts = self.query(x), self.key(x), self.value(x)
        return self.head(F.scaled_dot_product_attention(*parts).mean(1))


class Bends(nn.Module):
    """Attention whose values, queries and keys all move what follows in curves."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = x.reshape(x.shape[0], 3, 4)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.head((4 * h).sin().mean(1))


class Branches(nn.Module):
    """Which layer is used is a matter of the batch."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        first = self.left if x[0, 0] < 0 else self.right
        return self.last(torch.tanh(first(x)))


class Tokens(nn.Module):
    """Positions share weights, piecewise linearly."""

    def __init__(self, flat=False):
        super().__init__()
        self.a, self.b, self.flat = nn.Linear(2, 5), nn.Linear(5, 2), flat

    def forward(self, x):
        h = x.reshape(-1, 2) if self.flat else x.reshape(x.shape[0], 3, 2)
        return self.b(F.relu(self.a(h)).reshape(x.shape[0], 3, 5).mean(1))


class Mixes(nn.Module):
    """Samples see each other, or all see the first."""

    def __init__(self, first=False):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(3, 4), nn.Linear(4, 2), first

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h - h[:1] if self.first else h + h.roll(1, 0))


class Second(nn.Module):
    """The samples are the second dimension, or the fastest of the only one."""

    def __init__(self, flat):
        super().__init__()
        self.a, self.b, self.flat = nn.Linear(2, 5), nn.Linear(5, 2), flat

    def forward(self, x):
        h = x.reshape(x.shape[0], -1, 2).transpose(0, 1)
        h = F.linear(h.flatten(0, 1) if self.flat else h, self.a.weight, self.a.bias)
        return self.b(F.relu(h)).reshape(-1, x.shape[0], 2).mean(0)


class Hidden(nn.Module):
    """A second use of a parameter, with no first derivative at these parameters."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 3), nn.Linear(3, 2), how
        with torch.no_grad():
            (self.a.weight if how == "recurrent" else self.b.bias).zero_()

    def forward(self, x):
        w, h = self.a.weight, self.a(x)
        if self.how == "recurrent":
            h = h + F.linear(F.linear(x, w), w)
        out = self.b(F.relu(h))
        if self.how == "bias":
            out = out + self.b.bias.square()
        if self.how == "straight":
            out = out + (w - w.detach()).square().sum()
        return out


class Meets(nn.Module):
    """Samples see each other, but not to first order where they are all the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h + (h - h.mean(0)).square())


def conv(groups=1, activation=nn.ReLU, norm=nn.Identity):
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, stride=2, padding=1), norm(4),
        activation(), nn.Conv2d(4, 4, 2, groups=groups, dilation=1), activation(),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def conv1d():
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 3, 3, padding="same", bias=False),
        nn.LeakyReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(9, 2),
    )  # fmt: skip


def mlp(activation=nn.ReLU, norm=None, bias=True):
    middle = [] if norm is None else [norm]
    return nn.Sequential(
        nn.Linear(3, 5, bias=bias), *middle, activation(), nn.Dropout(0.3),
        nn.Linear(5, 4), activation(), nn.Linear(4, 2),
    )  # fmt: skip


def calibrated(net, x):
    """With running statistics of its own, in evaluation mode."""
    net.double().train()
    net(x)
    return net.eval()


EXACT = {
    "relu": (mlp, 3),
    "no bias": (lambda: mlp(bias=False), 3),
    "hardtanh": (lambda: mlp(nn.Hardtanh), 3),
    "linear": (lambda: nn.Linear(3, 2), 3),
    "convolution": (conv, 32),
    "grouped": (lambda: conv(2), 32),
    "convolution 1d": (conv1d, 12),
    "eval batch norm": (lambda: conv(norm=nn.BatchNorm2d).eval(), 32),
    "positions": (Tokens, 6),
    "flattened positions": (lambda: Tokens(True), 6),
    "samples second": (lambda: Second(False), 6),
    "as many positions": (lambda: Second(False), 14),
    "samples fastest": (lambda: Second(True), 6),
}
ELSE = {
    "tanh": (lambda: mlp(nn.Tanh), 3),
    "gelu convolution": (lambda: conv(2, nn.GELU), 32),
    "train batch norm": (lambda: mlp(norm=nn.BatchNorm1d(5)), 3),
    "layer norm": (lambda: mlp(norm=nn.LayerNorm(5)), 3),
    "bare layer norm": (lambda: mlp(norm=nn.LayerNorm(5, 1e-5, False)), 3),
    "eval batch norm of the batch": (
        lambda: mlp(norm=nn.BatchNorm1d(5, track_running_stats=False)).eval(),
        3,
    ),
    "group norm": (lambda: conv(norm=lambda c: nn.GroupNorm(2, c)), 32),
    "twice": (Twice, 3),
    "tied": (Tied, 3),
    "bare": (Bare, 3),
    "bare squared": (lambda: Bare(2), 3),
    "attention": (Attends, 6),
    "bent attention": (Bends, 12),
    "mixing samples": (Mixes, 3),
    "relative to the first": (lambda: Mixes(True), 3),
    "hidden recurrent": (lambda: Hidden("recurrent"), 3),
    "hidden bias": (lambda: Hidden("bias"), 3),
    "hidden straight": (lambda: Hidden("straight"), 3),
}
LOSSES = {
    "mse": "mse",
    "cross entropy": "cross_entropy",
    "smooth l1": F.smooth_l1_loss,
    "sum of squares": nn.MSELoss(reduction="sum"),
}


def batch(inputs, loss, n=7):
    x = torch.randn(n, inputs).double()
    whole = loss == "cross_entropy"
    return x, torch.randint(2, (n,)) if whole else torch.randn(n, 2).double()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", EXACT)
def test_piecewise_linear_networks_are_exact(name, loss):
    make, inputs = EXACT[name]
    net = make().double()
    x, y = batch(inputs, loss)
    for kind in (sharpness.hessian, sharpness.ggn):
        truth = kind(net, loss, (x, y)).dense().trace()
        for batches in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
            op = kind(net, loss, batches)
            found = sharpness.trace(op, 40, method="layerwise")
            assert found.method == "exact" and float(found.standard_error) == 0
            torch.testing.assert_close(found.value, truth)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", ELSE)
def test_others_are_estimated_and_say_so(name, loss):
    make, inputs = ELSE[name]
    net = make().double()
    op = sharpness.hessian(net, loss, batch(inputs, loss))
    truth = op.dense().trace()
    found = sharpness.trace(op, 1500, method="layerwise")
    assert found.method == "gauss_newton" and found.num_matvecs <= 1500
    assert abs(found.value - truth) <= 4.5 * found.standard_error + 1e-9 * truth.abs()
    if "batch norm" not in name:  # whose residual is larger than all the rest
        assert found.standard_error < 0.2 * truth.abs()


@pytest.mark.parametrize("name", ["tanh", "gelu convolution", "attention", "twice"])
def test_ragged_batches_and_masks_are_unbiased_too(name):
    make, inputs = ELSE[name]
    net = make().double()
    x, y = batch(inputs, "mse")
    op = sharpness.hessian(net, "mse", [(x[:2], y[:2]), (x[2:], y[2:])], masks=range(2))
    found = sharpness.trace(op, 1000, method="layerwise")
    assert abs(found.value - op.dense().trace()) <= 4.5 * found.standard_error


def test_batches_that_use_other_layers():
    net = Branches().double()
    x, y = batch(3, "mse")
    x[:3, 0], x[3:, 0] = -1, 1
    op = sharpness.hessian(net, "mse", [(x[:3], y[:3]), (x[3:], y[3:])])
    found = sharpness.trace(op, 400, method="layerwise")
    assert abs(found.value - op.dense().trace()) <= 4.5 * found.standard_error
    assert found.num_matvecs <= 400


def test_samples_that_meet_in_the_second_derivative_alone():
    net = Meets().double()
    x, y = batch(3, "mse")
    op = sharpness.hessian(net, "mse", (x[:1].repeat(7, 1), y))
    found = sharpness.trace(op, 300, method="layerwise")
    error = (found.value - op.dense().trace()).abs()
    assert error <= 4.5 * found.standard_error + 1e-9
    more = sharpness.trace(op, 300, state=found.state)
    assert (more.value - op.dense().trace()).abs() <= 4.5 * found.standard_error + 1e-9


def test_the_gauss_newton_part_of_attention_is_exact():
    net = Attends().double()
    op = sharpness.ggn(net, "cross_entropy", batch(6, "cross_entropy"))
    found = sharpness.trace(op, 40, method="layerwise")
    assert found.method == "exact"
    torch.testing.assert_close(found.value, op.dense().trace())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_biases_of_which_nothing_is_left_are_known(dtype):
    """That of keys moves all scores of a query alike: its derivative is rounding."""
    net, where = Splits().to(dtype), batch(6, "mse")
    op = sharpness.ggn(net, "mse", tuple(x.to(dtype) for x in where))
    for seed in range(20):
        torch.manual_seed(seed)
        assert sharpness.trace(op, 20).method == "exact"


def test_what_layers_are_taken_for_is_looked_at_once(monkeypatch):
    """Later draws rest on the same blocks, whatever a second look would say."""
    looks = []
    explained = Layerwise._explained

    def once(self, *args):
        looks.append(explained(self, *args) if not looks else [])
        return looks[-1]

    monkeypatch.setattr(Layerwise, "_explained", once)
    op = sharpness.hessian(mlp(nn.Tanh).double(), "mse", batch(3, "mse"))
    first = sharpness.trace(op, 30, method="layerwise")
    more = sharpness.trace(op, 300, state=first.state)
    assert len(looks) == 1
    error = (more.value - op.dense().trace()).abs()
    assert error <= 4.5 * more.standard_error


def test_errors_cover():
    net = mlp(nn.Tanh).double()
    op = sharpness.hessian(net, "mse", batch(3, "mse"))
    truth = op.dense().trace()
    found = [sharpness.trace(op, 80, method="layerwise") for _ in range(120)]
    z = torch.stack([(f.value - truth) / f.standard_error for f in found])
    assert z.mean().abs() < 4 / 120**0.5 and 0.7 < z.std() < 1.4


def test_one_hidden_layer_of_any_activation_is_exact_by_its_diagonal():
    """The residual's block in the layer's outputs is diagonal: signs see it all."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    op = sharpness.hessian(net, "mse", batch(3, "mse"))
    found = sharpness.trace(op, 20, method="layerwise")
    assert found.method == "gauss_newton"
    torch.testing.assert_close(found.value, op.dense().trace())
    assert found.standard_error < 1e-12


def test_many_outputs_are_sampled():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 30)).double()
    x, y = torch.randn(20, 3).double(), torch.randint(30, (20,))
    op = sharpness.hessian(net, "cross_entropy", (x, y))
    truth = op.dense().trace()
    short = sharpness.trace(op, 50)
    assert short.method == "gauss_newton" and short.num_matvecs <= 50
    assert abs(short.value - truth) <= 5 * short.standard_error
    assert sharpness.trace(op, 70).method == "exact"


def test_smooth_networks_beat_hutchinson_by_far():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3)
    )
    batch = torch.randn(64, 20), torch.randint(3, (64,))
    op = sharpness.hessian(net, "cross_entropy", batch)
    ours = sharpness.trace(op, 60)
    plain = sharpness.trace(op, 60, method="hutchinson")
    assert ours.method == "gauss_newton" and plain.method == "hutchinson"
    assert ours.standard_error < plain.standard_error / 4
    assert ours.num_matvecs <= 60 and plain.num_matvecs == 60


def test_losses_whose_form_is_not_what_it_looks_like():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.LogSoftmax(1))
    net, x, y = net.double(), torch.randn(9, 3).double(), torch.randint(3, (9,))
    op = sharpness.hessian(net, nn.NLLLoss(), (x, y))  # linear in the outputs
    found = sharpness.trace(op, 900, method="layerwise")
    assert abs(found.value - op.dense().trace()) < 5 * found.standard_error + 1e-9
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    op = sharpness.hessian(net[:3], weighted, (x, y))
    found = sharpness.trace(op, 40, method="layerwise")
    assert found.method == "exact"
    torch.testing.assert_close(found.value, op.dense().trace())

    def contrast(f, t):
        return (f @ f.T).square().mean()

    op = sharpness.hessian(net[:3], contrast, (x, y))
    with pytest.raises(ValueError, match="couples samples"):
        sharpness.trace(op, 20, method="layerwise")
    assert sharpness.trace(op, 20).method == "hutchinson"


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_scores_of_one_list_are_no_samples_of_a_trace(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    batch = torch.randn(16, 3).double(), torch.tensor(3)
    op = getattr(sharpness, kind)(net.double(), "cross_entropy", batch)
    with pytest.raises(ValueError, match="couples samples"):
        sharpness.trace(op, 20, method="layerwise")
    found = sharpness.trace(op, 20)
    assert found.method == "hutchinson"
    assert abs(found.value - op.dense().trace()) < 5 * found.standard_error


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Identity]),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sampled_from(["mse", "cross_entropy"]),
)
def test_exact_is_exact_for_any_widths(widths, activation, samples, seed, loss):
    torch.manual_seed(seed)
    layers, size = [], 2
    for width in widths:
        layers += [nn.Linear(size, width), activation()]
        size = width
    net = nn.Sequential(*layers, nn.Linear(size, 2)).double()
    op = sharpness.hessian(net, loss, batch(2, loss, samples))
    found = sharpness.trace(op, 40, method="layerwise")
    assert found.method == "exact"
    torch.testing.assert_close(found.value, op.dense().trace())


def test_subsets_of_the_parameters():
    net = mlp().double()
    given = batch(3, "mse")
    for params in (["0.weight"], ["0.bias", "3.weight"]):
        op = sharpness.hessian(net, "mse", given, params=params)
        found = sharpness.trace(op, 12, method="layerwise")
        assert found.method == "exact"
        torch.testing.assert_close(found.value, op.dense().trace())


def test_resumed_runs_go_on():
    op = sharpness.hessian(mlp(nn.Tanh).double(), "mse", batch(3, "mse"))
    truth = op.dense().trace()
    for method in ("layerwise", "hutchinson", "xtrace", "hutchpp"):
        first = sharpness.trace(op, 30, method=method)
        more = sharpness.trace(op, 300, method=method, state=first.state)
        assert first.num_matvecs <= 30 < more.num_matvecs <= 330
        assert more.standard_error < first.standard_error + 1e-12
        assert abs(more.value - truth) < 5 * more.standard_error
    torch.manual_seed(3)
    whole = sharpness.trace(op, 20, method="hutchinson")
    torch.manual_seed(3)
    half = sharpness.trace(op, 12, method="hutchinson")
    again = sharpness.trace(op, 8, method="hutchinson", state=half.state)
    assert again.value == whole.value


@pytest.mark.parametrize("method", ["hutchpp", "xtrace"])
def test_sketches_are_unbiased_and_better_where_eigenvalues_decay(method):
    basis = torch.linalg.qr(torch.randn(80, 80).double()).Q
    matrix = basis @ torch.diag(0.7 ** torch.arange(80).double()) @ basis.T
    found = [sharpness.trace(matrix, 24, method=method) for _ in range(100)]
    z = torch.stack([(f.value - matrix.trace()) / f.standard_error for f in found])
    assert z.mean().abs() < 1 and all(f.num_matvecs == 24 for f in found)
    plain = sharpness.trace(matrix, 24, method="hutchinson")
    usual = torch.stack([f.standard_error for f in found]).median()
    assert usual < plain.standard_error / 3
    values = torch.stack([f.value for f in found])
    assert (values.mean() - matrix.trace()).abs() < 4 * values.std() / 10


def xtrace_naive(matrix, probes):
    """The algorithm as it is written, one leave-one-out basis at a time."""
    images, out = matrix @ probes, []
    for i in range(probes.shape[1]):
        others = [j for j in range(probes.shape[1]) if j != i]
        q = torch.linalg.qr(images[:, others]).Q
        rest = probes[:, i] - q @ (q.T @ probes[:, i])
        out.append((q.T @ matrix @ q).trace() + rest @ matrix @ rest)
    return torch.stack(out)


def test_xtrace_is_the_naive_one():
    matrix = torch.randn(30, 30).double()
    matrix = matrix + matrix.T
    torch.manual_seed(5)
    found = sharpness.trace(matrix, 12, method="xtrace")
    torch.manual_seed(5)
    probes = torch.stack([
        torch.empty(30).double().bernoulli_(0.5).mul_(2).sub_(1) for _ in range(6)
    ], 1)  # fmt: skip
    expected = xtrace_naive(matrix, probes)
    torch.testing.assert_close(found.value, expected.mean())
    fewer = torch.stack([
        xtrace_naive(matrix, probes[:, torch.arange(6) != i]).mean() for i in range(6)
    ])  # fmt: skip
    jackknife = (5 / 6 * (fewer - fewer.mean()).square().sum()).sqrt()
    torch.testing.assert_close(found.standard_error, jackknife)


@pytest.mark.parametrize("method", ["hutchpp", "xtrace"])
@pytest.mark.parametrize("rank", [3, 60])
def test_errors_of_sketches_cover(method, rank):
    """Also where the sketch holds all but rounding."""
    basis = torch.linalg.qr(torch.randn(60, rank).double()).Q
    matrix = basis * torch.arange(1, rank + 1).double() ** -1.5 @ basis.T
    found = [sharpness.trace(matrix, 30, method=method) for _ in range(200)]
    errors = torch.stack([f.value for f in found]) - matrix.trace()
    said = torch.stack([f.standard_error for f in found])
    assert errors.square().mean() < (1.3 if rank > 3 else 4) * said.square().mean()
    assert rank > 3 or said.max() < 1e-14


def test_rtol_stops_early():
    op = sharpness.hessian(mlp(nn.Tanh).double(), "mse", batch(3, "mse"))
    found = sharpness.trace(op, 5000, rtol=0.02, method="layerwise")
    assert found.converged and found.num_matvecs < 3000
    assert found.standard_error <= 0.02 * found.value.abs()
    assert not sharpness.trace(op, 20, rtol=1e-9, method="layerwise").converged
    matrix = torch.diag(torch.arange(1.0, 9.0)).double() + 0.3
    found = sharpness.trace(matrix, 3000, rtol=0.01, method="hutchinson")
    assert found.converged and 2 < found.num_matvecs < 3000
    assert found.standard_error <= 0.01 * found.value.abs()


def test_products_are_counted_on_the_operator_too():
    op = sharpness.hessian(mlp(nn.Tanh).double(), "mse", batch(3, "mse"))
    first = sharpness.trace(op, 30, method="layerwise")
    assert op.num_matvecs == first.num_matvecs > 0
    more = sharpness.trace(op, 60, method="layerwise", state=first.state)
    assert op.num_matvecs == more.num_matvecs > first.num_matvecs


def test_bad_input():
    with pytest.raises(ValueError, match="num_matvecs"):
        sharpness.trace(torch.eye(9), 5, method="hutchpp")
    for method in ("magic", "layerwise"):
        with pytest.raises(ValueError, match="`method`"):
            sharpness.trace(torch.eye(9), 5, method=method)
    for matrix in (torch.ones(3, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="expected a square"):
            sharpness.trace(matrix)
    with pytest.raises(ValueError, match="expected a symmetric"):
        sharpness.trace(torch.ones(9, 9).triu(), 6, method="xtrace")


def test_a_product_that_is_not_finite_is_told_at_once():
    class Broken:
        shape, spent = (10_000, 10_000), 0

        def __matmul__(self, v):
            self.spent += 1
            return v * (float("nan") if self.spent == 2 else 1.0)

    broken = Broken()
    with pytest.raises(ValueError, match="finite products"):
        sharpness.trace(broken, 500)
    assert broken.spent == 2


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_that_weighs_below_zero_goes_layer_by_layer(soft):
    """Roots of its closed form were no numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    below = torch.tensor([1.0, -0.5, 2.0]).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    y = below.expand(9, -1) if soft else y
    op = sharpness.hessian(net, nn.CrossEntropyLoss(None if soft else below), (x, y))
    found = sharpness.trace(op, 40, method="layerwise")
    assert found.method == "exact"
    torch.testing.assert_close(found.value, op.dense().trace())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_traces_of_models_that_return_log_probabilities_have_no_noise(images, weighed):
    torch.manual_seed(0)
    if images:
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
            nn.LogSoftmax(1),
        )  # fmt: skip
        x = torch.randn(7, 1, 4, 4)
    else:
        net = nn.Sequential(
            nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3), nn.LogSoftmax(1)
        )
        x = torch.randn(7, 4)
    y = torch.tensor([0, 1, 2, 1, -100, 0, 2])
    weight = torch.tensor([1.0, 2.0, 0.5]).double() if weighed else None
    loss = nn.NLLLoss(weight)
    op = sharpness.hessian(net.double(), loss, [(x.double(), y)])
    found = sharpness.trace(op, num_matvecs=20)
    dense = op.dense().trace()
    assert float(found.standard_error) < 1e-14 * float(dense)  # but for rounding
    assert float(found.value) == pytest.approx(float(dense), rel=1e-9)
    other = sharpness.ggn(net, loss, [(x.double(), y)])
    assert float(sharpness.trace(other, num_matvecs=20).value) == pytest.approx(
        float(other.dense().trace()), abs=1e-12
    )
