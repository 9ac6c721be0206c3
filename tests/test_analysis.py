"""The analysis: leaves no trace, records what the measures say, breaks nothing."""

import contextlib
import copy
import gc
import io
import pickle
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.measures import (
    Condensation,
    Masks,
    ReceivedGradient,
    Regularizer,
)
from torch_dropout_ir.module_calls import measuring

OPTIMIZER = sys.modules["torch.optim.optimizer"]


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def deep():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(16, 16), nn.Dropout(0.5, inplace=True), nn.Tanh(), nn.Linear(16, 3),
    )  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Dropout2d(0.3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def without_dropout():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


MODELS = (mlp, deep, convolutional, without_dropout)


def train(model, steps=6, optimizer=torch.optim.SGD, criterion=None, attach=None):
    """An ordinary script; returns everything that it leaves behind."""
    torch.manual_seed(1)
    criterion = criterion or nn.MSELoss()
    sgd = optimizer(model.parameters(), lr=0.05)
    trace = []
    with attach(model, sgd) if attach else contextlib.nullcontext() as analysis:
        for _ in range(steps):
            x, y = torch.randn(8, 6), torch.randn(8, 3)
            sgd.zero_grad()
            criterion(model(x), y).backward()
            trace += [p.grad.clone() for p in model.parameters()]
            sgd.step()
            model.eval()
            trace.append(model(x).detach())
            model.train()
    trace += [v.clone() for v in model.state_dict().values()]
    trace.append(torch.get_rng_state())
    trace += [m.training for m in model.modules()]
    return trace, analysis


def quiet(**options):
    def attach(model, _):
        return tdi.attach_analysis(model, log_dir=False, **options)

    return attach


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("make", MODELS)
def test_training_is_bit_identical(make, optimizer):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    bare, _ = train(twin, optimizer=optimizer)
    watched, analysis = train(model, optimizer=optimizer, attach=quiet(every=1))
    same(bare, watched)
    assert not analysis.absent or make is without_dropout, analysis.absent
    assert len(analysis.history["loss/R_S"]) == 6


def test_training_is_bit_identical_to_the_converted_models():
    torch.manual_seed(0)
    model = deep()
    twin = tdi.convert_dropout_(copy.deepcopy(model))
    bare, _ = train(twin)
    watched, analysis = train(model, attach=quiet(every=1, convert=True))
    same(bare, watched)
    assert [type(m) for m in model] == [type(m) for m in deep()]
    assert analysis.latest["mask/keep_rate/5"] > 0


def anatomy(model):
    """Everything of the modules that an attachment could change."""
    return [
        (
            type(m),
            m.training,
            sorted(m.__dict__),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._backward_hooks),
            len(m._state_dict_hooks),
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_detach_gives_the_model_back(make, convert):
    model = make()
    before, keys = anatomy(model), list(model.state_dict())
    pre = len(OPTIMIZER._global_optimizer_pre_hooks)
    post = len(OPTIMIZER._global_optimizer_post_hooks)
    _, analysis = train(model, attach=quiet(every=2, convert=convert))
    assert anatomy(model) == before and list(model.state_dict()) == keys
    # Less where those of forgotten ones were there.
    assert len(OPTIMIZER._global_optimizer_pre_hooks) <= pre
    assert len(OPTIMIZER._global_optimizer_post_hooks) <= post
    assert not nn.modules.module._global_forward_pre_hooks
    analysis.detach()
    assert analysis.latest and analysis.summary()
    with pytest.raises(RuntimeError, match="detached"):
        analysis.measure()
    train(model)
    assert analysis.step == 6


@pytest.mark.parametrize("where", ["forward", "loss", "interrupt"])
def test_an_exception_leaves_nothing_behind(where):
    class Fails(nn.Module):
        def forward(self, x):
            if where == "interrupt":
                raise KeyboardInterrupt
            if where == "forward":
                raise ZeroDivisionError
            return x

    model = mlp().append(Fails())
    before = anatomy(model)
    analysis = tdi.attach_analysis(model, "mse", log_dir=False, every=1)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        model(torch.ones(2, 6))
        raise ZeroDivisionError
    analysis.detach()
    assert anatomy(model) == before
    assert not nn.modules.module._global_forward_pre_hooks


def test_records_are_what_the_measures_say():
    """Each number against the function called by hand on the same state."""
    model = mlp()
    criterion = nn.MSELoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for step in range(3):
            sgd.zero_grad()
            criterion(model(x), y).backward()
            model.eval()
            h = model[:3](x)
            clean = criterion(model(x), y).item()
            r1 = tdi.regularizers.last_layer(h, model[3].weight, 0.5).item()
            ratio = tdi.condensation.effective_neurons(
                tdi.condensation.input_weights(model[0])
            ).ratio
            model.train()
            norm = sum(p.grad.square().sum() for p in model.parameters()).item()
            op = tdi.sharpness.hessian(model, "mse", (x, y))
            matrix = op.dense()
            sgd.step()
            got = analysis.latest
            assert got["regularizer/R1"] == pytest.approx(r1, rel=1e-5)
            assert got["regularizer/R1/2"] == got["regularizer/R1"]
            assert got["regularizer/R1_standard_error"] == 0
            assert got["loss/R_S"] == pytest.approx(clean, rel=1e-5)
            assert got["regularizer/R2"] == pytest.approx(0.1 / 4 * norm, rel=1e-5)
            assert got["loss/modified"] == pytest.approx(
                clean + r1 + 0.1 / 4 * norm, rel=1e-5
            )
            assert got["condensation/effective_ratio/0"] == ratio
            values = torch.linalg.eigvalsh(matrix)
            assert (values - got["sharpness/top_eigenvalue"]).abs().min() <= (
                got["sharpness/top_eigenvalue_residual"] + 1e-5
            )
            assert got["sharpness/top_eigenvalue"] == pytest.approx(
                float(values[-1]), rel=0.01
            )
            assert abs(got["sharpness/trace"] - float(matrix.trace())) < (
                6 * got["sharpness/trace_standard_error"] + 1e-4
            )
            assert analysis.history["regularizer/R1"][-1][0] == step
    assert "exact" in analysis.notes["regularizer/R1"]


def test_dropout_noise_is_unbiased():
    torch.manual_seed(0)
    model = mlp()
    batch = torch.randn(4, 6), torch.randn(4, 3)
    truth = tdi.regularizers.gradient_norm(model, batch, "mse", lr=0.1, num_masks=2000)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    start = copy.deepcopy(model.state_dict())
    from torch_dropout_ir.analysis.measures import DropoutNoise

    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[DropoutNoise()]
    ) as analysis:
        for _ in range(300):
            sgd.zero_grad()
            criterion(model(batch[0]), batch[1]).backward()
            sgd.step()
            model.load_state_dict(start)
    found = torch.tensor([
        v for _, v in analysis.history["regularizer/R2_dropout_noise"]
    ])
    error = (found.var() / 300 + truth.dropout_noise_standard_error**2).sqrt()
    assert (found.mean() - truth.dropout_noise).abs() < 4 * error
    errors = torch.tensor([
        v for _, v in analysis.history["regularizer/R2_dropout_noise_standard_error"]
    ])
    assert 0.6 < errors.square().mean() / found.var() < 1.5  # one degree of freedom


def test_two_masks_have_no_error_and_that_is_said():
    from torch_dropout_ir.analysis.measures import DropoutNoise

    model, (x, y) = mlp(), (torch.randn(4, 6), torch.randn(4, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[DropoutNoise(2)]
    ) as analysis:
        nn.MSELoss()(model(x), y).backward()
        sgd.step()
    tag = "regularizer/R2_dropout_noise"
    assert tag in analysis.latest and f"{tag}_standard_error" not in analysis.latest
    assert "num_masks=4" in analysis.absent[f"{tag}_standard_error"]


def of_sites(batch_of, steps, *, restore=True):
    """An analysis of R_1 alone, of a network with two sites."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    measures = [ReceivedGradient(), Regularizer(2)]
    said = []
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=measures
    ) as analysis:
        for step in range(steps):
            sgd.zero_grad()
            x, y = batch_of(step)
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
            model.load_state_dict(start)
            said.append(dict(analysis.absent))
    return analysis, said


def test_the_sites_errors_are_their_spread_and_the_modified_loss_has_that_of_r1():
    """Of equal samples one draw tells it without bias."""
    batch = torch.ones(1, 6).expand(10, 6), torch.zeros(10, dtype=torch.int64)
    analysis, said = of_sites(lambda _: batch, 300)
    history = analysis.history
    for site in ("0", "3"):
        parts, errors = (
            torch.tensor([v for _, v in history[f"regularizer/R1{of}/{site}"]])
            for of in ("", "_standard_error")
        )
        assert 0.75 < errors.square().mean() / parts.var() < 1.3
    modified = history["loss/modified_standard_error"]
    assert modified == history["regularizer/R1_standard_error"]
    assert len(modified) == 300 and not any(said)
    rows = analysis.summary().partition("by dropout site")[2].splitlines()
    (line,) = [x for x in rows if x.startswith("  3 ") and "+-" in x]
    assert float(line.split()[3]) == pytest.approx(float(errors[-1]), rel=0.05)


def test_parts_have_no_error_where_masks_hardly_differ():
    """As of one sample of eight units; the next batch has."""

    def batch(step):
        n = 1 if step == 1 else 5
        return torch.randn(n, 6), torch.zeros(n, dtype=torch.int64)

    analysis, said = of_sites(batch, 3)
    parts = "regularizer/R1_standard_error/<site>"
    assert [parts in x for x in said] == [False, True, False]
    for site in ("0", "3"):
        steps = [
            s for s, _ in analysis.history[f"regularizer/R1_standard_error/{site}"]
        ]
        assert steps == [0, 2]


def test_foreign_masks_are_observed_as_they_are():
    model = mlp()
    model[1], model[2] = nn.Sigmoid(), nn.Dropout(0.3)  # no zero reaches the dropout
    seen = []

    def note(module, _, output):
        if module.training and not measuring():
            seen.append(output != 0)

    model[2].register_forward_hook(note)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1) as analysis:
        for step in range(3):
            model(torch.randn(8, 6)).sum().backward()
            sgd.step()
            kept = torch.cat(seen)
            assert len(kept) == 8 * (step + 1)
            share = analysis.latest["mask/keep_rate/2"]
            assert share == pytest.approx(float(kept.float().mean()))
            counts = analysis._view.statistics()["2"].unit_kept
            assert torch.equal(counts, kept.sum(0))
    spread = (kept.numel() * 0.21) ** 0.5
    z = (float(kept.sum()) - 0.7 * kept.numel()) / spread
    assert analysis.latest["mask/z_score/2"] == pytest.approx(z, rel=1e-5)


class Halves(nn.Dropout):
    """Calls torch's function in a forward of its own, as spatial dropout does."""

    def forward(self, x):
        return super().forward(x) / 2


class Named(nn.Dropout):
    pass


def test_what_a_subclass_drops_in_a_forward_of_its_own_is_in_r1():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Halves(0.3), Named(0.2), nn.Linear(4, 3))
    batch = torch.randn(8, 6), torch.randn(8, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = [Regularizer(32), Masks()]
    options = {"log_dir": False, "every": 1, "measures": watch}
    with tdi.attach_analysis(model, **options) as analysis:
        F.mse_loss(model(batch[0]), batch[1]).backward()
        sgd.step()
    found = {site.name: site.observed for site in analysis.sites}
    assert found == {"2": True, "1:dropout#0": True}
    squares = (model[0](batch[0]) / 2).square() @ model[3].weight.square().sum(0)
    squares = squares.detach() / 24
    one, other = 0.3 / 0.7, 0.2 / 0.8
    truth = ((1 + one) * (1 + other) - 1) * float(squares.sum())
    error = analysis.latest["regularizer/R1_standard_error"]
    assert abs(analysis.latest["regularizer/R1"] - truth) < 4 * error < truth
    sites = tdi.regularizers.gauss_newton(model, batch, "mse", num_samples=None)
    torch.testing.assert_close(sites.per_site["1:dropout#0"], one * squares.sum())


@pytest.mark.parametrize("make", [mlp, deep, convolutional])
def test_observed_channels_and_elements_equal_the_layers_own(make):
    """The same numbers whether observed from outside or kept by our layer."""
    foreign, ours = make(), tdi.convert_dropout_(make())
    shapes = {}
    for model in (foreign, ours):
        _, analysis = train(model, steps=2, attach=quiet(every=1))
        rates = {t: v for t, v in analysis.latest.items() if t.startswith("mask/keep")}
        shapes[model] = sorted(rates)
        assert all(0 < v < 1 for v in rates.values())
    assert shapes[foreign] == shapes[ours] != []


def unseen(outputs, targets):
    """A loss that hands the targets to nothing that is looked at."""
    return (outputs.exp().sum(1).log() - outputs[range(8), targets.tolist()]).mean()


def test_loss_as_string_callable_and_data():
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    for loss in ("cross_entropy", F.cross_entropy, nn.CrossEntropyLoss()):
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with tdi.attach_analysis(model, loss, log_dir=False, every=1) as analysis:
            unseen(model(x), y).backward()
            sgd.step()
        assert analysis.latest["regularizer/R1"] > 0
        assert "loss/R_S" not in analysis.latest
        assert "pass `data=`" in analysis.absent["sharpness"]
        with tdi.attach_analysis(
            model, loss, log_dir=False, every=1, data=(x, y)
        ) as analysis:
            unseen(model(x), y).backward()
            sgd.step()
        assert {"loss/R_S", "sharpness/trace"} <= set(analysis.latest)
        assert not analysis.absent


def test_without_a_loss_the_summary_says_what_is_absent():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        F.dropout(model(torch.randn(4, 6))).sum().backward()
        sgd.step()
    assert analysis.loss is None
    assert "Pass `loss=`" in analysis.absent["regularizer"]
    assert "condensation/effective_ratio/0" in analysis.latest
    assert "regularizer/R2" in analysis.latest
    assert "absent measures" in analysis.summary()


def test_a_model_without_dropout_says_so():
    _, analysis = train(without_dropout(), attach=quiet(every=1))
    assert "no dropout with p > 0" in analysis.absent["masks"]
    assert "no dropout with p > 0" in analysis.absent["regularizer/R1"]
    assert "regularizer/R1" not in analysis.latest
    assert {"loss/R_S", "sharpness/trace", "regularizer/R2"} <= set(analysis.latest)
    text = analysis.summary()
    assert text.count("no dropout") >= 2


def test_sites_that_cannot_be_seen_are_listed_with_the_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(4, 4, num_layers=2, dropout=0.2)
            self.alpha = nn.AlphaDropout(0.3)
            self.plain = nn.Dropout(0.4)

    with tdi.attach_analysis(Model(), log_dir=False) as analysis:
        found = {site.name: site for site in analysis.sites}
        assert found["plain"].observed and found["plain"].p == 0.4
        for name in ("recurrent", "alpha"):
            assert not found[name].observed
            assert found[name].reason in analysis.summary()


def test_measure_off_cadence():
    model = mlp()
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1000) as analysis:
        assert "no call of the model" in str(analysis.measure() and analysis.absent)
        model(torch.randn(4, 6))
        found = analysis.measure()
        assert found["regularizer/R1"] == analysis.latest["regularizer/R1"]
        assert analysis.step == 0


def test_a_failing_measure_or_sink_never_stops_training():
    class Breaks:
        name = "breaks"
        needs = frozenset()

        def __call__(self, snapshot):
            torch.rand(7)
            raise MemoryError("full")

    class Full:
        def write(self, step, records, notes):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    bare, _ = train(mlp_seeded())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched, analysis = train(
            mlp_seeded(), attach=quiet(every=1, measures=[Breaks()], sinks=[Full()])
        )
    same(bare, watched)
    assert "MemoryError: full" in analysis.absent["breaks"]
    said = [str(w.message) for w in caught]
    assert sum("MemoryError" in s for s in said) == 1, "one warning, not one a step"
    assert sum("switched off" in s for s in said) == 1


def mlp_seeded():
    torch.manual_seed(0)
    return mlp()


def test_attaching_twice_and_wrong_arguments():
    model = mlp()
    before = anatomy(model)
    for arguments, error in (
        ({"loss": "l1"}, ValueError),
        ({"loss": 3}, TypeError),
        ({"every": 0}, ValueError),
        ({"every": "often"}, ValueError),
        ({"data": []}, ValueError),
        ({"budget": 1.0}, ValueError),
        ({"budget": "5%"}, ValueError),
        ({"loss": nn.MSELoss}, TypeError),
        ({"measures": Masks()}, TypeError),
        ({"measures": [Masks]}, TypeError),
        ({"measures": [3]}, TypeError),
        ({"sinks": [print]}, TypeError),
    ):
        with pytest.raises(error):
            tdi.attach_analysis(model, log_dir=False, convert=True, **arguments)
        assert anatomy(model) == before
    with pytest.raises(TypeError, match=r"nn\.Module"):
        tdi.attach_analysis(lambda x: x, log_dir=False)
    for place in (123, True, b"runs"):
        with pytest.raises(TypeError, match="expected `log_dir` to be a path"):
            tdi.attach_analysis(model, log_dir=place, convert=True)
        assert anatomy(model) == before
    with tdi.attach_analysis(model, log_dir=False):
        with pytest.raises(RuntimeError, match="already"):
            tdi.attach_analysis(model, log_dir=False)
    with tdi.attach_analysis(model, log_dir=False):
        pass
    assert anatomy(model) == before


def test_an_attached_model_can_be_copied_pickled_and_saved():
    model = mlp()
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1) as analysis:
        model(torch.randn(4, 6))
        file = io.BytesIO()
        torch.save(model, file)
        assert b"torch_dropout_ir" not in pickle.dumps(model)  # loads without it
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            before = analysis._capture.inputs
            twin(torch.randn(2, 6))
            assert analysis._capture.inputs is before
            with tdi.attach_analysis(twin, log_dir=False):
                pass


