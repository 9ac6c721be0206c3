"""Torch's own settings, which are a script's: defaults, autocast, inference mode."""

import contextlib
import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_dropout_ir as tdi

R, S, C, T = tdi.regularizers, tdi.sharpness, tdi.condensation, tdi.testing


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(1, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(self.into(x[..., None]))[:, -1])


torch.manual_seed(3)
MLP = nn.Sequential(
    nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3)
)
ATTENTION = Attention()
BATCH = torch.randn(16, 6), torch.randint(3, (16,))
HALVES = [tuple(x[:8] for x in BATCH), tuple(x[8:] for x in BATCH)]
SMALL = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2))
PAIRS = torch.randn(3, 2), torch.randn(3, 2)
ROWS = torch.randn(40, 5)
LOSS = "cross_entropy"


def modified(kind, max_bytes, **lr):
    def gradient(model):
        model = copy.deepcopy(model)
        given = {"kind": kind, "r1": "gauss_newton", "max_bytes": max_bytes, **lr}
        value = R.modified_loss(model, BATCH, LOSS, **given)
        return [value, *torch.autograd.grad(value, [*model.parameters()])]

    return gradient


def hessian(model, **masks):
    return S.hessian(model, LOSS, BATCH, **masks)


def covariance(model):
    found = S.gradient_covariance(model, BATCH, LOSS, num_masks=3)
    return [found.trace(), found.principal(1), found @ torch.ones_like(found.mean)]


def trained(model):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, every=2, log_dir=False) as analysis:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
            optimizer.step()
    assert not analysis.absent
    return {k: v for k, v in analysis.history.items() if "cost" not in k}


def layer(_):
    dropout = tdi.Dropout2d(0.4)
    out = dropout(ROWS.view(2, 4, 5, 5))
    seen = dropout.statistics
    return [out, dropout.last_mask, (seen + seen).keep_rate, dropout.fingerprint]


FORMS = {
    "gauss_newton": lambda m: R.gauss_newton(m, BATCH, LOSS, num_samples=3),
    "gauss_newton, exact": lambda m: R.gauss_newton(m, BATCH, LOSS, num_samples=None),
    "second_order": lambda m: R.second_order(m, BATCH, LOSS, num_samples=2),
    "monte_carlo": lambda m: R.monte_carlo(m, BATCH, LOSS, num_masks=4),
    "gradient_norm": lambda m: R.gradient_norm(m, BATCH, LOSS, lr=0.1),
    "gradient_norm, batches": lambda m: R.gradient_norm(m, HALVES, LOSS, lr=0.1),
    "L1": modified("L1", 0),
    "regu": modified("regu", 0, lr=0.1),
    "regu, whole": modified("regu", None, lr=0.1),
}
CURVATURE = {
    "product": lambda m: hessian(m) @ dict(m.named_parameters()),
    "ggn": lambda m: S.ggn(m, LOSS, HALVES) @ dict(m.named_parameters()),
    "top_eigenvalues": lambda m: S.top_eigenvalues(hessian(m), 2, max_matvecs=30),
    "trace": lambda m: S.trace(hessian(m), num_matvecs=24),
    "trace at masks": lambda m: S.trace(hessian(m, masks=3), num_matvecs=9),
    "hutchpp": lambda m: S.trace(hessian(m), num_matvecs=9, method="hutchpp"),
    "density": lambda m: S.spectral_density(hessian(m), 4, num_probes=2),
    "slice": lambda m: S.loss_slice(m, LOSS, BATCH, [-0.5, 0.3]),
    "interpolate": lambda m: S.interpolate(m, m, LOSS, BATCH),
    "sam_sharpness": lambda m: S.sam_sharpness(m, LOSS, BATCH),
    "covariance": covariance,
    "alignment": lambda m: S.hessian_variance_alignment(
        hessian(m), S.gradient_covariance(m, BATCH, LOSS, num_masks=3), num_probes=2
    ),
    "used_parameters": lambda m: len(S.used_parameters(m, LOSS, BATCH)),
}
OTHERS = {
    "effective_neurons": lambda _: C.effective_neurons(ROWS, 0.6),
    "cosine_statistics": lambda _: C.cosine_statistics(ROWS),
    "cluster_order": lambda _: C.cluster_order(ROWS),
    "project_orientations": lambda _: C.project_orientations(ROWS),
    "movement": lambda _: C.movement(ROWS, ROWS + 1),
    "enumerate_masks": lambda _: [mask for mask, _ in T.enumerate_masks(2, 0.3)],
    "expected_dropout_loss": lambda _: T.expected_dropout_loss(SMALL, PAIRS, "mse"),
    "check_regularizer": lambda _: T.check_regularizer(SMALL, PAIRS, "mse").findings,
    "layer": layer,
    "attach_analysis": trained,
}
CALLS = {**FORMS, **CURVATURE, **OTHERS}


def numbers(found):
    if isinstance(found, Tensor):
        return [found.detach().double()]
    if dataclasses.is_dataclass(found):
        found = vars(found)
    if isinstance(found, dict):
        found = [*found.values()]
    if isinstance(found, (list, tuple)):
        return [*itertools.chain.from_iterable(map(numbers, found))]
    if not isinstance(found, (bool, int, float)):
        return []
    return [torch.tensor(float(found), dtype=torch.float64, device="cpu")]


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def compare(call, model, setting):
    seen = []
    for around in (contextlib.nullcontext(), setting):
        torch.manual_seed(0)
        with around:
            seen.append((numbers(call(model)), torch.get_rng_state()))
    (plain, before), (found, after) = seen
    assert plain and all(x.device.type == "cpu" for x in found)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=0, equal_nan=True)
    assert torch.equal(before, after)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("model", [MLP, ATTENTION], ids=["mlp", "attention"])
def test_no_default_device_moves_a_number(call, model):
    # Tensors that are made without a device have no values under this one; with a
    # model elsewhere than the default is they would not fit.
    compare(call, model, torch.device("meta"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_default_dtype_moves_a_number(call):
    compare(call, ATTENTION, default_dtype(torch.float64))


@pytest.mark.parametrize("call", CURVATURE.values(), ids=CURVATURE)
def test_curvature_is_of_full_precision_under_autocast(call):
    compare(call, MLP, torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("name", ["product", "trace", "sam_sharpness", "covariance"])
def test_curvature_in_inference_mode_is_named(name):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        CURVATURE[name](MLP)


def test_closed_forms_in_inference_mode_are_named():
    features, weight = torch.randn(4, 5), torch.randn(2, 5)
    given = {"outputs": features @ weight.T, "targets": torch.randn(4, 2)}
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        R.last_layer(features, weight, 0.3, loss=nn.HuberLoss(), **given)


@settings(max_examples=3)
@given(st.data())
def test_examples_of_strategies_are_on_the_cpu(data):
    with torch.device("meta"):
        model, batch = data.draw(T.problems())
    assert {x.device.type for x in (*model.parameters(), *batch)} == {"cpu"}
