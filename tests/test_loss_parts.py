"""Losses as sums of themselves on parts of the rows, against the dense Hessian."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, loss_weight, second_order
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.regularizers.root_choice import PartRoots

N, K = 120, 3


WEIGHT = torch.arange(1.0, K + 1).double()


def logits(f, y, **options):
    return F.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1), **options)


def focal(f, y):
    log = F.log_softmax(f, 1).gather(1, y[:, None]).squeeze(1)
    return -((1 - log.exp()) ** 2 * log).mean()


def real(y):
    """Targets of the outputs' shape that are made of labels."""
    return torch.stack([(y + k + 1.0).cos() for k in range(K)], 1).double()


def log_cosh(f, y):
    return (f - real(y)).cosh().log()


def of_positives(f, y):
    """A mean over a number of rows that the targets tell."""
    return (log_cosh(f, y).sum(1) * (y > 0)).sum() / (y > 0).sum()


# Sums of themselves, but for a weight.
SUMS = {
    "labels": logits,
    "some ignored": lambda f, y: logits(f, y, ignore_index=2),
    "sum": lambda f, y: logits(f, y, reduction="sum"),
    "class weights": lambda f, y: logits(f, y, weight=WEIGHT),
    "focal": focal,
    "log cosh": lambda f, y: log_cosh(f, y).mean(),
    "squares": lambda f, y: (f - real(y)).square().sum(1).mean(),
    "length": lambda f, y: (1 + (f - real(y)).square().sum(1)).sqrt().mean(),
    "positives": of_positives,
    "indefinite": lambda f, y: (f - real(y)).sin().sum(),
}  # fmt: skip


def balanced(f, y):
    """Weights of classes that are counted in the batch."""
    weight = len(y) / (1.0 + torch.bincount(y, minlength=K)).double()
    return logits(f, y, weight=weight, reduction="sum") / len(y)


def robust(f, y):
    """A threshold that is taken of the batch."""
    off = f - real(y)
    return F.huber_loss(f, real(y), delta=float(off.detach().abs().median()))


def chosen(f, y):
    """A mean over as many rows as outputs choose."""
    off = log_cosh(f, y).sum(1)
    return off[off > 0.5].sum() / (off > 0.5).sum()


def chosen_by_weight(f, y):
    off = log_cosh(f, y).sum(1)
    hard = (off.detach() > 0.5).double()
    return (off * hard).sum() / hard.sum()


def straight_through(f, y):
    """A term whose gradient is zero and whose curvature goes by the number of rows."""
    return log_cosh(f, y).mean() + len(f) * (f - f.detach()).square().mean()


# Functions of several rows, or of how many there are.
MEET = {
    "balanced": balanced,
    "robust": robust,
    "chosen": chosen,
    "chosen by weight": chosen_by_weight,
    "straight through": straight_through,
    "mean of labels": lambda f, y: (f - real(y) - y.double().mean()).cosh().mean(),
    "temperature": lambda f, y: logits(f / f.detach().std(), y),
    "scaled": lambda f, y: (f - real(y)).square().mean() / f.detach().var(),
    "by count": lambda f, y: (f - real(y)).abs().pow(1 + 40 / len(f)).mean(),
    "centred": lambda f, y: (f - f.mean(0) - real(y)).square().mean(),
    "a little": lambda f, y: log_cosh(f, y).mean() + 1e-4 * f.mean().square(),
    "largest": lambda f, y: log_cosh(f, y).mean() + 0.1 * f.amax(0).square().sum(),
    "rooted": lambda f, y: (f - real(y)).square().mean().sqrt(),
    "pairs": lambda f, y: logits(f @ f.T, torch.arange(len(f)).flip(0)),
    "no rows": lambda f, _: (f - torch.ones(N, K).double()).cosh().mean(),
}


def network():
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6), nn.Tanh(),
        nn.Dropout(0.5), nn.Linear(6, K),
    ).double()  # fmt: skip


def batch():
    return torch.randn(N, 4).double(), torch.randint(K, (N,))


@pytest.fixture
def small(monkeypatch):
    """Let the memory of small losses matter."""
    monkeypatch.setattr(loss_weight, "_FEWEST", 0)
    monkeypatch.setattr(loss_weight, "_SHARE", 0.0)


