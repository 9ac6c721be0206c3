"""Numbers of any size, not finite or none at all: right, or said to be wrong."""

import itertools
import math

import pytest
import torch
from torch import nn

from torch_dropout_ir import sharpness
from torch_dropout_ir.sharpness.recurrence import recurrence

UNITS = [1e-300, 1e-200, 1e-30, 1.0, 1e200, 1e300]
METHODS = ["hutchinson", "hutchpp", "xtrace"]


def symmetric(seed=0, size=24):
    torch.manual_seed(seed)
    matrix = torch.randn(size, size).double()
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS)
def test_traces_do_not_depend_on_the_unit(method, unit):
    matrix, found = symmetric(), []
    for factor in (1.0, unit):
        torch.manual_seed(7)
        found.append(sharpness.trace(factor * matrix, 15, method=method))
    for name in ("value", "standard_error"):
        one, other = (float(getattr(x, name)) for x in found)
        assert other / unit == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("unit", UNITS)
def test_errors_of_eigenvalues_do_not_depend_on_the_unit(unit):
    matrix, found = symmetric(1, 60), []
    for factor in (1.0, unit):
        torch.manual_seed(7)
        found.append(sharpness.top_eigenvalues(factor * matrix, max_matvecs=14))
    errors = [float(x.errors[0]) for x in found]
    assert 0 < errors[0] < float(found[0].residuals[0])
    assert errors[1] / unit == pytest.approx(errors[0], rel=1e-6)
    errors = []
    for factor in (1.0, unit):
        torch.manual_seed(7)
        errors.append(recurrence(factor * matrix, 14).error)
    assert errors[1] / unit == pytest.approx(errors[0], rel=1e-6)


@pytest.mark.parametrize("max_bytes", [0, 2**20])
@pytest.mark.parametrize("unit", [*UNITS, 2e306])
def test_densities_have_mass_one_in_any_unit(unit, max_bytes):
    values = torch.tensor([-40.0, -1.0, 3.0, 50.0]).double()
    torch.manual_seed(0)
    found = sharpness.spectral_density(
        unit * torch.diag(values), 4, max_bytes=max_bytes
    )
    assert torch.equal((found.nodes[0] / unit).round(), values)
    mass = torch.trapezoid(found.density * unit, found.grid / unit)
    assert float(mass) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_directions_have_the_norm_of_filters_of_any_size(unit, dtype):
    net = nn.Sequential(nn.Conv1d(2, 3, 4), nn.ConvTranspose1d(3, 4, 2)).to(dtype)
    for x in net.parameters():
        x.data.mul_(unit)
    direction = sharpness.filter_normalized_direction(net, per="layer")
    for name in ("0.weight", "1.weight"):
        assert direction[name].dtype == dtype
        norms = (direction[name], net.get_parameter(name).detach())
        one, other = (float((x.double() / unit).norm()) for x in norms)
        assert one == pytest.approx(other, rel=2e-2)


@pytest.mark.parametrize("unit", [1e-30, 1e-3, 1e15])
def test_principal_directions_of_vectors_of_any_size(unit):
    torch.manual_seed(0)
    vectors = unit * torch.randn(5, 8)
    steps = [{"w": x} for x in vectors]
    variances, directions = sharpness.trajectory_covariance(steps).principal()
    dense = torch.cov((vectors / unit).double().T)
    expected = torch.linalg.eigvalsh(dense).flip(0)[:4]
    assert torch.allclose(variances / unit**2, expected, rtol=1e-5)
    forms = ((directions.double() @ dense) * directions.double()).sum(1)
    assert torch.allclose(forms, expected, rtol=1e-4)


def test_a_covariance_that_is_not_finite_is_said():
    wide = [{"w": torch.tensor([x, 0.0]).double()} for x in (1e200, -1e200)]
    odd = [{"w": torch.tensor([1.0, x])} for x in (0.0, math.nan)]
    for steps in (wide, odd):
        covariance = sharpness.trajectory_covariance(steps)
        for call in (covariance.principal, covariance.trace, covariance.frobenius_norm):
            with pytest.raises(ValueError, match="whose squares are finite"):
                call()
    for x in (torch.ones(2, dtype=torch.int64), torch.ones(2) + 1j):
        with pytest.raises(ValueError, match="floating-point tensors, got none in"):
            sharpness.trajectory_covariance([{"step": x}, {"step": x}])


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_trace_that_is_not_finite_is_said(odd):
    matrix = symmetric()
    matrix[0, 1] = matrix[1, 0] = matrix[2, 2] = odd
    for method, count in (("auto", 24), ("auto", 5), *((x, 9) for x in METHODS)):
        with pytest.raises(ValueError, match="trace: expected an operator with finite"):
            sharpness.trace(matrix, count, method=method)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_trace_of_nothing_is_zero(method):
    found = sharpness.trace(torch.zeros(0, 0), 9, method=method)
    assert float(found.value) == float(found.standard_error) == found.num_matvecs == 0
    again = sharpness.trace(torch.zeros(0, 0), 2, state=found.state)
    assert found.method == again.method == "exact"


