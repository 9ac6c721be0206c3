"""Whatever fails, training goes on; whatever cannot be watched is said at once."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir import sinks
from torch_dropout_ir.analysis import attempts, capture, measures, records
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.signal_handlers import handlers_raise
from torch_dropout_ir.analysis.snapshot import Snapshot
from torch_dropout_ir.dropout_calls import DropoutCalls
from torch_dropout_ir.tensorboard import sink


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(16, 3),
    )  # fmt: skip


def train(model, steps, loss=None, **options):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(1)
    options = {"log_dir": False, "every": 1, **options}
    with tdi.attach_analysis(model, loss, **options) as analysis:
        for _ in range(steps):
            sgd.zero_grad()
            nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
            sgd.step()
    return analysis


class Says:
    """Calls a function of the step."""

    name = "says"
    needs = frozenset()

    def __init__(self, function):
        self.function = function
        self.tried = []

    def __call__(self, snapshot):
        self.tried.append(snapshot.step)
        return {"says/x": self.function(snapshot.step)}


def fails(_):
    raise MemoryError("full")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.tensor(-torch.inf)]
)
def test_what_is_no_number_is_left_out_with_the_reason(value):
    says = Says(lambda step: value if step < 2 else 1.0)
    analysis = train(mlp(), 2, measures=[says])
    assert "says/x" not in analysis.latest
    assert f"{float(value)} at step 1" in analysis.absent["says/x"]
    says.tried.clear()
    analysis = train(mlp(), 4, measures=[says])
    assert analysis.history["says/x"] == [(2, 1.0), (3, 1.0)]
    assert not analysis.absent


def test_a_failing_measure_is_retried_ever_less_often_and_switched_off():
    says = Says(fails)
    with pytest.warns(UserWarning, match="MemoryError: full") as caught:
        analysis = train(mlp(), 400, measures=[says])
    assert len(says.tried) == attempts.MOST_FAILURES
    gaps = [b - a for a, b in zip(says.tried, says.tried[1:], strict=False)]
    assert says.tried[0] == 0 and gaps == sorted(gaps) and gaps[-1] > 4 * gaps[1]
    assert "switched off after 6 failures; MemoryError: full" in analysis.absent["says"]
    assert len(caught) == 2, "when it fails first, and when it is switched off"
    assert "switched off" in analysis.summary()


def test_only_failures_on_end_switch_a_measure_off():
    says, absent = Says(fails), {}
    tries = attempts.Attempts([says], Ranks(), absent)
    snapshot = Snapshot(model=mlp(), step=0, sites=())
    with pytest.warns(UserWarning, match="full"):
        for works in [False] * 5 + [True] + [False] * 5:
            says.function = (lambda step: 1.0) if works else fails
            tries.take(snapshot, {"says"}, seed=0)
        assert tries.willing({"says"}, 10**9) and "switched off" not in absent["says"]
        tries.take(snapshot, {"says"}, seed=0)
    assert not tries.willing({"says"}, 10**9) and "switched off" in absent["says"]


def test_a_measure_that_works_again_is_taken_again():
    def at_first(step):
        return fails(step) if step < 5 else float(step)

    says = Says(at_first)
    with pytest.warns(UserWarning, match="full"):
        analysis = train(mlp(), 40, measures=[says])
    steps = [step for step, _ in analysis.history["says/x"]]
    assert 5 <= steps[0] < 12 and steps == list(range(steps[0], 40))
    assert not analysis.absent


def test_what_is_switched_off_can_be_measured_by_hand():
    says = Says(fails)
    with pytest.warns(UserWarning, match="full"):
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with tdi.attach_analysis(
            model, log_dir=False, every=1, measures=[says]
        ) as analysis:
            for _ in range(400):
                sgd.step()
            says.function = lambda step: 2.0
            assert analysis.measure()["says/x"] == 2.0


def test_measuring_by_hand_returns_what_it_has_found_and_nothing_older():
    says = Says(lambda step: 1.0)
    with tdi.attach_analysis(mlp(), log_dir=False, measures=[says]) as analysis:
        assert analysis.measure()["says/x"] == 1.0
        says.function = fails
        with pytest.warns(UserWarning, match="full"):
            assert "says/x" not in analysis.measure()


def test_a_sink_that_is_opened_late_is_opened_once_and_closed():
    kept, opened = sinks.Memory(), []
    late = records.Postponed(lambda: (opened.append(1), kept)[1])
    late.close()
    assert not opened
    for step in range(2):
        late.write(step, {"x": 1.0}, {})
    late.close()
    assert len(opened) == 1 and len(kept.records["x"]) == 2 and kept.closed


class RunsOut(measures.Regularizer):
    """Moves generators, modes and buffers, then finds no memory."""

    name = "runs_out"

    def __init__(self, until):
        super().__init__()
        self.until, self.tried = until, []

    def __call__(self, snapshot):
        self.tried.append(snapshot.step)
        super().__call__(snapshot)
        torch.rand(3)
        if snapshot.step < self.until:
            snapshot.model(snapshot.inputs.args[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return {"runs_out/x": 1.0}


@pytest.mark.parametrize("until", [5, 10**9])
def test_where_memory_runs_out_training_is_the_same(until):
    def run(attach):
        model, seen = mlp(), []
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        runs_out = RunsOut(until)
        with contextlib.ExitStack() as stack:
            if attach:
                analysis = tdi.attach_analysis(
                    model, log_dir=False, every=1,
                    measures=[runs_out, measures.ReceivedGradient()],
                )  # fmt: skip
                stack.enter_context(analysis)
            for _ in range(150):
                adam.zero_grad()
                x, y = torch.randn(8, 6), torch.randn(8, 3)
                nn.MSELoss()(model(x), y).backward()
                adam.step()
                seen.append(traces.left_behind(model, adam))
        return seen, attach and analysis, runs_out.tried

    plain, *_ = run(False)
    with pytest.warns(UserWarning, match="OutOfMemoryError: CUDA out of memory"):
        seen, analysis, tried = run(True)
    assert seen == plain
    assert len(analysis.history["regularizer/R2"]) == 150
    if until == 5:
        again = analysis.history["runs_out/x"][0][0]
        assert 5 <= again < 12 and not analysis.absent
    else:
        assert len(tried) == attempts.MOST_FAILURES
        assert "switched off after 6 failures" in analysis.absent["runs_out"]
        assert "Tried to allocate 9 GiB" in analysis.absent["runs_out"]


def test_an_unsupported_operation_leaves_the_other_measures():
    class Once(torch.autograd.Function):
        """It has a gradient that has none."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return Once.apply(self.body(x))

    with pytest.warns(UserWarning, match="sharpness"):
        analysis = train(Model(), 3)
    assert "once differentiable" in analysis.absent["sharpness"]
    assert len(analysis.history["regularizer/R1"]) == 3
    assert len(analysis.history["condensation/effective_ratio/body.0"]) == 3


