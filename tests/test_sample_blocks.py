"""Blocks that are read off a loss's graph: against the dense Hessian of autograd."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.jets import loss_blocks
from torch_dropout_ir import registration, sample_blocks
from torch_dropout_ir.jet_program import NotToldError, Program
from torch_dropout_ir.jet_rules import RULES
from torch_dropout_ir.loss_terms import nodes_of
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.output_hessian import hessian_columns
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers import gauss_newton

pytestmark = pytest.mark.skipif(
    not registration.COMPILED, reason="blocks are of the compiled kernel"
)
N, K = 5, 3
KERNELS = {"python": loss_blocks, "compiled": registration.loss_blocks}
LABELS = torch.tensor([0, 2, 1, 1, 0])


def divergence(f, _):
    p, q = f[:, :2].log_softmax(1), f[:, 1:].log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean()


def focal(f, _):
    log = f.log_softmax(1).gather(1, LABELS[: len(f), None]).squeeze(1)
    return -((1 - log.exp()) ** 2 * log).mean()


def functions(f, _):
    each = (
        f.exp().sqrt(), (f.exp() + 1).rsqrt(), f.exp().reciprocal(), F.logsigmoid(f),
        f.sinh(), f.cosh(), f.abs() * f, f.relu() ** 3, f.clamp(-0.5, 0.5) * f,
        f.clamp(min=0.1) * f, f.clamp_min(0.1) * f, f.sin(), f.cos(), f.tanh(),
        f.sigmoid(), f.expm1(), f.square().log1p(), f**1, f**0, f.exp() ** 1.5, -f**3,
        F.softplus(f, beta=3.0, threshold=1.0),
    )  # fmt: skip
    return sum((x * (i + 1)).sum() for i, x in enumerate(each))


def shapes(f, y):
    outer = f.view(N, K, 1) * f.unsqueeze(1) * y[:, :, None]
    strided = (
        f[:, ::2].reshape(N, 1, 2).squeeze(1) * f[0:, -2:] * f[:, -9:].mean(1, True)
    )
    copied = f[:, :2, None].expand(N, 2, 2).reshape(N, 4) ** 3
    chosen = f.select(1, 0) * f[:, -1] - f[..., 1].clone() ** 4
    single = f[:, 1:2].squeeze() ** 3
    whole = outer.expm1().sum((1, -1)).mean() + strided.mean((-2, -1)) + chosen.sum()
    return whole + copied.mean(1, keepdim=True).sum() + single.mean(0)


def joined(f, y):
    top = f.logsumexp(1, keepdim=True) * f + f.exp().logsumexp(-1)[:, None]
    s = f.view(N, 1, K).softmax(-1).sum(1) - y
    return top.sum() + (s**2).sum() + f.unsqueeze(2).log_softmax(1).sin().sum()


def parts(f, _):
    (a, b), (c, d) = f.chunk(2, 1), f[:, None].split([1, 2], 2)
    one, two, three = f.exp().unbind(1)
    rest = (c * d).sin().sum() + (one * three / two).sum()
    return (a.exp() * b).square().mean() + rest


def masks(f, y):
    most, least = torch.maximum(f.sin(), y), torch.minimum(f[:, :1], f[:, 1:].square())
    ties = torch.maximum(f.exp(), f.exp()) * torch.minimum(f, f.detach())
    either = torch.where(y > 0, f.exp(), f**3) + torch.where(y > 1, f[:, :1] ** 4, y)
    filled = f.cosh().masked_fill(y > 0, 2.0).exp() * (y < 1)
    return sum((x * x).sum() for x in (most, least, ties, either, filled))


def of_torch(f, y):
    """Torch's losses as terms of a formula."""
    weight, named = torch.arange(1.0, K + 1).to(f), LABELS.where(LABELS > 0, -100)
    above = named.abs()
    each = (
        F.huber_loss(f, y), F.huber_loss(f, y, reduction="none", delta=0.5).sin().sum(),
        F.smooth_l1_loss(f, y, beta=0.3, reduction="sum"),
        F.binary_cross_entropy_with_logits(f, y.sigmoid()),
        F.binary_cross_entropy_with_logits(
            f, y.sigmoid(), y.exp(), pos_weight=weight, reduction="sum"
        ),
        F.cross_entropy(f, LABELS), F.cross_entropy(f, LABELS, weight, reduction="sum"),
        F.nll_loss(f.softmax(1) ** 2, named, weight, ignore_index=-100),
        F.cross_entropy(f, LABELS, label_smoothing=0.1),
        F.nll_loss(f.exp(), above, ignore_index=100, reduction="none").exp().sum(),
        F.cross_entropy(f, LABELS, weight, reduction="none").square().mean(),
        F.margin_ranking_loss(f[:, 0].exp(), f[:, 1], torch.ones_like(f[:, 2]), 3.0),
    )  # fmt: skip
    return sum(x * (i + 1) for i, x in enumerate(each))


def gammas(f, y):
    a, b = F.softplus(f[:, :1]) + 0.5, F.softplus(f[:, 1:]) + 0.5
    powers = (
        torch.xlogy(a, b)
        + torch.xlogy(y[:, 1:].exp(), b)
        + torch.xlogy(a, y[:, :1].exp())
    )
    return (torch.lgamma(a) * torch.lgamma(b) + powers.square()).mean()


def matrices(f, y):
    w, head = y[:2].T.contiguous(), nn.Parameter(y[:, :2].clone())
    each = f[:, :, None] * y[:, None] + f[:, None].exp()
    both = torch.addmm(f.sin()[:, :2], f, w, beta=3, alpha=2)
    rows = (
        (f @ w).exp(), both.cos(), F.linear(f, w.T, w[0]).sin(),
        (f.cos() @ w[:, 0]).exp(), F.linear(f[:, None], w.T).sin(),
        (f.tanh() @ head[2:]).square(), torch.bmm(each, each.sin()).cos(),
        (each @ y.view(N, K, 1)).sin(), torch.bmm(y.view(N, 1, K), each).sin(),
        torch.baddbmm(each, y.view(N, K, 1), f.view(N, 1, K), alpha=0.5).sin(),
        torch.baddbmm(each.detach(), each, each, beta=2).cos(),
        torch.einsum("nij,njk->nki", each, each.cos()).sin(),
        torch.einsum("ni,ni->n", f, f.exp() * y).square(),
        torch.einsum("ni,ij->nj", f.cos(), w).exp(),
        torch.einsum("ni,ij,nj->n", f, w @ w.T, f.sin()).sin(),
        torch.baddbmm(y[:1, None, :2], f[None], w[None]).view(N, 2).sin(),
        torch.addmm(f[:, :2], y, w, beta=2).cosh(),
        torch.baddbmm(each, y.view(N, K, 1), y.view(N, 1, K), beta=2).sin(),
        (f @ head[:3].t().contiguous().t()).cosh(),
    )  # fmt: skip
    return sum((x * (i + 1)).sum() for i, x in enumerate(rows))


