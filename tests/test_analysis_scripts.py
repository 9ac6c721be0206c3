"""Training scripts as people write them, with the analysis and without."""

import contextlib
import copy
import gc
import io
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import torch_dropout_ir as tdi
from tests.traces import PARTS
from torch_dropout_ir.analysis.measures import Condensation, DropoutNoise, Regularizer
from torch_dropout_ir.analysis.root_hook import CompiledCall, compiled


def mlp(p=0.5):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))


def state(model, *others):
    tensors = [*model.parameters(), *model.buffers(), *others]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return [x.detach().clone() for x in tensors] + [torch.get_rng_state()]


def compare(script, **options):
    """Run ``script(attach)`` with and without the analysis; both must end alike."""
    outcomes = []
    for attached in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

        def attach(model, attached=attached, **more):
            if not attached:
                return contextlib.nullcontext()
            return tdi.attach_analysis(
                model, log_dir=False, **{"every": 1, **options, **more}
            )

        outcomes.append(script(attach))
    bare, (watched, analysis) = outcomes[0][0], outcomes[1]
    for a, b in zip(bare, watched, strict=True):
        assert torch.equal(a, b)
    return analysis


def loop(model, attach, steps=4, data=None, forward=None):
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = nn.MSELoss()
    with attach(model) as analysis:
        for _ in range(steps):
            x, y = torch.randn(8, 6), torch.randn(8, 3)
            sgd.zero_grad()
            criterion((forward or model)(x), y).backward()
            sgd.step()
    return state(model), analysis


def test_a_loader_as_data_is_read_once_and_not_moved():
    pool = TensorDataset(torch.randn(64, 6), torch.randn(64, 3))
    generator = torch.Generator().manual_seed(3)

    def script(attach):
        generator.manual_seed(3)
        loader = DataLoader(pool, batch_size=8, shuffle=True, generator=None)
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model, loss=F.mse_loss, data=loader) as analysis:
            for x, y in loader:
                sgd.zero_grad()
                F.mse_loss(model(x), y).backward()
                sgd.step()
        return state(model), analysis

    analysis = compare(script)
    assert analysis.step == 8
    assert len(analysis.history["sharpness/trace"]) == 8


@pytest.mark.parametrize("data", [5, "abc", iter([]), [1, 2, 3], lambda: 0])
def test_data_that_is_none_is_refused_when_attaching(data):
    model = mlp()
    with pytest.raises(TypeError, match="batch"):
        tdi.attach_analysis(model, "mse", log_dir=False, data=data)
    assert not model._forward_hooks


def test_inputs_stay_where_dropout_in_front_is_followed_by_writing():
    """Dropout makes a new tensor in training; switched off it hands on its input."""

    def script(attach):
        model = nn.Sequential(
            nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Dropout(0.5),
            nn.ReLU(inplace=True), nn.Linear(4, 3),
        )  # fmt: skip
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        kept = x.clone()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model) as analysis:
            for _ in range(3):
                sgd.zero_grad()
                nn.MSELoss()(model(x), y).backward()
                sgd.step()
        assert torch.equal(x, kept)
        return state(model, x), analysis

    assert not compare(script).absent


def test_a_metric_is_not_taken_for_the_loss_and_does_not_move():
    class Accuracy(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, outputs, targets):
            self.seen += 1
            return (outputs.argmax(1) == targets.argmax(1)).float().mean()

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs, targets):
            self.calls += 1
            return (outputs - targets).square().mean()

    def script(attach):
        model, metric, criterion = mlp(), Accuracy(), Weighted()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model) as analysis:
            for _ in range(3):
                x, y = torch.randn(8, 6), torch.randn(8, 3)
                sgd.zero_grad()
                outputs = model(x)
                metric(outputs, y)
                criterion(outputs, y).backward()
                sgd.step()
        return state(model, metric.seen, criterion.calls), analysis

    analysis = compare(script)
    assert not analysis.absent and not analysis.notes["loss/R_S"]
    assert analysis.latest["regularizer/R1"] > 0


