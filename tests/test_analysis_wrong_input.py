"""What an analysis says to what it cannot take."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi


def test_a_state_of_something_else_is_refused_by_its_keys():
    model = nn.Linear(2, 2)
    with tdi.attach_analysis(model, log_dir=False) as analysis:
        for wrong, got in ((model.state_dict(), "bias"), ({}, "keys []"), (None, "No")):
            with pytest.raises(
                ValueError, match=r"expected what `analysis.*got"
            ) as err:
                analysis.load_state_dict(wrong)
            assert got in str(err.value)
        analysis.load_state_dict(analysis.state_dict())


def test_an_analysis_says_what_to_pickle_in_its_place():
    model = nn.Linear(2, 2)
    with tdi.attach_analysis(model, log_dir=False) as analysis:
        with pytest.raises(TypeError, match=r"save `analysis.state_dict\(\)`"):
            pickle.dumps(analysis)
        model.kept = analysis
        assert copy.deepcopy(model).kept is analysis
        assert repr(analysis) == "<Analysis of Linear at step 0>"


@pytest.mark.parametrize("criterion", [F.mse_loss, F.cross_entropy])
def test_a_site_that_drops_everything_has_its_r1_by_masks(criterion):
    layers = nn.Linear(4, 8), nn.Dropout(1.0), nn.Linear(8, 3)
    model = nn.Sequential(*layers)
    x, y = torch.randn(8, 4), torch.randn(8, 3).softmax(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        dropped = criterion(model(x), y)
        dropped.backward()
        sgd.step()
    expected = float((dropped - criterion(model.eval()(x), y)).detach())
    assert analysis.latest["regularizer/R1"] == pytest.approx(expected, abs=1e-6)
    assert "regularizer" not in analysis.absent
    assert "site `1`" in analysis.notes["regularizer/R1"]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_trainer_that_is_not_installed_is_named(name, monkeypatch):
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning", name):
        monkeypatch.setitem(sys.modules, package, None)
    module = f"torch_dropout_ir.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=f"got none: pip install {name}"):
        importlib.import_module(module)


def test_a_sink_that_fails_is_listed_with_its_reason():
    class Full:
        def write(self, step, records, notes):
            raise OSError("no space left")

        def close(self):
            pass

    with tdi.attach_analysis(
        nn.Linear(2, 2), log_dir=False, sinks=[Full()]
    ) as analysis:
        with pytest.warns(UserWarning, match="Full failed .*no space.* switched off"):
            analysis.measure()
        assert (
            analysis.absent["Full"] == "switched off at step 0; OSError: no space left"
        )
        assert "no space left" in analysis.summary()


def stepped(analysis, model, steps=1, criterion=F.cross_entropy):
    """Train a few steps on noise."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        criterion(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        sgd.step()
    return analysis.summary()


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def test_a_model_in_evaluation_mode_is_told_so():
    model = net().eval()
    with tdi.attach_analysis(model, log_dir=False) as analysis:
        said = stepped(analysis, model)
    assert "no pass of the model in training mode was seen" in said
    assert "inf s" not in said and "`model.train()`" in analysis.absent["masks"]


@pytest.mark.parametrize("batch", [
    (torch.randn(8, 5), torch.arange(8) % 3), (torch.randn(8, 4), torch.arange(7) % 3),
])  # fmt: skip
def test_what_fails_on_the_given_data_says_so(batch):
    model = net()
    with tdi.attach_analysis(model, data=batch, log_dir=False, every=1) as analysis:
        with pytest.warns(match="sharpness.* on `data`"):
            stepped(analysis, model)
        assert "Error on `data`:" in analysis.absent["sharpness"]
        assert "regularizer" not in analysis.absent  # on the step's own batch


@pytest.mark.parametrize(("loss", "error"), [
    ("cross_entropy", RuntimeError), (nn.BCEWithLogitsLoss(), ValueError),
])  # fmt: skip
def test_a_known_loss_says_what_it_was_called_with(loss, error):
    batch = torch.randn(8, 4), torch.randn(8, 5)
    with pytest.raises(error, match=r"outputs \[8, 3\].*and targets \[8, 5\]"):
        tdi.regularizers.gauss_newton(net(), batch, loss)


def test_a_batch_in_the_place_of_the_loss_is_told_the_order():
    batch = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(TypeError, match=r"got tuple. The order is `\(model, batch"):
        tdi.sharpness.hessian(net(), batch, "cross_entropy")


def test_an_optimizer_or_a_model_in_the_wrong_place_is_told_of():
    model = net()
    with pytest.raises(TypeError, match=r"got SGD.*finds the optimizer itself"):
        tdi.attach_analysis(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"got Sequential. `input_weights\(module\)`"):
        tdi.condensation.effective_neurons(model)


def test_measures_that_stayed_behind_are_named():
    model = net()
    with tdi.attach_analysis(model, log_dir=False, every=1000) as analysis:
        stepped(analysis, model, steps=5)
        assert "\nnothing was measured after step 0: the schedule" in analysis.summary()
        analysis.history["cost/seconds/gradient"].append((4, 0.0))
        rest = "condensation, dropout_noise, masks, regularizer, sharpness"
        (said,) = (x for x in analysis.summary().splitlines() if "was measured" in x)
    behind = said.removeprefix("of ").partition(" nothing was measured after step 0")
    assert sorted(behind[0].split(", ")) == rest.split(", ") and behind[1]


def test_the_note_of_the_loss_is_of_the_batch_that_it_was_measured_on():
    model = net()
    with tdi.attach_analysis(model, log_dir=False, every=1000) as analysis:
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
            sgd.step()
        assert analysis.notes["loss/R_S"] == ""  # of the step's own, at step 0
        analysis._take_and_write({"gradient"})  # as the schedule would
        assert analysis.notes["loss/R_S"] == ""
        analysis.measure()
    assert "of the batch of step 0" in analysis.notes["loss/R_S"]


def test_what_is_measured_after_the_gradients_are_cleared_needs_none():
    model = net()
    with tdi.attach_analysis(model, log_dir=False, every=1000) as analysis:
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
            sgd.step()
            sgd.zero_grad()
        found = analysis.measure()
        said = analysis.summary()
        del sgd
        analysis.measure()
    assert "the optimizer is gone" in analysis.absent["dropout_noise"]
    assert {"regularizer/R1", "regularizer/R2_dropout_noise"} <= set(found)
    assert "regularizer/R2" not in found
    assert "or they are cleared" in analysis.absent["gradient"]
    assert "was measured after step" not in said  # the reason is told