def looked_at(loss):
    """A pass, what the loss reads of it, and the loss by parts."""
    torch.manual_seed(1)
    x, y = batch()
    with clean_pass(network(), x) as clean:
        read = read_outputs(clean.outputs, resolve_loss(loss), y)
        f, product = read.single, read.product()
        told = loss_weight.apart(product)
        parts = LossParts(read, N)
        if told:
            parts.look(clean, read)
    return f, y, clean, parts


def dense(loss, f, y):
    return torch.autograd.functional.hessian(lambda x: resolve_loss(loss)(x, y), f)


@pytest.mark.parametrize("name", SUMS)
def test_the_hessian_of_a_part_is_that_of_the_whole_in_its_rows(name):
    f, y, _, parts = looked_at(SUMS[name])
    whole = dense(SUMS[name], f, y)
    assert len(parts.weights) == len(parts.rows)
    for k, rows in enumerate(parts.rows):
        own = parts.read(k, [f[rows]])
        found = torch.autograd.functional.hessian(
            lambda x, own=own: own.risk([x]), f[rows]
        )
        torch.testing.assert_close(found, whole[rows][:, :, rows])
        whole[rows[:, None], :, rows] = 0
    assert not whole.any()
    assert torch.cat(parts.rows).sort().values.tolist() == list(range(N))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "make", [nn.BCEWithLogitsLoss, nn.HuberLoss, nn.PoissonNLLLoss]
)
def test_so_is_that_of_a_module_of_single_outputs(make, reduction):
    torch.manual_seed(1)
    loss, (x, y) = make(reduction=reduction), batch()
    y = (1 + real(y)) / 2
    with clean_pass(network(), x) as clean:
        read = read_outputs(clean.outputs, resolve_loss(loss), y)
        f, parts = read.single, LossParts(read, N)
        parts.look(clean, read)
    whole = dense(loss, f, y)
    assert len(parts.weights) == len(parts.rows) > 1 and parts.curved
    for k, rows in enumerate(parts.rows):
        own = parts.read(k, [f[rows]])
        found = torch.autograd.functional.hessian(
            lambda x, own=own: own.risk([x]), f[rows]
        )
        torch.testing.assert_close(found, whole[rows][:, :, rows])


@pytest.mark.parametrize("name", MEET)
def test_a_loss_that_is_no_sum_of_parts_is_seen(name):
    _, _, _, parts = looked_at(MEET[name])
    assert not parts.weights


@pytest.mark.parametrize("name", ["labels", "focal", "length", "indefinite"])
def test_roots_of_parts_multiply_to_the_hessian_on_average(name):
    f, y, clean, parts = looked_at(SUMS[name])
    roots, total, count = PartRoots(parts, clean, f, 1), 0.0, 200
    for _ in range(count):
        for root, sign in roots.sample():
            total += sign * root.T @ root / count
    whole = torch.einsum("iaib->ab", dense(SUMS[name], f, y))
    assert (total - whole).abs().max() < 0.05 * whole.abs().max()
    assert roots.curved


def test_parts_that_are_curved_one_way_have_no_other_root():
    torch.manual_seed(1)
    x, y = torch.randn(N, 4).double(), torch.ones(N, 1).double()

    def loss(f, y):
        return (y * f.cosh()).sum()

    with clean_pass(network(), x) as clean:
        read = read_outputs(clean.outputs, resolve_loss(loss), y)
        y[LossParts(read, N).samples[0]] = -1.0
        f, parts = read.single, LossParts(read, N)
        parts.look(clean, read)
        roots = PartRoots(parts, clean, f, 1).sample()
    assert {sign for _, sign in roots} == {1.0, -1.0}
    total = sum(sign * root.square() for root, sign in roots)
    torch.testing.assert_close(total, y * f.cosh())