class Centred(nn.Module):
    """A loss around a mean that it carries on, as self-distillation has it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, 3))

    def forward(self, outputs, targets):
        loss = (outputs - targets + self.centre).square().mean()
        self.centre = 0.5 * self.centre + targets.mean(0, keepdim=True)
        return loss


class WarmsUp(nn.Module):
    """A loss that counts its calls, in an attribute."""

    calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return (1 - 0.9**self.calls) * (outputs - targets).square().mean()


def test_a_loss_that_counts_its_calls_counts_those_of_the_script():
    made = []

    def script(attach):
        model, loss = mlp(), WarmsUp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        with attach(model) as analysis:
            for _ in range(3):
                sgd.zero_grad()
                loss(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
                sgd.step()
        made.append(loss.calls)
        return state(model), analysis

    assert compare(script).latest["regularizer/R1"] > 0
    assert made == [3, 3]


def test_a_loss_that_carries_a_state_on_is_measured_as_it_was():
    clean = []

    def script(attach):
        model, loss = mlp(), Centred()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model) as analysis:
            for _ in range(3):
                x, y = torch.randn(8, 6), torch.randn(8, 3)
                sgd.zero_grad()
                centre = loss.centre
                loss(model(x), y).backward()
                outputs = nn.Sequential(*model[:2], model[3])(x)
                clean.append(float((outputs - y + centre).square().mean().detach()))
                sgd.step()
        return state(model, loss.centre), analysis

    analysis = compare(script)
    assert [x for _, x in analysis.history["loss/R_S"]] == pytest.approx(clean[3:])


class Layerdrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        scale = random.random() + np.random.rand()
        return scale * self.body(x)


def test_generators_of_python_and_numpy_do_not_move():
    compare(lambda attach: loop(Layerdrop(), attach))


class Cell(nn.Module):
    """One step of a decoder, which the script calls for each symbol."""

    def __init__(self):
        super().__init__()
        self.cell, self.drop, self.head = (
            nn.GRUCell(6, 8),
            nn.Dropout(),
            nn.Linear(8, 3),
        )

    def forward(self, x, state):
        state = self.cell(x, state)
        return self.head(self.drop(state)), state


def test_a_pass_on_what_an_earlier_one_has_made_is_measured_on_that():
    clean = []

    def script(attach):
        model, x, y = Cell(), torch.randn(4, 8, 6), torch.randn(4, 8, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model) as analysis:
            for _ in range(3):
                hidden, losses, total = torch.zeros(8, 8), [], 0.0
                for at, target in zip(x, y, strict=True):
                    with torch.no_grad():
                        outputs = model.head(model.cell(at, hidden))
                        total += float(F.mse_loss(outputs, target))
                    outputs, hidden = model(at, hidden)
                    losses.append(F.mse_loss(outputs, target))
                sgd.zero_grad()
                sum(losses).backward()
                clean.append(total)
                sgd.step()
        return state(model), analysis

    analysis = compare(script)
    assert not analysis.absent
    assert analysis.latest["loss/R_S"] == pytest.approx(clean[-1])
    assert analysis.latest["regularizer/R2_dropout_noise"] > 0
    assert "have made for later ones" in analysis.notes["loss/R_S"]


@pytest.mark.parametrize("cut", [False, True])
def test_passes_that_are_given_what_others_have_made_are_said(cut):
    """Not where a script cuts it off, which makes it a number like any other."""
    model, x, y = mlp(), torch.randn(8, 6), torch.randn(8, 3)
    widen = nn.Linear(3, 6)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        for _ in range(2):
            sgd.zero_grad()
            once = model(x)
            again = widen(once.detach() if cut else once)
            (F.mse_loss(once, y) + F.mse_loss(model(again), y)).backward()
            sgd.step()
    assert ("have made for later ones" in analysis.notes["loss/R_S"]) is not cut
    with torch.no_grad():
        clean = float(F.mse_loss(model.eval()(x), y) + F.mse_loss(model(again), y))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-6)


class WritesOnInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x.mul_(0.9))


def test_a_model_that_writes_on_its_inputs_is_not_run_again():
    pool = torch.randn(8, 6)

    def script(attach):
        model, x = WritesOnInputs(), pool.clone()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with attach(model) as analysis:
            for _ in range(3):
                nn.MSELoss()(model(x), torch.zeros(8, 3)).backward()
                sgd.step()
        return state(model, x), analysis

    analysis = compare(script)
    assert "in place" in analysis.absent["regularizer"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 6)
        )
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_train_alike(reentrant):
    analysis = compare(
        lambda attach: loop(Checkpointed(reentrant), attach),
        measures=[tdi.analysis.measures.Regularizer(), tdi.analysis.measures.Masks()],
    )
    assert analysis.latest["regularizer/R1"] != 0
    assert analysis.latest["regularizer/R1_standard_error"] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_the_script_checkpoints_as_a_whole(reentrant):
    """The pass that is made once more, within the backward pass, is none of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 3))
    x, y = torch.randn(8, 6, requires_grad=True), torch.randn(8, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(2):
            F.mse_loss(checkpoint(model, x, use_reentrant=reentrant), y).backward()
            sgd.step()
    assert not analysis.absent
    assert analysis._capture.masks.statistics["2"].num_elements == 2 * 8 * 9
    clean = F.mse_loss(model.eval()(x), y).item()
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]


