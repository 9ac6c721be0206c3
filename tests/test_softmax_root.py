"""Random roots of a softmax's Hessian: their mean, spread, error and random stream."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir import output_products, softmax_roots
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_hessian import HessianRoots
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers import gauss_newton
from torch_dropout_ir.sharpness import ggn, trace
from torch_dropout_ir.softmax_roots import SoftmaxRoots

K = 5
WEIGHT = torch.tensor([0.3, 2.0, 1.0, 0.5, 4.0]).double()
LOSSES = {
    "plain": (F.cross_entropy, False),
    "sum": (functools.partial(F.cross_entropy, reduction="sum"), False),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), False),
    "smooth": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), False),
    "soft": (nn.CrossEntropyLoss(weight=WEIGHT), True),
}


@pytest.fixture(params=["in one operation", "by blocks", "half a batch at a time"])
def way(request, monkeypatch):
    """Each way in which roots are drawn, of outputs few enough to sum over."""
    if request.param != "in one operation":
        monkeypatch.setattr(output_products, "_DRAWN_IN_ONE", 0)
    if request.param == "half a batch at a time":
        monkeypatch.setattr(output_products, "_FEW", 0)
        monkeypatch.setattr(softmax_roots, "_DRAWN_AT_ONCE", 2 * K)
    return request.param


def targets_of(shape, soft):
    """Soft labels, or hard ones, some of them 1, the label that one loss ignores."""
    if soft:
        return torch.rand(shape).double().softmax(min(1, len(shape) - 1))
    count = math.prod(shape) // K
    labels = torch.arange(2, 2 + count) % (K - 1)
    return labels.view(shape[0], *shape[2:]) if len(shape) > 1 else labels[0]


@pytest.mark.parametrize("shape", [(4, K), (2, K, 2), (K,)])
@pytest.mark.parametrize("name", LOSSES)
def test_they_multiply_to_autograds_hessian(name, shape, way):
    """Between samples and positions too, where it is zero: each draws its own."""
    torch.manual_seed(0)
    function, soft = LOSSES[name]
    f = torch.randn(shape).double().mul_(3)
    y = targets_of(shape, soft)
    expected = torch.autograd.functional.hessian(lambda f: function(f, y), f)
    expected = expected.view(f.numel(), -1)
    roots = HessianRoots(resolve_loss(function), f, y)
    total, squares, count = 0.0, 0.0, 3000
    for _ in range(count):
        ((root, mass),) = roots.sample()
        one = mass * torch.outer(root.flatten(), root.flatten())
        total, squares = total + one / count, squares + one.square() / count
    error = ((squares - total.square()).clamp(min=0) / count).sqrt()
    assert expected.norm() > 0
    assert ((total - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("margin", [0.0, 3.0, 10.0, 30.0])
def test_a_square_is_off_by_no_more_than_a_share(margin, way):
    """Labels that are hardly ever drawn would leave next to nothing in most of them."""
    torch.manual_seed(0)
    f = torch.zeros(1, K).double()
    f[0, 0] = margin
    q, a = f[0].softmax(0), torch.randn(K).double()
    exact = (q * a.square()).sum() - (q * a).sum().square()
    roots = HessianRoots(resolve_loss("cross_entropy"), f, torch.tensor([0]))
    each = torch.stack([roots.sample()[0][0][0] @ a for _ in range(1000)]).square()
    assert each.std() < 1.1 * math.sqrt(2) * exact
    assert abs(each.mean() - exact) < 4.5 * each.std() / 1000**0.5


def soft(f, y):
    return -(y * f.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("by_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_lose_the_difference(dtype, by_graph):
    torch.manual_seed(0)
    f, y = torch.zeros(2, 4096, K, dtype=dtype)
    f[:, 0], y[:, 1] = 12.0, 1.0
    q = f[0].double().softmax(0)
    if by_graph:
        product = HessianProduct(Loss(soft), f, y)
        roots = SoftmaxRoots(product, product.terms)
    else:
        roots = HessianRoots(resolve_loss("cross_entropy"), f, y)
    ((root, mass),) = roots.sample()
    assert root.dtype == dtype
    squares = 4096 * mass * root.double().square()
    mean, error = squares.mean(0), squares.std(0) / 64
    exact = q - q.square()
    assert ((mean - exact).abs() <= 4 * error + 0.02 * exact).all()


@pytest.fixture(scope="module")
def confident():
    """A trained network that is sure of its samples, more or less, and the samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(), nn.Linear(32, 10))
    x, y = torch.randn(32, 10), torch.arange(32) % 10
    found = torch.optim.Adam(net.eval().parameters(), 0.02)
    for _ in range(200):
        found.zero_grad()
        F.cross_entropy(net(x), y).backward()
        found.step()
    assert net(x).softmax(1).amax(1).median() > 0.998
    return net, (x, y)


def form(net, batch, budget):
    return gauss_newton(net, batch, "cross_entropy", num_samples=budget and 12)


def curvature(net, batch, budget):
    """With a budget of 18 passes the 10 outputs are sampled."""
    return trace(ggn(net, "cross_entropy", batch), budget or 100)


@pytest.mark.parametrize("estimate", [form, curvature])
def test_the_error_of_draws_is_honest_of_a_confident_network(confident, estimate):
    exact = estimate(*confident, None)
    assert exact.standard_error == 0
    scores = []
    for seed in range(100):
        torch.manual_seed(seed)
        found = estimate(*confident, 18)
        assert found.standard_error > 0
        scores.append(float((found.value - exact.value) / found.standard_error))
    scores = torch.tensor(scores)
    assert (scores.abs() > 4).sum() <= 1 and (scores.abs() > 2).sum() <= 16
    assert abs(scores.median()) < 0.5


def test_a_seed_gives_the_same_roots(way):
    torch.manual_seed(0)
    roots = HessianRoots(resolve_loss("cross_entropy"), torch.randn(4, K, 3), None)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found += [roots.sample()[0][0], roots.sample()[0][0], torch.rand(3)]
    first, second, after, *again = found
    assert not torch.equal(first, second)
    torch.testing.assert_close([first, second, after], again, rtol=0, atol=0)


def product_of(loss, f):
    return HessianProduct(resolve_loss(loss), f, None)


def test_terms_of_both_signs_have_roots_of_both():
    """Of many rows, whose mass is of one sign and whose terms bend the other way."""

    def loss(f, _):
        return -(f.log_softmax(1) + 10).square().sum()

    n, row = 6000, torch.tensor([[2.0, 0.0, -3.0]]).double()
    block = torch.autograd.functional.hessian(lambda f: loss(f, None), row)[0, :, 0]
    product = product_of(loss, row.expand(n, 3).contiguous())
    roots = SoftmaxRoots(product, product.terms).sample()
    assert {sign for _, sign in roots} == {1.0, -1.0}
    squares = sum(sign * root.T @ root / n for root, sign in roots)
    assert (squares - block).abs().max() < 0.05 * block.abs().max()


def test_classes_in_rows_have_one_softmax():
    f = torch.randn(40000).double()
    product = product_of(lambda f, _: -f.log_softmax(0)[:2].sum(), f)
    ((root, _),) = SoftmaxRoots(product, product.terms).sample()
    assert root.sum().abs() < 1e-9 * root.abs().sum()