def moved(f, y):
    beside = torch.cat((f[:, 1:].exp(), y, f[:, :2] * f[:, 2:], f[:, :1].sin()), 1)
    cube, places = beside.view(N, 2, 2, 2), torch.tensor([1, 0, 1])
    order = cube.permute(0, 3, 1, 2).softmax(1) * cube
    rows = (
        beside, torch.cat((y[:, :1], f.exp()), -1), torch.cat((f.cosh(), y[:, :1]), 1),
        torch.stack((y, f.exp(), f.sin() * y), 1).logsumexp(1), order,
        torch.stack((f[:, 0], f[:, 1].exp()), -1) * torch.hstack((f[:, 2:], f[:, :1])),
        beside[:, :6].view(N, 3, 2).mT * y.view(N, 1, K),
        f.view(N, 1, K, 1).permute(0, 2, 3, 1).transpose(-1, -2).exp(),
        order.index_select(2, places).index_select(-3, places[1:2]),
    )  # fmt: skip
    return sum((x * (x + i)).sin().sum() for i, x in enumerate(rows))


def single(f, y):
    """Functions without a rule of their own, some of several entries of a row."""
    a, b = F.softplus(f) + 0.5, F.softplus(y) + 0.5
    each = (
        f.tanh().acos(), f.tanh().asin(), f.atan(), f.tan(), f.erf(), f.erfc(),
        F.elu(f, 0.5), F.gelu(f), F.silu(f), F.mish(f), F.leaky_relu(f) * f,
        F.hardtanh(f) * f, a.digamma(), a.polygamma(1), torch.special.i0e(f),
        torch.special.log_ndtr(f), (f[:, :K] - 1) ** 3,
        torch.atan2(a, f.sin()), torch.atan2(y, a), torch.logaddexp(f.sin(), f * y),
        torch.lerp(f.sin(), f.cos(), 0.3).exp(), torch.lerp(f.cos(), y, b).exp(),
        torch.lerp(f.cos(), f.sin(), b), torch.addcmul(y, a, f.sin(), value=2).exp(),
        torch.addcmul(f.cos(), a, y).exp(), a ** f.sin(), b**f, f.exp() ** b, 2.0**f,
        f ** b.round(), a ** y[:1], (a * a)[:, :1] ** f,
    )  # fmt: skip
    added = F.binary_cross_entropy(f.sigmoid(), b.tanh()) / 3
    added = added + F.soft_margin_loss(f, y.sign(), reduction="sum")
    return added + sum((x * (i + 1)).sum() for i, x in enumerate(each))


def elsewhere(f, y):
    """Entries in other places of their rows."""
    cube, ar = f.view(N, K, 1) * y[:, None], torch.arange(N)
    each = (
        f.flip(1), f.roll(1, 1), f.repeat(1, 2).view(N, 2, K), f.unfold(1, 2, 1),
        F.pad(f, (1, 2), value=3.0), cube.tril(1), cube.triu(), cube.diagonal(0, 1, 2),
        f.diag_embed(), f.sort(1)[0], f.topk(2, 1)[0], f.kthvalue(2, 1)[0],
        f.median(1, keepdim=True)[0], f.quantile(0.3, 1), f.max(1)[0], f.min(1)[0],
        f.amax(1), cube.amin((1, 2)), f.cummax(1)[0], f[ar, LABELS], f[:, [2, 0]],
        cube[..., [1]], F.max_pool1d(f[:, None], 2, 1),
    )  # fmt: skip
    return sum((x * x * (x + i)).sin().sum() for i, x in enumerate(each))


def multiplied(f, y):
    zeros = torch.cat((f[:, :1], f[:, 1:] * (y[:, 1:] > 0), f.sin()), 1)
    cube = f.view(N, K, 1) * y[:, None]
    each = (
        f.cumprod(1), zeros.cumprod(1), cube.cumprod(1), cube.cumprod(-1), f.prod(1),
        zeros.prod(1), cube.prod(2, keepdim=True), f.logcumsumexp(1),
        zeros.logcumsumexp(-1), cube.logcumsumexp(1), cube.logcumsumexp(2),
        f.flip(1).logcumsumexp(1), f[:, :1].cumprod(1),
    )  # fmt: skip
    return sum((x * (x + i)).sin().sum() for i, x in enumerate(each))


def moments(f, y):
    cube = f.view(N, K, 1) * (y[:, None].exp() + 1)
    each = (
        f.var(1), f.std(1, keepdim=True), cube.var((1, 2), correction=0), cube.std(-1),
        torch.var(f, 1, correction=0.5), f.norm(3, dim=1), cube.norm(1, dim=(1, 2)),
        (f * y).norm(0.5, dim=1, keepdim=True), torch.linalg.norm(cube, 2.5, dim=-1),
    )  # fmt: skip
    outer = f[:, None] * f[:, :, None] / 4 + torch.diag_embed(f.tanh() + 2)
    signs, logs = torch.linalg.slogdet(f[:, :1, None] * outer)
    more = torch.logdet(outer) * f[:, 0] + torch.det(outer[:, :2, :2]).sin()
    rest = (more + logs.square() + signs * f[:, 1] ** 3).sum()
    return rest + sum((x * (i + 1)).sin().sum() for i, x in enumerate(each))