def test_sites_without_a_part_are_said_to_lack_it():
    """Where derivatives do not reach them, here in `torch.no_grad`."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = False, nn.Linear(3, 3)
            self.drops = nn.ModuleList(nn.Dropout(0.3) for _ in range(2))

        def forward(self, x):
            with torch.set_grad_enabled(not self.hidden):
                x = self.drops[0](x)
            return self.out(self.drops[1](x))

    net = Model()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        for net.hidden in (True, False):
            nn.functional.l1_loss(net(x), y).backward()
            sgd.step()
            sgd.zero_grad()
            assert "regularizer/R1" in analysis.latest
            assert ("regularizer/R1/drops.1" in analysis.latest) != net.hidden
            lacks = analysis.absent.get("regularizer/R1/<site>", "")
            assert ("torch.no_grad" in lacks) == net.hidden == bool(lacks)


@pytest.mark.parametrize("convert", [False, True])
def test_an_interrupt_in_a_measure_leaves_nothing_behind(convert):
    class Stops(measures.Regularizer):
        def __call__(self, snapshot):
            def stop(*_):
                raise KeyboardInterrupt

            torch.rand(5)
            for module in snapshot.model.modules():
                module.eval()
            handle = snapshot.model[4].register_forward_hook(stop)
            try:
                return super().__call__(snapshot)
            finally:
                handle.remove()
                snapshot.model.train()

    def anatomy(model):
        return [
            (type(m), m.training, sorted(m.__dict__), len(m._forward_hooks),
             len(m._forward_pre_hooks)) for m in model.modules()
        ]  # fmt: skip

    model = mlp()
    before = anatomy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    analysis = tdi.attach_analysis(
        model, "mse", log_dir=False, every=1, convert=convert, measures=[Stops()]
    )
    nn.MSELoss()(model(x), y).backward()
    kept = [v.clone() for v in (*model.state_dict().values(), torch.get_rng_state())]
    with pytest.raises(KeyboardInterrupt):
        sgd.step()
    now = [*model.state_dict().values(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    analysis.detach()
    assert anatomy(model) == before
    assert not nn.modules.module._global_forward_hooks


def test_an_interrupt_in_the_end_of_a_context_leaves_nothing_behind():
    class LeavesOpen:
        name, needs = "open", frozenset()

        def __call__(self, snapshot):
            named = [*snapshot.model.named_modules()]
            DropoutCalls(named, lambda site, h: h).__enter__()
            raise KeyboardInterrupt

    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    with tdi.attach_analysis(model, log_dir=False, measures=[LeavesOpen()]):
        model(torch.randn(8, 6)).square().mean().backward()
        with pytest.raises(KeyboardInterrupt):
            sgd.step()
        assert not torch._C._len_torch_function_stack()
        assert (model[3](torch.ones(99)) == 0).any()
        hooked = [m for m in model[1:] if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked
    assert not model._forward_hooks and not model._forward_pre_hooks


class OverTime(Exception):
    pass


@pytest.fixture
def time_limit():
    """A handler that raises, as of a limit of time."""

    def over(*_):
        raise OverTime from ValueError("cause")

    before = signal.signal(signal.SIGTERM, over)
    yield over
    signal.signal(signal.SIGTERM, before)


class Interrupted(nn.Module):
    armed = False

    def forward(self, x):
        if self.armed:
            signal.raise_signal(signal.SIGTERM)
        return x


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_a_signal_handler_raises_in_a_measure_is_the_scripts(time_limit, by_hand):
    model = nn.Sequential(*mlp(), Interrupted())
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        model(torch.randn(8, 6)).square().mean().backward()
        kept = [x.clone() for x in model.state_dict().values()]
        model[-1].armed = True
        with pytest.raises(OverTime) as raised:
            analysis.measure() if by_hand else sgd.step()
        assert isinstance(raised.value.__cause__, ValueError)
        assert signal.getsignal(signal.SIGTERM) is time_limit
        assert all(map(torch.equal, kept, model.state_dict().values()))
        assert all(m.training for m in model.modules())
        model[-1].armed = False
        model(torch.randn(8, 6)).square().mean().backward()
        sgd.step()
        assert "regularizer/R1" in analysis.latest


@pytest.mark.parametrize("kind", ["plain", "partial", "once", "of any arguments"])
def test_what_a_signal_handler_raises_while_a_pass_is_looked_at_is_the_scripts(
    time_limit, monkeypatch, kind
):
    def late(*_):
        signal.raise_signal(signal.SIGTERM)

    def once(number, _):
        signal.signal(number, time_limit)
        raise OverTime

    if kind == "partial":
        time_limit = functools.partial(time_limit, "job")
        signal.signal(signal.SIGTERM, time_limit)
    elif kind == "once":
        signal.signal(signal.SIGTERM, once)
    elif kind == "of any arguments":
        over = time_limit
        time_limit = lambda *call: over(*call)  # noqa: E731
        signal.signal(signal.SIGTERM, time_limit)
    with tdi.attach_analysis(model := mlp(), log_dir=False, every=1):
        monkeypatch.setattr(capture, "not_again", late)
        with pytest.raises(OverTime):
            model(torch.randn(8, 6))
        assert signal.getsignal(signal.SIGTERM) is time_limit


def test_a_signal_handler_that_puts_another_in_its_place(time_limit):
    def again(*_):
        signal.signal(signal.SIGTERM, time_limit)

    signal.signal(signal.SIGTERM, again)
    train(mlp(), 1, measures=[Says(lambda _: signal.raise_signal(signal.SIGTERM))])
    assert signal.getsignal(signal.SIGTERM) is time_limit


def test_a_signal_handler_that_goes_on_to_the_one_it_found(time_limit):
    def chains(_):
        found = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *call: found(*call))

    train(mlp(), 1, measures=[Says(chains)])
    with pytest.raises(OverTime):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_arrives_while_handlers_are_put_back(time_limit, monkeypatch):
    def late(number, handler):
        if handler is time_limit:
            signal.raise_signal(number)
        return put(number, handler)

    put = signal.signal
    with pytest.raises(OverTime), handlers_raise():
        monkeypatch.setattr(signal, "signal", late)
    monkeypatch.undo()
    with pytest.raises(OverTime), handlers_raise():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("a measure's own `except` has it")


def test_where_the_scripts_directory_is_gone_a_relative_log_dir_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError, match="log_dir=False"):
        tdi.attach_analysis(mlp(), log_dir="runs")


def test_after_an_interrupt_costs_are_of_the_measurement_alone():
    class Slow(nn.Module):
        seconds = 0.0

        def forward(self, x):
            time.sleep(self.seconds)
            return x

    def interrupted(step):
        if model[-1].seconds:
            raise KeyboardInterrupt
        return 1.0

    model = nn.Sequential(*mlp(), Slow())
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    chosen = [measures.Masks(), Says(interrupted)]
    with tdi.attach_analysis(model, log_dir=False, measures=chosen) as analysis:
        model(torch.randn(8, 6)).square().mean().backward()
        model[-1].seconds = 0.3
        with pytest.raises(KeyboardInterrupt):
            sgd.step()
        model[-1].seconds = 0.0
        sgd.step()
    assert analysis.latest["cost/seconds/masks"] < 0.3


class ChoosesItsRate(torch.optim.Optimizer):
    def __init__(self, params, **given):
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure=None):
        for x in self.param_groups[0]["params"]:
            x -= 0.01 * x.grad


@pytest.mark.parametrize("given", [{"lr": None}, {}])
def test_without_a_rate_there_is_no_r2_and_all_else(given):
    model = mlp()
    optimizer = ChoosesItsRate(model.parameters(), **given)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        optimizer.step()
    assert {"regularizer/R1", "sharpness/trace"} <= analysis.latest.keys()
    assert "regularizer/R2" not in analysis.latest
    assert analysis.absent.keys() == {"gradient", "dropout_noise"}
    assert all("no number `lr`" in why for why in analysis.absent.values())


SCRIPT = """
import resource, sys, time, warnings
import torch, torch_dropout_ir as tdi
from torch import nn
torch.set_num_threads(1)  # two that wait for each other take minutes on a busy machine
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 2))
sgd = torch.optim.SGD(model.parameters(), lr=0.01)
analysis = tdi.attach_analysis(model, nn.MSELoss(), log_dir=sys.argv[1], every=1)
for step in range(int(sys.argv[3])):
    sgd.zero_grad()
    nn.MSELoss()(model(torch.randn(8, 4)), torch.randn(8, 2)).backward()
    sgd.step()
