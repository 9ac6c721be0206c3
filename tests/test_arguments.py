"""Numbers that are none, or out of range: said by name, before anything is computed."""

import re

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation, regularizers, sharpness, testing
from torch_dropout_ir.analysis import measures
from torch_dropout_ir.arguments import check_count, check_real
from torch_dropout_ir.offline import analyze
from torch_dropout_ir.tensorboard import TensorBoardSink

MATRIX = torch.eye(6)
NET = nn.Linear(3, 2)
BATCH = torch.ones(5, 3), torch.zeros(5, 2)
ALONG = {n: torch.ones_like(x) for n, x in NET.named_parameters()}
LOSS = NET, "mse", BATCH
WEIGHTS = torch.eye(4)
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
    "num_masks of pairs": lambda x: regularizers.gradient_norm(
        *DROPS, lr=0.1, num_masks=x
    ),
    "num_masks of R_1": lambda x: measures.Regularizer(x),
    "num_masks of R_2": lambda x: measures.DropoutNoise(x),
    "num_masks of a checkpoint": lambda x: analyze(*DROPS, num_masks=x),
    "most_batches": lambda x: analyze(*DROPS, most_batches=x),
    "seed of frozen masks": lambda x: tdi.frozen_masks(NET, x).__enter__(),
    "seed of a report": lambda x: testing.check_regularizer(*DROPS, seed=x),
    "bins": lambda x: condensation.cosine_statistics(WEIGHTS, bins=x),
    "num_heads": lambda x: condensation.input_weights(NET, num_heads=x),
    "head": lambda x: condensation.input_weights(NET, num_heads=1, head=x),
    "max_width": lambda x: testing.networks(max_width=x),
    "max_samples": lambda x: testing.batches(nn.Sequential(NET), max_samples=x),
    "max_image": lambda x: measures.Condensation(max_image=x),
    "max_bytes of an event": lambda x: TensorBoardSink(max_bytes=x),
    **{
        f"{name} of a measure": lambda x, name=name: measures.Sharpness(**{name: x})
        for name in ("max_matvecs", "trace_matvecs", "density_steps", "slice_points")
    },
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
    "max_change": lambda x: condensation.merge_condensed(NET, BATCH[0], max_change=x),
    "min_amplitude of a measure": lambda x: measures.Condensation(min_amplitude=x),
    "max_operations": lambda x: measures.Condensation(max_operations=x),
    "tol of a measure": lambda x: measures.Sharpness(tol=x),
    "max_parameters": lambda x: measures.Sharpness(max_parameters=x),
    "max_bytes of a measure": lambda x: measures.Sharpness(max_bytes=x),
    "factor of a relation": lambda x: sharpness.variance_flatness(
        *LOSS, NOISE, factor=x
    ),
}
FLAGS = {
    "shared_mask": lambda x: regularizers.gradient_norm(*DROPS, lr=0.1, shared_mask=x),
    "training": lambda x: tdi.dropout(BATCH[0], 0.5, x),
    "convert": lambda x: tdi.attach_analysis(DROPS[0], log_dir=False, convert=x),
    "least_squares": lambda x: condensation.merge_condensed(
        NET, BATCH[0], least_squares=x
    ),
    "run_own_code": lambda x: condensation.outgoing_weights(NET, run_own_code=x),
    "coupled": lambda x: testing.expected_dropout_loss(*DROPS, coupled=x),
    "sharpness": lambda x: analyze(*DROPS, sharpness=x),
    "progress": lambda x: analyze(*DROPS, progress=x),
}
WORDS = {
    "sites": lambda x: testing.networks(sites=x),
    "loss": lambda x: testing.batches(nn.Sequential(NET), loss=x),
    "loss of problems": lambda x: testing.problems(loss=x),
    "coupling": lambda x: measures.Sharpness(coupling=x),
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


def test_the_fewest_that_make_sense_are_said():
    """One product, step, draw, component; two where a spread is to be told."""
    least = {
        "k": 1, "num_steps": 1, "num_probes": 1, "num_steps of an ascent": 1,
        "k of a relation": 1, "k of a covariance": 1, "num_samples": 1, "bins": 1,
        "num_masks": 2, "num_masks of draws": 2, "num_probes of an alignment": 2,
        "num_matvecs": 2, "trace_matvecs": 2, "seed": 0, "head": 0,
        "trace_matvecs of a measure": 2,
    }  # fmt: skip
    for name, fewest in least.items():
        with pytest.raises(ValueError, match=f"`{name.split()[0]}` >= {fewest}, got"):
            COUNTS[name](fewest - 1)


@pytest.mark.parametrize("name", REALS)
def test_numbers_are_real_and_in_range(name):
    named = f"`{name.split()[0]}`"
    for wrong in ("7", True, torch.ones(2)):
        with pytest.raises(TypeError, match=f"{named} to be a real number"):
            REALS[name](wrong)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{named} >=? .*got {wrong}"):
            REALS[name](wrong)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name):
    for wrong in ("no", 0, 1.0, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"`{name}` to be True or False, got ") as e:
            FLAGS[name](wrong)
        assert repr(wrong) in str(e.value)


@pytest.mark.parametrize("name", WORDS)
def test_words_are_those_that_are_known(name):
    named = name.split()[0]
    for wrong in ("no", None, True, []):
        with pytest.raises(ValueError, match=f"`{named}` to be '.*' or '.*', got "):
            WORDS[name](wrong)


def test_nothing_is_not_the_default():
    """An empty list, or 0, is not None."""
    with pytest.raises(TypeError, match="`sinks`"):
        tdi.attach_analysis(DROPS[0], log_dir=False, sinks=0)
    for directions in ((), ALONG):
        with pytest.raises(TypeError, match="a pair of dictionaries"):
            sharpness.loss_plane(*LOSS, [0.0], directions=directions)
    with pytest.raises(ValueError, match="`masks`"):
        sharpness.hessian(*LOSS, masks=b"7")
    with pytest.raises(TypeError, match="`lr` to be a real number"):
        regularizers.gradient_norm(*DROPS, lr=True)
    with pytest.raises(ValueError, match="an even `num_masks`, got 3"):
        measures.DropoutNoise(3)
    for wrong in ("7", True, None):
        with pytest.raises(TypeError, match="`threshold` to be a real number"):
            condensation.effective_neurons(WEIGHTS, wrong)
        with pytest.raises(TypeError, match="`min_amplitude` to be a real number"):
            condensation.effective_neurons(WEIGHTS, 0.9, wrong)


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