def linear(f, y):
    """Without a rule: they are asked for their derivatives."""
    places, cube = torch.tensor([1, 0, 1]), f.view(N, 1, K) * y[:, :, None]
    turned, spectrum = torch.fft.fft(f.sin()), torch.fft.rfft(cube, dim=1)
    each = (
        torch.zeros_like(y).index_add(1, places, f.exp()), turned.abs(),
        f.sin().scatter_add(1, places.expand(N, K), f * y), turned.real * y,
        torch.zeros_like(y).scatter_reduce(1, LABELS[:, None], f[:, :1], "sum"),
        torch.view_as_real(spectrum), turned.imag.exp(), (turned * 1j).real,
        F.avg_pool1d(cube, 2, 1), F.interpolate(cube, 5, mode="linear"),
        f.index_copy(1, places[1:], f[:, :2].sin()), torch.fft.irfft(turned).sin(),
        F.conv1d(cube, y[:2, :, None].expand(2, K, 2), y[0, :2], 1, 1),
        F.conv_transpose1d(cube, y[:, :, None].expand(N, K, 2)[:K], stride=2),
        F.conv1d(f[:, None], y[:2, None, :2], dilation=2), F.fold(cube, (1, 3), (1, 1)),
        torch.trapezoid(f, dim=1),
    )  # fmt: skip
    return sum((x * (x + i)).sin().sum() for i, x in enumerate(each))


def some_rows(f, y):
    keep, order = y[:, 0] > 0, torch.tensor([3, 0, 4, 1, 2])
    at, labels = f[keep].sin(), LABELS[keep]
    other = f.exp()[order[:3]] * y[order[:3]]
    each = (
        at * y[keep], f[keep] * at, other.logsumexp(1), (f @ y[:K])[order].softmax(1),
        f[::2] * y[::2], f[-2:].exp().cumsum(1), f.index_select(0, order[1:]).tanh(),
        f[order].logcumsumexp(1), torch.fft.fft(f[order]).abs(), f[[-1]].square(),
        (f[1:, None] * y[1:, :, None]).norm(dim=(1, 2)), at[:, 1] / at[:, 0].exp(),
        torch.cat((at, y[keep]), 1).var(1), at.gather(1, labels[:, None]),
    )  # fmt: skip
    more = F.cross_entropy(f[keep], labels) + F.huber_loss(f[order], y[order])
    more = more + F.mse_loss(at, y[keep], reduction="sum") * 0.1
    return more + sum((x * (x + i)).sin().mean() for i, x in enumerate(each))


LOSSES = {
    "moments": moments,
    "linear": linear,
    "some rows": some_rows,
    "Gaussian": lambda f, y: F.gaussian_nll_loss(f[:, :1], y[:, :1], f[:, 1:2].exp()),
    "divergence": divergence,
    "focal": focal,
    "softplus": lambda f, _: F.softplus(f[:, :1] - f[:, 1:]).mean(),
    "Student": lambda f, y: ((f - y) ** 2).log1p().mean(),
    "log cosh": lambda f, y: (f - y).cosh().log().mean(),
    "soft labels": lambda f, y: -(y.softmax(1) * f.log_softmax(1)).sum(1).mean(),
    "squared errors": lambda f, y: (
        0.5 * F.mse_loss(f, y)
        + F.mse_loss(f[:, :2], y[:, :2], reduction="sum")
        + F.mse_loss(f, y, reduction="none").exp().sum()
    ),
    "crossed": lambda f, y: (
        torch.linalg.cross(f.sin(), f.exp()).square()
        + torch.linalg.cross(y, f * f).exp() + torch.linalg.cross(f, y[:1]).sin()
        + torch.linalg.cross(torch.stack((f, f**2), 2), torch.stack((y, y), 2), dim=-2)
        .sum(2).prod(1, keepdim=True)
    ).sum(),
    "ratios": lambda f, y: (
        (f[:, 0] / (f[:, 1] ** 2 + 1) + 1 / (f[:, 2].exp() + 1) + y[:, 0] / f[:, 0])
        / (y[:, 1].square() + 1)
    ).sum() / 7,
    "products": lambda f, _: (
        (f[:, 0] * f[:, 1].tanh() * f[:, 2].sin() - (f * f).sum(1).cos()).mean() * 3
    ),
    "sums": lambda f, _: (
        -(f.exp().sum() - 2 * f.sin().mean() + 1) / 4
        + (1 - f.square().sum())
        + torch.rsub(f.exp(), f.sin(), alpha=2).sum().double()
        + torch.add(f, f.exp(), alpha=3).sum() - torch.sub(f, f.cos(), alpha=2).sum()
    ),
    "repeated": lambda f, y: (f[:, :1].expand(N, K) * f * y[:1] * y[0]).exp().mean(),
    "lengths": lambda f, y: (
        (f - y).norm(dim=1).mean() + (f * y).norm(dim=-1, keepdim=True).exp().sum()
        + F.cosine_similarity(f, y).square().sum() + F.normalize(f)[:, 0].sum()
        + F.pairwise_distance(f[:, :2], y[:, :2]).mean()
        + F.cosine_embedding_loss(f, y, (LABELS - 1).sign(), margin=-0.5)
        + f.view(N, K, 1).expand(N, K, 2).exp().norm(dim=(1, 2)).sum()
    ),
    "parts": parts,
    "masks": masks,
    "of torch": of_torch,
    "gammas": gammas,
    "functions": functions,
    "shapes": shapes,
    "joined": joined,
    "matrices": matrices,
    "moved": moved,
    "single": single,
    "elsewhere": elsewhere,
    "multiplied": multiplied,
    "ranked probabilities": lambda f, y: (
        (f.softmax(1).cumsum(1) - y.softmax(1).cumsum(-1)).square().sum(1).mean()
        + (f.view(N, 1, K, 1) * y[0, :2]).cumsum(-2).sin().sum()
        + (f.view(N, 1, K, 1) * y[0, :2]).cumsum(3).exp().mean()
    ),
}  # fmt: skip


def dense(loss, f, y):
    """The Hessian ``[n, K, n, K]``."""
    found = torch.autograd.functional.hessian(lambda x: loss(x, y), f.detach())
    return found.reshape(len(f), f[0].numel(), len(f), f[0].numel())