def test_gauss_newton_through_checkpoints():
    torch.manual_seed(0)
    plain = Checkpointed(False).double()
    batch = torch.randn(8, 6).double(), torch.randn(8, 3).double()
    found = tdi.regularizers.gauss_newton(plain, batch, "mse", num_samples=None)
    plain.forward = lambda x: plain.head(plain.block(plain.stem(x)))
    without = tdi.regularizers.gauss_newton(plain, batch, "mse", num_samples=None)
    torch.testing.assert_close(found.value, without.value)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="cannot reach"):
        tdi.regularizers.gauss_newton(Checkpointed(True).double(), batch, "mse")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_is_measured_uncompiled():
    def script(attach):
        torch._dynamo.reset()
        return loop(torch.compile(mlp(), backend="aot_eager"), attach)

    analysis = compare(script)
    model = analysis.model
    assert type(model) is nn.Sequential
    assert analysis.latest["regularizer/R1"] > 0
    assert analysis.latest["regularizer/R2_dropout_noise"] > 0
    assert "compiled model" in analysis.absent["masks"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_that_is_compiled_while_it_is_watched(in_place):
    options = {"backend": "aot_eager", "fullgraph": True}
    made = []

    def script(attach):
        torch._dynamo.reset()
        model, compiled = mlp(), []

        def forward(x):
            if not compiled:
                compiled.append(model if in_place else torch.compile(model, **options))
                if in_place:
                    model.compile(**options)
            return compiled[0](x)

        made.append((model, compiled))
        return loop(model, attach, forward=forward)

    analysis = compare(script)
    assert [step for step, _ in analysis.history["regularizer/R1"]] == [1, 2, 3]
    assert set(analysis.absent) == {"masks"}
    model, (compiled,) = made[1]
    assert not model._forward_pre_hooks and not compiled._forward_pre_hooks
    assert not isinstance(model._compiled_call_impl, CompiledCall)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_of_what_was_compiled_the_latest_is_what_is_called():
    model = mlp()
    first = torch.compile(model, backend="aot_eager")
    gc.collect()
    assert compiled(model) is first
    second = torch.compile(model, backend="aot_eager")
    assert compiled(model) is second
    del first, second
    wrapper = torch.compile(nn.DataParallel(other := mlp()), backend="aot_eager")
    assert compiled(other) is wrapper and compiled(mlp()) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_call_that_the_script_compiles_anew_stays():
    model = mlp()
    model.compile(backend="aot_eager")
    with tdi.attach_analysis(model, log_dir=False):
        assert isinstance(model._compiled_call_impl, CompiledCall)
        model.compile(backend="aot_eager")
        anew = model._compiled_call_impl
    assert model._compiled_call_impl is anew


def test_sites_in_evaluation_mode_draw_nothing_and_count_nothing():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 16), nn.Dropout(0.5),
                          nn.Linear(16, 3))  # fmt: skip
    model[0].eval()
    _, analysis = loop(model, lambda m: tdi.attach_analysis(m, log_dir=False, every=1))
    assert "regularizer/R1/0" not in analysis.latest
    assert "exact" in analysis.notes["regularizer/R1"]
    batch = torch.randn(8, 6), torch.randn(8, 3)
    assert set(tdi.regularizers.gauss_newton(model, batch, "mse").per_site) == {"2"}
    assert set(tdi.regularizers.gauss_newton(model.eval(), batch, "mse").per_site) == {
        "0",
        "2",
    }


def test_masks_that_are_observed_again_have_no_note(monkeypatch):
    def fails(*_):
        raise MemoryError("full")

    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for step in range(2):
            with monkeypatch.context() as patch:
                if not step:
                    patch.setattr(tdi.MaskStatistics, "of_units", fails)
                nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
                expected = contextlib.nullcontext()
                if not step:
                    expected = pytest.warns(UserWarning, match="not observed: full")
                with expected:
                    sgd.step()
            assert bool(analysis.notes["masks"]) == (not step)


def test_the_gradient_of_a_fused_optimizer_is_unscaled():
    model = mlp(0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        loss = nn.MSELoss()(model(x), y)
        gradients = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True
        )
        scaler.scale(loss).backward()
        scaler.step(sgd)
    expected = 0.1 / 4 * sum(float(g.square().sum()) for g in gradients)
    assert analysis.latest["regularizer/R2"] == pytest.approx(expected, rel=1e-4)


