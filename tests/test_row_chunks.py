"""Estimates by chunks of rows against the same by the whole batch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.passes import take_in_parts
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.jet_derivatives import _roots
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.output_hessian import ALL, HessianRoots
from torch_dropout_ir.regularizers import (
    gauss_newton,
    root_choice,
    row_chunks,
    second_order,
)
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.output_rows import RowNoise, chunks, rows_of_samples
from torch_dropout_ir.regularizers.root_forms import RootForms
from torch_dropout_ir.row_powers import _kept, by_powers
from torch_dropout_ir.softmax_roots import SoftmaxRoots


def convolutional():
    net = nn.Sequential(
        nn.Dropout(0.2), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Dropout2d(0.3),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    return net, torch.randn(7, 2, 6, 6)


def transformer():
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.1, activation="gelu", batch_first=True
    )
    net = nn.Sequential(nn.Dropout(0.2), layer, nn.Flatten(), nn.Linear(40, 3))
    return net, torch.randn(9, 5, 8)


class Several(nn.Module):
    """A mapping in, a mapping out; an argument that has no rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])

    def forward(self, x, scale):
        h = self.net(x * scale)
        return {"a": self.heads[0](h), "unread": self.heads[1](h)}


def several():
    return Several(), {"x": torch.randn(6, 4), "scale": torch.tensor(1.5)}


def weighted(outputs, targets):
    weight = torch.tensor([0.5, 2.0, 1.0]).double()
    outputs = outputs["a"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(outputs, targets, weight=weight, ignore_index=1)


LOSSES = {
    "weighted": weighted,
    "module": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=1
    ),
}


def of_both(monkeypatch, form, net, batch, loss, num_samples):
    """The estimate by chunks and by the whole, with the same signs or roots."""

    def one(self, rows=ALL):
        return [next(self.exact(rows))]

    drawn = SoftmaxRoots.sample

    def same(self, rows=ALL):
        torch.manual_seed(7)
        return [(root[rows], sign) for root, sign in drawn(self)]

    monkeypatch.setattr(HessianRoots, "sample", one)
    monkeypatch.setattr(SoftmaxRoots, "sample", same)
    monkeypatch.setattr(root_choice, "_blocks_pay", lambda *_: True)  # no random ones
    monkeypatch.setattr(RootForms, "sums", lambda *_, **__: None)
    found = []
    for least in (0, 2**62):
        take_in_parts(monkeypatch, not least)
        torch.manual_seed(5)
        found.append(form(net, batch, loss, num_samples=num_samples))
    return found


def assert_equal(parts, whole):
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(parts.value, whole.value, **close)
    torch.testing.assert_close(
        parts.standard_error, whole.standard_error, equal_nan=True, **close
    )
    assert parts.per_site.keys() == whole.per_site.keys()
    for name, value in whole.per_site.items():
        torch.testing.assert_close(parts.per_site[name], value, **close)


CASES = [
    (form, make, loss, count)
    for form in (second_order, gauss_newton)
    for make, loss in (
        (convolutional, "weighted"),
        (convolutional, "module"),
        (transformer, "module"),
        (several, "weighted"),
    )
    for count in (1, 6, None)
    # A pass a unit of each of its sites.
    if (form, make, count) != (second_order, transformer, None)
]


