"""Spectral densities: mass one, the right quadrature, exactly the products said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import sharpness


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, v):
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix @ v


def symmetric(values):
    basis = torch.linalg.qr(torch.randn(len(values), len(values)).double()).Q
    return basis @ torch.diag(values.double()) @ basis.T


@given(
    st.integers(1, 30), st.integers(1, 25), st.integers(1, 3), st.integers(0, 99),
    st.sampled_from(["normal", "constant", "low rank", "zero"]),
)  # fmt: skip
def test_mass_is_one_and_products_are_as_said(size, steps, probes, seed, kind):
    torch.manual_seed(seed)
    values = {
        "normal": torch.randn(size),
        "constant": torch.ones(size),
        "low rank": torch.cat((torch.ones(1) * 3, torch.zeros(size - 1))),
        "zero": torch.zeros(size),
    }[kind]
    op = Counted(symmetric(values))
    found = sharpness.spectral_density(op, steps, probes)
    assert found.num_matvecs == op.count <= steps * probes
    if kind == "normal":
        assert op.count == min(steps, size) * probes
    mass = torch.trapezoid(found.density, found.grid)
    assert float(mass) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(probes).double())
    assert found.nodes.min() >= values.min() - 1e-6
    assert found.nodes.max() <= values.max() + 1e-6


def test_weights_are_squared_first_entries_not_whole_vectors():
    """Gauss quadrature is exact for the probe's moments up to degree 2 m - 1."""
    matrix = symmetric(torch.randn(40))
    torch.manual_seed(3)
    found = sharpness.spectral_density(matrix, 4)
    torch.manual_seed(3)
    probe = torch.randn(40, dtype=torch.float64)
    probe /= probe.norm()
    for degree in range(8):
        moment = probe @ torch.linalg.matrix_power(matrix, degree) @ probe
        quadrature = (found.weights * found.nodes**degree).sum()
        torch.testing.assert_close(quadrature, moment)
    beyond = probe @ torch.linalg.matrix_power(matrix, 8) @ probe
    assert ((found.weights * found.nodes**8).sum() - beyond).abs() > 1e-6


def test_two_vectors_give_the_same_quadrature_as_a_basis():
    """Where a basis does not fit: no second rule for the weights."""
    matrix = torch.randn(40, 40).double()
    matrix = matrix + matrix.T
    torch.manual_seed(1)
    held = sharpness.spectral_density(matrix, 10)
    torch.manual_seed(1)
    lean = sharpness.spectral_density(matrix, 10, max_bytes=0)
    torch.testing.assert_close(lean.nodes, held.nodes)
    torch.testing.assert_close(lean.weights, held.weights)
    torch.testing.assert_close(lean.density, held.density)
    assert lean.num_matvecs == 10


def test_the_density_is_that_of_the_eigenvalues_within_its_error():
    values = torch.cat((torch.randn(280) * 0.2, torch.full((20,), 3.0)))
    matrix = symmetric(values)
    grid = torch.linspace(-2, 4, 61).double()
    found = sharpness.spectral_density(matrix, 60, 30, grid, bandwidth=0.3)
    kernel = torch.distributions.Normal(values.double(), 0.3)
    truth = kernel.log_prob(grid[:, None]).exp().mean(1)
    z = (found.density - truth) / found.standard_error.clamp(min=1e-4)
    assert z.abs().max() < 5 and found.bandwidth == 0.3
    assert torch.equal(found.grid, grid)


def test_twenty_steps_of_a_network_are_twenty_products():
    net = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3))
    batch = torch.randn(30, 5), torch.randint(3, (30,))
    op = sharpness.hessian(net, "cross_entropy", batch)
    found = sharpness.spectral_density(op)
    assert op.num_matvecs == found.num_matvecs == 20
    top = torch.linalg.eigvalsh(op.dense())[-1]
    assert float(found.nodes.max()) == pytest.approx(float(top), rel=1e-3)


def test_stops_on_its_standard_error_and_goes_on_from_a_state(tmp_path):
    matrix = symmetric(torch.randn(300))
    loose = sharpness.spectral_density(matrix, 10, 100, rtol=0.3)
    assert loose.converged and 30 <= loose.num_matvecs < 1000
    assert not sharpness.spectral_density(matrix, 10, 3, rtol=1e-6).converged
    torch.manual_seed(1)
    whole = sharpness.spectral_density(matrix, 8, 5)
    torch.manual_seed(1)
    first = sharpness.spectral_density(matrix, 8, 2)
    torch.save(first.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    rest = sharpness.spectral_density(matrix, 8, 3, state=state)
    torch.testing.assert_close(rest.density, whole.density)
    assert rest.num_matvecs == 40


def test_bad_input():
    with pytest.raises(ValueError, match="not empty"):
        sharpness.spectral_density(torch.zeros(0, 0))
    for width in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bandwidth"):
            sharpness.spectral_density(torch.eye(3), bandwidth=width)
    for grid in (torch.zeros(2, 2), torch.tensor([0.0, float("nan")])):
        with pytest.raises(ValueError, match="grid"):
            sharpness.spectral_density(torch.eye(3), grid=grid)
