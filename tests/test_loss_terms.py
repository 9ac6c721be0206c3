"""What a loss is a sum of, and the Hessian that this gives, against the dense one."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import tracing
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_hessian import HessianRoots, hessian_columns
from torch_dropout_ir.output_products import HessianProduct, magnitudes, signs_of
from torch_dropout_ir.output_scales import closed_diagonal
from torch_dropout_ir.regularizers import gauss_newton, modified_loss, second_order
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.estimate import is_quadratic
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.regularizers.root_choice import choose
from torch_dropout_ir.softmax_roots import SoftmaxRoots

CLASSES = 3
INNER = {
    "as they are": lambda f: f,
    "scaled": lambda f: f / 2.5 + 1,
    "chosen": lambda f: f[..., :2],
    "flattened": lambda f: f.flatten(0, -2),
    "turned": lambda f: f.transpose(0, 1),
    "every other": lambda f: f[::2],
    "masked": lambda f: f.masked_fill(torch.arange(f.shape[-1]) == 1, -30.0),
    "centred": lambda f: f - f.mean(0),
}


def labels(u):
    return torch.arange(u[..., :1].numel()).view(u[..., :1].shape) % u.shape[-1]


def weights(u):
    return torch.linspace(-1, 2, u.numel(), dtype=u.dtype).view(u.shape).sin()


def focal(u):
    log = u.gather(-1, labels(u)).squeeze(-1)
    return -((1 - log.exp()) ** 2 * log).mean()


def chosen_twice(u):
    first, last = u[..., 0], u.gather(-1, labels(u)).squeeze(-1)
    return (first * last).sum()


OUTER = {
    "soft": lambda u: -(weights(u).square() * u).sum(-1).mean(),
    "signed": lambda u: (weights(u) * u).mean(),
    "labels": lambda u: F.nll_loss(
        u.flatten(0, -2), labels(u).flatten(), torch.arange(u.shape[-1]).to(u) + 1
    ),
    "ignored": lambda u: F.nll_loss(
        u.flatten(0, -2), labels(u).flatten(), ignore_index=0, reduction="sum"
    ),
    "divergence": lambda u: F.kl_div(
        u, weights(u).log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "focal": focal,
    "focal of labels": lambda u: (
        lambda x: ((1 - (-x).exp()) ** 1.5 * x).sum()
    )(F.nll_loss(u.flatten(0, -2), labels(u).flatten(), reduction="none")),
    "entropy": lambda u: (u * u.exp()).sum(),
    "squares": lambda u: (u + 1).square().mean() - u.sum(),
    "capped": lambda u: u.clamp(min=-1.0).sum() + (weights(u) * u).sum(),
    "held": lambda u: (u.detach().exp() * u).sum(),
    "nothing": lambda u: (0 * u).sum(),
}  # fmt: skip
UNTOLD = {
    "chosen twice": chosen_twice,
    "by row": lambda u: (u.exp() * weights(u)).sum(-1).log().mean(),
    "repeated": lambda u: (u[..., :1] * u).sum(),
    "unbound": lambda u: (u.unbind(-1)[0] * u.unbind(-1)[1]).sum(),
    "in halves": lambda u: math.prod(u.split(1, -1)[:2]).sum(),
    "of labels' mean": lambda u: F.nll_loss(u, labels(u).flatten()).square(),
    "of the mean": lambda u: u.mean().square(),
}


def of_log_softmax(inner, outer, dim=-1):
    return lambda f, _: outer(F.log_softmax(inner(f), dim))


def products(loss, f, v):
    """The product with the Hessian, of autograd."""
    return torch.autograd.functional.hvp(lambda x: loss(x, None), f, v)[1]


def by_parts(roots, inner, f, v):
    """The product with the Hessian that the roots are of."""
    _, pushed = torch.autograd.functional.jvp(inner, f, v)
    (s, diagonal), dim = roots._spectrum, roots._classes
    found = diagonal * (pushed - (s * pushed).sum(dim, keepdim=True))
    found = found - s * found.sum(dim, keepdim=True)
    return torch.autograd.functional.vjp(inner, f, found)[1]


@given(
    st.sampled_from([*INNER]), st.sampled_from([*OUTER]), st.integers(1, 4),
    st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99),
)  # fmt: skip
def test_losses_of_log_probabilities_have_their_hessian(inner, outer, n, more, seed):
    torch.manual_seed(seed)
    f = 2 * torch.randn(n, *more, CLASSES).double()
    loss = of_log_softmax(INNER[inner], OUTER[outer])
    product = HessianProduct(Loss(loss), f, None)
    terms, v = product.terms, torch.randn_like(f)
    assert terms.log_softmax is not None
    assert terms.direct or inner != "as they are"
    assert not terms.by_row or torch.equal(INNER[inner](f).view_as(f), f)
    assert not terms.linear or outer not in ("focal", "entropy", "squares")
    roots = SoftmaxRoots(product, terms)
    expected = products(loss, f, v)
    torch.testing.assert_close(by_parts(roots, INNER[inner], f, v), expected)
    if not roots.curved:
        assert not expected.any()
    rows = torch.arange(0, n, 2)
    for root, _ in roots.sample():
        assert root.shape == f.shape and root.isfinite().all()
    assert all(root.shape == f[rows].shape for root, _ in roots.sample(rows))


@pytest.mark.parametrize("outer", ["signed", "entropy", "squares", "held"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_classes_may_be_in_any_dimension(dim, outer):
    torch.manual_seed(0)
    f, v = torch.randn(2, 3, 4, 2).double().unbind(-1)
    loss = of_log_softmax(INNER["as they are"], OUTER[outer], dim)
    product = HessianProduct(Loss(loss), f, None)
    roots = SoftmaxRoots(product, product.terms)
    found = by_parts(roots, INNER["as they are"], f, v)
    torch.testing.assert_close(found, products(loss, f, v))
    assert product.terms.by_row == (dim > 0)


@pytest.mark.parametrize("outer", ["soft", "signed", "focal", "entropy", "squares"])
@pytest.mark.parametrize("inner", ["as they are", "scaled", "centred", "chosen"])
def test_roots_multiply_to_the_hessian_on_average(inner, outer):
    torch.manual_seed(0)
    f = torch.randn(3, CLASSES).double()
    loss = of_log_softmax(INNER[inner], OUTER[outer])
    product = HessianProduct(Loss(loss), f, None)
    roots = SoftmaxRoots(product, product.terms)
    dense = torch.autograd.functional.hessian(lambda x: loss(x, None), f)
    total, square, count = torch.zeros_like(dense), torch.zeros_like(dense), 6000
    for _ in range(count):
        drawn = sum(
            sign * torch.einsum("ia,jb->iajb", root, root)
            for root, sign in roots.sample()
        )
        total, square = total + drawn, square + drawn.square()
    spread = (square / count - (total / count).square()).clamp(min=1e-12).sqrt()
    score = (total / count - dense) / (spread / count**0.5 + 1e-9)
    assert score.abs().max() < 4.5


def test_as_many_roots_as_there_are_signs():
    f = torch.randn(4, CLASSES)
    for outer, signs in (
        (lambda u: -u.sum(), [1.0]), (lambda u: u.sum(), [-1.0]),
        (lambda u: u.sum() * 0, [1.0]), (OUTER["entropy"], [1.0, -1.0]),
        (lambda u: u.square().sum() - 20 * u.sum(), [1.0]),
    ):  # fmt: skip
        loss = Loss(of_log_softmax(INNER["as they are"], outer))
        product = HessianProduct(loss, f, None)
        roots = SoftmaxRoots(product, product.terms)
        assert [sign for _, sign in roots.sample()] == signs
    concave = Loss(lambda f, _: -f.square().sum(), "elementwise")
    assert [sign for _, sign in HessianRoots(concave, f, f).sample()] == [-1.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_no_zero(value):
    for x in (torch.tensor([value]), torch.tensor([1.0, value, -1.0])):
        parts = [magnitudes(x, sign).copysign(x) for sign in signs_of(x)]
        assert parts and not torch.stack(parts).isfinite().all()


@pytest.mark.parametrize("name", UNTOLD)
def test_what_mixes_log_probabilities_is_not_told(name):
    loss = of_log_softmax(INNER["as they are"], UNTOLD[name])
    assert HessianProduct(Loss(loss), torch.randn(4, CLASSES), None).terms is None


class Slope(torch.autograd.Function):
    """Twice, with a derivative that looks at values."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if float(g.sum()) > -1e9 else g