def test_several_optimizers_count_once():
    model = mlp()
    other = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    adam = torch.optim.Adam(model[2:].parameters(), lr=0.1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1) as analysis:
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
            other(torch.ones(2)).sum().backward()
            for optimizer in (foreign, sgd, adam):
                optimizer.step()
    assert analysis.step == 3
    with tdi.attach_analysis(
        model, "mse", log_dir=False, every=1, optimizer=adam
    ) as analysis:
        model(torch.randn(4, 6)).sum().backward()
        sgd.step()
        assert analysis.step == 0
        adam.step()
        assert analysis.step == 1
    assert "Adam" in analysis.notes["optimizer"]


def test_accumulation_and_evaluation_passes():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(4):
            criterion(model(torch.randn(4, 6)), torch.randn(4, 3)).backward()
        model.eval()
        criterion(model(torch.randn(100, 6)), torch.randn(100, 3))
        model.train()
        sgd.step()
        assert analysis._capture.inputs.first_tensor().shape == (4, 6)
        assert analysis.latest["loss/R_S"] > 0


def test_every_n_steps():
    _, analysis = train(mlp(), steps=7, attach=quiet(every=3))
    assert [step for step, _ in analysis.history["regularizer/R1"]] == [0, 3, 6]
    assert [s for s, _ in analysis.history["mask/keep_rate/2"]] == [0, 3, 6]


