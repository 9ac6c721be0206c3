"""Second derivatives of losses of single entries, against the dense Hessian."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir import entry_curvature as own
from torch_dropout_ir import output_products, softmax_roots
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import ALL, HessianProduct
from torch_dropout_ir.regularizers import gauss_newton, loss_weight
from torch_dropout_ir.regularizers.line_pass import AlongLine
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.softmax_roots import SoftmaxRoots

N, K = 9, 4
Y = torch.linspace(-2, 2, N * K).view(N, K).double().sin()
ROWS, COLUMNS = Y[:, :1].exp(), Y[0].exp()
SOME = Y > 0
PARAMETER = nn.Parameter(Y[:3].clone())
LABELS = torch.arange(N) % K


def focal_of(x):
    return ((1 - (-x).exp()) ** 2 * x).mean()


def entropy_of(u):
    return (u * u.exp()).sum()


def pairs(f):
    return F.softplus(-2 * (f - Y)) + (f - Y)


TOLD = {
    "squares": lambda f: ((f - Y) ** 2).mean(),
    "squares of rows": lambda f: (f - Y).square().sum(1).mean(),
    "products": lambda f: ((f - Y) * (f + Y)).sum(),
    "log cosh": lambda f: (f - Y).cosh().log().mean(),
    "softplus": lambda f: pairs(f).mean(),
    "weights": lambda f: ((f - Y) ** 4 * ROWS * COLUMNS).sum(),
    "Student's t": lambda f: (1 + (f - Y) ** 2 / 3).log().mean(),
    "quotient": lambda f: ((f - Y) / (1 + f**2)).sum(),
    "reciprocal": lambda f: (COLUMNS / (1 + f**2)).mean(),
    "several": lambda f: f.exp().mean() + 2 * (f**3).sum() - f.sum(),
    "a penalty beside": lambda f: f.exp().mean() + PARAMETER.square().sum(),
    "choice": lambda f: torch.where(SOME, f**2, f.exp()).mean(),
    "larger": lambda f: torch.maximum(f**2, f.exp()).mean(),
    "xlogy": lambda f: torch.xlogy(f.sigmoid(), f.sigmoid()).sum(),
    "capped": lambda f: (f.clamp(min=-0.5) ** 2).mean(),
    "MSE": lambda f: 3 * F.mse_loss(f, Y),
    "MSE of each": lambda f: (F.mse_loss(f, Y, reduction="none") * COLUMNS).mean(),
    "Huber": lambda f: F.huber_loss(f, Y) + F.smooth_l1_loss(f, Y, reduction="sum"),
    "logistic": lambda f: F.binary_cross_entropy_with_logits(
        f, SOME.double(), weight=ROWS, pos_weight=COLUMNS
    ),
    "focal of logits": lambda f: focal_of(
        F.binary_cross_entropy_with_logits(f, SOME.double(), reduction="none")
    ),
    "columns": lambda f: ((f[:, 1:3] - Y[:, 1:3]) ** 4).mean(),
    "one column, repeated": lambda f: ((f[:, 1:2] * Y).exp()).sum(),
    "masked": lambda f: (f - Y)[SOME].exp().mean(),
    "turned": lambda f: ((f.T - Y.T) ** 4).sum(),
    "flat": lambda f: ((f.reshape(-1) - Y.view(-1)) ** 4).sum(),
    "single precision": lambda f: ((f.float() - Y.float()) ** 4).sum().double(),
}  # fmt: skip


def made_twice(f):
    """What is added up is part of another function too."""
    x = f.exp()
    return x.mean() + (x**2).mean()


# Of these the graph does not tell, or there is no rule.
UNTOLD = {
    "made twice": made_twice,
    "bent before": lambda f: f.exp()[:, :2].square().sum(),
    "no rule": lambda f: F.gelu(f).sum(),
    "no rule, added up": lambda f: F.binary_cross_entropy(f.sigmoid(), SOME.double()),
    "margins": lambda f: F.soft_margin_loss(f, Y.sign(), reduction="sum"),
    "rows": lambda f: (1 + (f - Y).square().sum(1)).sqrt().mean(),
    "linear": lambda f: (f * Y).mean(),
    "linear, a penalty beside": lambda f: (f * Y).mean() + PARAMETER.square().sum(),
    "infinite times zero": lambda f: f.relu().sqrt().sum(),
    "complex": lambda f: (f.to(torch.complex128) * (1 + 2j)).abs().square().sum(),
    "of one number": lambda f: (f * torch.tensor(1 + 2j)).abs().square().sum(),
}
# A single row meets several.
REPEATED = {
    "differences": lambda f: (f - Y).cosh().sum(),
    "in the end": lambda f: (f.exp() * Y[:, :1]).cosh().mean(),
    "more dimensions": lambda f: (f - Y.view(3, 3, K)).cosh().sum(),
    "logits": lambda f: torch.binary_cross_entropy_with_logits(f, Y, reduction=2),
    "choice": lambda f: torch.where(Y > 0, f, f**2).sum() + (f - 2 * Y).exp().sum(),
    "one of several": lambda f: f.exp().sum() + (f[:1] * Y[:2]).exp().sum(),
}
LOGS = {
    "focal": lambda u: focal_of(-u.gather(1, LABELS[:, None])),
    "focal of labels": lambda u: focal_of(F.nll_loss(u, LABELS, reduction="none")),
    "some ignored": lambda u: focal_of(
        F.nll_loss(u, LABELS, reduction="none", ignore_index=2)
    ),
    "entropy": lambda u: (u * u.exp()).sum(1).mean(),
    "all": lambda u: (-((1 - u.exp()) ** 2) * u).gather(1, LABELS[:, None]).mean(),
    "turned": lambda u: entropy_of(u.T),
}


@pytest.fixture(params=[1, 12, 1000])
def parts(request, monkeypatch):
    """Rows go in parts of one, of three, or all at once."""
    monkeypatch.setattr(own, "_AT_ONCE", request.param)
    monkeypatch.setattr(output_products, "_DRAWN_IN_ONE", 0)


def outputs():
    torch.manual_seed(0)
    return 2 * torch.randn(N, K).double()


def diagonal(loss, f):
    size = f.numel()
    return torch.autograd.functional.hessian(loss, f).view(size, size).diagonal()


def product_of(loss, f):
    return HessianProduct(Loss(lambda x, _: loss(x)), f, None)


@pytest.mark.parametrize("name", TOLD)
def test_it_is_the_diagonal_of_the_dense_hessian(parts, name):
    f = outputs()
    product = product_of(TOLD[name], f)
    found, expected = product.entries.all(), diagonal(TOLD[name], f)
    close = {"rtol": 1e-5, "atol": 1e-4} if name == "single precision" else {}
    torch.testing.assert_close(found.flatten(), expected, **close)
    assert found.shape == f.shape and expected.any()


@pytest.mark.parametrize("name", LOGS)
def test_so_it_is_in_log_probabilities(parts, name):
    f = outputs()
    product = product_of(lambda x: LOGS[name](x.log_softmax(1)), f)
    expected = diagonal(LOGS[name], f.log_softmax(1))
    torch.testing.assert_close(product.entries.all().flatten(), expected)


@pytest.mark.parametrize("rows", [ALL, torch.tensor([1, 4, 5])])
@pytest.mark.parametrize("name", ["linear", *LOGS])
def test_roots_of_a_softmax_multiply_to_the_hessian(monkeypatch, parts, name, rows):
    monkeypatch.setattr(softmax_roots, "_DRAWN_AT_ONCE", own._AT_ONCE)
    f, logs = outputs(), {"linear": lambda u: (Y * u).sum(), **LOGS}
    product = product_of(lambda x: logs[name](x.log_softmax(1)), f)
    roots, total, count = SoftmaxRoots(product, product.terms), 0.0, 400
    for _ in range(count):
        for root, sign in roots.sample(rows):
            total += sign * root[:, :, None] * root[:, None] / count
    dense = torch.autograd.functional.hessian(lambda x: logs[name](x.log_softmax(1)), f)
    whole = torch.stack([dense[i, :, i] for i in range(N)])[rows]
    assert (total - whole).abs().max() < 0.3 * whole.abs().max()
    assert (total - whole).sum().abs() < 0.1 * whole.abs().sum()
    assert roots.curved


@pytest.mark.parametrize("name", UNTOLD)
def test_what_the_graph_does_not_tell_is_left_to_derivatives(parts, name):
    assert product_of(UNTOLD[name], outputs()).entries is None


@pytest.mark.parametrize("name", REPEATED)
def test_a_row_that_is_repeated_is_told_rightly_or_not_at_all(parts, name):
    f, loss = outputs()[:1], REPEATED[name]
    found, expected = product_of(loss, f).entries, diagonal(loss, f)
    assert expected.any()
    if found is not None:
        torch.testing.assert_close(found.all().flatten(), expected)


def test_a_loss_in_pieces_that_are_linear_has_none(parts):
    found = product_of(lambda f: torch.maximum(f, Y).mean(), outputs()).entries
    assert found is not None and not found.all().any()


def test_weights_of_labels_are_left_to_derivatives(parts):
    def loss(f):
        u = f.log_softmax(1)
        return focal_of(F.nll_loss(u, LABELS, weight=COLUMNS, reduction="none"))

    assert product_of(loss, outputs()).entries is None


def test_what_was_written_on_since_is_an_error(parts):
    y = Y.clone()
    f = outputs()
    product = product_of(lambda x: ((x * y) ** 2).sum(), f)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        _ = product.entries


def network():
    return nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, K)
    ).double()


def of_logs(f):
    return LOGS["focal"](f.log_softmax(1))


def refuse(*_):
    pytest.fail("the graph tells")


@pytest.mark.parametrize(
    ("loss", "count"),
    [*itertools.product((TOLD["log cosh"], TOLD["products"]), (1, 4, None)),
     (of_logs, 1)],
)  # fmt: skip
def test_estimates_go_without_parts_lines_and_derivatives(
    monkeypatch, parts, loss, count
):
    torch.manual_seed(1)
    net, x = network(), torch.randn(N, 3).double()

    def run(count):
        return gauss_newton(
            net, (x, None), lambda f, _: loss(f), num_samples=count
        ).value

    with monkeypatch.context() as before:
        before.setattr(HessianProduct, "entries", None)
        exact = run(None)
    monkeypatch.setattr(loss_weight, "_FEWEST", 0)
    monkeypatch.setattr(loss_weight, "_SHARE", 0.0)
    monkeypatch.setattr(LossParts, "__init__", refuse)
    monkeypatch.setattr(AlongLine, "of", refuse)
    monkeypatch.setattr(HessianProduct, "__call__", refuse)
    found = torch.stack([run(count) for _ in range(200 if count else 2)])
    error = 4.5 * found.std() / len(found) ** 0.5 + 1e-12
    assert (found.mean() - exact).abs() < error < 0.5 * exact.abs()
