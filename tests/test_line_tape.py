"""Losses as the operations that they ran, and estimates along lines through them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.line_functions import Halved, Straight
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    line_rules,
    loss_weight,
    second_order,
)
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.line_calls import NoRuleError
from torch_dropout_ir.regularizers.line_pass import (
    AlongLine,
    LossTape,
    curvature_along,
    masks_of,
)
from torch_dropout_ir.regularizers.line_tape import Tape
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.regularizers.site_forms import signs

N, K = 7, 4
LABELS = torch.tensor([0, 2, 1, 3, 1, 0, 2])
PLACES = torch.arange(N * 6).view(N, 2, 3) % K
TABLE = torch.zeros(N, K).double()
REAL = torch.linspace(-1, 1, N * K, dtype=torch.float64).view(N, K).sin()


def around(z):
    return z - z.mean(0)


def off_diagonal(c):
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def clip(a, b):
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.3
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def vicreg(a, b):
    total = F.mse_loss(a, b)
    for z in (around(a), around(b)):
        spread = torch.sqrt(z.var(0) + 1e-4)
        total += F.relu(1 - spread).mean()
        total += off_diagonal(z.T @ z / (N - 1)).pow(2).sum() / K
    return total


def barlow(a, b):
    a, b = (around(z) / z.std(0) for z in (a, b))
    c = a.T @ b / N
    return (c.diagonal() - 1).square().sum() + off_diagonal(c).square().sum() / 5


def supervised(a, _):
    z = F.normalize(a, dim=1)
    s = z @ z.T / 0.2
    s = s - s.max(1, keepdim=True)[0].detach()
    other = 1 - torch.eye(N).double()
    log = s - (s.exp() * other).sum(1, keepdim=True).log()
    same = (LABELS[:, None] == LABELS[None]) * other
    return -((same * log).sum(1) / same.sum(1).clamp(min=1)).mean()


def written(a, b):
    y = a * 1.5
    y += b
    y *= y.exp()
    z = y.sin_()
    return (z.mul_(b)).sum() + (a * b).sum()


def constants_written(a, b):
    weight = torch.zeros(N, K).double()
    weight[:, 1:] = 0.5
    weight[0].fill_(2.0)
    weight.view(-1)[3:5] += 1
    return (weight * a.exp()).sum() * b.sum()


def into_a_view(a, b):
    y = a * b
    y[:, 0] = b[:, 1]
    return y.square().sum()


def shown_by_several(a, b):
    """Written on by turns, also where nothing moved, and over what has been written."""
    y, z = a.exp() + 1, b.new_zeros(b.shape)
    rows, columns, flat = y[::2], y[:, 1:], z.view(-1)
    rows.mul_(b[::2])
    columns[1:] += z[1:, 1:] + b[1:, 1:] ** 2
    flat[2:9] = y.flatten()[2:9].sin()
    flat[3] = 0.7
    z[0] = rows[0] * columns[0].sum()
    return (z * z.flip(0) + y).square().sum() + flat[5:7].prod() * rows.sum()


def filled(a, b):
    whole = torch.zeros(N, K).double()
    whole.index_put_((LABELS,), a.exp(), accumulate=True)
    return (whole * whole).sum() + b.square().sum()


def scaled_by_constants(a, b):
    with torch.no_grad():
        scale = a.abs().mean()
        y = a.exp() + b
    return ((a * y) / scale).square().sum() + a.detach().sum() * b.sum() ** 2


def read_last_by_constants(a, b):
    y = (a * b).sin()
    with torch.no_grad():
        scale = a.exp()
    return (scale * y).sum() ** 2


def clamped_without_autograd(a, b):
    y = a * 1.5
    with torch.no_grad():
        y.clamp_(-0.4, 0.4)
    return (y * b).sum() ** 2 + y.sin().sum()


def added_to_itself(a, b):
    return torch.addmm(a, a, b.T @ b, beta=0.5, alpha=2).sin().sum()


def of_one_row(a, b):
    y = (a * b).sum(0, keepdim=True)
    return (y.cumprod(0).sin() + y.exp()).sum()  # its line is that of `y`


def with_metrics(a, b):
    seen = (a.argmax(1) == LABELS).double().mean() + a.exp().sum().item()
    a.cos().add_(1)
    return (a * b + 0 * seen).logsumexp(1).mean() + (a.max() - a.min()) * b.sum()


LOSSES = {
    "clip": clip, "vicreg": vicreg, "barlow": barlow, "supervised": supervised,
    "written": written, "constants written": constants_written, "filled": filled,
    "constants": scaled_by_constants, "read last": read_last_by_constants,
    "clamped": clamped_without_autograd,
    "metrics": with_metrics, "itself in a product": added_to_itself,
    "one row": of_one_row, "moving weights": lambda a, b: torch.lerp(a, b, a * b).sum(),
    "mse, centred": lambda a, b: F.mse_loss(around(a), REAL),
    "mse of both": lambda a, b: F.mse_loss(a * b, a.exp(), reduction="sum"),
    "mse, the target": lambda a, b: F.mse_loss(REAL, a * a),
    "each square": lambda a, b: F.mse_loss(a * a, b, reduction="none").sin().sum(),
    "labels": lambda a, b: F.cross_entropy(around(a).view(-1, K), LABELS),
    "soft labels": lambda a, b: F.cross_entropy(around(a), REAL.softmax(1)),
    "smoothed": lambda a, b: F.cross_entropy(a * b, LABELS, label_smoothing=0.1),
    "weighed": lambda a, b: F.cross_entropy(
        a * b, LABELS, weight=REAL[0].abs(), reduction="sum", ignore_index=2
    ),
    "columns": lambda a, b: ((a * b).log_softmax(0) * REAL).sum() + b.softmax(0).norm(),
    "a single row": lambda a, b: (a[0] * b[0]).log_softmax(0)[1] * b.softmax(-1)[2, 1],
    "mixed": lambda a, b: (a.mul(b)).softmax(1).square().sum(),
    "huber": lambda a, b: F.huber_loss(a * a, REAL, delta=0.3),
    "smooth l1": lambda a, b: F.smooth_l1_loss(a.exp(), b, reduction="sum"),
    "margin": lambda a, b: F.soft_margin_loss(a * b, REAL.sign()),
    "bce": lambda a, b: F.binary_cross_entropy_with_logits(
        around(a), REAL.sigmoid(), reduction="sum"
    ),
    "bce of probabilities": lambda a, b: F.binary_cross_entropy(
        a.sigmoid(), REAL.sigmoid()
    ),
    "bce with weights": lambda a, b: F.binary_cross_entropy_with_logits(
        a, REAL.sigmoid(), weight=REAL.abs(), pos_weight=REAL[0].exp()
    ),
    "gaussian": lambda a, b: F.gaussian_nll_loss(a, REAL, b.exp()),
    "divergence": lambda a, b: F.kl_div(
        a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True
    ),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b).mean(),
    "triplet": lambda a, b: F.triplet_margin_loss(a, b, REAL, margin=3.0),
    "distance": lambda a, b: F.pairwise_distance(a, b).exp().mean(),
    "labels of places": lambda a, b: (
        F.cross_entropy((a * b)[..., None, None].expand(N, K, 2, 3), PLACES)
        * F.cross_entropy(a[..., None, None].expand(N, K, 2, 3), PLACES, REAL[0].exp())
    ),
    "covariance": lambda a, b: torch.cov(a.T).square().sum(),
    "correlation": lambda a, b: torch.corrcoef(a.T)[0, 1],
    "lengths": lambda a, b: (a - b).norm() * a.norm(dim=0).prod(),
    "spread": lambda a, b: a.var() * b.std() + torch.std_mean(a, 1)[0].exp().sum(),
    "of each column": lambda a, b: (a * b).var(0, correction=0).exp().sum()
    + (a.std((0, 1), keepdim=True) * b.std(1, keepdim=True)).sum(),
    "of a third dimension": lambda a, b: (
        (a[:, None] - b[None]).norm(dim=(0, -1)).prod()
        * torch.linalg.vector_norm(a[:, None] - b, 3, dim=(0, 2)).sum()
        * (a[:, None] - b).var((0, 2), keepdim=True).sum()
    ),
    "a column of zeros": lambda a, b: (a * torch.arange(K)).std(0).exp().sum()
    + (b - b).std(0).sum(),
    "sums": lambda a, b: a.logcumsumexp(0).square().sum() + b.cumsum(0).sin().sum(),
    "products": lambda a, b: torch.einsum("ij,kj->ik", a, b).logsumexp(0).mean(),
    "batches": lambda a, b: (a[:, None, :] @ b[:, :, None]).exp().sum(),
    "trace": lambda a, b: torch.trace((a @ a.T) @ (b @ b.T)),
    "mapped": lambda a, b: torch.vmap(lambda x, y: (x * y).sum().sin())(a, b).mean(),
    "sorted": lambda a, b: (a.sort(0)[0] - REAL.sort(0)[0]).square().mean().sqrt(),
    "itself": lambda a, b: a.square().sum() * 1.0,
    "into a view": into_a_view, "shown by several": shown_by_several,
    "far apart": lambda a, b: torch.cdist(a, b).logsumexp(1).mean(),
    "far apart, of many": lambda a, b: (
        torch.cdist(a.repeat(2, 5, 1), b.repeat(5, 1) ** 2).logsumexp(-1).mean()
        + torch.cdist(a.repeat(5, 1), b.new_ones(1, K)).exp().mean()
    ),
    "cubic distances": lambda a, b: torch.cdist(a, b, 3).logsumexp(1).mean(),
    "frequencies": lambda a, b: torch.fft.fft(a * b).abs().sum(),
    "volume": lambda a, b: torch.logdet(a.T @ a + b.T @ b),
    "of two, single": lambda a, b: torch.hypot(a, b[:1]).sum() + a.atan2(b).sin().sum(),
    "the larger": lambda a, b: torch.maximum(a * a, b).square().sum(),
    "rank": lambda a, b: (a / b.exp()).sum() * (a.sum() / b.sum()) / (a.sum() / 3),
}  # fmt: skip


def lines_of(loss):
    """Outputs, their lines, and the second derivative of the loss by autograd."""
    torch.manual_seed(0)
    a, b, u, v, w = torch.randn(5, N, K).double().unbind()
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = loss(a + t * u + t * t / 2 * w, b + t * v)
    (slope,) = torch.autograd.grad(value, t, create_graph=True)
    (expected,) = torch.autograd.grad(slope, t)
    return [a, b], [(u, w), (v, None)], expected


@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_along_lines_is_what_autograd_gives(name):
    at, lines, expected = lines_of(LOSSES[name])
    tape = Tape(lambda x: LOSSES[name](*x), at)
    values = [x.clone() for x in at]
    for _ in range(2):  # a record is not used up
        found = tape.curvature([x.clone() for x in at], [*lines])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6
    assert all(torch.equal(x, y) for x, y in zip(at, values, strict=True))


def test_distances_of_many_rows_take_no_graph(monkeypatch):
    at, lines, expected = lines_of(LOSSES["far apart, of many"])
    tape = Tape(lambda x: LOSSES["far apart, of many"](*x), at)
    monkeypatch.setattr(line_rules, "by_graph", None)
    torch.testing.assert_close(tape.curvature(at, lines), expected)


def test_where_a_length_is_zero_there_is_none():
    at, lines, _ = lines_of(clip)
    tape = Tape(lambda x: x[0].norm(dim=0).sum(), at)
    assert tape.curvature([torch.zeros(N, K).double(), at[1]], lines).isnan()


@pytest.mark.filterwarnings("ignore:var")
def test_the_variance_of_one_row_is_no_number():
    at, lines, _ = lines_of(clip)
    at, lines = [x[:1] for x in at], [(u[:1], None) for u, _ in lines]
    tape = Tape(lambda x: x[0].var(0).sum(), at)
    assert tape.curvature(at, lines).isnan()


@pytest.mark.parametrize("name", ["clip", "written", "mse, centred", "constants"])
def test_what_others_hold_is_not_written_on(name):
    at, lines, expected = lines_of(LOSSES[name])
    tape = Tape(lambda x: LOSSES[name](*x), at)
    values = [x.clone() for x in at]
    found = tape.curvature([*at], [*lines])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(at, values, strict=True))


class Own(torch.Tensor):
    """A tensor that torch makes of another without an operation."""


def on_what_it_was_given(a, b):
    a[:, 0].mul_(b[:, 1])
    return a.exp().sum()


def on_what_is_elsewhere(a, b):
    TABLE[:, 0] = a[:, 0]
    return (TABLE * b).exp().sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: Straight.apply(a).sum(), on_what_it_was_given,
        lambda a, b: (a * b).sum().as_subclass(Own), on_what_is_elsewhere,
    ],
)  # fmt: skip
def test_what_lines_do_not_go_through_is_not_recorded(loss):
    with pytest.raises(NoRuleError):
        Tape(lambda x: loss(*x), lines_of(clip)[0])


class Two(nn.Module):
    """Two heads above two sites, the first of which samples share by channel."""

    def __init__(self, meet=False):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6) if meet else nn.Identity()
        self.last, self.heads = nn.Dropout(0.2), nn.Linear(6, 2 * K)

    def forward(self, x):
        h = self.last(self.norm(self.first(x)).tanh())
        a, b = self.heads(h).chunk(2, 1)
        return {"a": a, "b": b, "number": 3}


def of_both(f, _):
    return clip(f["a"], f["b"])


def problem(meet=False):
    torch.manual_seed(0)
    return Two(meet).double(), torch.randn(N, 5).double()


@pytest.fixture
def small(monkeypatch):
    """Let the memory of small losses matter."""
    monkeypatch.setattr(loss_weight, "_FEWEST", 0)
    monkeypatch.setattr(loss_weight, "_SHARE", 0.0)


@pytest.fixture
def taken(monkeypatch):
    """Count the estimates along lines."""
    found, estimate = [], AlongLine.estimate

    def counted(*args, **options):
        found.append(estimate(*args, **options))
        return found[-1]

    monkeypatch.setattr(AlongLine, "estimate", counted)
    return found


@pytest.mark.parametrize("meet", [False, True])
def test_linearized_it_is_the_dense_gauss_newton_matrix(meet):
    net, x = problem(meet)
    loss = resolve_loss(of_both)
    with clean_pass(net, x) as clean:
        uses = masks_of(clean)
        read = read_outputs(clean.outputs, loss, None)
        tape = LossTape.of(read)
        inputs = [h.detach() for _, h, _ in clean.uses]
    at = [x.detach() for x in read.tensors]
    size = N * K

    def risk(f):
        return clip(f[:size].view(N, K), f[size:].view(N, K))

    hessian = torch.autograd.functional.hessian(risk, torch.cat(at).flatten())
    for use, h in enumerate(inputs):
        site = uses[use][0]
        z = signs(site, h)

        def outputs(v, use=use):
            h = inputs[use] + v
            h = net.norm(net.first[2](h)).tanh() if use == 0 else h
            return torch.cat(net.heads(h).chunk(2, 1)).flatten()

        zero = torch.zeros_like(h)
        jacobian = torch.autograd.functional.jacobian(outputs, zero).flatten(1)
        u = jacobian @ (site.variance**0.5 * z * h).flatten()
        along = net, (x, None), loss, uses, use, z.clone
        for own in (tape, None):
            found = curvature_along(*along, own, True)
            torch.testing.assert_close(found, u @ hessian @ u)


@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_estimates_along_lines_are_the_exact_sums_on_average(small, taken, form, meet):
    net, x = problem(meet)
    exact = form(net, (x, None), of_both, num_samples=None)
    assert not taken
    found = form(net, (x, None), of_both, num_samples=100)
    assert taken == [found]
    assert abs(found.value - exact.value) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.2 * exact.value.abs()
    assert found.per_site.keys() == exact.per_site.keys()
    for name, part in found.per_site.items():
        error = found.per_site_standard_error[name]
        assert abs(part - exact.per_site[name]) < 4 * error
    one = form(net, (x, None), of_both)
    assert one.standard_error.isnan()
    assert not one.exact
    assert exact.notes == () and "one draw" in " ".join(one.notes)


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_their_errors_are_those_that_they_say(small, taken, form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, K), nn.Tanh()).double()
    batch = torch.randn(N, 5).double(), None

    def centred(f, _):
        return F.mse_loss(around(f), REAL)

    exact = form(net, batch, centred, num_samples=None).value
    draws = [form(net, batch, centred, num_samples=12) for _ in range(60)]
    assert taken == draws
    z = torch.stack([(d.value - exact) / d.standard_error for d in draws])
    assert abs(z.mean()) < 4 / 60**0.5
    assert 0.7 < z.square().mean() ** 0.5 < 1.6  # of twelve draws, Student's


def test_a_loss_that_is_no_sum_of_parts_goes_along_a_line(small, taken):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, K))
    net, x, y = net.double(), torch.randn(60, 5).double(), torch.randint(K, (60,))

    def scaled(f, y):  # rows are apart in the graph, their scale is of the batch
        return ((f - y[:, None]) / f.detach().std()).cosh().log().mean()

    for form in (gauss_newton, second_order):
        exact = form(net, (x, y), scaled, num_samples=None).value
        found = form(net, (x, y), scaled, num_samples=100)
        assert abs(found.value - exact) < 4 * found.standard_error
    assert len(taken) == 2


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_what_lines_do_not_go_through_is_taken_as_before(small, taken, form):
    net, x = problem()

    def unseen(f, _):
        return into_a_view(f["a"], f["b"]).sqrt().as_subclass(Own)

    exact = form(net, (x, None), unseen, num_samples=None).value
    found = form(net, (x, None), unseen, num_samples=200)
    assert abs(found.value - exact) < 4 * found.standard_error
    net.norm = Unknown()
    exact = form(net, (x, None), of_both, num_samples=None).value
    assert not taken
    found = form(net, (x, None), of_both, num_samples=200)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert taken == [None]


class Unknown(nn.Module):
    def forward(self, x):
        return Halved.apply(x)


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_a_loss_without_curvature_is_told_by_its_graph(small, taken, form):
    net, x = problem()

    def away(f):
        return (f["a"] - f["b"].mean(0) + 0.1).clamp(max=2)

    for bent in (F.relu, torch.abs, F.leaky_relu):
        with pytest.raises(ValueError, match="piecewise"):
            form(net, (x, None), lambda f, _, bent=bent: bent(away(f)).mean())
    linear = gauss_newton(net, (x, None), lambda f, _: (f["a"] - f["b"].mean(0)).sum())
    assert linear.value == 0
    assert any("linear" in note for note in linear.notes)
    assert not taken
    # Of pieces that are squares, at outputs on the others.
    beyond = gauss_newton(
        net,
        (x, None),
        lambda f, _: F.huber_loss(
            f["a"] - f["b"].mean(0) + 9, torch.zeros(N, K).double()
        ),
    )
    assert beyond.value == 0 and "linear" in beyond.notes[0]
    assert taken == [None]


def test_a_loss_that_reads_more_than_outputs_does_not_go_along_a_line(small, taken):
    net, x = problem()

    def beside(f, _):
        return clip(f["a"], f["b"]) + net.kept.square().sum()

    net.norm.register_forward_hook(lambda m, a, out: setattr(net, "kept", out))
    found = gauss_newton(net, (x, None), beside)
    assert any("reads" in note for note in found.notes)
    assert not taken


def test_a_single_root_of_a_softmax_of_each_row_takes_its_place(small, taken):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, K)).double()
    batch = torch.randn(N, 5).double(), LABELS
    gauss_newton(net, batch, lambda f, y: F.cross_entropy(f.view(-1, K), y))
    assert not taken
    gauss_newton(net, batch, lambda f, y: F.cross_entropy(around(f), y))
    assert len(taken) == 1


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_small_losses_are_taken_as_before(monkeypatch, taken, form):
    net, x = problem()
    form(net, (x, None), of_both)
    monkeypatch.setattr(loss_weight, "_FEWEST", 0)
    monkeypatch.setattr(loss_weight, "_SHARE", 100)  # of what the network makes
    form(net, (x, None), of_both)
    assert not taken
    monkeypatch.setattr(loss_weight, "_SHARE", 1 / 100)
    form(net, (x, None), of_both)
    assert taken