def test_state_dict_resumes():
    model = mlp()
    _, first = train(model, attach=quiet(every=2))
    second = tdi.attach_analysis(model, log_dir=False, every=2)
    second.load_state_dict(first.state_dict())
    assert second.step == 6
    with second:
        train(model, steps=3)
    steps = [step for step, _ in second.history["regularizer/R1"]]
    assert steps == [0, 2, 4, 6, 8]
    drawn = 8 * 16 * 5  # three observed before, two after
    assert second._view.statistics()["2"].num_elements == drawn


def test_a_state_is_not_changed_by_what_comes_after_it():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    watched = quiet(every=1, measures=[ReceivedGradient()])

    def step():
        nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        sgd.step()

    with watched(model, sgd) as analysis:
        step()
        state = analysis.state_dict()
        step()
        assert len(state["history"]["regularizer/R2"]) == 1
        analysis.load_state_dict(state)
        step()
        assert len(analysis.history["regularizer/R2"]) == 2
        assert len(state["history"]["regularizer/R2"]) == 1


def test_cadence_keeps_its_budget():
    cadence = Cadence("auto", 0.05, ["dear", "cheap"])
    prices = {"dear": 3.0, "cheap": 0.01}
    taken = dict.fromkeys(prices, 0)
    for step in range(20_000):
        for name in cadence.due(step):
            cadence.measured(name, prices[name])
            taken[name] += 1
        cadence.trained(0.1)
    assert cadence.share == pytest.approx(0.05, abs=0.005)
    assert taken["dear"] > 10 and taken["cheap"] > 1000
    before = dict(taken)
    cadence.trained(1e9)  # an idle night
    for step in range(10):
        for name in cadence.due(step):
            cadence.measured(name, prices[name])
            taken[name] += 1
    assert taken["dear"] <= before["dear"] + 1