def told(loss, f, y, kernel=registration.loss_blocks, *, watch=None):
    f = f.detach().requires_grad_()
    nodes = nodes_of(loss(f, y))
    if watch is not None:
        watch.setattr(sample_blocks, "loss_blocks", kernel)
    found = sample_blocks.blocks_of(f, nodes)
    assert found is None or not found.couples
    return found and found.columns


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_are_those_of_the_dense_hessian(name, dtype, kernel, monkeypatch):
    torch.manual_seed(0)
    f, y = torch.randn(2, N, K, dtype=torch.float64)
    expected = dense(LOSSES[name], f, y)
    found = told(
        LOSSES[name], f.to(dtype), y.to(dtype), KERNELS[kernel], watch=monkeypatch
    )
    assert found.shape == (K, N, K) and found.dtype == dtype
    rows = torch.arange(N)
    blocks = expected[rows, :, rows]
    assert (expected.abs().sum() - blocks.abs().sum()).abs() < 1e-9  # no others
    rest = 1e-12 if dtype == torch.float64 else 2e-5
    scale = blocks.abs().max().item()
    torch.testing.assert_close(
        found.double(), blocks.movedim(0, 1), atol=rest * scale, rtol=rest
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_bounds_functions_are_bent_as_by_torch(dtype):
    """Whose versions differ in whether derivatives pass there."""
    f = torch.tensor([[-1.0, 0.1], [0.1, 1.0], [0.0, 0.5]], dtype=dtype)

    def loss(f, _):
        each = f.clamp(-1, 1), f.clamp(min=0.1), f.clamp_min(0), f.clamp(0.1, 0.5)
        each = *each, F.softplus(f, threshold=0.5)
        return sum((x * (x + i)).exp().sum() for i, x in enumerate(each))

    rows = torch.arange(len(f))
    expected = dense(loss, f, None)[rows, :, rows].movedim(0, 1)
    torch.testing.assert_close(told(loss, f, None), expected)
    many = f.repeat(2**13, 1)
    product = HessianProduct(resolve_loss(loss), many, None)
    found = product.entries.all().double()[: len(f)]
    torch.testing.assert_close(
        found, expected.diagonal(0, 0, 2).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: torch.cat((f.exp(), 0 * y), 1).sqrt().sum(),
        lambda f, y: torch.xlogy(f.relu(), y * 0).sum() + f.prod(1).sum(),
        lambda f, y: torch.binary_cross_entropy_with_logits(
            f, y.repeat(2, 1, 1), reduction=1
        ),
    ],
)
def test_what_autograd_does_not_multiply_or_repeats_is_right(loss):
    torch.manual_seed(0)
    f, y = -torch.rand(2, N, K, dtype=torch.float64)
    rows, product = torch.arange(N), HessianProduct(resolve_loss(loss), f, y)
    expected = dense(loss, f, y)[rows, :, rows].movedim(0, 1)
    assert expected.isfinite().all()
    torch.testing.assert_close(hessian_columns(product), expected)


@pytest.mark.parametrize(
    "behind",
    [
        lambda f: f.cumsum(2), lambda f: f.cumprod(2), lambda f: f.flip(2).cumsum(2),
        lambda f: torch.cat((f, f.sin()), 2), lambda f: f[:, :, 1],
        lambda f: f.softmax(2).sum(2), lambda f: f.logsumexp(2), lambda f: f.prod(2),
        lambda f: f.unbind(2)[1], lambda f: f.cumsum(1), lambda f: f.norm(dim=2),
    ],
)  # fmt: skip
def test_rows_in_the_second_dimension_are_told_rightly_or_not_at_all(behind):
    torch.manual_seed(0)
    f = torch.randn(N, K, dtype=torch.float64)

    def loss(f, _):
        return behind(f.exp()[None]).square().sum()

    rows, found = torch.arange(N), told(loss, f, None)
    expected = dense(loss, f, None)[rows, :, rows].movedim(0, 1)
    assert found is None or torch.allclose(found, expected)


def test_each_rule_is_of_one_of_these_losses():
    torch.manual_seed(0)
    f, y = torch.randn(2, N, K).requires_grad_()
    graphs = [nodes_of(loss(f, y.detach())) for loss in LOSSES.values()]
    seen = {name for nodes in graphs for name, _ in nodes.values()}
    assert RULES.keys() <= seen


@pytest.mark.parametrize("shape", [(7,), (1, 3), (3, 3), (4, 2, 2), (20, 1)])
def test_rows_of_any_shape(shape):
    """Of one row, of as many as outputs, and of more than are taken at a time."""
    torch.manual_seed(0)
    f, y = torch.randn(2, *shape, dtype=torch.float64)

    def loss(f, y):
        rows = (f * y).flatten(1) if f.ndim > 1 else f[:, None]
        return (
            (rows.sum(1) * rows.flatten(1)[:, 0]).exp() / 7 + rows.sin().sum(1)
        ).sum()

    rows = torch.arange(len(f))
    expected = dense(loss, f, y)[rows, :, rows].movedim(0, 1)
    torch.testing.assert_close(told(loss, f, y), expected)