class Squares(torch.autograd.Function):
    """A sum of squares, by a function of the user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Slope.apply(x) * g


scale = nn.Parameter(torch.tensor(0.5))
SINGLE = {
    "told": lambda f: ((f - 1).cosh().log().mean() + f.sum()) / 3,
    "chosen": lambda f: f[:, 1:].square().sum() + f.mean(),
    "repeated": lambda f: f[:, :1].expand(-1, 3).exp().sum(),
    "flattened": lambda f: F.mse_loss(f.flatten(), torch.ones(f.numel())),
    "with constants of other shapes": lambda f: (
        (f[:, 0] * torch.arange(2.0)[:, None]).exp() * f[:, 0].cos()
    ).sum(),
    "one choice, broadcast": lambda f: (
        lambda x: ((x * torch.arange(2.0)[:, None]).exp() * x.cos()).sum()
    )(f[:, 0]),
    "a factor that is trained": lambda f: f.exp().sum() * scale.detach(),
    "both halves": lambda f: (f[:, :1] * f[:, 1:2]).sum(),
    "two choices": lambda f: f[:, :1].exp().sum() + f[:, 1:2].exp().sum(),
    "with its mean": lambda f: (f * f.mean()).sum(),
    "outputs too": lambda f: (f.log_softmax(1) * f).sum(),
    "one after the other": lambda f: f.tanh().log_softmax(1).sum(),
    "of two softmaxes": lambda f: f.log_softmax(1).sum() + (2 * f).log_softmax(1).sum(),
    "a constant's": lambda f: (scale.expand(4, 3).log_softmax(1) * f.exp()).sum(),
    "of a mean": lambda f: F.mse_loss(f, torch.ones(4, 3).to(f)).sqrt(),
    "its own": lambda f: Squares.apply(f),
    "turned": lambda f: (f[:3] * f[:3].t()).sum(),
}
TOLD = {
    "one choice, broadcast",
    "told",
    "chosen",
    "repeated",
    "flattened",
    "a factor that is trained",
}


@pytest.mark.parametrize("name", SINGLE)
def test_terms_of_one_output_each_are_told_and_others_are_not(name):
    torch.manual_seed(0)
    f = torch.randn(4, 3)
    terms = HessianProduct(Loss(lambda f, _: SINGLE[name](f)), f, None).terms
    assert (terms is not None) == (name in TOLD)
    if terms is not None:
        assert terms.log_softmax is None
        dense = torch.autograd.functional.hessian(SINGLE[name], f).view(12, 12)
        assert torch.equal(dense, dense.diagonal().diag())


@pytest.mark.parametrize("name", ["its own", "both halves", "told"])
def test_products_at_once_are_those_one_by_one(name, monkeypatch):
    torch.manual_seed(0)
    f = torch.randn(4, 3).double()
    loss = Loss(lambda f, _: SINGLE[name](f))
    dense = torch.autograd.functional.hessian(SINGLE[name], f)
    blocks = torch.stack([dense[i, :, i] for i in range(4)])
    torch.testing.assert_close(
        hessian_columns(HessianProduct(loss, f, None)), blocks.movedim(-1, 0)
    )
    single = []
    monkeypatch.setattr(
        HessianProduct, "__call__", lambda *_: single.append(0) or torch.zeros(4, 3)
    )
    hessian_columns(HessianProduct(loss, f, None))
    assert len(single) == (3 if name == "its own" else 0)


@pytest.mark.parametrize("lacks", ["_ENGINE", "_UNSEEN_DIM"])
def test_products_at_once_need_no_private_name(lacks, monkeypatch):
    torch.manual_seed(0)
    f, v = torch.randn(4, 3).double(), torch.randn(5, 4, 3).double()
    product = HessianProduct(Loss(lambda f, _: SINGLE["both halves"](f)), f, None)
    expected = torch.stack([product(x) for x in v])
    torch.testing.assert_close(product.each(v), expected)
    alone = []
    monkeypatch.setattr(HessianProduct, "__call__", lambda *_: alone.append(1))
    monkeypatch.setattr(tracing, lacks, None if lacks == "_ENGINE" else (None,) * 4)
    torch.testing.assert_close(product.each(v), expected)
    assert not alone


ELEMENTWISE = {
    nn.HuberLoss: {"delta": st.sampled_from([0.3, 1.0, 2.5])},
    nn.SmoothL1Loss: {"beta": st.sampled_from([0.5, 2.0, 0.0])},
    nn.PoissonNLLLoss: {
        "log_input": st.booleans(), "full": st.booleans(), "eps": st.just(0.1)
    },
    nn.SoftMarginLoss: {},
}  # fmt: skip
FUNCTIONS = {
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
@given(st.data(), st.integers(0, 99))
def test_torchs_losses_of_single_outputs_have_their_second_derivatives(
    kind, data, seed
):
    torch.manual_seed(seed)
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    options = {name: data.draw(values) for name, values in ELEMENTWISE[kind].items()}
    options["reduction"] = data.draw(st.sampled_from(["mean", "sum"]))
    by_function = functools.partial(FUNCTIONS[kind], **options)
    loss = resolve_loss(data.draw(st.sampled_from([kind(**options), by_function])))
    f, y = torch.rand(2, *shape).double().mul(3).unbind(0)
    y = y.transpose(0, -1).contiguous().transpose(0, -1)
    found = closed_diagonal(loss)(f, y)
    dense = torch.autograd.functional.hessian(lambda x: loss(x, y), f)
    torch.testing.assert_close(found.flatten().diag(), dense.view(2 * (f.numel(),)))
    torch.testing.assert_close(HessianRoots(loss, f, y)._spectrum[0], found)


def test_second_derivatives_that_are_not_at_hand_are_autograds():
    f, y = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    loss = resolve_loss(nn.HuberLoss())
    with pytest.warns(UserWarning, match="broadcast"):
        roots = HessianRoots(loss, f, y)
    torch.testing.assert_close(roots._spectrum[0], ((f - y).abs() < 1).double() / 12)
    assert closed_diagonal(resolve_loss(nn.BCELoss())) is None
    weighted = functools.partial(F.huber_loss, weight=torch.rand(4, 3))
    assert closed_diagonal(resolve_loss(weighted)) is None
    assert closed_diagonal(resolve_loss(lambda f, y: (f - y).sum())) is None


def test_a_loss_that_bends_elsewhere_is_0_and_said_where_it_is_linear():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.full((4, 2), 100.0)
    for loss in (nn.HuberLoss(), nn.SmoothL1Loss(), lambda f, y: F.huber_loss(f, y)):
        for form in (gauss_newton, second_order):
            found = form(net, batch, loss)
            assert found.value == 0 and "linear" in found.notes[0]
        for r1 in ("last_layer", "gauss_newton", "second_order"):
            modified = modified_loss(net, batch, loss, kind="L1", r1=r1)
            risk = loss(net[1](batch[0]), batch[1])
            torch.testing.assert_close(modified, risk)
    with pytest.raises(ValueError, match="piecewise linear"):
        gauss_newton(net, batch, nn.SmoothL1Loss(beta=0.0))
    assert gauss_newton(net, (batch[0], torch.zeros(4, 2)), nn.HuberLoss()).value > 0


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_cross_entropy_inside_a_function_costs_what_it_does_by_name(num_samples):
    """One backward pass a draw, with the same spread."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 12)
    ).double()
    x, y = torch.randn(6, 4).double(), torch.randint(4, (6, 3))

    def loss(f, y):
        return F.cross_entropy(f.view(-1, 3, 4).flatten(0, 1), y.flatten())

    inner = nn.Sequential(net, nn.Unflatten(1, (3, 4)), nn.Flatten(0, 1))
    for own, by_name in ((loss, "cross_entropy"),):
        draws = [
            torch.stack([
                gauss_newton(model, (x, target), kind, num_samples=num_samples).value
                for _ in range(300)
            ])
            for model, target, kind in ((net, y, own), (inner, y.flatten(), by_name))
        ]
    means, stds = [d.mean() for d in draws], [d.std() for d in draws]
    error = (stds[0].square() + stds[1].square()).sqrt() / 300**0.5
    assert (means[0] - means[1]).abs() < 4 * error
    assert 0.8 < stds[0] / stds[1] < 1.25


