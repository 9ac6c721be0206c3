"""When measures are taken: by clocks that the tests hold."""

import itertools
import time

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.cadence import ADVANCE, Cadence
from torch_dropout_ir.analysis.measures import (
    DropoutNoise,
    Masks,
    Regularizer,
    Sharpness,
    default_measures,
)
from torch_dropout_ir.analysis.observed_masks import ObservedMasks

PASSES = {"gradient": 0.0, "regularizer": 8.0, "noise": 3.0, "sharpness": 120.0}
COSTS = PASSES | {"gradient": 0.1, "condensation": 4.0}  # in steps


def simulate(step, steps, budget=0.05, cost=1.0):
    """Seconds by step at which measures were taken, and the share after each step."""
    cadence = Cadence("auto", budget, list(COSTS), PASSES)
    taken, shares = {name: [] for name in COSTS}, []
    for k in range(steps):
        due = set(cadence.due(k))
        if due:
            cadence.expect(step)
            for name in due - cadence.afford(due, k).keys():
                cadence.measured(name, cost * COSTS[name] * step)
                taken[name].append(k)
        cadence.trained(step)
        shares.append((cadence.training_seconds, cadence.share))
    return taken, shares


@pytest.mark.parametrize("step", [0.002, 0.012, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("budget", [0.01, 0.05, 0.3])
def test_the_share_is_within_the_budget_after_the_first_half_minute(step, budget):
    taken, shares = simulate(step, int(max(600 / budget, 100 / step)), budget)
    # What cannot be estimated is taken at once, and paid after that time.
    after = ADVANCE + 4.1 * step * (1 - budget) / budget
    assert max(share for t, share in shares if t >= after) <= budget + 1e-9
    assert min(map(len, taken.values())) >= 2
    assert shares[-1][1] > budget / 2  # and it is used


def test_what_the_first_half_minute_pays_for_is_taken_at_once():
    taken, _ = simulate(0.006, 10)
    assert all(steps[0] == 0 for steps in taken.values())
    taken, _ = simulate(0.1, 10_000)
    first = {name: steps[0] for name, steps in taken.items()}
    assert 2280 < first.pop("sharpness") < 4560  # 12 s, at 0.0053 s a step
    assert set(first.values()) == {0}


def test_first_costs_that_were_underestimated_are_paid_back():
    taken, shares = simulate(0.2, 60_000, cost=3.0)
    late = [share for t, share in shares if t > 3000]
    assert len(taken["sharpness"]) > 2 and max(late) <= 0.05 + 1e-9


def test_an_estimate_falls_with_the_passes_and_a_slow_one_makes_it_wait():
    cadence = Cadence("auto", 0.05, ["dear"], {"dear": 100.0})
    assert cadence.due(0) == ["dear"]
    cadence.expect(1.0)  # a cold start
    assert cadence.afford(["dear"], 0) == {"dear": 100.0}
    cadence.trained(1.0)
    assert cadence.due(1) == ["dear"]  # it is looked at again
    cadence.expect(2.0)
    assert cadence.afford(["dear"], 1) == {"dear": 200.0}
    cadence.trained(1.0)
    cadence.expect(0.01)
    assert cadence.due(2) == ["dear"] and not cadence.afford(["dear"], 2)
    cadence.expect(0.1)  # the machine is slow now
    assert cadence.afford(["dear"], 2) == {"dear": pytest.approx(10.0)}


@pytest.mark.parametrize("begins", [1000, 6000])
def test_a_machine_that_becomes_slower_keeps_the_budget(begins):
    """Before the first dear measurement, and between two."""
    cadence, shares = Cadence("auto", 0.05, ["dear"], {"dear": 100.0}), []
    for k in range(20_000):
        step = 1.0 if k < begins else 3.0
        due = set(cadence.due(k))
        cadence.expect(step)
        if due and not cadence.afford(due, k):
            cadence.measured("dear", 100.0 * step)
        cadence.trained(step)
        shares.append(cadence.share)
    assert max(shares) <= 0.05 + 1e-9 and shares[-1] > 0.04


def test_what_evaluations_earn_beyond_some_debts_pays_the_others():
    cadence = Cadence("auto", 0.5, ["light", "dear"])
    cadence.measured("light", 1.0)
    cadence.measured("dear", 100.0)
    cadence.trained(202.5)  # for these, and for the next ones
    assert cadence.due(1) == ["light", "dear"]
    assert not cadence.afford(["light", "dear"], 1)


def test_of_what_is_due_the_cheap_ones_come_first_and_leave_less():
    cadence = Cadence("auto", 0.5, ["dear", "cheap"], {"dear": 20.0, "cheap": 15.0})
    cadence.expect(2.0)  # a slow first pass: what is owed for it is of the next
    cadence.expect(1.0)
    owed = cadence.numbers()
    assert owed["debt of dear"] == pytest.approx(20.0)
    assert owed["debt of cheap"] == pytest.approx(15.0)
    assert cadence.afford({"dear", "cheap"}, 0) == {"dear": 20.0}  # of thirty
    cadence.measured("cheap", 15.0)
    cadence.trained(4.0)  # five are lacking
    assert "dear" not in cadence.due(0)
    cadence.trained(2.0)
    assert "dear" in cadence.due(0)
    cadence.trained(30.0)  # of 36 there are 15 spent
    assert not cadence.afford({"dear"}, 0)


def test_ranks_go_on_alike_from_the_numbers_of_one():
    cadence, other = (Cadence("auto", 0.05, ["a", "b"], {"a": 9.0}) for _ in range(2))
    cadence.expect(0.5)
    cadence.measured("b", 2.0)
    cadence.trained(1.0)
    other.load_numbers(cadence.numbers())
    assert other.numbers() == cadence.numbers()
    assert [cadence.wait(step) for step in (1, 3)] == [1, 3]  # no more than were made


@pytest.mark.parametrize("pace", [0.1, 3.0])
def test_nothing_is_due_before_the_steps_to_wait_are_over(pace):
    cadence = Cadence("auto", 0.5, ["a"])
    cadence.measured("a", 30 * pace)  # and as much for the next: sixty steps
    for _ in range(50):
        cadence.trained(pace)
    ahead = cadence.wait(50)
    assert 10 <= ahead <= 11  # as rounding has it
    cadence.trained((ahead - 2) * pace)
    assert not cadence.due(50 + ahead - 2)
    cadence.trained(2 * pace)
    assert cadence.due(50 + ahead) == ["a"]


def test_nothing_to_measure_is_never_due():
    cadence = Cadence("auto", 0.05, [])
    cadence.expect(1.0)
    cadence.trained(100.0)
    assert cadence.due(3) == [] and not cadence.afford([], 3) and cadence.wait(3) >= 1


def test_waiting_is_looked_at_when_steps_have_doubled():
    cadence = Cadence("auto", 0.05, ["dear", "cheap"], {"dear": 1e9})
    cadence.measured("cheap", 1e-6)
    looked = []
    for step in range(1000):
        if "dear" in cadence.due(step):
            looked.append(step)
            cadence.expect(1.0)
            assert cadence.afford(["dear"], step)
            assert not cadence.afford(["cheap"], step)  # which changes nothing
        cadence.trained(1.0)
    assert looked == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_rates_are_those_of_the_youngest_numbers():
    """Against a search: no other way to spend the budget has a lower mean age."""
    prices = {"a": 1.0, "b": 4.0, "c": 9.0}
    cadence, taken = Cadence("auto", 0.1, list(prices)), dict.fromkeys(prices, 0)
    steps = 200_000
    for step in range(steps):
        for name in cadence.due(step):
            cadence.measured(name, prices[name])
            taken[name] += 1
        cadence.trained(1.0)
    found = sum(steps / n for n in taken.values())
    income = 0.1 / 0.9
    cuts = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    a, b = torch.meshgrid(cuts, cuts, indexing="ij")
    ages = (1 / a + 4 / b + 9 / (1 - a - b)) / income
    best = float(ages[a + b < 0.995].min())
    assert found == pytest.approx(best, rel=0.01)


class Clock:
    """Seconds that pass when it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Slow:
    """Takes fake seconds."""

    needs = frozenset({"gradients"})

    def __init__(self, name, clock, seconds, passes=None):
        self.name, self.clock, self.seconds = name, clock, seconds
        if passes is not None:
            self.passes = passes

    def __call__(self, snapshot):
        self.clock.now += self.seconds
        return {f"{self.name}/x": 1.0}


def watched(monkeypatch, steps, **options):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    class Net(nn.Linear):
        def forward(self, x):
            clock.now += 0.5
            return super().forward(x)

    model = Net(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = [Slow("light", clock, 0.1), Slow("dear", clock, 50.0, passes=100.0)]
    with tdi.attach_analysis(
        model, log_dir=False, measures=measures, **options
    ) as watch:
        clock.now += 7.0  # data are loaded
        for _ in range(steps):
            sgd.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            clock.now += 0.5
            sgd.step()
    return watch


def test_a_dear_measure_waits_for_its_budget(monkeypatch):
    short = watched(monkeypatch, 100)
    assert short.history["light/x"][0][0] == 0
    assert "dear/x" not in short.history and short.cost_share < 0.05
    assert "some 100 s" in short.absent["dear"] and "dear" in short.summary()
    long = watched(monkeypatch, 3000)
    step = long.history["dear/x"][0][0]
    assert 1900 < step < 2400 and "dear" not in long.absent and long.cost_share < 0.05
    by_number = watched(monkeypatch, 2, every=1)
    assert [step for step, _ in by_number.history["dear/x"]] == [0, 1]


def test_a_larger_budget_takes_it_at_once(monkeypatch):
    found = watched(monkeypatch, 1, budget=0.8)
    assert found.history["dear/x"] == [(0, 1.0)]


def test_what_fails_before_all_measures_is_put_off_and_said_until_it_works(monkeypatch):
    clock, tried = Clock(), []
    monkeypatch.setattr(time, "perf_counter", clock)
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails(inputs, passes):
        tried.append(analysis.step)
        clock.now += 0.5
        raise MemoryError("full")

    def steps(count):
        for _ in range(count):
            sgd.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            clock.now += 1.0
            sgd.step()

    with tdi.attach_analysis(
        model, log_dir=False, measures=[Slow("light", clock, 1.0)]
    ) as analysis:
        steps(1)
        works, analysis.inputs_of = analysis.inputs_of, fails
        with pytest.warns(UserWarning, match="MemoryError: full"):
            steps(1000)
        assert "full" in analysis.absent["capture"]
        # Half a second and that of a step are a twentieth of 30 s, less themselves; at
        # the end of a step it is decided for the next.
        assert {b - a for a, b in itertools.pairwise(tried)} == {30}
        analysis.inputs_of = works
        assert analysis.measure()["light/x"] == 1.0
    assert not analysis.absent


def test_looking_at_a_pass_is_no_time_of_training(monkeypatch):
    begins = ObservedMasks.begins
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    sgd, own = torch.optim.SGD(model.parameters(), lr=0.1), [Masks()]
    with tdi.attach_analysis(model, log_dir=False, every=1, measures=own) as analysis:
        cadence = analysis._cadence
        for wait in (0.0, 0.5):

            def slow(*given, wait=wait):
                time.sleep(wait)
                return begins(*given)

            monkeypatch.setattr(ObservedMasks, "begins", slow)
            before = cadence.measured_seconds, cadence.training_seconds
            model(torch.ones(4, 3)).sum().backward()
            sgd.step()
            times = cadence.measured_seconds, cadence.training_seconds
    taken, trained = (now - then for now, then in zip(times, before, strict=True))
    assert trained < 0.5 < taken


def test_schedules_resume_with_what_waits(monkeypatch):
    first = watched(monkeypatch, 100)
    again = Cadence("auto", 0.05, ["light", "dear"], {"dear": 100.0})
    again.load_state_dict(first._cadence.state_dict())
    assert again.due(100) == ["dear"]  # looked at, and not taken
    assert again.afford(["dear"], 100) == {"dear": pytest.approx(100.0)}


def test_the_dear_ones_of_the_default_say_so():
    said = {m.name: getattr(m, "passes", 0.0) for m in default_measures()}
    assert said["sharpness"] > 10 * said["regularizer"] > said["dropout_noise"] > 0
    assert Sharpness(max_matvecs=5, trace_matvecs=2, slice_points=0).passes == 22
    assert Regularizer(num_masks=2).passes == 2 and DropoutNoise().passes == 5


@pytest.mark.parametrize("kind, times", [(nn.LSTM, 5), (nn.GRU, 2.5), (nn.Linear, 1)])
def test_sharpness_of_recurrent_kernels_is_known_to_be_dear(kind, times):
    model = nn.Sequential(nn.ModuleDict({"within": kind(3, 4)}), nn.Dropout())
    with tdi.attach_analysis(model, log_dir=False) as analysis:
        passes = analysis._cadence.first
        assert passes["sharpness"] == times * Sharpness().passes
        assert passes["regularizer"] == Regularizer().passes


def test_several_batches_take_several_times_as_long():
    data = [(torch.ones(4, 3), torch.zeros(4, 2))] * 3
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 2))
    with tdi.attach_analysis(model, "mse", log_dir=False, data=data) as analysis:
        assert analysis._cadence.first["sharpness"] == 3 * Sharpness().passes
        assert analysis._cadence.first["regularizer"] == Regularizer().passes