class _Cubed(torch.autograd.Function):
    """A function of a user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


MEETING = {
    "a mean over rows": lambda f: ((f - f.mean(0)) ** 2).sum(),
    "a sum over rows": lambda f: (f.sum(0) ** 2).sum(),
    "a ratio with a sum": lambda f: (f.exp() / f.cosh().sum()).sum(),
    "a sum beside rows": lambda f: (f + f.sum()).exp().sum(),
    "all pairs": lambda f: (f[:, None] * f[None]).exp().sum(),
    "rows as columns": lambda f: (f.sum(1) * f).exp().sum(),
    "a column and a row": lambda f: (f.sum(1, keepdim=True) * f[:, 0]).exp().sum(),
    "repeated rows": lambda f: (f[:1] * f).exp().sum(),
    "another row": lambda f: (f[1:] * f[:-1]).exp().sum(),
    "a row": lambda f: f[0].exp().sum() + f.exp().sum(),
    "a softmax over rows": lambda f: f.softmax(0).square().sum(),
    "a log-softmax over rows": lambda f: f.log_softmax(0).square().sum(),
    "its logarithm": lambda f: f.logsumexp(0).square().sum(),
    "the logarithm of all": lambda f: f.logsumexp((0, 1)).square(),
    "gathered rows": lambda f: f.gather(0, torch.tensor([[1, 0, 2]] * 3)).exp().sum(),
    "some places gathered": lambda f: (
        f[:, :2]
        .view(3, 2, 1, 1)
        .expand(3, 2, 2, 2)
        .gather(3, torch.ones(3, 2, 1, 2).long())
        .exp()
        .sum()
    ),
    "the logarithm of rows": lambda f: f.view(3, 3, 1).logsumexp((1, 2)).exp().sum(),
    "few gathered": lambda f: f.gather(1, torch.zeros(2, 1).long()).exp().sum(),
    "rows of parts": lambda f: (f.split(1)[0] * f).exp().sum(),
    "parts of rows": lambda f: (f.unbind(0)[0] * f.unbind(0)[1]).exp().sum(),
    "a choice of rows": lambda f: torch.where(f > 0, f.exp(), f[:1]).exp().sum(),
    "a mask of a row": lambda f: f[:, 0].masked_fill(f > 0, 1.0).exp().sum(),
    "the greatest of rows": lambda f: torch.maximum(f, f[0].exp()).exp().sum(),
    "targets made of them": lambda f: F.mse_loss(f.exp(), f.sin()),
    "a label of rows": lambda f: F.nll_loss(f[:, 0].exp(), torch.tensor(1)),
    "filled with a row": lambda f: (
        f.exp().masked_fill(f > 0, f[0, 0].exp()).exp().sum()
    ),
    "turned": lambda f: (f.t() * f).exp().sum(),
    "a length of all": lambda f: (f - 1).norm() ** 2 + f.norm(dim=0).exp().sum(),
    "views of all": lambda f: (f.view(-1)[1:] * f.view(-1)[:-1]).exp().sum(),
    "rows joined": lambda f: (f.view(1, 9) * f.view(1, 9)).exp().sum(),
    "repeated further": lambda f: (f[:, 0].expand(3, 3) * f).exp().sum(),
    "a sum repeated": lambda f: (f.sum() + torch.ones(3)).exp().sum(),
    "all products of rows": lambda f: (f @ f.t()).exp().sum(),
    "a product over rows": lambda f: (f.t() @ f).exp().sum(),
    "rows times others": lambda f: (torch.ones(3, 3).double() @ f).exp().sum(),
    "rows times each other": lambda f: (f @ f.exp()).exp().sum(),
    "columns in the place of rows": lambda f: (f @ f[:, 0]).exp().sum(),
    "rows added to a product": lambda f: torch.addmm(f[0], f, f.detach()).exp().sum(),
    "a column added to a product": lambda f: (
        torch.addmm(f[:, 0], f, f.detach()).exp().sum()
    ),
    "rows below rows": lambda f: (torch.cat((f, f)) * torch.cat((f.t(), f))).sum(),
    "rows in a stack": lambda f: (torch.stack((f, f)) * f).exp().sum(),
    "rows in the second place": lambda f: (f.view(3, 1, 3).transpose(0, 1) * f).sum(),
    "permuted rows": lambda f: (f.permute(1, 0) * f).exp().sum(),
    "rows by number": lambda f: (f.index_select(0, torch.tensor([1, 0, 2])) * f).sum(),
    "beside constants of unknown size": lambda f: (
        torch.cat((f.detach(), f, f.detach()), 1).exp().sum()
    ),
    "behind another, times rows": lambda f: (
        torch.bmm(f.view(1, 3, 3), f.exp().view(1, 3, 3)).exp().sum()
    ),
    "behind another, their sum": lambda f: f.view(1, 3, 3).sum(1).exp().sum(),
    "behind another, by places": lambda f: (
        (f.view(1, 3, 3) * f.view(3, 1, 3)).exp().sum()
    ),
    "behind another, turned": lambda f: (f.view(1, 3, 3).mT * f).exp().sum(),
    "behind another, cut": lambda f: (f.view(1, 3, 3)[:, 1:] * f[1:]).exp().sum(),
    "sums up to each row": lambda f: f.cumsum(0).exp().sum(),
    "a row of single outputs": lambda f: (f[:, 0].exp() @ f.detach()).exp().sum(),
    "up to each row": lambda f: f.logcumsumexp(0).exp().sum() + f.cumprod(0).sum(),
    "a product of rows": lambda f: f.prod(0).exp().sum(),
    "the other way round": lambda f: (f.flip(0) * f).exp().sum(),
    "sorted rows": lambda f: (f.sort(0)[0] * f).exp().sum(),
    "the greatest row": lambda f: (f.amax(0) + f.max(0)[0]).exp().sum(),
    "ties": lambda f: (f.clamp(max=-0.1).amax(1) * f.sum(1)).exp().sum(),
    "the mean of two": lambda f: (f[:, [0]] + f.expand(2, 3, 3)).exp().sum(),
    "rows by numbers": lambda f: (f[[1, 0, 2]] * f).exp().sum(),
    "a transform of rows": lambda f: torch.fft.fft(f, dim=0).abs().sum(),
    "rows added by number": lambda f: f.index_add(0, LABELS[:3], f.sin()).exp().sum(),
    "rows put by number": lambda f: (
        f.scatter_add(0, torch.tensor([[1, 0, 2]] * 3), f.sin()).exp().sum()
    ),
    "rows averaged": lambda f: F.avg_pool1d(f.t()[None], 2, 1).exp().sum(),
    "rows convolved": lambda f: F.conv1d(f[None], f[:, :, None].detach()).exp().sum(),
    "a spread of rows": lambda f: (f.var(0) + f.std(0)).exp().sum() + f.var(),
    "a volume": lambda f: torch.logdet(f.t() @ f + torch.eye(3)).exp(),
    "rows twice": lambda f: f[[0, 1, 1]].exp().prod(1).sum(),
    "rows with others": lambda f: (f[[1, 0, 2]] * f[[2, 0, 1]]).exp().sum(),
    "rows beside others": lambda f: (f[1:] * f[:2]).exp().sum(),
    "rows of rows": lambda f: (f[[1, 0, 2]][[1, 0, 2]] * f).exp().prod(1).sum(),
    "behind another, in order": lambda f: (
        (f[[1, 0, 2]][None] @ f.detach()).view(3, 3).exp().prod(1).sum()
    ),
    "not known": lambda f: (
        torch.linalg.inv(f[:, None] * f[:, :, None] + torch.eye(3)).exp().sum()
    ),
    "not known, of pairs": lambda f: torch.fft.fft(f).exp().abs().sum(),
    "nobody's function": lambda f: _Cubed.apply(f).prod(1).sum(),
    "of what it is made of": lambda f: torch.logaddexp(f, -f).sum(),
    "of itself twice": lambda f: torch.logaddexp(*[f.exp()] * 2).sin().sum(),
    "of repeated entries": lambda f: torch.logaddexp(f[:, :1], f.sin()).sum(),
}


@pytest.mark.parametrize("name", MEETING)
def test_where_rows_may_meet_nothing_is_told(name):
    """Of as many rows as outputs: shapes tell nothing."""
    torch.manual_seed(0)
    f = torch.randn(3, 3, dtype=torch.float64)
    assert told(lambda f, _: MEETING[name](f), f, None) is None
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).double()
    x, loss = torch.randn(3, 3, dtype=torch.float64), lambda f, _: MEETING[name](f)
    found = gauss_newton(net, (x, None), loss, num_samples=None)
    w = net[1].weight.detach()
    per_mask = torch.einsum(
        "akbl,aj,kj,bm,lm->ajbm", dense(loss, net[1](x), None), x, w, x, w
    )
    expected = 0.5 * per_mask.reshape(9, 9).trace()
    torch.testing.assert_close(found.value, expected)


def overlap(f):
    p, y = f.sigmoid(), (torch.arange(9).view(3, 3) % 2).double()
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


SUMS_BENT = {
    "a function of a sum": lambda f: f.square().sum().sqrt(),
    "a product of sums": lambda f: f.exp().sum() * f.sin().sum(),
    "a ratio of sums": lambda f: f.exp().sum() / f.cosh().sum(),
    "one over a sum": lambda f: 1 / f.exp().sum(),
    "an overlap": overlap,
    "a spread of sums": lambda f: (f[:, 0].square().mean() - f[1:].mean() ** 2).sqrt(),
    "the greater of two": lambda f: torch.maximum(f.exp().sum(), f.cosh().sum()) ** 2,
    "a mean and rows": lambda f: (
        f[:2].exp().mean().log() + f.square().sum(1).sin().sum()
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SUMS_BENT)
def test_of_sums_that_are_bent_the_blocks_are_told(name, kernel, monkeypatch):
    torch.manual_seed(0)
    f, rows = torch.randn(3, 3, dtype=torch.float64), torch.arange(3)
    monkeypatch.setattr(sample_blocks, "loss_blocks", KERNELS[kernel])
    found = sample_blocks.blocks_of(f.requires_grad_(), nodes_of(SUMS_BENT[name](f)))
    expected = dense(lambda f, _: SUMS_BENT[name](f), f, None)
    assert found.couples
    torch.testing.assert_close(found.columns, expected[rows, :, rows].movedim(0, 1))


@pytest.mark.parametrize("meet", [False, True])
def test_of_sums_that_are_bent_one_sample_is_unbiased(meet):
    """Where the network joins samples what is between them counts."""
    net, x = network()
    net.insert(1, nn.BatchNorm1d(8, affine=False).double() if meet else nn.Tanh())
    if meet:
        net.insert(4, nn.BatchNorm1d(8, affine=False).double())
    y = (torch.randn(6, K) > 0).double()

    def loss(f, y):
        return 1 - 2 * (f.sigmoid() * y).sum() / (f.sigmoid().sum() + y.sum())

    expected = dense_form(net, x, y, loss, modes=meet)
    exact = gauss_newton(net, (x, y), loss, num_samples=None)
    torch.testing.assert_close(exact.value, expected)
    draws = [gauss_newton(net, (x, y), loss) for _ in range(400)]
    values = torch.stack([found.value for found in draws])
    error = values.std() / math.sqrt(len(values))
    assert (values.mean() - expected).abs() <= 4 * error + 1e-12
    errors = torch.stack([found.standard_error for found in draws])
    if meet:
        assert errors.isnan().all()
    else:
        assert errors.square().mean() >= values.var() * 0.9


def test_of_sums_that_are_bent_rows_of_a_sample_are_taken_together():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1)
    )
    x = torch.randn(3, 4)
    net, x = net.double(), x.double()

    def loss(f, _):
        return f.exp().sum().log()

    def moved(by):
        return loss(net[1:](x * (1 + by)), None)

    curved = torch.autograd.functional.hessian(moved, torch.zeros_like(x))
    found = gauss_newton(net, (x, None), loss, num_samples=None)
    torch.testing.assert_close(found.value, 0.5 * curved.view(12, 12).trace())


@pytest.mark.parametrize("dims", [0, (0, 2)])
def test_a_sum_over_rows_and_not_all_is_none_over_all(dims):
    f = torch.ones(4, 3, 2).requires_grad_()
    for summed in (f.sum(dims), f.mean(dims)):
        node = summed.grad_fn
        with pytest.raises(NotToldError):
            RULES[node.name()](Program(f.shape), node, [0])


def test_a_sum_over_rows_that_is_repeated_has_no_rule():
    f = torch.ones(4, 2).requires_grad_()
    program, node = Program(f.shape), (f.sum() + torch.ones(3)).grad_fn
    with pytest.raises(NotToldError):
        RULES[node.name()](program, node, [program.total(0, 1.0), -1])


def test_what_else_has_a_gradient_is_a_constant():
    torch.manual_seed(0)
    f, y = torch.randn(2, N, K, dtype=torch.float64)
    scale = nn.Parameter(torch.tensor(0.7).double())
    shift = nn.Parameter(torch.randn(K).double())

    def loss(f, y):
        return (scale * (f - shift * y) ** 4 / scale.exp()).mean() * scale.sin()

    rows = torch.arange(N)
    expected = dense(loss, f, y)[rows, :, rows].movedim(0, 1)
    torch.testing.assert_close(told(loss, f, y), expected)


def test_what_was_written_on_is_refused():
    f, y = torch.randn(2, N, K)

    def loss(f, y):
        weight = y.clone()
        value = (f.exp() * weight).sum()
        weight.zero_()
        return value

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        told(loss, f, y)


def test_a_torch_of_other_names_is_not_told(monkeypatch):
    f, y = torch.randn(2, N, K)

    def rule(to, node, inputs):
        return node._saved_by_another_name

    monkeypatch.setitem(RULES, "ExpBackward0", rule)
    assert told(lambda f, _: f.exp().sum(), f, y) is None


def test_of_few_outputs_alone():
    loss = resolve_loss(lambda f, _: f.exp().sum())

    def blocks(*shape, **options):
        return HessianProduct(loss, torch.randn(*shape, **options), None).blocks

    assert blocks(273, 4) is not None and blocks(9) is not None
    assert blocks(274, 4) is None and blocks(()) is None
    assert blocks(1, 16) is not None and blocks(1, 17) is None
    assert blocks(4, 2, dtype=torch.float16) is None
    trained = torch.ones(4, 2, requires_grad=True)
    assert HessianProduct(loss, trained, None).blocks is None


@pytest.mark.parametrize("width", [8, 12])
def test_of_more_outputs_jets_of_fewer_entries(width):
    f = torch.randn(8, width)
    pairs = told(lambda f, _: (f[:, None] * f[:, :, None]).sin().sum(), f, None)
    assert (pairs is None) == (width > 8)


def test_what_the_compiled_kernel_cannot_read_is_named():
    f, start = torch.ones(2, 3), [0, -1, -1, 0, 0, 0, 0, 1, 3]
    total = [6, 0, -1, 1, 0, 0, 0, 0]
    for program, values, message in (
        ([], (), "expected a program, got none"),
        (start, (), "a loss of 3 outputs, got 3 of 3"),
        ([*start[:-1], 4, *total], (), "a loss of 3 outputs, got 1 of 4"),
        ([*start, *total[:-1]], (), "a longer program than 16"),
        ([*start[:6], 2**40], (), "a longer program than 7 numbers, for 1099511627776"),
        ([*start, 99, *total[1:]], (), "before it, got kind 99 of 0 and -1"),
        ([*start, 6, 1, *total[2:]], (), "before it, got kind 6 of 1 and -1"),
        ([*start, 6, -1, *total[2:]], (), "before it, got kind 6 of -1 and -1"),
        ([*start, 11, *total[1:]], (), "1 values for kind 11, got 0"),
        ([*start, 6, 0, -1, 0, 0, 0, 0, 0], (), "expected 3 sums, got 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            registration.loss_blocks(f, program, [0.0] * 9, list(values))
    total[1] = 1
    for node, value, message in (
        ([11, 0, -1, 0, 0, 0, 1, 4, 0], f, "expected 5 values, got 1"),
        ([11, 0, -1, 0, 0, 0, 1, 0, 0], f.half(), "got float16"),
        ([11, 0, -1, 0, 0, 0, 1, 0, 1, 3], f[:1].repeat(3, 1), "of 2 rows, got 3"),
        ([11, 0, -1, 0, 0, 0, 1, 0, 1, 2], f, "expected 2 entries or one"),
        ([4, 0, -1, 1, 0, 1, 0, 1, 1], f, "a dimension below 1, got 1"),
        ([4, 0, -1, 0, 3, 1, 0, 1, 1], f, "an entry below 3, got 3"),
        ([4, 0, -1, 1, 0, 1, 0, 2, 3, 2], f[:, :1], "a dimension below 1, got 1"),
        ([4, 0, -1, -1, 0, 1, 0, 1, 1], f, "a dimension below 1, got -1"),
        ([5, 0, -1, 1, 0, 1, 0, 1, 4], f, "a dimension below 1, got 1"),
        ([5, 0, -1, 0, 2, 1, 0, 1, 4], f, "an entry below 4, got 4"),
        ([5, 0, -1, 0, 0, 1, 0, 2, 4, 2], f, "expected 2 entries, got 3"),
        ([11, 0, -1, 0, 0, 0, 1, 0, 1, -3], f, "got a size of -3"),
        ([11, 0, -1, 0, 0, 0, 1, 0, 2, 2**32, 2**32], f, "got a size of 4294967296"),
        ([7, 0, -1, 0, 0, 0, 1, 0, 0], f[:, 0].long(), "1 dimensions of a row, got 0"),
        ([10, 0, -1, 0, 0, 0, 2, 0, 0, 1, 3], f, "expected 1 entries, got 3"),
        ([8, 0, -1, 1, 0, 0, 1, 0, 1, 3], f, "a dimension below 1, got 1"),
        ([7, 0, -1, 0, 0, 0, 1, 0, 1, 1], f[:, :1], "indices of int64"),
        ([7, 0, -1, 0, 0, 0, 1, 0, 1, 1], 3 * f[:, :1].long(), "below 3, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            registration.loss_blocks(f, [*start, *node, *total], [0.0] * 9, [value])
    with pytest.raises(RuntimeError, match="two numbers a node, got 1"):
        registration.loss_blocks(f, start, [0.0], [])
    with pytest.raises(RuntimeError, match="with rows, got a number"):
        registration.loss_blocks(f[0, 0], start, [0.0, 0.0], [])


def test_what_is_chosen_unevenly_is_named():
    f = torch.ones(2, 2, 2)
    program = [0, -1, -1, 0, 0, 0, 0, 2, 2, 2, 4, 0, -1, 0, 0, 1, 0, 1, 3,
               6, 1, -1, 1, 0, 0, 0, 0]  # fmt: skip
    with pytest.raises(RuntimeError, match="expected 2 entries, got 3"):
        registration.loss_blocks(f, program, [0.0] * 6, [])


def test_complex_powers_are_not_told():
    f = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    value = (f**1j).abs().square().sum()
    assert sample_blocks.blocks_of(f, nodes_of(value)) is None


@pytest.mark.parametrize("count", [800, 900])
def test_a_loss_that_makes_much_of_each_row_has_products(count):
    f, grid = (
        torch.rand(N, K, dtype=torch.float64, requires_grad=True),
        torch.rand(count),
    )
    value = (f[:, :1] - grid).exp().mean()
    found = sample_blocks.blocks_of(f, nodes_of(value))
    assert (found is None) == (count * N > 2**12)


@pytest.mark.parametrize("width", [32, 33])
def test_products_of_many_entries_are_not_told(width):
    f = torch.rand(32, 4, dtype=torch.float64, requires_grad=True)
    value = (f @ torch.rand(4, width).double()).exp().mean()
    assert (sample_blocks.blocks_of(f, nodes_of(value)) is None) == (width > 32)


def test_what_the_kernel_cannot_read_is_not_told():
    f, y = torch.randn(2, N, K)
    assert told(lambda f, y: (f.exp() * y.half()).sum(), f, y) is None


def test_where_all_labels_are_ignored_there_are_zeros():
    f = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    value = F.cross_entropy(f * f, torch.full((N,), -100))
    assert not sample_blocks.blocks_of(f, nodes_of(value)).columns.any()


def test_opcheck():
    f = torch.rand(4, 3)
    program = [0, -1, -1, 0, 0, 0, 0, 1, 3, 11, 0, -1, 0, 0, 0, 1, 0, 1, 3,
               6, 1, -1, 1, 0, 0, 0, 0]  # fmt: skip
    given = f, program, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [f.exp()]
    torch.library.opcheck(registration.loss_blocks, given, test_utils="test_schema")


def network():
    torch.manual_seed(0)
    widths = (4, 8, 8, 3)
    layers = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (nn.Linear(a, b), nn.Tanh(), nn.Dropout(0.5))
    ]
    return nn.Sequential(*layers[:-2]).double(), torch.randn(6, 4).double()


@pytest.mark.parametrize("name", ["Gaussian", "divergence", "softplus", "focal"])
def test_one_sample_is_unbiased_for_the_dense_form(name):
    net, x = network()
    y = torch.randn(6, K).double()
    loss = {**LOSSES, "focal": lambda f, _: focal_of(f)}[name]
    expected = dense_form(net, x, y, loss)
    draws = [gauss_newton(net, (x, y), loss) for _ in range(400)]
    values = torch.stack([found.value for found in draws])
    error = values.std() / math.sqrt(len(values))
    assert (values.mean() - expected).abs() <= 4 * error + 1e-12
    told = torch.stack([found.standard_error for found in draws]).square().mean()
    assert told >= values.var() * 0.9  # an upper bound in the mean


def two_soft_labels(f, y):
    return -(y[:, :2].softmax(1) * f[:, :2].log_softmax(1)).sum(1).mean()


def focal_of(f):
    log = f.log_softmax(1)[:, 0]
    return -((1 - log.exp()) ** 2 * log).mean()


def dense_form(net, x, y, loss, modes=False):
    """``sum_sites p / (2 (1 - p)) tr(diag(h)^2 J' H J)`` by dense derivatives."""
    for layer in net:
        layer.train(modes and not isinstance(layer, nn.Dropout))
    total, h = 0.0, x
    for i, layer in enumerate(net):
        h = layer(h)
        if isinstance(layer, nn.Dropout):
            above, at = net[i + 1 :], h.detach()
            curved = dense(loss, above(at), y)
            jacobian = torch.autograd.functional.jacobian(above, at)
            scaled = jacobian * at
            total += 0.5 * torch.einsum("akbl,akcj,blcj->", curved, scaled, scaled)
    net.train()
    return total


@pytest.mark.parametrize("name", ["Gaussian", "two soft labels"])
def test_where_a_part_of_a_block_has_one_eigenvalue_there_is_no_spread(name):
    """Both parts are sent back, and roots of a softmax are those of its blocks."""
    net, x = network()
    y = torch.randn(6, K).double()
    loss = {**LOSSES, "two soft labels": two_soft_labels}[name]
    found = [gauss_newton(net, (x, y), loss).value for _ in range(3)]
    expected = dense_form(net, x, y, loss)
    for value in found:
        torch.testing.assert_close(value, expected)


def test_no_derivative_of_the_loss_is_taken(monkeypatch):
    net, x = network()
    taken = []
    monkeypatch.setattr(HessianProduct, "_differentiate", taken.append)
    gauss_newton(net, (x, None), lambda f, _: (f[:, 0] * f[:, 1]).exp().mean())
    assert not taken


def test_a_loss_that_reads_beside_the_outputs_is_told():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, x):
            self.kept = self.drop(x)
            return self.last(self.kept)

    net, x = Keeps(), torch.randn(6, 4)
    found = gauss_newton(
        net, (x, None), lambda f, _: (f.square() * net.kept[:, :1]).mean()
    )
    assert any("reads what the model keeps" in note for note in found.notes)
    found = gauss_newton(net, (x, None), lambda f, _: f.square().mean())
    assert not found.notes


