"""Threads of one process: nobody waits for one that waits for him."""

import contextlib
import functools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import turns

SOON = 20  # seconds that nothing here takes


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2)
    ).double()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    made = (torch.randn(6, n, generator=draw, dtype=torch.float64) for n in (4, 2))
    return tuple(made)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(turns, "_LONGEST", 2.0)
    monkeypatch.setattr(turns, "_SOON", 0.2)


def trace(model, batch, loss):
    return tdi.sharpness.trace(tdi.sharpness.hessian(model, loss, batch), 20)


@contextlib.contextmanager
def served(model, x, threads=3):
    """Call a model in other threads, again and again."""
    over, counts = threading.Event(), [0] * threads

    def serve(which):
        while not over.is_set():
            with torch.no_grad():
                model(x)
            counts[which] += 1
            time.sleep(1e-3)

    running = [threading.Thread(target=serve, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in running:
            thread.join(SOON)


def test_a_model_that_is_served_beside_training_is_measured(model, batch, impatient):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with served(model, batch[0]) as counts:
        started = time.monotonic()
        with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
            for _ in range(10):
                sgd.zero_grad()
                F.mse_loss(model(batch[0]), batch[1]).backward()
                sgd.step()
        taken = time.monotonic() - started
    assert taken < 10, "it waited for passes that waited for it"
    for tag in ("regularizer/R1", "sharpness/trace"):
        assert [step for step, _ in analysis.history[tag]] == [*range(10)]
    assert min(counts) > 3


@pytest.mark.parametrize("measure", [tdi.regularizers.gauss_newton, trace])
def test_a_loss_that_calls_the_model_in_a_thread(model, batch, impatient, measure):
    seen, refused = [], contextlib.nullcontext()
    if measure is not trace:
        refused = pytest.raises(ValueError, match="the loss runs the model again")
    with ThreadPoolExecutor(1) as pool:

        def loss(outputs, targets):
            seen.append(pool.submit(model, batch[0]).result(SOON))
            return F.mse_loss(outputs, targets)

        with refused:
            assert torch.isfinite(measure(model, batch, loss).value)
    clean = model.eval()(batch[0])
    assert seen
    for outputs in seen:  # as in this thread
        torch.testing.assert_close(outputs, clean)


class Twice(nn.Module):
    """Calls a model on two inputs, as ``map`` or a pool does."""

    def __init__(self, net, each):
        super().__init__()
        self.net, self.each = net, each

    def forward(self, x):
        return sum(self.each(self.net, [x, 2 * x]))


def test_a_whole_that_calls_an_attached_part_in_threads(model, batch, impatient):
    exact = functools.partial(tdi.regularizers.gauss_newton, num_samples=None)
    with (
        ThreadPoolExecutor(2) as pool,
        tdi.attach_analysis(model, log_dir=False, every=1) as analysis,
    ):
        found = exact(Twice(model, pool.map), batch, "mse")
        assert not analysis.history
    alone = exact(Twice(model, map), batch, "mse")
    torch.testing.assert_close(found.value, alone.value)


@pytest.mark.parametrize(
    ("form", "options"), [("gauss_newton", {"num_samples": None}), ("monte_carlo", {})]
)
def test_a_site_that_two_threads_are_in_at_once(model, batch, form, options):
    estimate = getattr(tdi.regularizers, form)
    alone = estimate(Twice(model, map), batch, "mse", **options)
    two = threading.Barrier(2)

    def meet(*_):
        two.wait(SOON)

    site = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    site.register_forward_pre_hook(meet)
    site.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = estimate(Twice(model, pool.map), batch, "mse", **options)
    error = 5 * (found.standard_error + alone.standard_error)
    assert abs(found.value - alone.value) <= 1e-9 + error


@pytest.fixture
def let_go(model):
    """Let another thread hold the model until this is called."""
    held, over = threading.Event(), threading.Event()

    def hold():
        with turns.alone_with(model):
            held.set()
            over.wait(SOON)

    def end():
        over.set()
        other.join()

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(SOON)
    yield end
    end()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_a_child_of_another_thread_waits_for_nobody(model, batch, let_go):
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it
        model(batch[0])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    let_go()
    assert status == 0, "it waited for a thread that it does not have"


@pytest.fixture
def interrupts():
    """Let SIGINT raise: shells have it ignored by what they start behind them."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_at_the_door_leaves_nothing(model, batch, let_go, monkeypatch):
    monkeypatch.setattr(turns, "_SOON", 60.0)  # a timer may be late
    main = threading.main_thread().ident
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        model(batch[0])
    assert not turns._waiting
    let_go()
    with turns.in_turn() as own:
        assert own