print("trained", step + 1, analysis.latest["regularizer/R1"], flush=True)
"""


def started(folder, how, steps):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how, str(steps)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_in(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "regularizer/R1" not in found.Tags()["scalars"]:
        return []
    return [event.step for event in found.Scalars("regularizer/R1")]


def test_on_a_full_disk_training_goes_on(tmp_path):
    with started(tmp_path, "full", 40) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "trained 40" in out
    assert "TensorBoardSink" in err and "`history` goes on" in err
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 20_000


def test_killed_at_any_moment_what_was_flushed_is_readable(tmp_path):
    with started(tmp_path, "killed", 10**9) as process:
        deadline = time.time() + 60
        while time.time() < deadline and len(steps_in(tmp_path)) < 5:
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    steps = steps_in(tmp_path)
    assert len(steps) >= 5 and steps == list(range(len(steps)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_writer_that_dies_or_hangs_holds_nothing_up(tmp_path, monkeypatch, how):
    writes = threading.Event()

    def write(*_):
        if how == "dies":
            raise SystemExit
        writes.wait()

    monkeypatch.setattr(sink, "_PATIENCE", 0.1)
    monkeypatch.setattr(sink, "_MOST_WAITING", 4)
    monkeypatch.setattr(sink.TensorBoardSink, "_write", write)
    closed, unregister = [], sink.atexit.unregister
    monkeypatch.setattr(
        sink.atexit, "unregister", lambda f: (closed.append(f), unregister(f))
    )
    said = "has died" if how == "dies" else "nothing was written in 0 s"
    with pytest.warns(UserWarning, match=f"TensorBoardSink failed.*{said}"):
        analysis = train(mlp(), 20, log_dir=tmp_path)
    writes.set()
    assert len(analysis.history["regularizer/R1"]) == 20
    assert len(closed) == 1, "nor does it hold up the end of the script"


def test_off_cadence_there_is_one_hook_and_no_more():
    model, seen = mlp(), []
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)

    def count(*_):
        every = [h for m in model.modules() for h in m._forward_hooks.values()]
        every += [h for m in model.modules() for h in m._forward_pre_hooks.values()]
        seen.append(len(every) + len(nn.modules.module._global_forward_hooks) - 1)

    model[0].register_forward_hook(count)
    with tdi.attach_analysis(model, log_dir=False, every=3):
        for _ in range(3):
            nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
            sgd.step()
        for off_cadence in (False, True, True):
            outputs = model(torch.randn(8, 6))
            assert bool(nn.modules.module._global_forward_hooks) != off_cadence
            outputs.sum().backward()
            sgd.step()
            if not off_cadence:
                seen.clear()  # the measures' own passes
        assert seen == [1, 1]


def test_state_resumes_the_schedule():
    cadence = Cadence("auto", 0.1, ["dear", "cheap"])
    cadence.measured("dear", 5.0)
    cadence.trained(1.0)
    model = mlp()
    first = train(model, 4, every="auto", budget=0.5)
    second = tdi.attach_analysis(model, log_dir=False, budget=0.5)
    second.load_state_dict(first.state_dict())
    second.detach()
    # How long a pass takes is of the machine that goes on.
    assert second._cadence.numbers() == first._cadence.numbers() | {"pass": 0.0}
    assert second.history == first.history and second.step == 4
    other = Cadence("auto", 0.1, ["dear", "cheap"])
    other.load_state_dict(cadence.state_dict())
    assert other.due(1) == cadence.due(1) == ["cheap"]


def test_after_the_second_measurement_the_share_is_within_the_budget():
    cadence, taken, shares = Cadence("auto", 0.05, ["dear", "cheap"]), {}, []
    for step in range(3000):
        for name in cadence.due(step):
            cadence.measured(name, {"dear": 0.7, "cheap": 0.02}[name])
            taken[name] = taken.get(name, 0) + 1
        cadence.trained(0.1)
        if taken["dear"] > 1:
            shares.append(cadence.share)
    assert taken["dear"] > 5 and taken["cheap"] > 100
    assert max(shares) <= 0.05 and shares[-1] > 0.04  # and it is used


def test_what_lacks_is_looked_for_as_if_it_cost_a_step():
    cadence = Cadence("auto", 0.05, ["lacks"])
    looked = []
    for step in range(1000):
        if cadence.due(step):
            looked.append(step)
            cadence.put_off("lacks", step)
        cadence.trained(0.1)
    gaps = [b - a for a, b in itertools.pairwise(looked[1:])]
    assert len(gaps) > 20 and set(gaps) <= {19, 20}  # a twentieth of the steps
    assert cadence.share == 0


# --- bad input


def test_parameters_without_data_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    with pytest.raises(ValueError, match=r"'0\.weight' first.*Materialize"):
        tdi.attach_analysis(model, log_dir=False)
    assert not model._forward_hooks


def test_buffers_without_data_are_refused():
    norm = nn.BatchNorm1d(3)
    norm.running_mean = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"'1\.running_mean' first"):
        tdi.attach_analysis(nn.Sequential(nn.Linear(3, 3), norm), log_dir=False)


def test_a_model_that_is_quantized_in_part_is_said():
    model = mlp()
    model.packed = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="quantized in part.*int8"):
        analysis = tdi.attach_analysis(model, "mse", log_dir=False)
    assert "quantized in part" in analysis.summary()
    analysis.detach()


def test_an_optimizer_over_other_parameters_is_refused():
    model, other = mlp(), mlp()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD over others"):
        tdi.attach_analysis(model, log_dir=False, optimizer=sgd)
    assert not model._forward_hooks


@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantization:UserWarning")
def test_a_model_that_does_not_train_is_said():
    frozen = mlp().requires_grad_(False)
    bits = nn.Sequential(nn.Dropout())
    bits.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    for model, said in ((frozen, "no parameter"), (bits, "quantized.*int8")):
        with pytest.warns(UserWarning, match=said):
            analysis = tdi.attach_analysis(model, "mse", log_dir=False)
        assert "no training to watch" in analysis.summary()
        analysis.detach()
    with pytest.warns(UserWarning, match="no parameter"):
        with tdi.attach_analysis(frozen, "mse", log_dir=False) as analysis:
            frozen(torch.randn(4, 6))
            assert analysis.measure()["regularizer/R1"] > 0


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = mlp(), kind

    def forward(self, x, labels=None):
        h = self.body[:4](x)
        return self.kind(self.body[4](h), h)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (lambda y, h: (y, h), lambda out: out[0]),
        (lambda y, h: {"logits": y, "hidden": h}, lambda out: out["logits"]),
        (Output, lambda out: out.logits),
    ],
    ids=["tuple", "dict", "dataclass"],
)
@pytest.mark.parametrize("source", ["labels", "data"])
def test_the_loss_callable_decides_what_of_the_outputs_counts(kind, read, source):
    def loss(outputs, targets):
        return nn.functional.mse_loss(read(outputs), targets)

    x, y = torch.randn(8, 6), torch.randn(8, 3)
    found = []
    for model, criterion in ((Returns(kind), loss), (mlp(), "mse")):
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        given = {"labels": y} if source == "labels" and criterion is loss else {}
        with tdi.attach_analysis(
            model, criterion, log_dir=False, every=1,
            data=None if given else (x, y),
        ) as analysis:  # fmt: skip
            outputs = model(x, **given)
            (loss if criterion is loss else nn.functional.mse_loss)(
                outputs, y
            ).backward()
            sgd.step()
        assert not analysis.absent
        found.append(analysis.latest)
    ours, plain = found
    for tag in ("loss/R_S", "sharpness/top_eigenvalue"):
        assert ours[tag] == pytest.approx(plain[tag], rel=2e-3)
    error = ours["regularizer/R1_standard_error"]
    assert abs(ours["regularizer/R1"] - plain["regularizer/R1"]) < 5 * error + 1e-9


def test_an_optimizer_of_another_kind_is_said_to_lack():
    class Own:
        def step(self):
            for x in model.parameters():
                x.data -= 0.1 * x.grad

    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1))
    with tdi.attach_analysis(model, "mse", log_dir=False) as analysis:
        for _ in range(3):
            nn.functional.mse_loss(
                model(torch.randn(4, 3)), torch.zeros(4, 1)
            ).backward()
            Own().step()
        assert "measure()" in analysis.absent["optimizer steps"]
        assert "optimizer steps" in analysis.summary()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert "optimizer steps" not in analysis.absent


def test_an_empty_batch_draws_no_mask_and_that_is_said():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1) as analysis:
        model(torch.randn(0, 3)).sum().backward()
        sgd.step()
        (site,) = analysis.sites
        assert "empty" in site.reason


class Uncopied(collections.UserDict):
    """Arguments that cannot be kept."""

    def __copy__(self):
        raise RuntimeError("not to be copied")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("what", ["arguments", "results"])
def test_passes_that_nothing_can_look_at_train_on_and_say_why(what, compiled):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

        def forward(self, given):
            held = [self.body(given["x"])]
            if what == "results":
                held.append(held)
            return held

    def trained(watched):
        torch.manual_seed(0)
        net, x = Net(), torch.randn(4, 3)
        if compiled:
            net.compile(backend=lambda graph, _: graph.forward)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        analysis = (
            tdi.attach_analysis(net, log_dir=False, budget=0.9) if watched else None
        )
        given = Uncopied(x=x) if what == "arguments" else {"x": x}
        for _ in range(2):
            net(given)[0].square().mean().backward()
            sgd.step()
        return net.body[0].weight, analysis

    with pytest.warns(UserWarning, match="a pass was not looked at") as warned:
        found, analysis = trained(True)
    assert torch.equal(found, trained(False)[0])
    said = {str(w.message) for w in warned}
    (said,) = (text for text in said if "a pass was not looked at" in text)
    for name in ("regularizer", "masks", "sharpness"):
        assert f"torch_dropout_ir: {analysis.absent[name]}; training" in said
    assert "RecursionError" in said or "not to be copied" in said


def test_a_hook_that_measures_is_told_where_what_it_measures_calls_it():
    model, batch = mlp(), (torch.randn(8, 6), torch.randn(8, 3))
    sgd, said = torch.optim.SGD(model.parameters(), lr=0.1), []
    only = [measures.DropoutNoise()]
    with tdi.attach_analysis(model, log_dir=False, every=9, measures=only) as analysis:
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        sgd.step()

        def measure(gradient):
            assert len(said) < 9
            try:
                said.append(analysis.measure())
            except RuntimeError as err:
                said.append(str(err))
            return 1 * gradient  # a hook that looks on is not called

        model[0].weight.register_hook(measure)
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    *inside, found = said
    assert inside and set(inside) == {"measure: called inside a measurement"}
    assert found["regularizer/R2_dropout_noise"] > 0