@pytest.mark.parametrize(
    ("num_samples", "kind"),
    [(1, SoftmaxRoots), (5, HessianRoots), (None, HessianRoots)],
)
def test_blocks_take_the_place_of_the_softmax_where_they_pay(num_samples, kind):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 5))
    loss = Loss(of_log_softmax(INNER["as they are"], OUTER["soft"]))
    with clean_pass(net, torch.randn(4, 3)) as clean:
        read = read_outputs(clean.outputs, loss, None)
        roots, couples = choose(clean, read, num_samples, read.product())
    assert type(roots) is kind and not couples


WEIGHTS = {  # of the square of an output, and where that is; which a graph tells not
    "constant": (lambda f: 3.0, 1.0),
    "own": (lambda f: 1 + f.abs(), 1.0),
    "odd, at zero": (lambda f: 1 + torch.tanh(f), 0.0),
    "own, at zero": (lambda f: 1 + f.abs(), 0.0),
    "far away": (lambda f: 1.0 + (f.abs() > 30), 1.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_squares_that_weigh_by_what_they_are_of_are_no_squares(name):
    weight, size = WEIGHTS[name]
    f = size * torch.randn(20, 3).double()
    loss = resolve_loss(lambda f, _: (weight(f.detach()) * f.square()).sum())
    assert is_quadratic(loss, f, None) == (name == "constant")


def test_squares_that_cannot_be_told_are_not_taken_for_such():
    f = torch.randn(20, 3)
    whole = lambda f, _: (f - f.detach() + 0.1).square().sum()  # noqa: E731
    beside = lambda f, _: f.square().sum() + 1e8  # noqa: E731
    assert is_quadratic(resolve_loss("mse"), f, f)
    for loss in (whole, beside):
        assert not is_quadratic(resolve_loss(loss), f, None)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (3,)])
def test_probabilities_of_classes_are_one_term_a_sample(shape):
    """As torch's mean counts them, and as labels of the same outputs count."""
    f, p = torch.randn(shape), torch.rand(shape)
    summed = F.cross_entropy(f, p, reduction="sum") / F.cross_entropy(f, p)
    for loss in ("cross_entropy", nn.CrossEntropyLoss(weight=torch.rand(3))):
        assert resolve_loss(loss).num_terms(p) == round(float(summed))
    assert resolve_loss(nn.BCELoss()).num_terms(p) == p.numel()