def test_symmetry_is_asked_for_in_any_unit():
    odd = torch.randn(5, 5)
    for unit in (1e-30, 1.0, 1e30):
        with pytest.raises(ValueError, match="a symmetric matrix"):
            sharpness.top_eigenvalues(unit * odd)
        sharpness.top_eigenvalues(unit * (odd + odd.T))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(0, 9), (2, 0, 9), (2, 4, 0, 9)])
def test_layers_without_weights_are_none_to_the_curvature(sizes):
    """Only the last bias is left."""
    net = nn.Sequential(*(nn.Linear(*x) for x in itertools.pairwise(sizes)))
    used = f"{len(sizes) - 2}.bias"
    batch = torch.ones(3, sizes[0]), torch.zeros(3, 9)
    for make in (sharpness.hessian, sharpness.ggn):
        op = make(net, "mse", batch, params=lambda n: n == used)
        assert torch.allclose(op.dense(), torch.eye(9) * 2 / 9)
        draws = torch.stack([sharpness.trace(op, 8).value for _ in range(60)])
        assert abs(float(draws.mean()) - 2) < 5 * float(draws.std()) / 60**0.5


class Bare:
    """An operator with no more than is asked for."""

    def __init__(self, matrix):
        self._matrix, self.shape = matrix, matrix.shape

    def __matmul__(self, v):
        return self._matrix @ v


def test_an_operator_needs_a_product_and_a_shape_alone():
    matrix = symmetric().float()
    expected = torch.linalg.eigvalsh(matrix).double().flip(0)[:2]
    for start in (None, torch.ones(24)):
        found = sharpness.top_eigenvalues(Bare(matrix), 2, 1e-5, start=start)
        assert torch.allclose(found.values, expected, rtol=1e-4)


def test_half_precision_aligns_as_single_does():
    curved, noisy = torch.diag(torch.tensor([4.0, 2, 1])), torch.eye(3)
    expected = sharpness.hessian_variance_alignment(curved, noisy)
    for dtype in (torch.float16, torch.bfloat16):
        found = sharpness.hessian_variance_alignment(curved.to(dtype), noisy.to(dtype))
        assert found.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize("start", [[math.nan] * 24, [math.inf] * 24, [1 + 1j] * 24])
def test_a_start_is_real_and_finite(start):
    with pytest.raises(ValueError, match="a `start` of 24 real numbers, finite"):
        sharpness.top_eigenvalues(symmetric(), start=torch.tensor(start))


CALLS = {
    "trace": lambda m, x: sharpness.trace(m, 8, state=x),
    "top_eigenvalues": lambda m, x: sharpness.top_eigenvalues(m, state=x),
    "spectral_density": lambda m, x: sharpness.spectral_density(m, state=x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_state_is_that_of_an_earlier_result(name):
    matrix, call = symmetric(), CALLS[name]
    others = [f(matrix, None).state for n, f in CALLS.items() if n != name]
    for wrong in ({}, {"method": "hutchinson"}, *others):
        with pytest.raises(ValueError, match=f"{name}: expected the `state` of an ear"):
            call(matrix, wrong)
    for wrong in ("x", 5, []):
        with pytest.raises(TypeError, match=f"{name}: expected the `state` of an ear"):
            call(matrix, wrong)
    assert call(matrix, call(matrix, None).state).num_matvecs > 8


@pytest.mark.parametrize(
    "call",
    [*CALLS.values(), lambda m, x: sharpness.trace(m, 8, method="xtrace", state=x)],
)
def test_a_state_of_another_size_is_refused(call):
    found = call(symmetric(), None)
    with pytest.raises(ValueError, match="the same operator, 7 numbers"):
        call(symmetric(size=7), found.state)


def test_a_state_of_another_operator_is_refused():
    net, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.zeros(5, 3))
    layered = sharpness.trace(sharpness.hessian(net, "mse", batch), 8)
    with pytest.raises(ValueError, match="'layerwise' for an operator of"):
        sharpness.trace(symmetric(size=15), 8, state=layered.state)
    other = sharpness.hessian(nn.Linear(4, 4), "mse", (batch[0], torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="the same operator, 20 numbers"):
        sharpness.trace(other, 8, state=layered.state)


def test_sketches_ask_for_what_they_need_where_they_go_on():
    found = sharpness.trace(symmetric(), 6, method="xtrace")
    with pytest.raises(ValueError, match="`num_matvecs` >= 4"):
        sharpness.trace(symmetric(), 2, state=found.state)
