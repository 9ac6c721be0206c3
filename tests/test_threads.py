"""Threads of one process: measurements one by one, passes beside them whole."""

import copy
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import torch_dropout_ir as tdi
from torch_dropout_ir import turns
from torch_dropout_ir.analysis import measures as measured

regularizers, sharpness = tdi.regularizers, tdi.sharpness
SOON = 20  # seconds that nothing here takes


class Calls(nn.Module):
    """It calls a function of dropout, so that a mode looks on."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 30), nn.Linear(30, 2)

    def forward(self, x):
        return self.two(F.dropout(self.one(x).tanh(), 0.5, self.training))


def layers():
    return nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2))


@pytest.fixture(params=[layers, Calls], ids=["layers", "calls"])
def model(request):
    torch.manual_seed(0)
    return request.param().double()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    made = (torch.randn(6, n, generator=draw, dtype=torch.float64) for n in (4, 2))
    return tuple(made)


class Other:
    """Another thread, which does one thing when it is told to."""

    def __init__(self, work):
        self._work, self._go, self.done = work, threading.Event(), threading.Event()
        self.result = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        if self._go.wait(SOON):
            self.result = self._work()
            self.done.set()

    def begins(self):
        self._go.set()

    def has_ended(self, seconds=0.1):
        return self.done.wait(seconds)

    def join(self):
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        return self.result


def forms(model, batch):
    exact = {"num_samples": None}
    frozen = sharpness.hessian(model, "mse", batch, masks=3)
    ones = torch.ones(frozen.shape[0], dtype=torch.float64)
    return torch.stack([
        regularizers.gauss_newton(model, batch, "mse", **exact).value,
        regularizers.second_order(model, batch, "mse", **exact).value,
        sharpness.ggn(model, "mse", batch).dense().trace(),
        (frozen @ ones).sum(),
    ]).detach()  # fmt: skip


def state(model):
    return [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), {*vars(m)})
        for m in model.modules()
    ]


@pytest.mark.parametrize("apart", [False, True])
def test_measurements_in_threads_are_those_of_one(model, batch, apart):
    alone, before = forms(model, batch), state(model)
    found = []

    def work():
        own = copy.deepcopy(model) if apart else model
        return [forms(own, batch) for _ in range(3)]

    others = [Other(work) for _ in range(3)]
    for other in others:
        other.begins()
    found = [x for other in others for x in other.join()]
    assert len(found) == 9
    for x in found:
        torch.testing.assert_close(x, alone, rtol=1e-9, atol=0)
    assert state(model) == before


MEASURES = {
    "gauss_newton": regularizers.gauss_newton,
    "monte_carlo": lambda *given: regularizers.monte_carlo(*given, num_masks=4),
    "hessian": lambda m, batch, loss: sharpness.hessian(m, loss, batch),
    "frozen": lambda m, batch, loss: sharpness.hessian(m, loss, batch, masks=1),
}


def beside(other):
    """A loss in which another thread begins."""

    def loss(outputs, targets):
        other.begins()
        loss.waited = not other.has_ended()
        return F.mse_loss(outputs, targets)

    return loss


@pytest.mark.parametrize("name", MEASURES)
def test_a_pass_beside_a_measurement_waits_and_drops(model, batch, name):
    x = torch.ones(1, 4, dtype=torch.float64).expand(50, 4)
    other = Other(lambda: model(x))
    loss = beside(other)
    MEASURES[name](model, batch, loss)
    assert loss.waited, "the pass went through a model that was being measured"
    rows = other.join().detach()
    assert len(rows.unique(dim=0)) > 10, "dropout was off"


def test_a_measurement_waits_for_a_pass(batch):
    held, inside = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                held.wait(SOON)
            return x

    model = nn.Sequential(Slow(), *layers()).double()
    x = torch.ones(1, 4, dtype=torch.float64).expand(50, 4)
    other = Other(lambda: model(x))
    other.begins()
    assert inside.wait(SOON)
    threading.Timer(0.2, held.set).start()
    started = time.monotonic()
    regularizers.gauss_newton(model, batch, "mse")
    assert time.monotonic() - started > 0.15
    assert len(other.join().detach().unique(dim=0)) > 10, "dropout was off"


def test_a_pass_that_does_not_end_is_named(batch, monkeypatch):
    monkeypatch.setattr(turns, "_LONGEST", 0.05)
    held, inside = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            inside.set()
            held.wait(SOON)
            return x

    model = nn.Sequential(Slow(), *layers()).double()
    before = state(model)
    other = Other(lambda: model(batch[0]))
    other.begins()
    assert inside.wait(SOON)
    with pytest.raises(RuntimeError, match="passes of Sequential in other threads"):
        regularizers.gauss_newton(model, batch, "mse")
    assert state(model) == before
    held.set()
    other.join()


@pytest.mark.parametrize("name", ["gauss_newton", "monte_carlo"])
def test_what_another_thread_trains_meanwhile_is_refused(model, batch, name):
    weight = next(model.parameters())
    other = Other(lambda: weight.data_ptr() and weight.detach().mul_(1.1))

    def loss(outputs, targets):
        other.begins()
        other.has_ended(SOON)
        return F.mse_loss(outputs, targets)

    before = state(model)
    with pytest.raises(RuntimeError, match="written on by another thread"):
        MEASURES[name](model, batch, loss)
    assert state(model) == before
    other.join()
    MEASURES[name](model, batch, "mse")  # the next one is as ever


def test_frozen_passes_of_two_models_wait_for_each_other():
    """The generators are those of the process."""

    drawn = threading.Event()

    class Begins(nn.Module):
        def forward(self, x):
            if other is not None:
                other.begins()
                other.has_ended()
            return x

    class Waits(nn.Module):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                drawn.wait(0.3)
            return x

    first = nn.Sequential(Begins(), nn.Dropout(0.5))
    second = nn.Sequential(Waits(), nn.Dropout(0.5))
    other, x = None, torch.ones(1000)
    with tdi.frozen_masks(first, 3), tdi.frozen_masks(second, 4):
        alone = first(x), second(x)
        other = Other(lambda: second(x))
        assert torch.equal(first(x), alone[0])
        drawn.set()
        assert torch.equal(other.join(), alone[1])


def trained(model, batch, steps, between=lambda _: None, **options):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"log_dir": False, "every": 1, **options}
    with tdi.attach_analysis(model, **options) as analysis:
        for _ in range(steps):
            sgd.zero_grad()
            loss = F.mse_loss(model(batch[0]), batch[1])
            between(analysis)
            loss.backward()
            sgd.step()
    return analysis


def test_what_is_served_beside_training_is_not_measured(model, batch):
    twin = copy.deepcopy(model)
    measures = [measured.Masks(), measured.Regularizer()]
    torch.manual_seed(3)
    alone = trained(model, batch, 3, measures=measures)
    torch.manual_seed(3)

    def serve(_):
        if analysis_is_known:
            with torch.random.fork_rng(devices=[]):
                other = Other(lambda: twin(torch.zeros(2, 4).double()).sum().backward())
                other.begins()
                other.join()
            for x in twin.parameters():
                x.grad = None
        analysis_is_known.append(True)

    analysis_is_known = []
    found = trained(twin, batch, 3, serve, measures=measures)
    assert not found.absent
    for tag in ("regularizer/R1", "loss/R_S"):
        assert found.history[tag] == alone.history[tag]
    assert not torch.overrides._get_current_function_mode_stack()


class DrawnBeside(torch.Tensor):
    """Targets: while a loss reads them, another thread draws random numbers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.mse_loss:
            other = Other(lambda: torch.rand(3))
            other.begins()
            other.join()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_a_loss_is_known_where_another_thread_draws_meanwhile(model, batch):
    targets = batch[1].as_subclass(DrawnBeside)
    analysis = trained(model, (batch[0], targets), 1, measures=[measured.Regularizer()])
    clean = F.mse_loss(model.eval()(batch[0]), batch[1])
    assert not analysis.absent and not analysis.notes["loss/R_S"]
    assert clean.isfinite() and analysis.latest["loss/R_S"] > 0


