"""Covariances against their dense forms, alignment against its null."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests.test_regularizer_memory import peak
from torch_dropout_ir import sharpness, vectors


def network(dropout=nn.Dropout):
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), dropout(0.5), nn.Linear(4, 2)
    ).double()


def data(n=8):
    return torch.randn(n, 3).double(), torch.randn(n, 2).double()


def gradient(net, x, y):
    found = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("dropout", [nn.Dropout, tdi.Dropout])
def test_covariance_over_masks(dropout):
    net, (x, y) = network(dropout), data()
    rows = []
    for seed in range(5, 12):
        with tdi.frozen_masks(net, seed):
            rows.append(gradient(net, x, y))
    expected = torch.cov(torch.stack(rows).T)
    found = sharpness.gradient_covariance(net, (x, y), "mse", num_masks=7, seed=5)
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.mean, torch.stack(rows).mean(0))
    assert found.rows.shape == (7, 26) and found.shape == (26, 26)
    v = torch.randn(26).double()
    torch.testing.assert_close(found @ v, expected @ v)
    named = found @ vectors.to_params(v, found.params)
    torch.testing.assert_close(vectors.to_vector(named), expected @ v)
    torch.testing.assert_close(found.trace(), expected.trace())
    torch.testing.assert_close(found.frobenius_norm(), expected.norm())
    values, directions = found.principal()
    assert values.numel() == 6  # the mean takes one
    torch.testing.assert_close(directions.T * values @ directions, expected)
    assert found.principal(2)[1].shape == (2, 26)


def test_its_trace_is_the_dropout_noise_of_r2():
    net, batch = network(), data()
    found = sharpness.gradient_covariance(net, batch, "mse", num_masks=400)
    r2 = tdi.regularizers.gradient_norm(net, batch, "mse", lr=4.0, num_masks=400)
    error = r2.dropout_noise_standard_error
    assert abs(found.trace() - r2.dropout_noise) < 6 * error


def test_covariance_over_batches():
    net, (x, y) = network(), data(9)
    batches = [(x[:2], y[:2]), (x[2:5], y[2:5]), (x[5:], y[5:])]
    found = sharpness.gradient_covariance(net, batches, "mse", over="batches")
    net.eval()
    rows = torch.stack([gradient(net, *b) for b in batches])
    torch.testing.assert_close(found.dense(), torch.cov(rows.T))


def test_covariance_of_a_subset_streams_ragged_batches():
    net, (x, y) = network(), data()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    whole = sharpness.gradient_covariance(net, batches, "mse", num_masks=4)
    part = sharpness.gradient_covariance(
        net, batches, "mse", num_masks=4, params=["3.weight"]
    )
    assert list(part.params) == ["3.weight"]
    torch.testing.assert_close(part.dense(), whole.dense()[16:24, 16:24])


def test_trajectory_covariance():
    net = network()
    states = []
    for _ in range(4):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        states.append({n: v.clone() for n, v in net.state_dict().items()})
    found = sharpness.trajectory_covariance(iter(states))
    rows = torch.stack([vectors.to_vector(s) for s in states])
    torch.testing.assert_close(found.dense(), torch.cov(rows.T))
    with pytest.raises(ValueError, match="same names"):
        sharpness.trajectory_covariance([states[0], {"x": torch.ones(2)}])
    with pytest.raises(ValueError, match="at least two"):
        sharpness.trajectory_covariance(states[:1])


def test_a_loader_is_read_over_batches_without_a_trace():
    """Generators are left as they are, and batches are the same each time."""
    net, (x, y) = network(), data(9)
    own, rows = torch.Generator().manual_seed(3), torch.utils.data.TensorDataset(x, y)
    for generator in (None, own):
        loader = torch.utils.data.DataLoader(rows, 3, shuffle=True, generator=generator)
        before = torch.get_rng_state(), own.get_state()
        found = sharpness.gradient_covariance(net, loader, "mse", over="batches")
        torch.testing.assert_close(torch.get_rng_state(), before[0])
        torch.testing.assert_close(own.get_state(), before[1])
        again = sharpness.gradient_covariance(net, loader, "mse", over="batches")
        torch.testing.assert_close(found.dense(), again.dense(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="of 208 bytes"):  # half-way
        sharpness.gradient_covariance(net, loader, "mse", over="batches", max_bytes=9)
    torch.testing.assert_close(own.get_state(), before[1])
    with pytest.raises(TypeError, match="of the form"):
        sharpness.gradient_covariance(net, [(x,), (x,)], "mse", over="batches")


def test_covariances_hold_their_vectors_once():
    """Live bytes, as the allocator counts them: on a GPU untouched memory counts."""
    net = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Dropout(), nn.Linear(400, 2))
    batch = torch.randn(4, 300), torch.randn(4, 2)
    size = sum(p.numel() for p in net.parameters())
    steps = [{"w": torch.randn(size)} for _ in range(20)]
    found = sharpness.gradient_covariance(net, batch, "mse", num_masks=20)
    op = sharpness.hessian(net, "mse", batch)
    runs = {
        "masks": lambda: sharpness.gradient_covariance(net, batch, "mse", num_masks=20),
        "batches": lambda: sharpness.gradient_covariance(
            net, [batch] * 20, "mse", over="batches"
        ),
        "trajectory": lambda: sharpness.trajectory_covariance(steps),
        "components": found.principal,
        "alignment": lambda: sharpness.hessian_variance_alignment(
            op, found, trace_matvecs=8
        ),
    }
    held = {name: peak(run) / (4 * size) for name, run in runs.items()}
    # Those of one pass and of the Hessian's products come on top.
    assert all(19 <= vectors < 20 + 7 for vectors in held.values()), held


def test_covariance_of_what_has_no_length():
    """A generator of snapshots, a loader that does not know how many batches it has."""
    net, (x, y) = network(), data(12)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)]
    batches.insert(1, (x[:0], y[:0]))

    class Unsized(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    loader = torch.utils.data.DataLoader(Unsized(), batch_size=None)
    found = sharpness.gradient_covariance(net, loader, "mse", over="batches")
    same = sharpness.gradient_covariance(net, batches, "mse", over="batches")
    assert found.rows.shape == same.rows.shape == (5, 26)
    torch.testing.assert_close(found.dense(), same.dense())
    with pytest.raises(ValueError, match="3 of 208 bytes"):
        sharpness.gradient_covariance(
            net, loader, "mse", over="batches", max_bytes=2 * 208
        )
    with pytest.raises(ValueError, match="6 of 208 bytes"):  # before the first pass
        sharpness.gradient_covariance(
            net, batches, "mse", over="batches", max_bytes=2 * 208
        )


def random_rotations(matrix, count):
    size = matrix.shape[0]
    for _ in range(count):
        q = torch.linalg.qr(torch.randn(size, size).double()).Q
        yield q @ matrix @ q.T


def test_alignment_and_its_null():
    torch.manual_seed(3)
    size = 12
    a = torch.randn(size, size).double()
    hessian = a + a.T + 3 * torch.eye(size)
    b = torch.randn(size, 5).double()
    sigma = b @ b.T
    found = sharpness.hessian_variance_alignment(hessian, sigma)
    both = hessian.norm() * sigma.norm()
    assert found.value == pytest.approx(float((hessian @ sigma).trace() / both))
    null = torch.stack([
        (hessian @ turned).trace() / both for turned in random_rotations(sigma, 4000)
    ])
    assert found.null_mean == pytest.approx(
        float(null.mean()), abs=4 * found.null_deviation / 4000**0.5
    )
    assert found.null_deviation == pytest.approx(float(null.std()), rel=0.05)
    expected = (found.value - found.null_mean) / found.null_deviation
    assert found.z_score == pytest.approx(expected)
    torch.testing.assert_close(
        (found.variances * found.curvatures).sum(), (hessian @ sigma).trace()
    )
    psd = a @ a.T
    aligned = sharpness.hessian_variance_alignment(psd, psd)
    assert aligned.value == pytest.approx(1.0) and aligned.z_score > 3


def test_alignment_of_a_network_within_its_error():
    net, batch = network(), data()
    op = sharpness.hessian(net, "mse", batch)
    noise = sharpness.gradient_covariance(net, batch, "mse", num_masks=6)
    matrix, sigma = op.dense(), noise.dense()
    truth = float((matrix @ sigma).trace() / (matrix.norm() * sigma.norm()))
    exact = sharpness.hessian_variance_alignment(op, noise, num_probes=26)
    assert exact.value == pytest.approx(truth) and exact.standard_error == 0
    found = sharpness.hessian_variance_alignment(op, noise, num_probes=20)
    assert abs(found.value - truth) < 4 * found.standard_error
    assert found.num_matvecs == 5 + 20 + 26


def test_the_error_of_an_alignment_is_its_spread():
    net, batch = network(), data()
    op = sharpness.hessian(net, "mse", batch)
    noise = sharpness.gradient_covariance(net, batch, "mse", num_masks=6)
    runs = [
        sharpness.hessian_variance_alignment(op, noise, num_probes=12, trace_matvecs=8)
        for _ in range(100)
    ]
    spread = torch.tensor([run.value for run in runs]).std()
    said = torch.tensor([run.standard_error for run in runs]).square().mean().sqrt()
    assert float(said) == pytest.approx(float(spread), rel=0.4)
    dense = sharpness.hessian_variance_alignment(op, noise.dense(), num_probes=26)
    exact = sharpness.hessian_variance_alignment(op, noise, num_probes=26)
    assert dense.value == pytest.approx(exact.value)


class Bowl(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size).double())

    def forward(self, x):
        return self.theta.expand(x.shape[0], -1)


def test_inverse_variance_flatness_relation_of_a_bowl():
    """Widths go as c^-1/2; variances of c^2 give the slope -4, of c the slope -2."""
    curvatures = 2.0 ** -torch.arange(1, 6).double()  # all variances are below 1
    net = Bowl(5)
    batch = torch.zeros(1, 1).double(), torch.zeros(1, 1).double()

    def loss(f, t):
        return 1 + 0.5 * (curvatures * f[0].square()).sum()

    for power, slope in ((2, -4.0), (1, -2.0)):
        rows = torch.diag(curvatures ** (power / 2))
        noise = sharpness.Covariance(rows, torch.zeros(5), {"theta": net.theta})
        found = sharpness.variance_flatness(net, loss, batch, noise)
        assert found.slope == pytest.approx(slope, abs=0.01)
        assert found.slope_standard_error < 0.01
        expected = 2 * (2 / curvatures).sqrt()
        torch.testing.assert_close(found.widths, expected, rtol=1e-3, atol=0)
    one = sharpness.variance_flatness(net, loss, batch, noise, k=1)
    assert math.isnan(one.slope)
    two = sharpness.variance_flatness(net, loss, batch, noise, k=2)
    assert math.isnan(two.slope_standard_error) and not math.isnan(two.slope)


def test_slopes_and_their_errors_are_those_of_a_least_squares_fit():
    curvatures = torch.tensor([9.0, 5.0, 4.0, 0.3, 0.2]).double()
    net, batch = Bowl(5), (torch.zeros(1, 1).double(),) * 2
    noise = sharpness.Covariance(
        torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.4, 0.3]).double()),
        torch.zeros(5),
        {"theta": net.theta},
    )
    found = sharpness.variance_flatness(
        net, lambda f, t: 1 + (curvatures * f[0].square()).sum(), batch, noise
    )
    widths, variances = found.widths.log().numpy(), found.variances.log().numpy()
    line, spread = np.polyfit(widths, variances, 1, cov=True)
    assert found.slope == pytest.approx(line[0], rel=1e-9)
    assert found.slope_standard_error == pytest.approx(spread[0, 0] ** 0.5, rel=1e-9)


class Products:
    def __init__(self, matrix):
        self.matrix, self.shape = matrix, matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def __matmul__(self, v):
        return self.matrix @ v


def test_bad_input():
    net, batch = network(), data()
    with pytest.raises(ValueError, match="num_masks"):
        sharpness.gradient_covariance(net, batch, "mse", num_masks=1)
    with pytest.raises(ValueError, match="`over`"):
        sharpness.gradient_covariance(net, batch, "mse", over="time")
    with pytest.raises(ValueError, match="at least two"):
        sharpness.gradient_covariance(net, batch, "mse", over="batches")
    with pytest.raises(ValueError, match="max_bytes"):
        sharpness.gradient_covariance(net, batch, "mse", max_bytes=1000)
    op = sharpness.hessian(net, "mse", batch, params=["0.weight"])
    noise = sharpness.gradient_covariance(net, batch, "mse", num_masks=3)
    with pytest.raises(ValueError, match="same"):
        sharpness.hessian_variance_alignment(op, noise)
    weights = sharpness.gradient_covariance(  # of the same size
        net, batch, "mse", num_masks=3, params=["3.weight", "0.bias"]
    )
    op = sharpness.hessian(net, "mse", batch, params=["0.weight"])
    assert op.shape == weights.shape
    with pytest.raises(ValueError, match="same"):
        sharpness.hessian_variance_alignment(op, weights)
    with pytest.raises(ValueError, match="same"):
        sharpness.hessian_variance_alignment(torch.eye(3), torch.eye(4))
    still = sharpness.gradient_covariance(network(nn.Identity), batch, "mse", 3)
    with pytest.raises(ValueError, match="not zero"):
        sharpness.hessian_variance_alignment(
            sharpness.hessian(network(nn.Identity), "mse", batch), still
        )
    with pytest.raises(ValueError, match="num_probes"):
        sharpness.hessian_variance_alignment(torch.eye(3), torch.eye(3), num_probes=1)
    upper = torch.ones(3, 3).triu()
    for pair in ((upper, torch.eye(3)), (torch.eye(3), upper)):
        with pytest.raises(ValueError, match="symmetric"):
            sharpness.hessian_variance_alignment(*pair)
    steps = [dict(nn.BatchNorm1d(4).state_dict(), weight=torch.rand(4)) for _ in "ab"]
    with pytest.raises(ValueError, match="running_mean"):
        sharpness.variance_flatness(
            nn.BatchNorm1d(4), "mse", batch, sharpness.trajectory_covariance(steps)
        )
    with pytest.raises(TypeError, match="got Tensor"):
        sharpness.trajectory_covariance([torch.ones(3), torch.ones(3)])


def test_the_null_knows_how_well_the_trace_is_known():
    basis = torch.randn(5, 60).double()
    noise = sharpness.Covariance(basis / 2, basis.mean(0), {})
    matrix = torch.randn(60, 60).double()
    op = Products(matrix + matrix.T)
    found = [
        sharpness.hessian_variance_alignment(op, noise, trace_matvecs=30)
        for _ in range(200)
    ]
    truth = sharpness.hessian_variance_alignment(op.matrix, noise)
    assert truth.null_standard_error == 0
    errors = torch.tensor([x.null_mean - truth.null_mean for x in found])
    said = torch.tensor([x.null_standard_error for x in found])
    assert 0.7 < errors.square().mean() / said.square().mean() < 1.4
    scores = torch.tensor([x.z_score for x in found])
    said /= torch.tensor([x.null_deviation for x in found])
    assert 0.6 < scores.var() / said.square().mean() < 1.6


def test_the_deviation_of_the_null_is_that_of_random_eigenvectors():
    """In three dimensions, where its constant is a tenth from that of a large one."""
    torch.manual_seed(0)
    curved, noisy = (
        torch.diag(torch.tensor(x)).double() for x in ([4, -1, 1], [3, 1, 0])
    )
    turns = torch.linalg.qr(torch.randn(40_000, 3, 3).double()).Q
    drawn = torch.einsum("ij,njk,kl,nil->n", curved, turns, noisy, turns)
    drawn = drawn / (curved.norm() * noisy.norm())
    found = sharpness.hessian_variance_alignment(curved, noisy)
    assert found.null_mean == pytest.approx(float(drawn.mean()), abs=0.01)
    assert found.null_deviation == pytest.approx(float(drawn.std()), rel=0.02)