@pytest.mark.parametrize(("form", "make", "loss", "num_samples"), CASES)
def test_chunks_of_rows_give_what_the_whole_batch_gives(
    monkeypatch, form, make, loss, num_samples
):
    torch.manual_seed(0)
    net, x = make()
    net = net.double()
    x = {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double()
    count = len(x["x"] if isinstance(x, dict) else x)
    batch = x, torch.arange(count) % 3
    seen = []
    chunk = row_chunks.RowChunks._chunk
    monkeypatch.setattr(
        row_chunks.RowChunks,
        "_chunk",
        lambda self, k, rows, take: (
            seen.append(len(rows)) or chunk(self, k, rows, take)
        ),
    )
    parts, whole = of_both(monkeypatch, form, net, batch, LOSSES[loss], num_samples)
    if form is gauss_newton and num_samples == 1:
        # The graph tells, or a few rows; one backward pass holds no more than a step.
        assert seen in ([], [2])
    else:
        assert len(seen) >= 3 and max(seen) <= -(-count // 2)
    assert not parts.notes and not whole.notes
    assert_equal(parts, whole)


class Coded(nn.Module):
    """Draws a code of each sample, and drops samples and channels by hand."""

    def __init__(self):
        super().__init__()
        self.given, self.made = nn.Linear(6, 10), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        mean, log = self.given(self.drop(x)).chunk(2, 1)
        z = mean + torch.randn_like(mean) * log.exp()
        z = z * torch.empty(len(x), 1).bernoulli_(0.7) + torch.rand(len(x), 5)
        return self.made(self.drop(torch.tanh(z)) + torch.normal(mean.detach(), 0.1))


@pytest.mark.parametrize("num_samples", [1, 6, None])
@pytest.mark.parametrize("form", [second_order, gauss_newton])
def test_noise_of_rows_is_what_the_whole_batch_drew(monkeypatch, form, num_samples):
    torch.manual_seed(0)
    batch = torch.randn(40, 6).double(), torch.arange(40) % 3
    tried, parts_of = [], row_chunks.RowChunks.each
    monkeypatch.setattr(
        row_chunks.RowChunks,
        "each",
        lambda *args: tried.append(parts_of(*args)) or tried[-1],
    )
    parts, whole = of_both(
        monkeypatch, form, Coded().double(), batch, weighted, num_samples
    )
    assert None not in tried and (tried or (form, num_samples) == (gauss_newton, 1))
    assert_equal(parts, whole)


def drawn(x):
    """Numbers of many kinds, of the rows of a tensor and of nothing else."""
    n = len(x)
    turned = x.new_empty(n, 3, 4).transpose(1, 2)
    return [
        torch.rand_like(x), torch.randn(n, 20), torch.randint(9, (2 * n, 3)),
        torch.empty(n, 17).exponential_(), turned.bernoulli_(0.3), torch.bernoulli(x),
        torch.normal(x, 2.0), F.dropout(x.new_ones(n, 4, 8), 0.4),
        F.gumbel_softmax(x.new_zeros(n, 5)), torch.multinomial(x, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("samples", [[1, 4], [0, 2, 5, 6, 11], [7, 8, 9]])
def test_random_numbers_of_rows_are_rows_of_those_of_all(samples):
    x, samples = torch.rand(12, 18), torch.tensor(samples)
    torch.manual_seed(3)
    whole, after = drawn(x), torch.get_rng_state()
    torch.manual_seed(3)
    with RowNoise(samples, 12):
        found = drawn(x[samples])
    assert torch.equal(torch.get_rng_state(), after)
    for own, all_of_it in zip(found, whole, strict=True):
        rows = rows_of_samples(samples, len(all_of_it) // 12)
        assert torch.equal(own, all_of_it[rows])


DRAWS = [
    torch.bernoulli, torch.randn_like, Tensor.bernoulli_, F.dropout,
    lambda x: torch.randn(x.shape, device=x.device),
]  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS)
def test_noise_of_rows_is_drawn_on_the_device_of_the_model(draw):
    """Rows had numbers on the CPU: no part of a model with noise ran on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 3, device="cuda")
        with RowNoise(torch.tensor([1, 4, 7, 9]), 12):
            found = draw(x)
    assert found.shape == (4, 3) and found.device.type == "cuda"


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode])
def test_numbers_of_rows_know_of_no_mode_around_them(mode):
    """A generator of the CPU's draws nothing for a default device; caches kept modes.

    What was made under inference mode could not be saved for a backward pass later.
    """
    root, cpu = torch.ones(7, 2, dtype=torch.float64), torch.device("cpu")
    _kept.cache_clear()
    _roots.cache_clear()
    with mode():
        by_powers(root)
        if not torch.is_inference_mode_enabled():
            assert {rows.device for rows in chunks(40, 3)} == {cpu}
            assert rows_of_samples(root[:1, 0], 2).tolist() == [2, 3]
        else:
            _roots((7, 3), torch.float64, cpu, 3)
    slope = root.clone().requires_grad_()
    (by_powers(slope) * by_powers(root)).sum().backward()
    powers = slope.grad[:, 0].sqrt().log2()
    assert torch.equal(powers, powers.round()) and len(powers.unique()) == 7
    of_two = by_powers(torch.ones(14), count=7)  # two rows a sample, one after another
    assert torch.equal(of_two, by_powers(torch.ones(7)).repeat_interleave(2))
    roots = _roots((7, 3), torch.float64, cpu, 3)
    (torch.ones_like(roots).requires_grad_() * roots).sum().backward()


class Masked(nn.Module):
    """Attention over as many positions as there are samples, with a mask of theirs."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(3, 3)

    def forward(self, x, mask):
        # The graph does not know that to flip features keeps samples apart.
        return self.out(torch.tanh(mask @ self.drop(x)).flip(-1)).sum(1)


def norm():
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ), torch.randn(8, 3)  # fmt: skip


def below():
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 3)
    ), torch.randn(8, 3)  # fmt: skip


class Sized(nn.Sequential):
    """A network that is made for so many samples."""

    def forward(self, x):
        assert len(x) == 8
        return super().forward(x)


@pytest.mark.parametrize("form", [second_order, gauss_newton])
def test_a_network_that_is_made_for_its_batch_runs_on_all_of_it(monkeypatch, form):
    torch.manual_seed(0)
    net = Sized(nn.Dropout(0.2), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = torch.randn(8, 3).double(), torch.arange(8) % 3
    assert_equal(*of_both(monkeypatch, form, net, batch, "cross_entropy", None))


def masked():
    return Masked(), (torch.randn(8, 8, 3), torch.randn(8, 8))


@pytest.mark.parametrize("num_samples", [1, None])
@pytest.mark.parametrize("form", [second_order, gauss_newton])
@pytest.mark.parametrize("make", [norm, below, masked])
def test_samples_that_do_not_run_apart_run_together(
    monkeypatch, make, form, num_samples
):
    torch.manual_seed(1)
    net, x = make()
    net = net.double()
    x = tuple(v.double() for v in x) if isinstance(x, tuple) else x.double()
    batch = x, torch.arange(8) % 3
    parts, whole = of_both(monkeypatch, form, net, batch, "cross_entropy", num_samples)
    if num_samples is None or make is below:
        assert_equal(parts, whole)
    if num_samples == 1:
        # Rows that do not run alone do not tell whether they meet.
        told = make if form is gauss_newton else norm
        assert parts.standard_error.isnan() == (make is not below and make is told)
        assert whole.standard_error.isnan() == (make is norm)
    if form is gauss_newton:
        torch.testing.assert_close(parts.value, whole.value)
    # What lies below the first site does not matter; where samples meet, no graph is.
    if form is second_order:
        together = ["double backward" in note for note in parts.notes]
        assert any(together) == (make is masked)


class Again(nn.Module):
    """Batch normalization and the first site in a block that is computed again."""

    def __init__(self):
        super().__init__()
        self.block, self.last = nn.Sequential(*below()[0]), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(checkpoint(self.block, x, use_reentrant=False))


@pytest.mark.parametrize("form", [second_order, gauss_newton])
def test_a_block_that_is_computed_again_is_given_what_it_was(monkeypatch, form):
    torch.manual_seed(4)
    net = Again().double()
    batch = torch.randn(8, 3).double(), torch.arange(8) % 3
    parts, whole = of_both(monkeypatch, form, net, batch, "cross_entropy", None)
    assert_equal(parts, whole)


class Pairs(nn.Module):
    """Samples of one group meet; the first of all are alone."""

    def __init__(self):
        super().__init__()
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(4, 2)

    def forward(self, x, group):
        h = self.drop(x)
        sums = torch.zeros_like(h).index_add(0, group, h)
        return self.last(torch.tanh(sums[group]))


@pytest.mark.parametrize("form", [second_order, gauss_newton])
def test_samples_that_meet_in_pairs_are_seen_to(monkeypatch, form):
    torch.manual_seed(2)
    net, x = Pairs().double(), torch.randn(24, 4).double()
    group = torch.cat((torch.arange(16), torch.arange(16, 20).repeat_interleave(2)))
    batch = (x, group), torch.randint(2, (24,))
    parts, whole = of_both(monkeypatch, form, net, batch, "cross_entropy", None)
    assert_equal(parts, whole)
    sampled, _ = of_both(monkeypatch, form, net, batch, "cross_entropy", 1)
    assert sampled.standard_error.isnan()


def test_roots_of_some_rows_are_those_rows_of_the_roots():
    torch.manual_seed(3)
    f, rows = torch.randn(6, 4).double(), torch.tensor([4, 0, 3])
    labels, values = torch.randint(4, (6,)), torch.randn(6, 4).double()
    for loss, y in (
        (nn.CrossEntropyLoss(weight=torch.rand(4).double()), labels),
        (nn.MSELoss(), values),
        (nn.BCEWithLogitsLoss(), values.sigmoid()),
        (lambda a, b: (a - b).pow(4).sum(), values),
    ):
        roots = HessianRoots(resolve_loss(loss), f, y)
        pairs = zip(roots.exact(), roots.exact(rows), strict=True)
        for (root, sign), (part, its) in pairs:
            sign = sign[rows] if isinstance(sign, torch.Tensor) else sign
            torch.testing.assert_close(part, root[rows])
            torch.testing.assert_close(its, sign)
        # On average their squares are the Hessian's blocks.
        blocks = sum(
            s * (r[:, :, None] * r[:, None])
            for r, s in (
                (r, s if isinstance(s, float) else s[:, None, None])
                for r, s in roots.exact(rows)
            )
        )
        drawn = 0.0
        for _ in range(2000):
            drawn += (
                sum(s * r[:, :, None] * r[:, None] for r, s in roots.sample(rows))
                / 2000
            )
        assert (drawn - blocks).abs().max() < 0.15 * blocks.abs().max()


def test_a_backward_pass_holds_no_derivative_of_a_site():
    net = nn.Sequential(nn.Dropout(0.2), nn.Linear(5, 5), nn.Dropout(0.2))
    with clean_pass(net, torch.randn(3, 5)) as clean:
        found = {}
        clean.pull(clean.outputs, torch.ones(3, 5), found.__setitem__)
        plain = torch.autograd.grad(clean.outputs, clean.edges, torch.ones(3, 5))
    assert list(found) == [1, 0]
    for use, g in enumerate(plain):
        torch.testing.assert_close(found[use], g)


def test_inputs_that_count_something_else_are_left_whole():
    x, table, one = torch.randn(5, 2), torch.randn(7, 2), torch.randn(1, 2)
    rows = torch.tensor([0, 3])
    found = row_chunks.rows_of(Inputs((x, table), {"one": one}), rows, 5)
    assert torch.equal(found.args[0], x[rows])
    assert found.args[1] is table and found.kwargs["one"] is one


class Tokens(nn.Module):
    """Images with normalized channels, whose positions are normalized too."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout2d(0.4), nn.InstanceNorm2d(4, affine=True)
        self.tokens, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.tokens(self.norm(self.drop(x)).flatten(2).mT)).mean(1)


@pytest.mark.parametrize("rows", range(2, 14))
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("least", [1, 2])
def test_chunks_have_rows_enough(rows, parts, least):
    found = [chunk.tolist() for chunk in row_chunks.chunks(rows, parts, least)]
    assert sorted(i for chunk in found for i in chunk) == list(range(rows))
    assert min(map(len, found)) >= least


def go_apart(monkeypatch):
    """Let no samples be so few that they go along a line."""
    monkeypatch.setattr(sys.modules[second_order.__module__], "_FEW", 0)


class Short(nn.Module):
    """Texts whose symbols are classified, each read by those behind it."""

    def __init__(self, norm):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(5, 4), nn.Dropout(0.3)
        self.body = nn.TransformerEncoderLayer(4, 2, 6, 0.2, batch_first=True)
        self.norm, self.out = norm, nn.Linear(4, 3)

    def forward(self, x):
        h = self.body(self.drop(self.embedding(x)))
        return self.out(self.norm(h.mT).mT).flatten(0, 1)


@pytest.mark.parametrize("num_samples", [1, 3, None])
@pytest.mark.parametrize("form", [second_order, gauss_newton])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_samples_apart_run_alone(monkeypatch, count, form, num_samples):
    """But not where there is batch normalization, whose derivative torch misreads."""
    torch.manual_seed(0)
    go_apart(monkeypatch)
    sizes = []
    for norm in (nn.Identity(), nn.BatchNorm1d(4).eval()):
        net = Short(norm).double()
        net.out.register_forward_hook(lambda _, x, y: sizes.append(len(x[0])))
        batch = torch.randint(5, (count, 6)), torch.randint(3, (6 * count,))
        parts, whole = of_both(
            monkeypatch, form, net, batch, "cross_entropy", num_samples
        )
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-10, atol=1e-13)
        alone = isinstance(norm, nn.Identity) and (form, num_samples) != (
            gauss_newton, 1,
        )  # fmt: skip
        assert (1 in sizes) == alone
        sizes.clear()


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_chunks_of_few_images_are_as_the_batch(monkeypatch, rows):
    torch.manual_seed(0)
    net = Tokens().double()
    batch = torch.randn(rows, 4, 3, 3).double(), torch.randn(rows, 2).double()
    whole = gauss_newton(net, batch, "mse", num_samples=None)
    take_in_parts(monkeypatch)
    parts = gauss_newton(net, batch, "mse", num_samples=None)
    torch.testing.assert_close(parts.value, whole.value)


def rates(f, y):
    """Mixes the outputs of a sample; its curvature has both signs."""
    return (f.softmax(1) * (f * y).tanh().sum(1, keepdim=True)).sum(1).cos().mean()


@pytest.mark.parametrize(("width", "whole"), [(96, True), (6, False)])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_one_graph_does_for_two_roots_where_parameters_hold_as_much(
    monkeypatch, width, whole, num_samples
):
    """A step holds their gradients, which an estimate does not."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(5, width), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8),
    ).double()  # fmt: skip
    batch = torch.randn(16, 5).double(), torch.randn(16, 8).double()
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    exact = gauss_newton(net, batch, rates, num_samples=None)
    for name in ("FEWEST", "SOME", "LEAST"):
        monkeypatch.setattr(f"torch_dropout_ir.regularizers.step_memory.{name}", 0)
    monkeypatch.setattr("torch_dropout_ir.regularizers.recorder._LARGE", 0)
    passes.clear()
    found = [
        gauss_newton(net, batch, rates, num_samples=num_samples) for _ in range(60)
    ]
    assert (len(passes) == len(found)) == whole
    values = torch.stack([x.value for x in found])
    error = values.std() / len(values) ** 0.5
    assert (values.mean() - exact.value).abs() < 5 * error


def test_a_single_sample_goes_along_a_line(monkeypatch):
    """It cannot be taken apart, and tells no error of one draw in any case."""
    torch.manual_seed(0)
    layers = [nn.Dropout(0.3), nn.Linear(4, 4), nn.Tanh()]
    for _ in range(6):
        layers += [nn.Linear(4, 4), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    batch = torch.randn(1, 4).double(), torch.tensor([1])
    whole = second_order(net, batch, "cross_entropy", num_samples=None)
    take_in_parts(monkeypatch)
    along = second_order(net, batch, "cross_entropy", num_samples=None)
    torch.testing.assert_close(along.value, whole.value, rtol=1e-10, atol=1e-13)
    assert along.notes == ()


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_few_samples_go_along_a_line_together(monkeypatch, rows):
    """A graph of one holds as much as a step: the signs alone tell the error."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    net = nn.Sequential(nn.Dropout(0.3), *layers, nn.Linear(4, 3)).double()
    batch = torch.randn(rows, 4).double(), torch.arange(rows) % 3
    whole = second_order(net, batch, "cross_entropy", num_samples=None)
    take_in_parts(monkeypatch)
    once = second_order(net, batch, "cross_entropy")
    many = second_order(net, batch, "cross_entropy", num_samples=200)
    assert once.standard_error.isnan() == (rows < 4)
    assert (many.value - whole.value).abs() < 4 * many.standard_error
    assert many.standard_error < 0.3 * whole.value.abs()


def test_few_samples_that_no_line_goes_through_run_alone(monkeypatch):
    """The largest number by far is one layer's: a line would hold four of it."""
    torch.manual_seed(0)
    ends = nn.Linear(4, 99), nn.Linear(99, 3)
    net = nn.Sequential(nn.Dropout(0.3), *ends).double()
    batch = torch.randn(2, 4).double(), torch.tensor([1, 2])
    parts, whole = of_both(monkeypatch, second_order, net, batch, "cross_entropy", 1)
    assert_equal(parts, whole)
    assert not parts.standard_error.isnan()
    assert parts.notes == whole.notes