def test_of_a_length_that_is_zero_nothing_is_told():
    """Torch has its own derivatives there."""
    f = torch.randn(4, 2, dtype=torch.float64)
    for y, known in ((torch.zeros_like(f), True), (f * torch.eye(4, 1), False)):
        found = told(lambda f, y: (f - y).norm(dim=1).sum(), f, y)
        assert (found is not None) == known


def test_means_of_nothing_have_no_derivatives():
    def loss(f, _):
        return f[:, :0].mean(1).sum() + f[:, :0].mean() + f.prod(1).sum()

    f = torch.rand(N, K, dtype=torch.float64)
    torch.testing.assert_close(
        told(loss, f, None), told(lambda f, _: f.prod(1).sum(), f, None)
    )


@pytest.mark.parametrize("include_self", [True, False])
def test_a_product_of_several_zeros_is_not_told(include_self):
    """Of it torch has one derivative, and no process that asks for many at once."""
    f = torch.rand(N, K, dtype=torch.float64)
    f[0] = 0
    index = torch.zeros(N, K, dtype=torch.int64)

    def loss(f, _):
        start = torch.ones_like(f)
        return start.scatter_reduce(
            1, index, f, "prod", include_self=include_self
        ).sum()

    assert told(loss, f, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("away", [0.0, 1e-12, 1e-6, 1e-3])
def test_next_to_singular_matrices_determinants_are_right_or_not_told(dtype, away):
    """They are polynomials: of four numbers ``ad - bc``."""
    draws = torch.Generator().manual_seed(0)
    first = torch.randint(1, 10, (50, 1, 2), generator=draws).to(dtype) / 10
    second = first * torch.randint(2, 9, (50, 1, 1), generator=draws)
    second[..., 1] += away
    f = torch.cat((first, second), 1)
    expected = torch.zeros(4, 50, 4, dtype=dtype)
    expected[[0, 3], :, [3, 0]], expected[[1, 2], :, [2, 1]] = 1, -1
    found = [told(lambda f, _: torch.linalg.det(f).sum(), x[None], None) for x in f]
    for each, whole in zip(found, expected.unbind(1), strict=True):
        if each is not None:
            torch.testing.assert_close(each[:, 0], whole, rtol=1e-6, atol=1e-6)
    assert away < 1e-3 or None not in found


@pytest.mark.parametrize("other", range(16, 33))
def test_no_row_is_added_to_another_unseen(other):
    """Of rows sixteen apart and more the first powers of two may be the same."""
    f = torch.rand(33, 1, dtype=torch.float64)
    for row in range(16):
        index = torch.arange(33)
        index[row] = other

        def loss(f, _, index=index):
            return torch.zeros_like(f).index_add(0, index, f).exp().sum()

        assert told(loss, f, None) is None
