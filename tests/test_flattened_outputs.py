"""Outputs with several rows a sample, as of a language model that flattens them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes import take_in_parts
from tests.reference.second_order import replace_sites, second_order_form
from torch_dropout_ir.output_hessian import ALL, HessianRoots
from torch_dropout_ir.regularizers import gauss_newton, row_chunks, second_order
from torch_dropout_ir.testing import expected_dropout_loss

FORMS = (second_order, gauss_newton)


class Language(nn.Module):
    """Tokens that attend to those before them, a site on flattened rows if asked."""

    def __init__(self, tokens=3, flat_site=False, norm=False, early=0.2):
        super().__init__()
        self.embed, self.drop = nn.Embedding(5, 2), nn.Dropout(early)
        self.mix = nn.Parameter(torch.randn(tokens, tokens).tril())
        self.norm = nn.BatchNorm1d(tokens) if norm else nn.Identity()
        self.late = nn.Dropout(0.4 if flat_site else 0.0)
        self.out = nn.Linear(2, 4)

    def forward(self, x):
        h = self.drop(self.embed(x))
        h = torch.tanh(self.norm(self.mix @ h))
        return self.out(self.late(h.reshape(-1, 2)))


def language(samples=2, tokens=3, **options):
    torch.manual_seed(3)
    net = Language(tokens, **options).double()
    x = torch.randint(5, (samples, tokens))
    return net, (x, torch.randint(4, (samples * tokens,)))


def masks(net, samples, tokens):
    late = [(samples * tokens, 2)] if net.late.p else []
    if not late:
        net.late = nn.Identity()
    return [(samples, tokens, 2), *late]


@pytest.mark.parametrize("least", [0, 2**62])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("flat_site", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_exact_sum_is_the_dense_form(monkeypatch, form, flat_site, norm, least):
    take_in_parts(monkeypatch, not least)
    net, batch = language(4, 3, flat_site=flat_site, norm=norm)
    same = copy.deepcopy(net)
    shapes = masks(same, 4, 3)
    for loss in (F.cross_entropy, lambda f, t: F.cross_entropy(f, t).exp()):
        expected = second_order_form(
            copy.deepcopy(same), shapes, batch, loss, linearized=form is gauss_newton
        )
        found = form(net, batch, loss, num_samples=None).value
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(("flat_site", "early"), [(False, 0.2), (True, 0.2), (True, 0)])
@pytest.mark.parametrize("num_samples", [1, 5, None])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_samples_take_all_of_their_rows(
    monkeypatch, form, num_samples, flat_site, early
):
    monkeypatch.setattr(
        HessianRoots, "sample", lambda self, rows=ALL: [next(self.exact(rows))]
    )
    sizes, chunk = [], row_chunks.RowChunks._chunk
    monkeypatch.setattr(
        row_chunks.RowChunks,
        "_chunk",
        lambda self, k, rows, take: (
            sizes.append(len(rows)) or chunk(self, k, rows, take)
        ),
    )
    net, batch = language(7, 3, flat_site=flat_site, early=early)
    found = []
    for least in (0, 2**62):
        take_in_parts(monkeypatch, not least)
        torch.manual_seed(5)
        found.append(form(net, batch, "cross_entropy", num_samples=num_samples))
    parts, whole = found
    told = form is gauss_newton and num_samples == 1  # by the graph
    assert told if not sizes else max(sizes) <= 4
    assert not parts.notes
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(parts.value, whole.value, **close)
    torch.testing.assert_close(parts.standard_error, whole.standard_error, **close)
    torch.testing.assert_close(parts.per_site, whole.per_site, **close)


@pytest.mark.parametrize("form", FORMS)
def test_the_standard_error_is_that_of_samples(form):
    net, batch = language(16, 3, flat_site=True)
    exact = form(net, batch, "cross_entropy", num_samples=None).value
    drawn = [form(net, batch, "cross_entropy") for _ in range(150)]
    values = torch.stack([x.value for x in drawn])
    spread = values.std()
    assert (values.mean() - exact).abs() < 4 * spread / 150**0.5
    claimed = torch.stack([x.standard_error for x in drawn]).square().mean().sqrt()
    assert 0.8 * spread < claimed < 3 * spread  # an upper bound with one sample
    more = [form(net, batch, "cross_entropy", num_samples=8) for _ in range(60)]
    spread = torch.stack([x.value for x in more]).std()
    claimed = torch.stack([x.standard_error for x in more]).square().mean().sqrt()
    assert 0.7 * spread < claimed < 1.5 * spread


def test_samples_with_batch_norm_between_their_rows_meet():
    net, batch = language(6, 3, norm=True)
    for form in FORMS:
        assert form(net, batch, "cross_entropy").standard_error.isnan()


class Bag(nn.Module):
    """A site on the flattened rows of samples that have one row of outputs."""

    def __init__(self):
        super().__init__()
        self.early, self.drop = nn.Dropout(0.2), nn.Dropout(0.3)
        self.out = nn.Linear(2, 3)

    def forward(self, x):
        rows = self.drop(self.early(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.out(torch.tanh(rows.sum(1)))


def bag(samples):
    torch.manual_seed(1)
    batch = torch.randn(samples, 2, 2).double(), torch.arange(samples) % 3
    return Bag().double(), batch


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_sample_that_meet_are_taken_one_by_one(form):
    net, batch = bag(4)
    expected = second_order_form(
        copy.deepcopy(net), [(4, 2, 2), (8, 2)], batch, F.cross_entropy,
        linearized=form is gauss_newton,
    )  # fmt: skip
    found = form(net, batch, "cross_entropy", num_samples=None).value
    torch.testing.assert_close(found, expected.detach())


def test_every_mask_of_rows_that_are_flattened():
    """Where a sample has several rows, they do not share a mask."""
    net, batch = bag(1)
    found = expected_dropout_loss(net, batch, "cross_entropy")
    shapes = [(1, 2, 2), (2, 2)]
    placed = replace_sites(net)
    expected = 0.0
    sizes = [torch.Size(s).numel() for s in shapes]
    for kept in itertools.product((0.0, 1.0), repeat=sum(sizes)):
        weight = 1.0
        parts = torch.tensor(kept).double().split(sizes)
        for (place, p), shape, part in zip(placed, shapes, parts, strict=True):
            place.noise = part.view(shape) / (1 - p)
            weight *= float(torch.where(part > 0, 1 - p, p).prod())
        expected += weight * F.cross_entropy(net(batch[0]), batch[1]).detach()
    torch.testing.assert_close(found, expected)


def test_rows_of_a_sample_have_the_sign_of_its_curvature():
    """Of a loss that is no convex function, whose sites have rows of their own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.out = nn.Dropout(0.3), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.drop(x.reshape(-1, 2)).reshape(-1, 6))

    torch.manual_seed(0)
    net, x = Net().double(), 3 * torch.randn(4, 3, 2).double()
    loss = lambda f, _: f.sum(1).sin().sum() + f.cos().sum()  # noqa: E731
    expected = second_order_form(
        copy.deepcopy(net), [(12, 2)], (x, None), loss, linearized=True
    )
    found = gauss_newton(net, (x, None), loss, num_samples=None).value
    torch.testing.assert_close(found, expected.detach())
