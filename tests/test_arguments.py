"""Numbers that are none, or out of range: said by name, before anything is computed."""

import re

import pytest
import torch
from torch import nn

from torch_dropout_ir import regularizers, sharpness, testing
from torch_dropout_ir.arguments import check_count, check_real

MATRIX = torch.eye(6)
NET = nn.Linear(3, 2)
BATCH = torch.ones(5, 3), torch.zeros(5, 2)
ALONG = {n: torch.ones_like(x) for n, x in NET.named_parameters()}
LOSS = NET, "mse", BATCH
DROPS = nn.Sequential(nn.Dropout(0.5), NET), BATCH, "mse"
NOISE = sharpness.trajectory_covariance([ALONG, {n: 2 * x for n, x in ALONG.items()}])
COUNTS = {
    "k": lambda x: sharpness.top_eigenvalues(MATRIX, x),
    "max_matvecs": lambda x: sharpness.top_eigenvalues(MATRIX, max_matvecs=x),
    "num_matvecs": lambda x: sharpness.trace(MATRIX, x),
    "num_steps": lambda x: sharpness.spectral_density(MATRIX, x),
    "num_probes": lambda x: sharpness.spectral_density(MATRIX, 3, x),
    "num_masks": lambda x: sharpness.gradient_covariance(NET, BATCH, "mse", x),
    "seed": lambda x: sharpness.gradient_covariance(NET, BATCH, "mse", 2, seed=x),
    "num_steps of an ascent": lambda x: sharpness.adaptive_sharpness(*LOSS, 0.5, x),
    "k of a relation": lambda x: sharpness.variance_flatness(*LOSS, NOISE, x),
    "k of a covariance": lambda x: NOISE.principal(x),
    "num_probes of an alignment": lambda x: sharpness.hessian_variance_alignment(
        MATRIX, MATRIX, num_probes=x
    ),
    "max_masks": lambda x: testing.expected_dropout_loss(*DROPS, max_masks=x),
    "max_masks of a report": lambda x: testing.check_regularizer(*DROPS, max_masks=x),
    "num_masks of draws": lambda x: regularizers.monte_carlo(*DROPS, num_masks=x),
    "num_samples": lambda x: regularizers.gauss_newton(*DROPS, num_samples=x),
    "trace_matvecs": lambda x: sharpness.hessian_variance_alignment(
        MATRIX, MATRIX, trace_matvecs=x
    ),
}
REALS = {
    "tol": lambda x: sharpness.top_eigenvalues(MATRIX, tol=x),
    "max_bytes": lambda x: sharpness.top_eigenvalues(MATRIX, max_bytes=x),
    "rtol": lambda x: sharpness.trace(MATRIX, 9, x),
    "rtol of draws": lambda x: regularizers.monte_carlo(*DROPS, rtol=x),
    "rtol of a report": lambda x: testing.check_regularizer(*DROPS, rtol=x),
    "max_bytes of a loss": lambda x: regularizers.modified_loss(
        *DROPS, kind="L1", max_bytes=x
    ),
    "bandwidth": lambda x: sharpness.spectral_density(MATRIX, 3, bandwidth=x),
    "rtol of a density": lambda x: sharpness.spectral_density(MATRIX, 3, rtol=x),
    "max_bytes of a density": lambda x: sharpness.spectral_density(
        MATRIX, 3, max_bytes=x
    ),
    "max_bytes of a covariance": lambda x: sharpness.gradient_covariance(
        NET, BATCH, "mse", 2, max_bytes=x
    ),
    "factor": lambda x: sharpness.interval_flatness(*LOSS, ALONG, x),
    "floor": lambda x: sharpness.interval_flatness(*LOSS, ALONG, floor=x),
    "reach": lambda x: sharpness.interval_flatness(*LOSS, ALONG, reach=x),
    "rho": lambda x: sharpness.sam_sharpness(*LOSS, x),
    "block_bytes": lambda x: sharpness.hessian(*LOSS, block_bytes=x),
    "factor of a relation": lambda x: sharpness.variance_flatness(
        *LOSS, NOISE, factor=x
    ),
}
STEPS = {
    "alphas": lambda x: sharpness.loss_slice(*LOSS, x, ALONG),
    "betas": lambda x: sharpness.loss_plane(*LOSS, [0.0], x, (ALONG, ALONG)),
    "alphas between": lambda x: sharpness.interpolate(NET, NET, "mse", BATCH, x),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_integers(name):
    named = f"`{name.split()[0]}`"
    for wrong in (5.5, "7", True):
        with pytest.raises(
            TypeError, match=f"{named} to be an integer, got .*"
        ) as said:
            COUNTS[name](wrong)
        assert repr(wrong) in str(said.value)
    with pytest.raises(ValueError, match=f"{named} >= "):
        COUNTS[name](-1)


@pytest.mark.parametrize("name", REALS)
def test_numbers_are_real_and_in_range(name):
    named = f"`{name.split()[0]}`"
    for wrong in ("7", True, torch.ones(2)):
        with pytest.raises(TypeError, match=f"{named} to be a real number"):
            REALS[name](wrong)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{named} >=? .*got {wrong}"):
            REALS[name](wrong)


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_a_row_of_numbers(name):
    named = name.split()[0]
    for wrong in (0.5, "7"):
        with pytest.raises(TypeError, match=f"`{named}` to be a row of numbers"):
            STEPS[name](wrong)
    with pytest.raises(TypeError, match=re.escape(f"`{named}[1]` to be a real number")):
        STEPS[name]([0.0, "7"])
    with pytest.raises(ValueError, match=re.escape(f"a finite `{named}[0]`, got nan")):
        STEPS[name]([float("nan")])


def test_what_is_in_range_passes():
    np = pytest.importorskip("numpy")
    for value in (3, np.int64(3)):
        check_count("f", "k", value, 3)
    for value in (0.0, np.float32(0.0), torch.tensor([0.0]), 0):
        check_real("f", "tol", value, least=0)
    check_real("f", "max_bytes", float("inf"), least=0, finite=False)
    for bad in (float("inf"), -0.0):
        with pytest.raises(ValueError, match="finite `rho` > 0"):
            check_real("f", "rho", bad, above=0)
    with pytest.raises(ValueError, match="a real `x`, got -inf"):
        check_real("f", "x", -float("inf"), finite=False)