def test_what_serves_the_model_before_the_first_step_only_looks(model, batch):
    """Without a graph in a thread that did not attach, which keeps no mode of ours."""
    modes = torch.overrides._get_current_function_mode_stack
    left, sgd = [], torch.optim.SGD(model.parameters(), lr=0.1)

    def serve():
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(batch[0])
            left.extend(modes())

    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(2):
            other = Other(serve)
            other.begins()
            other.join()
            assert analysis._capture.inputs is None
        F.mse_loss(model(batch[0]), batch[1]).backward()
        sgd.step()
    assert analysis.latest["regularizer/R1"] > 0 and not left


def test_a_pass_that_ends_an_analysis_in_another_thread_is_none_of_its(model, batch):
    """Torch forgets that a hook takes arguments by name before the hook is gone."""
    analysis = tdi.attach_analysis(model, log_dir=False)
    hook = next(iter(model._forward_pre_hooks.values()))
    analysis.detach()
    hook(model, (batch[0],))  # as another thread calls it that has seen it before
    assert hook.call is None


def test_a_thread_may_ask_for_a_measurement(model, batch):
    found = []

    def ask(analysis):
        other = Other(analysis.measure)
        other.begins()
        found.append(other.join())

    measures = [measured.Sharpness(max_matvecs=4, trace_matvecs=4)]
    analysis = trained(model, batch, 2, ask, every=100, measures=measures)
    assert not analysis.absent
    assert analysis.latest["sharpness/trace"] == found[1]["sharpness/trace"]


def test_analyses_begin_and_end_beside_one_while_other_threads_step():
    """Torch goes through hooks of all optimizers, which are not to change meanwhile."""
    failed, done = [], threading.Event()

    def train():
        net = nn.Linear(2, 1)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        try:
            while not done.is_set():
                net(torch.ones(4, 2)).sum().backward()
                sgd.step()
        except RuntimeError as err:
            failed.append(err)

    one = tdi.attach_analysis(layers(), log_dir=False, measures=[])
    # As measurements are, in a step of one of them.
    hooks = lambda *_: time.sleep(1e-4), lambda *_: None
    handles = [register_optimizer_step_pre_hook(hook) for hook in hooks]
    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        time.sleep(1e-3)
        tdi.attach_analysis(layers(), log_dir=False, measures=[]).detach()
    done.set()
    for thread in threads:
        thread.join(SOON)
    for handle in handles:
        handle.remove()
    one.detach()
    assert not failed