def test_a_first_part_without_curvature_is_not_taken_for_all(small, monkeypatch):
    torch.manual_seed(1)
    net, (x, _) = network(), batch()
    net.insert(4, nn.BatchNorm1d(6).double())
    loss, drawn, sample = nn.HuberLoss(delta=0.1), [], PartRoots.sample
    with clean_pass(net, x) as clean:
        f = clean.outputs.detach()
        read = read_outputs(clean.outputs, resolve_loss(loss), f)
        first, *_ = LossParts(read, N).samples
    y = f + 0.05
    y[first] = f[first] + 3  # where it is linear
    exact = gauss_newton(net, (x, y), loss, num_samples=None).value
    monkeypatch.setattr(PartRoots, "sample", lambda *a: drawn.append(1) or sample(*a))
    found = gauss_newton(net, (x, y), loss, num_samples=60)
    assert drawn and not found.notes and exact > 0
    assert (found.value - exact).abs() < 4.5 * found.standard_error
    assert found.standard_error < 0.2 * exact


def test_an_exact_sum_by_parts_draws_nothing_where_no_part_is_curved(small):
    net, (x, y) = network(), batch()
    before, far = torch.get_rng_state(), real(y) + 1000
    assert gauss_newton(net, (x, far), nn.HuberLoss(), num_samples=None).value == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize(
    "name", ["focal", "log cosh", "length", "positives", "some ignored"]
)
def test_gauss_newton_by_parts_is_the_exact_sum_on_average(
    small, monkeypatch, name, meet
):
    torch.manual_seed(1)
    net, (x, y) = network(), batch()
    if meet:
        net.insert(4, nn.BatchNorm1d(6).double())
    exact = gauss_newton(net, (x, y), SUMS[name], num_samples=None).value
    drawn, sample = [], PartRoots.sample
    monkeypatch.setattr(PartRoots, "sample", lambda *a: drawn.append(1) or sample(*a))
    found = gauss_newton(net, (x, y), SUMS[name], num_samples=60)
    assert (found.value - exact).abs() < 4.5 * found.standard_error
    assert found.standard_error < 0.2 * exact.abs()
    assert bool(drawn) == meet  # where samples do not meet, chunks have their own


@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize("name", [*SUMS, "balanced", "straight through"])
def test_exact_sums_are_the_same_by_parts(small, monkeypatch, name, meet):
    torch.manual_seed(1)
    net, (x, y) = network(), batch()
    if meet:
        net.insert(4, nn.BatchNorm1d(6).double())
    loss, runs, looks = (SUMS | MEET)[name], [], LossParts.look
    monkeypatch.setattr(LossParts, "look", lambda *a: runs.append(1) or looks(*a))
    parts = gauss_newton(net, (x, y), loss, num_samples=None)
    assert runs
    monkeypatch.setattr(loss_weight, "much", lambda *_: False)
    whole = gauss_newton(net, (x, y), loss, num_samples=None)
    assert len(runs) == 1
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(parts.per_site, whole.per_site)
    assert parts.exact == whole.exact and parts.notes == whole.notes


@pytest.mark.parametrize("name", [*SUMS, *MEET])
def test_second_order_is_the_same_by_parts(small, monkeypatch, name):
    torch.manual_seed(1)
    net, (x, y) = network(), batch()
    loss, found, runs = (SUMS | MEET)[name], [], []
    looks = LossParts.look
    monkeypatch.setattr(LossParts, "look", lambda *a: runs.append(1) or looks(*a))
    own = sys.modules[second_order.__module__]
    monkeypatch.setattr(own, "makes_much", lambda *_: False)
    for much in (loss_weight.much, lambda *_: False):
        monkeypatch.setattr(own, "much", much)
        torch.manual_seed(3)
        found.append(second_order(net, (x, y), loss, num_samples=2))
    parts, whole = found
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(parts.per_site, whole.per_site)
    assert runs or name in MEET


@pytest.mark.parametrize("form", [gauss_newton, second_order])
@pytest.mark.parametrize("rows", [N, 1])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_single_outputs_may_be_of_the_batch(small, form, rows, name):
    torch.manual_seed(1)
    net, (x, y) = network(), batch()
    loss = nn.BCEWithLogitsLoss(**{name: torch.rand(rows, K).double() + 0.5})
    y = (real(y) > 0).double()
    exact = form(net, (x, y), loss, num_samples=None).value
    found = form(net, (x, y), loss, num_samples=60)
    assert (found.value - exact).abs() < 4.5 * found.standard_error