def test_an_interrupt_leaves_a_model_that_can_be_pickled():
    class Stops(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), Stops())
    analysis = tdi.attach_analysis(model, log_dir=False, every=1)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 6))
    assert pickle.loads(pickle.dumps(model[1])).p == 0.5
    analysis.detach()
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_a_mask_that_cannot_be_observed_does_not_stop_the_forward(monkeypatch):
    def fails(*_):
        raise MemoryError("full")

    monkeypatch.setattr(tdi.MaskStatistics, "of_units", fails)
    with pytest.warns(UserWarning, match="were not observed: full"):
        analysis = compare(lambda attach: loop(mlp(), attach, steps=2))
    assert "were not observed: full" in analysis.absent["masks"]


def test_a_replaced_optimizer_is_found():
    model = mlp()
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD(model.parameters(), lr=0.01)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for optimizer in [first] * 3 + [second] * 6:
            nn.MSELoss()(model(x), y).backward()
            optimizer.step()
    assert analysis.step == 3 + 4


def test_freezing_a_layer_on_the_way():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for step in range(3):
            if step == 1:
                model[0].requires_grad_(False)
            sgd.zero_grad()
            nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
            sgd.step()
    assert len(analysis.history["sharpness/trace"]) == 3


def test_converting_gives_back_only_what_it_converted():
    model = nn.Sequential(nn.Dropout(0.1), tdi.Dropout(0.2))
    model[1].track = False
    with tdi.attach_analysis(model, log_dir=False, convert=True):
        assert type(model[0]) is tdi.Dropout
    assert type(model[0]) is nn.Dropout
    assert type(model[1]) is tdi.Dropout and model[1].track is False