def test_auto_measures_and_stays_cheap():
    _, analysis = train(mlp(), steps=300, attach=quiet())
    assert analysis.history["regularizer/R1"][0][0] == 0
    assert 0 < analysis.cost_share < 1


def test_the_analysis_dies_with_its_model():
    model = mlp()
    analysis = tdi.attach_analysis(model, log_dir=False)
    gone = weakref.ref(model)
    del model, analysis
    gc.collect()
    assert gone() is None


def test_the_analysis_lives_as_long_as_its_model():
    model = mlp()
    seen = []

    class Counts:
        name = "counts"
        needs = frozenset()

        def __call__(self, snapshot):
            seen.append(snapshot.step)
            return {}

    tdi.attach_analysis(model, log_dir=False, every=1, measures=[Counts()])
    gc.collect()
    train(model, steps=2)
    assert seen == [0, 1]


def test_measures_of_a_generator_are_all_taken():
    given = (measure for measure in [Masks(), Condensation()])
    with tdi.attach_analysis(mlp(), log_dir=False, measures=given) as analysis:
        assert analysis.measure().keys() > {"condensation/dead_neurons/0"}


def test_steps_between_measurements_may_be_a_number_of_numpys():
    cadence = Cadence(np.int64(3), 0.05, ["masks"])
    assert [step for step in range(7) if cadence.due(step)] == [0, 3, 6]


def test_measuring_by_hand_in_inference_mode():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        F.mse_loss(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        optimizer.step()
        with torch.inference_mode():
            found = analysis.measure()
            assert torch.is_inference_mode_enabled()
    assert not analysis.absent
    assert {"regularizer/R1", "sharpness/trace"} < found.keys()
