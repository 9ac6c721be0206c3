"""Steps at which nothing is due: what they call, compile and keep."""

import gc
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi

OURS = str(Path(tdi.__file__).parent)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def step(model, optimizer, size=8):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(torch.randn(size, 6)), torch.randn(size, 3)).backward()
    optimizer.step()


def calls_of_ours(function):
    """The functions of the package that run in a call, in order."""
    seen = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return seen


def test_an_analysis_that_was_dropped_leaves_no_hook():
    gc.collect()
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    before = calls_of_ours(lambda: step(model, sgd))
    dropped = mlp()
    tdi.attach_analysis(dropped, log_dir=False, measures=[])
    assert len(calls_of_ours(lambda: step(model, sgd))) > len(before)
    del dropped
    gc.collect()
    assert calls_of_ours(lambda: step(model, sgd)) == before


def test_little_runs_at_a_step_that_measures_nothing(monkeypatch):
    gc.collect()  # analyses of failed scripts, of other tests
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for every in (1000, "auto"):
        with tdi.attach_analysis(model, log_dir=False, every=every) as analysis:
            step(model, sgd)
            assert analysis.latest["loss/R_S"] > 0
            before, now = analysis._capture.inputs, time.perf_counter()
            # Slow steps would pay for what waits, and that be measured.
            monkeypatch.setattr(time, "perf_counter", lambda: now)  # noqa: B023
            for _ in range(3):
                seen = calls_of_ours(lambda: step(model, sgd, 5))
                assert len(seen) <= 7, seen  # their code is in no cache any more
            # No batch is held but the one that was measured.
            assert analysis._capture.inputs is before
            assert before.first_tensor().shape == (8, 6)
            assert analysis.step == 4
        monkeypatch.undo()


def test_a_step_that_measures_nothing_leaves_nothing_for_the_garbage_collector():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def left():
        step(model, sgd)
        gc.collect()
        before = gc.get_count()[0]
        for _ in range(100):
            step(model, sgd)
        return gc.get_count()[0] - before

    gc.disable()
    try:
        bare = left()
        for every in (100_000, "auto"):
            with tdi.attach_analysis(
                model, log_dir=False, every=every, measures=[]
            ) as analysis:
                assert left() <= bare + 20  # none of a step's own
            assert analysis.step == 101
    finally:
        gc.enable()


def test_compiled_code_is_compiled_once_whatever_is_due():
    for attach_first in (True, False):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        if not attach_first:
            model.compile(backend=backend)
        with tdi.attach_analysis(model, log_dir=False, every=2, measures=[]):
            called = torch.compile(model, backend=backend) if attach_first else model
            for _ in range(4):
                step(called, sgd)
        assert len(graphs) == 1


def test_an_optimizer_that_replaces_another_is_found_off_cadence():
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with tdi.attach_analysis(model, log_dir=False, every=1000) as analysis:
        for _ in range(3):
            step(model, first)
        for _ in range(5):
            step(model, second)
    assert analysis.step == 3 + 5 - 2


def test_every_measurement_sees_the_batch_of_its_step():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = []
    with tdi.attach_analysis(model, log_dir=False, every=3) as analysis:
        for _ in range(7):
            x, y = torch.randn(8, 6), torch.randn(8, 3)
            nn.functional.mse_loss(model(x), y).backward()
            sgd.step()
            model.eval()
            losses.append(nn.functional.mse_loss(model(x), y).item())
            model.train()
    assert [s for s, _ in analysis.history["loss/R_S"]] == [0, 3, 6]
    for s, value in analysis.history["loss/R_S"]:
        assert abs(value - losses[s]) < 1e-6


def _by_hand(model, passes):
    """Steps of which torch knows nothing; the functions of ours that each runs."""
    counts = []
    x, y = torch.randn(8, 6), torch.randn(8, 3)

    def once():
        nn.functional.mse_loss(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
                p.grad = None

    for _ in range(passes):
        counts.append(len(calls_of_ours(once)))
    return counts


@pytest.mark.parametrize("options, stride", [({}, 80), ({"every": 10}, 10)])
def test_passes_without_a_step_of_torchs_are_looked_at_seldom_in_the_end(
    options, stride
):
    gc.collect()
    model = mlp()
    with tdi.attach_analysis(model, log_dir=False, **options) as analysis:
        assert min(_by_hand(model, 501)) > 100
        counts = _by_hand(model, 2 * stride + 1)[1:]  # the first ends the look before
        assert sum(n > 100 for n in counts) == 2
        assert max(n for n in counts if n <= 100) < 40
        assert "few are looked at" in analysis.absent["optimizer steps"]
        # By hand it is measured as it is now, on the last batch that was seen.
        found = analysis.measure()
        assert found["regularizer/R1"] > 0 and "loss/R_S" in found
        if not options:
            return  # what was measured is to be paid off first
        # Once torch's optimizer steps, each step that is due is measured on its batch.
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(11):
            nn.functional.mse_loss(model(x), y).backward()
            sgd.step()
        step, last = analysis.history["loss/R_S"][-1]
    assert step > 0
    clean = nn.functional.mse_loss(model.eval()(x), y).item()
    assert last == pytest.approx(clean, rel=1e-5)
    assert [s for s, _ in analysis.history["loss/R_S"]].count(0) == 1  # by hand
