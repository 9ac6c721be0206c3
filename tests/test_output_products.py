"""Losses without a closed form: what their graph tells, and roots by products."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.output_products import HessianProduct, ProductRoots
from torch_dropout_ir.regularizers import gauss_newton
from torch_dropout_ir.regularizers.loss_graph import joins_rows

N, K = 5, 3
SQUARE = torch.eye(K).double() + 0.5


def focal(f, y):
    log = F.log_softmax(f, 1).gather(1, y.argmax(1)[:, None]).squeeze(1)
    return -((1 - log.exp()) ** 2 * log).mean()


ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(0))
# Rows in another order, or of a function that is not known.
NOT_TOLD = (
    "flipped", "normalized", "pooled", "others", "products of rows",
    "products of many", "by row and column", "a row twice", "rows of rows",
    "spectra of rows", "one matrix", "volumes of columns", "a number of it",
    "some entries of all", "a part of all entries", "entries by number",
)  # fmt: skip


def gaussian(f, y):
    return F.gaussian_nll_loss(f[:, :1], y[:, :1], F.softplus(f[:, 1:2]))


def square(f, y):
    return ((f - y) ** 2).sum(1).mean()


def pairs(f, y):
    return (f * f[:, [1, 2, 0]] * y).mean() + f.pow(4).mean()


def rooted(f, y):
    return (f - y).square().mean().sqrt()


def centred(f, y):
    return (f - f.mean(0) - y).square().mean()


def product_of_sums(f, y):
    return f.square().mean() * (f - y).cosh().mean()


def turned(f, y):
    return (f[:K] * f[:K].t()).sum() + f.square().sum() + y.sum()


ONE_BY_ONE = {
    "huber": nn.HuberLoss(delta=0.5), "poisson": nn.PoissonNLLLoss(),
    "logcosh": lambda f, y: (f - y).cosh().log().mean(), "square": square,
    "weighted": lambda f, y: 2 * (f.exp() * y).sum(0).mean() / 3 - f.mean(),
    "indefinite": lambda f, y: (f - y).sin().sum(),
    "each": lambda f, y: (F.mse_loss(f.sin(), y, reduction="none") * y).mean(),
}  # fmt: skip
BY_ROW = {
    "focal": focal, "gaussian": gaussian, "pairs": pairs,
    "soft": lambda f, y: -(y.softmax(1) * F.log_softmax(f, 1)).sum(1).mean(),
    "kl": lambda f, y: F.kl_div(
        F.log_softmax(f, 1), y.softmax(1), reduction="batchmean"
    ),
    "norm": lambda f, y: (f - y).norm(dim=1).mean(),
    "labels, one by one": lambda f, y: (
        F.cross_entropy(f, y.argmax(1), reduction="none").square().mean()
    ),
    "of sums": lambda f, y: F.mse_loss(f.sum(1), y[:, 0], reduction="none").mean(),
    "Mahalanobis": lambda f, y: (
        torch.einsum("bi,ij,bj->b", f - y, SQUARE, f - y).log1p().mean()
    ),
    "of columns": lambda f, y: (SQUARE @ (f - y).T).square().sum(0).sqrt().sum(),
    "left out": lambda f, y: (F.log_softmax(f, 1) * y)[:2].sum(),
}  # fmt: skip
COUPLED = {
    "rooted": rooted, "centred": centred, "sums": product_of_sums, "turned": turned,
    "flipped": lambda f, y: (f * f.flip(0) * y).sum() + f.square().sum(),
    "pooled": lambda f, y: F.huber_loss(f.mean(0), y[0], reduction="none").sum(),
    "normalized": lambda f, y: (
        F.batch_norm(f, None, None, training=True) - y
    ).square().mean(),
    "columns": lambda f, y: (F.log_softmax(f, 0) * y).sum(),
    "products of rows": lambda f, y: (torch.ones(N, N).double() @ f - y).cosh().sum(),
    "products of many": lambda f, y: (f.T[:, None] @ y.T[..., None]).square().sum(),
}  # fmt: skip
ALL = ONE_BY_ONE | BY_ROW | COUPLED
TOLD_BY_ROW = {
    "chosen": lambda f, y: -f.log_softmax(1)[torch.arange(N), y.argmax(1)].mean(),
    "turned round": lambda f, y: (f.flip(1) * f.roll(1, 1) * f.sort(1)[0]).mean(),
    "up to each": lambda f, y: (
        f.logcumsumexp(1) * f.cumprod(1) * f.cumsum(1) * f.cummax(1)[0]
    ).mean(),
    "of a row": lambda f, y: (
        f.prod(1) * f.amax(1) * f.min(1)[0] * f.kthvalue(2, 1)[0] * f.std(1) * f.var(1)
        + f.median(1)[0].sin() * f.topk(2, 1)[0].sum(1)
    ).sum(),
    "of products": lambda f, y: (f.T @ f * y[0]).sum(),
    "distances": lambda f, y: torch.cdist(f, y).exp().sum(),
    "a product of all": lambda f, y: torch.einsum("ni,ni->", f.sigmoid(), f * y),
    "of one label": lambda f, y: (
        F.nll_loss(f[:, 0], torch.tensor(1), reduction="none") * y[0, 0]
        + f.prod(1).sum()
    ),
    "a number of it": lambda f, y: (
        f[:, 0].gather(0, torch.tensor(2)).exp() * y[0, 0] + f.prod(1).sum()
    ),
    "some of them": lambda f, y: F.mse_loss(f[ORDER[:2]].softmax(1), y[:2]),
    "spectra": lambda f, y: (
        torch.fft.rfft(f.exp() - y).abs().log1p().sum()
        + torch.view_as_real(torch.fft.fft(f)).prod(1).sum()
        + torch.fft.irfft(torch.fft.rfft(f) ** 2).exp().sum()
    ),
    "volumes": lambda f, y: (
        torch.logdet(f[:, None] * f[:, :, None] + torch.eye(K)).sum()
        + torch.linalg.inv(f[:, None] * f[:, :, None] + torch.eye(K)).square().mean()
    ),
    "added by number": lambda f, y: (
        torch.zeros_like(f).index_add(1, ORDER[:K] % 2, f.exp()).prod(1).mean()
        + f.scatter_add(1, ORDER[:, None] % K, f[:, :1]).exp().prod(1).sum()
    ),
    "chosen rows": lambda f, y: (
        (f[ORDER] * y).logsumexp(1).sum() + F.cross_entropy(f[ORDER < 3], ORDER[:3] % K)
        + f.index_select(0, ORDER[1:]).prod(1).mean() + f[1:].prod(1).exp().sum()
    ),
    "the same rows": lambda f, y: (f[ORDER] * f[ORDER - N].exp()).sum(),
    "parts of the rows": lambda f, y: sum(
        (x * z.exp()).prod(1).sum() for x, z in zip(f.split(2), f.split(2), strict=True)
    ),
    "from before the first": lambda f, y: (f[-N - 2 : 2] * f[:2].exp()).sum(),
    "a row twice": lambda f, y: f[[0, 1, 1]].prod(1).exp().sum(),
    "rows of rows": lambda f, y: f[[1, 0]][[1, 0]].prod(1).exp().sum(),
    "angles": lambda f, y: (
        torch.atan2(f[:, 0], f[:, 1]) * torch.lerp(f[:, 2], y[:, 0], 0.2).erf()
    ).sum(),
}  # fmt: skip
TOLD_COUPLED = {
    "distances, in batches": lambda f, y: (
        torch.cdist(f, y.expand(N, N, K), p=1.0).sum((1, 2)).square().sum()
    ),
    "by row and column": lambda f, y: (
        f[torch.arange(N), ORDER[:, None].expand(N, N) % K].exp().sum(1).square().sum()
    ),
    "at risk": lambda f, y: (f.mean(1)[ORDER].logcumsumexp(0) * y[:, 0]).sum(),
    "at risk, by sums": lambda f, y: f.mean(1)[ORDER].exp().cumsum(0).log().sum(),
    "contrast": lambda f, y: F.cross_entropy(f @ f.T, torch.arange(N)),
    "overlap": lambda f, y: (f.sigmoid() * y).sum() / (f.sigmoid().sum() + 1),
    "spectra of rows": lambda f, y: torch.fft.fft(f, dim=0).abs().sum(),
    "one matrix": lambda f, y: torch.logdet(f.T @ f + torch.eye(K).double()).exp(),
    "volumes of columns": lambda f, y: torch.logdet(
        f.exp().T[:, None] * torch.eye(N) + torch.ones(N, N)
    ).sum(),
    "others beside them": lambda f, y: (f[1:] - f[:-1]).square().sum(),
    "differences": lambda f, y: F.softplus(f[:, None] - f[None]).mean(),
    "covariance": lambda f, y: (f.T @ f).square().sum(),
    "spread": lambda f, y: f.var(0).sum() * 2 + f.std(0).sum(),
    "halves": lambda f, y: F.cross_entropy(
        f.split([2, N - 2])[0].exp() @ f.split([2, N - 2])[1].sin().T, torch.arange(2)
    ),
    "others": lambda f, y: (f[ORDER] * f * y).sum() + f.square().sum(),
    "some entries of all": lambda f, y: (f.flatten()[:N] * f[:, 0]).sum(),
    "a part of all entries": lambda f, y: (f.view(-1).split(N)[0] * f[:, 0]).sum(),
    "entries by number": lambda f, y: (f.view(-1)[[N, N + 1]] * f.view(-1)[:2]).sum(),
    "others, cubed": lambda f, y: (f[ORDER] * f[ORDER.flip(0)] * y).sum(),
}  # fmt: skip
TOLD = ALL | TOLD_BY_ROW | TOLD_COUPLED


def hessian(loss):
    """Outputs, targets, and the dense Hessian between all outputs."""
    torch.manual_seed(1)
    f, y = torch.randn(N, K).double(), torch.randn(N, K).double().abs()
    dense = torch.autograd.functional.hessian(lambda x: resolve_loss(loss)(x, y), f)
    return f, y, dense


@pytest.mark.parametrize("name", TOLD)
def test_what_the_graph_tells_is_true_of_the_dense_hessian(name):
    f, y, dense = hessian(TOLD[name])
    product = HessianProduct(resolve_loss(TOLD[name]), f, y)
    alone = product.terms is not None and product.terms.log_softmax is None
    told = alone, joins_rows(product.at, product.nodes) is False
    diagonal = torch.diag(dense.view(N * K, N * K).diagonal()).view_as(dense)
    blocks = torch.einsum("iaib,ij->iajb", dense, torch.eye(N).double())
    assert not told[0] or torch.equal(dense, diagonal)
    assert not told[1] or torch.equal(dense, blocks)
    assert told[0] == (name in ONE_BY_ONE)
    coupled = name in COUPLED | TOLD_COUPLED
    assert torch.allclose(dense, blocks) is not coupled
    expected = None if name in NOT_TOLD else coupled
    assert joins_rows(product.at, product.nodes) is expected


@pytest.mark.parametrize("name", ALL)
def test_products_and_their_roots_are_those_of_the_dense_hessian(name):
    """Over all signs the pairs of roots multiply to the Hessian, skew parts aside."""
    f, y, dense = hessian(ALL[name])
    product = HessianProduct(resolve_loss(ALL[name]), f, y)
    v = torch.randn_like(f)
    torch.testing.assert_close(product(v), torch.einsum("iajb,jb->ia", dense, v))
    roots, total, count = (
        ProductRoots(product, keep=True),
        torch.zeros_like(dense),
        8000,
    )
    for _ in range(count):
        for root, sign in roots.sample():
            total += sign * torch.einsum("ia,jb->iajb", root, root) / count
    spread = dense.square().sum().sqrt() * math.sqrt(2 / count)
    assert (total - dense).abs().max() < 5 * spread
    assert roots.curved


@pytest.mark.parametrize("depth", ["one site", "two sites", "batch norm"])
@pytest.mark.parametrize("name", ALL)
def test_a_sample_is_the_exact_sum_on_average(name, depth):
    torch.manual_seed(2)
    x, y = torch.randn(N, 4), torch.randn(N, K).abs().double()
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3 if depth != "one site" else 0.0),
        nn.BatchNorm1d(6) if depth == "batch norm" else nn.Identity(),
        nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, K),
    ).double()  # fmt: skip
    batch = x.double(), y
    exact = gauss_newton(net, batch, ALL[name], num_samples=None).value
    draws = torch.stack([gauss_newton(net, batch, ALL[name]).value for _ in range(300)])
    z = (draws.mean() - exact) / (draws.std() / len(draws) ** 0.5 + 1e-12)
    assert z.abs() < 4.5
    one = gauss_newton(net, batch, ALL[name])
    # Of sums that are bent samples draw by themselves where the network keeps them so.
    meet = name in COUPLED.keys() - {"rooted", "sums"} or depth == "batch norm"
    assert one.standard_error.isnan() == meet


def test_a_loss_without_curvature_at_the_outputs_is_refused_or_said():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="piecewise linear"):
        gauss_newton(net, batch, lambda f, y: (f - y).abs().mean())
    said = gauss_newton(net, batch, lambda f, y: (f * y).mean())
    assert said.value == 0 and any("linear" in note for note in said.notes)


def test_a_loss_with_attention_in_it_has_a_second_derivative():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 8))
    batch = torch.randn(4, 3).double(), torch.randn(4, 8).double()

    def critic(f, y):
        heads = f.view(-1, 1, 2, 4)
        return (
            (F.scaled_dot_product_attention(heads, heads, heads).flatten(1) - y)
            .square()
            .mean()
        )

    assert gauss_newton(net.double(), batch, critic).value.isfinite()


@pytest.mark.parametrize("samples", [1, N])
def test_outputs_that_a_loss_turns_have_an_exact_sum(samples):
    """As of a language model, whose classes are last, by a lambda of cross-entropy."""
    head = nn.Linear(4, K)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.3), head).double()
    x, labels = torch.randn(samples, 2, 2).double(), torch.randint(K, (samples, 2))
    found = gauss_newton(
        net, (x, labels), lambda f, y: F.cross_entropy(f.mT, y), num_samples=None
    ).value
    with torch.no_grad():
        h, w = net[:2](x), head.weight
        s = head(h).softmax(-1)
        spread = s @ w.square() - (s @ w).square()
        expected = 0.3 / 0.7 / 2 * (h.square() * spread).sum() / labels.numel()
    torch.testing.assert_close(found, expected)