def test_state_is_plain_and_numbers_of_any_kind_are_kept():
    class Odd:
        name = "odd"
        needs = frozenset()

        def __call__(self, snapshot):
            return {
                "odd/int": 3,
                "odd/tensor": torch.tensor(2.5),
                "odd/np": np.float32(1),
            }

    class Nothing:
        name = "nothing"
        needs = frozenset()

        def __call__(self, snapshot):
            return None

    with pytest.warns(UserWarning, match="nothing"):
        _, analysis = loop(
            mlp(),
            lambda m: tdi.attach_analysis(
                m, log_dir=False, every=1,
                measures=[Odd(), Nothing(), tdi.analysis.measures.Masks()],
            ),
        )  # fmt: skip
    assert analysis.latest["odd/int"] == 3.0
    assert analysis.latest["odd/tensor"] == 2.5
    assert "AttributeError" in analysis.absent["nothing"]
    file = io.BytesIO()
    torch.save(analysis.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["history"].keys() == analysis.history.keys()


def test_long_histories_are_thinned(monkeypatch):
    from torch_dropout_ir.analysis import records

    monkeypatch.setattr(records, "MOST_KEPT", 10)
    curve: dict = {}
    for step in range(1000):
        records.remember(curve, step, {"x": float(step)})
    assert len(curve["x"]) <= 10
    assert curve["x"][0] == (0, 0.0) and curve["x"][-1] == (999, 999.0)
    steps = [step for step, _ in curve["x"]]
    assert max(b - a for a, b in itertools.pairwise(steps)) < 4 * 1000 / 10
    for _ in range(30):
        records.remember(curve, 999, {"x": 1.0})
    assert len(curve["x"]) <= 10 and curve["x"][0] == (0, 0.0)


def test_momentum_and_weight_decay_are_noted():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        model(torch.randn(4, 6)).sum().backward()
        sgd.step()
    assert "momentum and weight_decay" in analysis.notes["optimizer"]


def test_parameters_that_another_optimizer_steps_are_noted():
    model = mlp()
    first, rest = [*model.parameters()][:2], [*model.parameters()][2:]
    optimizers = torch.optim.SGD(first, lr=0.1), torch.optim.SGD(rest, lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        model(torch.randn(4, 6)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    said = "R_2 is of the parameters that this SGD steps, 2 of 4 tensors"
    assert analysis.notes["optimizer"] == said


def test_the_noise_in_r2_is_of_the_parameters_that_are_stepped():
    """Of a loss that is linear the last bias has a gradient without noise."""

    class Linear(nn.Module):
        def forward(self, outputs, targets):
            return (outputs * targets).mean()

    for stepped, noisy in (("bias", False), ("weight", True)):
        model, criterion = mlp(), Linear()
        sgd = torch.optim.SGD([getattr(model[3], stepped)], lr=0.1)
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        with tdi.attach_analysis(
            model, log_dir=False, every=1, measures=[DropoutNoise()]
        ) as analysis:
            criterion(model(x), y).backward()
            sgd.step()
        assert (analysis.latest["regularizer/R2_dropout_noise"] > 0) == noisy


def test_deep_networks_get_an_unbiased_r1():
    """Where no closed form is exact, the definition is averaged, with its error."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Tanh(),
        nn.Dropout(0.5), nn.Linear(16, 3),
    )  # fmt: skip
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    truth = tdi.regularizers.monte_carlo(model, (x, y), "cross_entropy", num_masks=4000)
    start = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    measures = [tdi.analysis.measures.Regularizer()]
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=measures
    ) as analysis:
        for _ in range(50):
            criterion(model(x), y).backward()
            sgd.step()
            model.load_state_dict(start)
    values = torch.tensor([v for _, v in analysis.history["regularizer/R1"]])
    errors = torch.tensor([
        v for _, v in analysis.history["regularizer/R1_standard_error"]
    ])
    pooled = errors.square().mean().sqrt() / 50**0.5
    assert abs(float(values.mean() - truth.value)) < 4 * float(pooled)
    assert float(values.std()) == pytest.approx(float(errors.mean()), rel=0.4)
    assert "unbiased" in analysis.notes["regularizer/R1"]


def test_layers_that_are_put_in_on_the_way_are_measured():
    def script(attach):
        model = mlp()
        with attach(model, measures=[Condensation()]) as analysis:
            for step in range(4):
                if step == 1:
                    model[3] = nn.Linear(16, 4)
                if step == 2:  # what read the first layer is no layer any more
                    model.insert(3, nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3)))
                sgd = torch.optim.SGD(model.parameters(), lr=0.05)
                model(torch.randn(8, 6)).square().mean().backward()
                sgd.step()
        return state(model), analysis

    analysis = compare(script)
    assert not analysis.absent
    last = {tag: values[-1][0] for tag, values in analysis.history.items()}
    names = {t.rpartition("/")[2] for t, step in last.items() if "/movement/" in t}
    assert names == {"0", "3", "3.0", "4"} and last["condensation/movement/3.0"] >= 2
    assert "of `3.0`" in analysis.notes["condensation/orientation_amplitude/0"]


def test_an_optimizer_for_each_parameter_makes_one_step_of_all():
    def script(attach):
        model = mlp()
        steps = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def step(p):
            steps[p].step()
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        with attach(model) as analysis:
            for _ in range(4):
                nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        return state(model), analysis

    assert compare(script).step == 4


def test_inputs_may_be_objects_of_the_scripts_own():
    class Graph:
        def __init__(self):
            self.x, self.y = torch.randn(8, 6), torch.randint(3, (8,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, graph):
            return F.cross_entropy(self.net(graph.x), graph.y)

    def script(attach):
        model = Net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model) as analysis:
            for _ in range(2):
                sgd.zero_grad()
                model(Graph()).backward()
                sgd.step()
        return state(model), analysis

    analysis = compare(script)
    assert set(analysis.absent) <= {PARTS}
    assert {"regularizer/R1", "sharpness/trace"} <= set(analysis.latest)


def test_where_no_optimizer_steps_the_summary_says_so():
    model = mlp()
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        assert "no step of a torch.optim.Optimizer" in analysis.summary()
        assert {"loss/R_S", "regularizer/R1"} <= set(analysis.measure())
        assert "no step of" not in analysis.summary()


RECORDERS = {
    "export": lambda m, x: torch.export.export(m, (x,)).graph_module.code,
    "make_fx": lambda m, x: make_fx(m)(x).code,
    "trace": lambda m, x: [
        node.kind()
        for node in torch.jit.trace(m, x, check_trace=False).inlined_graph.nodes()
    ],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_what_is_recorded_in_training_mode_is_as_without(record):
    # A measurement is due, and then a pass is looked at whose loss is still to come.
    model, twin, x = mlp(), mlp(), torch.randn(8, 6)
    expected = record(twin, x)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        assert record(model, x) == expected
        loss = model(x).square().mean()
        assert record(twin, x) == record(model, x) == expected
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert analysis.latest["regularizer/R1"] > 0


def test_passes_on_fake_tensors_are_not_looked_at():
    model, x = mlp(), torch.randn(8, 6)
    with tdi.attach_analysis(model, log_dir=False, every=1):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(x).shape == (8, 3)  # a warning would be an error


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_a_model_says_to_detach_first():
    model = mlp()
    with tdi.attach_analysis(model, log_dir=False):
        with pytest.raises(AttributeError, match=r"detach\(\)` first"):
            torch.jit.script(model)
    torch.jit.script(model)
