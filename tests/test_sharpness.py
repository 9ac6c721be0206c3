"""Curvature against the dense Hessian, and the errors that others make."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import sharpness, vectors


def dense_hessian(net, loss, x, y):
    """The Hessian of the loss in evaluation mode, by autograd's own functional."""
    names, shapes = zip(*[(n, p.shape) for n, p in net.named_parameters()], strict=True)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def f(flat):
        pieces = flat.split([s.numel() for s in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return loss(torch.func.functional_call(net, params, (x,)), y)

    return torch.autograd.functional.hessian(f, flat)


@pytest.fixture
def case():
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)
    ).double()
    return net, torch.randn(9, 3).double(), torch.randn(9, 2).double()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", F.smooth_l1_loss])
def test_hessian_equals_the_dense_one(case, loss):
    net, x, y = case
    y = torch.randint(2, (9,)) if loss == "cross_entropy" else y
    function = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}.get(loss, loss)
    net.eval()
    expected = dense_hessian(net, function, x, y)
    net.train()
    op = sharpness.hessian(net, loss, (x, y))
    torch.testing.assert_close(op.dense(), expected)
    assert op.num_matvecs == op.shape[0] == 32
    v = vectors.random_like(op.params)
    product = op @ v
    assert list(product) == [n for n, _ in net.named_parameters()]
    torch.testing.assert_close(
        vectors.to_vector(product), expected @ vectors.to_vector(v)
    )
    assert net.training


class Bare(nn.Module):
    """Parameters that no layer holds, among which one is used twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 5), nn.Parameter(torch.rand(5) + 0.5)
        self.shift, self.last = nn.Parameter(torch.randn(2)), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.scale * self.inner(x)) * self.scale
        return self.last(h) + self.shift.exp()


@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
def test_products_are_added_with_the_weights_of_their_batches(case, kind):
    _, x, y = case
    net = Bare().double()
    op = kind(net, "mse", [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])])
    matrix = kind(net, "mse", (x, y)).dense()
    v, total = torch.randn(2, op.shape[0]).double()
    expected = total + matrix @ v
    op.add_product(v, total)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(op @ v, matrix @ v)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ragged_batches_are_weighted_by_their_samples(case, reduction):
    net, x, y = case
    loss = nn.MSELoss(reduction=reduction)
    whole = sharpness.hessian(net, loss, (x, y)).dense()
    pieces = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    torch.testing.assert_close(sharpness.hessian(net, loss, pieces).dense(), whole)


def test_the_operator_stays_at_the_parameters_of_its_making(case):
    net, x, y = case
    for batches in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        op = sharpness.hessian(net, "mse", batches)
        before = op.dense()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)
        torch.testing.assert_close(op.dense(), before)
        assert (
            sharpness.hessian(net, "mse", batches).dense() - before
        ).abs().max() > 1e-3


def test_live_dropout_and_batch_norm_do_not_disturb():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1)
    ).double()
    batch = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    op = sharpness.hessian(net, "mse", batch)
    matrix = op.dense()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(op.dense(), matrix)
    for name, value in net.named_buffers():
        assert torch.equal(value, buffers[name]), name
    net[1].eval()
    assert not torch.allclose(sharpness.hessian(net, "mse", batch).dense(), matrix)


def test_attention_has_curvature():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v).flatten(1)

    op = sharpness.hessian(Attends(), "mse", (torch.randn(2, 3, 4), torch.zeros(2, 12)))
    v = vectors.random_like(op.params)
    assert vectors.norm(op @ v) > 0


@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_top_eigenvalues_of_any_symmetric_matrix(size, k, seed, low_rank):
    torch.manual_seed(seed)
    k = min(k, size)
    matrix = torch.randn(size, 2 if low_rank else size).double()
    matrix = (
        matrix @ matrix.T if low_rank else matrix @ matrix.T @ torch.eye(size).double()
    )
    matrix = matrix - (seed % 3) * torch.eye(size)
    found = sharpness.top_eigenvalues(matrix, k, tol=1e-8, max_matvecs=2000)
    assert found.converged
    values = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    scale = float(matrix.abs().max()) + 1
    torch.testing.assert_close(found.values, values, atol=1e-6 * scale, rtol=0)
    for value, vector, residual in zip(
        found.values, found.vectors, found.residuals, strict=True
    ):
        actual = (matrix @ vector - value * vector).norm()
        assert actual <= residual + 1e-9 * scale
        assert vector.norm() == pytest.approx(1.0)


def test_close_eigenvalues_are_resolved_through_restarts():
    values = torch.linspace(0, 1, 400).double() ** 0.2
    basis = torch.linalg.qr(torch.randn(400, 400).double()).Q
    matrix = basis @ torch.diag(values) @ basis.T
    found = sharpness.top_eigenvalues(matrix, 2, tol=1e-6, max_matvecs=2000)
    assert found.converged and found.num_matvecs > 32
    torch.testing.assert_close(found.values, values.flip(0)[:2], atol=1e-6, rtol=0)


def test_stops_on_residual_and_says_when_it_does_not_converge():
    matrix = torch.diag(torch.linspace(0, 1, 300).double())
    short = sharpness.top_eigenvalues(matrix, max_matvecs=5, tol=1e-6)
    assert not short.converged and short.num_matvecs == 5
    assert 1 - short.values[0] <= short.residuals[0] and short.residuals[0] > 1e-3
    assert sharpness.top_eigenvalues(matrix, max_matvecs=1).num_matvecs == 1
    loose = sharpness.top_eigenvalues(matrix, tol=1e-2)
    tight = sharpness.top_eigenvalues(matrix, tol=1e-4, max_matvecs=500)
    assert loose.converged and tight.converged
    assert loose.num_matvecs < tight.num_matvecs
    warm = sharpness.top_eigenvalues(matrix, tol=1e-2, start=tight.vectors[0])
    assert warm.num_matvecs <= 10


def test_a_start_blind_to_the_top_eigenvector_is_found_out():
    """A residual alone would stop at the second eigenvalue."""
    values = torch.cat((torch.linspace(-0.2, 0.3, 98), torch.tensor([1.15, 1.21])))
    matrix = torch.diag(values.double())
    start = torch.zeros(100).double()
    start[98] = 1.0
    found = sharpness.top_eigenvalues(matrix, tol=1e-3, start=start)
    assert found.converged and float(found.values[0]) == pytest.approx(1.21, abs=1e-3)
    for seed in range(50):
        torch.manual_seed(seed)
        found = sharpness.top_eigenvalues(matrix, tol=1e-3)
        assert float(found.values[0]) == pytest.approx(1.21, abs=2e-3)


def test_top_eigenvalues_of_a_network(case):
    net, x, y = case
    op = sharpness.hessian(net, "mse", (x, y))
    found = sharpness.top_eigenvalues(op, k=2, tol=1e-8)
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(op.dense()).flip(0)[:2]
    )
    image = vectors.to_vector(op @ found.vectors[0])
    torch.testing.assert_close(
        image, found.values[0] * vectors.to_vector(found.vectors[0]), atol=1e-6, rtol=0
    )


def test_trace_is_exact_where_products_suffice(case):
    net, x, y = case
    op = sharpness.hessian(net, "mse", (x, y))
    found = sharpness.trace(op, num_matvecs=32)
    torch.testing.assert_close(found.value, op.dense().trace())
    assert float(found.standard_error) == 0 and found.num_matvecs == 32


def test_trace_is_unbiased_and_its_error_covers():
    matrix = torch.randn(60, 60).double()
    matrix = matrix + matrix.T
    found = [sharpness.trace(matrix, 20) for _ in range(200)]
    z = torch.stack([(f.value - matrix.trace()) / f.standard_error for f in found])
    assert z.mean().abs() < 4 / 200**0.5
    assert 0.8 < z.std() < 1.3
    wide = torch.stack([sharpness.trace(matrix, 40).standard_error for _ in range(50)])
    narrow = torch.stack([
        sharpness.trace(matrix, 10).standard_error for _ in range(50)
    ])
    assert wide.mean() < 0.65 * narrow.mean()


def test_trace_stops_on_its_standard_error():
    matrix = torch.eye(300) + 0.01 * torch.ones(300, 300)
    found = sharpness.trace(matrix, num_matvecs=200, rtol=0.05)
    assert found.converged and 16 <= found.num_matvecs < 200
    assert found.standard_error <= 0.05 * found.value
    failed = sharpness.trace(torch.randn(300, 300), num_matvecs=10, rtol=1e-9)
    assert not failed.converged and failed.num_matvecs == 10


def test_filter_normalized_direction():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        net[0].weight[1] = 0
    d = sharpness.filter_normalized_direction(net)
    for place in range(3):
        assert d["0.weight"][place].norm() == pytest.approx(
            float(net[0].weight[place].detach().norm()), rel=1e-5
        )
    assert d["2.weight"].norm() == pytest.approx(
        float(net[2].weight.detach().norm()), rel=1e-5
    )
    assert not d["0.bias"].any() and not d["2.bias"].any()


def test_loss_slice_is_the_loss_along_the_line(case):
    net, x, y = case
    net.train()
    d = sharpness.filter_normalized_direction(net)
    alphas = [-0.5, 0.0, 1.0]
    before = {n: p.clone() for n, p in net.state_dict().items()}
    found = sharpness.loss_slice(
        net, "mse", [(x[:4], y[:4]), (x[4:], y[4:])], alphas, d
    )
    for alpha, value in zip(alphas, found, strict=True):
        moved = {n: before[n] + alpha * d[n] for n in d}
        net.eval()
        expected = F.mse_loss(torch.func.functional_call(net, moved, (x,)), y)
        net.train()
        torch.testing.assert_close(value, expected.detach())
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())


def test_bad_input(case):
    net, x, y = case
    op = sharpness.hessian(net, "mse", (x, y))
    with pytest.raises(ValueError, match="shape"):
        op @ torch.ones(3)
    with pytest.raises(ValueError, match="got none for"):
        op @ {"0.weight": torch.ones(1)}
    with pytest.raises(TypeError, match="iterated more than once"):
        sharpness.hessian(net, "mse", iter([(x, y)]))
    with pytest.raises(TypeError, match="batch"):
        sharpness.hessian(net, "mse", 3)
    with pytest.raises(ValueError, match="at least one batch"):
        sharpness.hessian(net, "mse", []) @ torch.ones(32).double()
    for k, most in ((0, 9), (33, 99), (2, 1)):
        with pytest.raises(ValueError, match="`k`"):
            sharpness.top_eigenvalues(op, k, max_matvecs=most)
    with pytest.raises(ValueError, match="num_matvecs"):
        sharpness.trace(op, 1)
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        sharpness.hessian(net, "mse", (x, y))
    with pytest.raises(ValueError, match="distribution"):
        vectors.random_like(op.params, "cauchy")


def test_multiple_eigenvalues_are_all_found():
    values = torch.tensor([3.0, 3.0, 3.0, *[1.0] * 40]).double()
    found = sharpness.top_eigenvalues(torch.diag(values), k=3)
    torch.testing.assert_close(found.values, values[:3])
    net = nn.Linear(6, 4).double()  # a Hessian of the form identity x X'X
    op = sharpness.hessian(
        net, "mse", (torch.randn(20, 6).double(), torch.zeros(20, 4))
    )
    dense = torch.linalg.eigvalsh(op.dense()).flip(0)[:4]
    found = sharpness.top_eigenvalues(op, k=4, tol=1e-8, max_matvecs=500)
    torch.testing.assert_close(found.values, dense)
    assert found.converged


def test_a_large_negative_eigenvalue_does_not_loosen_the_top():
    values = torch.linspace(0, 1, 100).double()
    values[0] = -1000.0
    found = sharpness.top_eigenvalues(torch.diag(values), max_matvecs=1000)
    assert found.converged and float(found.values[0]) == pytest.approx(1.0, abs=1e-3)


def test_more_bad_input(case):
    net, x, y = case
    with pytest.raises(ValueError, match="not all zero"):
        sharpness.top_eigenvalues(torch.eye(3), start=torch.zeros(3))
    with pytest.raises(ValueError, match=r"0\.bias"):
        sharpness.loss_slice(net, "mse", (x, y), [0.0], {"0.weight": net[0].weight})
