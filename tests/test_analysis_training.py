"""Ways to train that people use: the same with the analysis as without it."""

import contextlib
import copy
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir.analysis.measures import (
    DropoutNoise,
    Masks,
    ReceivedGradient,
    Regularizer,
    Sharpness,
)

torchvision = pytest.importorskip("torchvision")
mse = nn.MSELoss()


def mlp():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 3)
    )


def batch():
    return torch.randn(8, 6), torch.randn(8, 3)


def sgd(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )


def plain(model):
    x, y = batch()
    mse(model(x), y).backward()


class Owns(nn.Module):
    """It draws from generators of its own, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.torchs = torch.Generator().manual_seed(1)
        self.held = [np.random.default_rng(0), {"old": np.random.RandomState(1)}]
        self.pythons = random.Random(0)

    def forward(self, x):
        new, old = self.held[0].normal(), self.held[1]["old"].rand()
        noise = torch.randn(x.shape, generator=self.torchs)
        return self.net(x + noise + new + old + self.pythons.random())

    def drawn(self):
        new, old = self.held[0].bit_generator.state, self.held[1]["old"].get_state()
        own = self.torchs.get_state().tolist(), self.pythons.getstate()
        return str((new, old, *own))


def own_generators(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        optimizer.zero_grad()
        plain(model)
        optimizer.step()
        yield model, optimizer, model.drawn()


def mixed_precision(model, steps):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in steps:
        optimizer.zero_grad()
        x, y = batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = mse(model(x), y) * (float("inf") if step == 1 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        yield model, optimizer, scaler.state_dict()


def step_under_autocast(model, steps):
    optimizer = sgd(model)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in steps:
            optimizer.zero_grad()
            plain(model)
            optimizer.step()
            yield model, optimizer


def accumulation(model, steps):
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in steps:
        optimizer.zero_grad()
        for _ in range(3):
            x, y = batch()
            (mse(model(x), y) / 3).backward()
        optimizer.step()
        yield model, optimizer


def step_in_the_backward_pass(model, steps):
    own = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

    def step(p):
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in steps:
        plain(model)
        # Of the steps before nothing is left once the next pass has begun.
        yield model, own[model[0].weight], torch._C._len_torch_function_stack() < 2


def two_optimizers(model, steps):
    first = torch.optim.AdamW(model[:2].parameters(), fused=True)
    second = torch.optim.SGD(model[2:].parameters(), lr=0.1, foreach=True)
    for _ in steps:
        first.zero_grad()
        second.zero_grad(set_to_none=False)
        plain(model)
        first.step()
        second.step()
        yield model, first


def averages(model, steps):
    optimizer, average = sgd(model), torch.optim.swa_utils.AveragedModel(model)
    for _ in steps:
        optimizer.zero_grad()
        plain(model)
        optimizer.step()
        average.update_parameters(model)
        twin = copy.deepcopy(model)
        plain(twin)
        yield model, optimizer, traces.digest(*average.state_dict().values())


def parametrized_later(model, steps):
    for step in steps:
        if step == 1:
            parametrizations.spectral_norm(model[0])
            prune.l1_unstructured(model[4], "weight", 0.3)
        optimizer = sgd(model)
        plain(model)
        optimizer.step()
        yield model, optimizer, sorted(model.state_dict())


class Adapter(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.drop = inner.requires_grad_(False), nn.Dropout(0.1)
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(self.drop(x)))


def adapters(model, steps):
    for step in steps:
        if step == 1:
            model.requires_grad_(False)
            model[0], model[4] = Adapter(model[0]), Adapter(model[4])
        optimizer = sgd(model)
        plain(model)
        optimizer.step()
        yield model, optimizer


def other_precision(model, steps):
    optimizer = sgd(model)
    for step in steps:
        dtype = (torch.float32, torch.bfloat16, torch.float64)[step]
        model.to(dtype)
        optimizer.zero_grad()
        x, y = batch()
        mse(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
        yield model, optimizer


def failures(model, steps):
    """The forward pass fails once a step, the backward pass once."""
    optimizer, now = sgd(model), set()

    def fail(*_):
        if "forward" in now:
            raise ZeroDivisionError

    model[1].register_forward_hook(fail)
    for step in steps:
        optimizer.zero_grad()
        x, y = batch()
        now.add("forward")
        with contextlib.suppress(ZeroDivisionError):
            model(x)
        now.clear()
        outputs = model(x) * 1
        if step == 1:
            outputs.register_hook(lambda _: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            mse(outputs, y).backward()
        optimizer.step()
        yield model, optimizer


def sharpness_aware(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        x, y = batch()
        mse(model(x), y).backward()
        with torch.no_grad():
            moves = [0.05 * p.grad for p in model.parameters()]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        mse(model(x), y).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()
        yield model, optimizer


def draws_after_the_pass(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        optimizer.zero_grad()
        x, y = batch()
        outputs = model(x)
        noise = torch.randn_like(y) + random.random() + np.random.rand()
        mse(outputs, y + noise).backward()
        optimizer.step()
        yield model, optimizer


def other_thread(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        optimizer.zero_grad()
        worker = threading.Thread(target=lambda: (plain(model), optimizer.step()))
        worker.start()
        worker.join()
        yield model, optimizer


def looked_at_as_a_whole(model, steps):
    """Hooks of all modules count calls; one of the root's makes copies."""
    counts, optimizer = [0, 0], sgd(model)

    def forward(*_):
        counts[0] += 1

    def backward(*_):
        counts[1] += 1

    hooks = nn.modules.module
    handles = (
        hooks.register_module_forward_hook(forward),
        hooks.register_module_full_backward_hook(backward),
        model.register_full_backward_hook(lambda *_: None),
    )
    for _ in steps:
        optimizer.zero_grad()
        plain(model)
        optimizer.step()
        yield model, optimizer, list(counts)
    for handle in handles:
        handle.remove()


class OfParts(nn.Module):
    """Its inputs are in a dictionary of a dictionary; it returns another."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, parts):
        return {"logits": self.net(parts["features"]["x"]), "name": parts["name"]}


def nested_inputs(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        optimizer.zero_grad()
        x, y = batch()
        mse(model({"name": "a", "features": {"x": x}})["logits"], y).backward()
        optimizer.step()
        yield model, optimizer


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.drop = nn.GRU(6, 8), nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, packed):
        return self.head(self.drop(self.cell(packed)[1][0]))


def packed_sequences(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        optimizer.zero_grad()
        rows = [torch.randn(length, 6) for length in (5, 4, 4, 2)]
        packed = nn.utils.rnn.pack_sequence(rows)
        mse(model(packed), torch.randn(4, 3)).backward()
        optimizer.step()
        yield model, optimizer


def per_sample_gradients(model, steps):
    optimizer = sgd(model)
    for _ in steps:
        x, y = batch()

        def loss(params, a, b):
            return mse(torch.func.functional_call(model, params, (a[None],)), b[None])

        of_each = torch.func.vmap(
            torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different"
        )
        found = of_each({n: p.detach() for n, p in model.named_parameters()}, x, y)
        for name, p in model.named_parameters():
            p.grad = found[name].mean(0)
        optimizer.step()
        yield model, optimizer


def without_second_derivative(model, steps):
    optimizer, whole = sgd(model), torch.tensor([4])
    for _ in steps:
        optimizer.zero_grad()
        found = model(torch.randn(4, 6)).square().sum(1)
        torch.segment_reduce(found, "mean", lengths=whole).sum().backward()
        optimizer.step()
        yield model, optimizer


def alignments(model, steps):
    optimizer, criterion = sgd(model), nn.CTCLoss()
    lengths = torch.full((4,), 5), torch.full((4,), 2)
    for _ in steps:
        optimizer.zero_grad()
        scores = model(torch.randn(5, 4, 6)).log_softmax(-1)
        criterion(scores, torch.randint(1, 3, (4, 2)), *lengths).backward()
        optimizer.step()
        yield model, optimizer


def no_norm():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 3))


# What cannot be measured, by script.
ABSENT = {
    without_second_derivative: {"sharpness": "differentiated twice"},
    per_sample_gradients: dict.fromkeys(
        ("regularizer", "dropout_noise", "masks", "sharpness"), "no call of the model"
    ),
}
MAKES = {
    own_generators: Owns,
    nested_inputs: OfParts,
    packed_sequences: Sequences,
    per_sample_gradients: no_norm,
    alignments: no_norm,
    without_second_derivative: no_norm,
}
SCRIPTS = (
    own_generators, mixed_precision, step_under_autocast, accumulation,
    step_in_the_backward_pass, two_optimizers, averages, parametrized_later, adapters,
    other_precision, failures, sharpness_aware, draws_after_the_pass, other_thread,
    looked_at_as_a_whole,
    nested_inputs, packed_sequences, per_sample_gradients, alignments,
    without_second_derivative,
)  # fmt: skip


def run(script, attached):
    """What each step of a script leaves behind."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model, trail, analysis = MAKES.get(script, mlp)(), [], None
    if attached:
        measures = [
            ReceivedGradient(), Regularizer(num_masks=4), DropoutNoise(), Masks(),
            Sharpness(max_matvecs=2, trace_matvecs=2, density_steps=0, slice_points=0),
        ]  # fmt: skip
        analysis = tdi.attach_analysis(model, log_dir=False, every=1, measures=measures)
    for own, optimizer, *more in script(model, range(3)):
        trail.append((traces.left_behind(own, optimizer), more))
    if attached:
        analysis.detach()
    return model, trail, analysis


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_it_trains_alike_and_is_measured(script):
    bare, expected, _ = run(script, attached=False)
    model, trail, analysis = run(script, attached=True)
    assert trail == expected
    assert traces.anatomy(model) == traces.anatomy(bare)
    assert torch._C._len_torch_function_stack() == 0
    assert not nn.modules.module._global_forward_hooks
    absent = ABSENT.get(script, {})
    assert set(analysis.absent) == set(absent), analysis.absent
    assert all(said in analysis.absent[name] for name, said in absent.items())
    tags = {
        "regularizer": {"loss/R_S", "regularizer/R1"},
        "dropout_noise": {"regularizer/R2_dropout_noise"},
        "sharpness": {"sharpness/trace"},
    }
    for name in tags.keys() - absent:
        assert tags[name] <= set(analysis.latest)


def compiled_in_place():
    torch.compiler.reset()
    model = mlp()
    model.compile(backend="aot_eager")
    return model


def compiled_block():
    torch.compiler.reset()
    block = torch.compile(mlp(), backend="aot_eager")
    return nn.Sequential(block, nn.Dropout(0.2), nn.Linear(3, 3))


def loss_of(model):
    x, y = batch()
    return mse(model(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_that_is_compiled_in_place_is_measured_uncompiled():
    analysis = traces.compared(compiled_in_place, loss_of)
    assert set(analysis.absent) == {"masks"}
    assert analysis.latest["regularizer/R1"] != 0
    model = compiled_in_place()
    call = model._compiled_call_impl
    with tdi.attach_analysis(model, log_dir=False) as analysis:
        with pytest.raises(RuntimeError, match="has an analysis already"):
            tdi.attach_analysis(model, log_dir=False)
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
            model(torch.randn(8, 5))
        twin = copy.deepcopy(model)
        assert twin._compiled_call_impl is None
    assert model._compiled_call_impl is call


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_blocks_run_uncompiled_in_measures():
    # Anatomies differ: torch writes the address of each wrapper on it.
    _, expected, _ = traces.train(compiled_block, loss_of, attach=False)
    _, seen, analysis = traces.train(compiled_block, loss_of, attach=True)
    assert seen == expected
    traces.assert_measured(analysis, {"0._orig_mod.3", "1"})


def test_masks_are_of_the_precision_that_the_script_had():
    class Draws(nn.Module):
        """What it draws depends on the precision."""

        def __init__(self):
            super().__init__()
            self.first, self.drop = nn.Linear(6, 6), nn.Dropout()
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x)
            torch.rand(1 if h.dtype == torch.bfloat16 else 2)
            return self.last(self.drop(h))

    model = Draws()
    optimizer = sgd(model)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        with torch.autocast("cpu", torch.bfloat16):
            plain(model)
        optimizer.step()
    assert analysis._view.statistics()["drop"].num_elements == 48


def test_masks_are_found_where_a_generator_of_the_models_own_says_what_is_drawn():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)
            self.own, self.sizes = random.Random(0), []

        def forward(self, x):
            self.sizes.append(self.own.randrange(1000))
            torch.rand(self.sizes[-1])
            return self.head(self.drop(x))

    model = Draws()
    optimizer = sgd(model)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(2):
            plain(model)
            optimizer.step()
    assert len(set(model.sizes)) == 2
    assert analysis._view.statistics()["drop"].num_elements == 96


def test_attention_without_dropout_is_no_noise():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)

        def forward(self, x):
            h = x.view(1, 1, 8, 6)
            attention = nn.functional.scaled_dot_product_attention
            h = attention(h, h, h).view(8, 6)
            own = torch.Generator().manual_seed(0)
            return self.head(self.drop(h)) + torch.rand(1, generator=own)

    model = Attends()
    optimizer = sgd(model)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        plain(model)
        optimizer.step()
    hidden = [site.name for site in analysis.sites if not site.observed]
    assert hidden == [":rand"]


def test_where_no_mask_is_drawn_the_reason_is_the_true_one():
    """An empty input draws none, as of an expert that gets no row; nor does p = 1."""
    model = nn.ModuleList([
        nn.Linear(4, 4),
        nn.Dropout(1.0),
        nn.Dropout(),
        nn.Linear(4, 2),
    ])
    model.forward = lambda x: model[3](
        model[0](x) + model[1](x) + model[2](x[:0]).sum()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        model(torch.ones(8, 4)).square().mean().backward()
        optimizer.step()
        said = {site.name: site.reason for site in analysis.sites}
    assert said.pop("1") == "at p = 1 it drops everything, and draws no mask"
    assert "its input was empty" in said["2"]


class Resting(nn.Module):
    """Noise that rests: a branch that is dropped, and layers between recurrent ones."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 4, num_layers=2, dropout=0.5).eval()
        self.path = torchvision.ops.StochasticDepth(0.5, "row").eval()
        self.drop, self.off = nn.Dropout(), nn.Dropout().eval()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.path(self.cell(x)[0])
        return self.head(self.drop(nn.functional.dropout(h, 0.5, training=False)))


def test_what_is_in_evaluation_mode_draws_no_mask_and_is_not_said_to_be_hidden():
    model = Resting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, "mse", log_dir=False, every=1, measures=[Masks()]
    ) as analysis:
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        hidden = {site.name for site in analysis.sites if not site.observed}
    assert hidden == {"cell"}  # as a module that drops between its own layers
    assert {tag for tag in analysis.latest if tag.startswith("mask/keep")} == {
        "mask/keep_rate/drop"
    }
    assert [name for name in analysis._capture.masks.calls] == []


class Ascends(torch.optim.SGD):
    """SAM: goes up by its first gradient, and down by that of its closure there."""

    def step(self, closure):
        own = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in own:
                p.add_(p.grad, alpha=self.rise)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in own:
                p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("rise", [0.5, None])
def test_a_closure_that_is_called_at_moved_parameters_is_said(rise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    if rise is None:  # a closure that comes first
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    else:
        optimizer = Ascends(model.parameters(), lr=0.1)
        optimizer.rise = rise
    x, y, clean = torch.randn(8, 6), torch.randn(8, 3), []

    def closure():
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = nn.Sequential(*model[:2], model[3])(x)
            clean.append(float(nn.functional.mse_loss(outputs, y)))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        closure()
        clean.clear()
        optimizer.step(closure)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean[0], rel=1e-5)
    said = "that it has moved" in analysis.notes["optimizer"]
    assert said is (rise is not None)


@pytest.mark.parametrize("convert", [False, True])
def test_a_mask_counts_once_whoever_observes_it(convert):
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, convert=convert, measures=[Masks()]
    ) as analysis:
        for _ in range(3):
            nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
            optimizer.step()
        assert analysis._view.statistics()["1"].num_elements == 3 * 8 * 16
        assert analysis._view.statistics()["1"].num_calls == 3


class Autograd:
    """Says whether a measure of the user's has autograd."""

    name = "autograd"
    needs = frozenset({"gradients"})

    def __call__(self, snapshot):
        return {"autograd/on": float(torch.is_grad_enabled())}


def around_the_step(context):
    torch.manual_seed(0)
    model = no_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = [Regularizer(), DropoutNoise(), Sharpness(), Autograd()]
    with tdi.attach_analysis(model, log_dir=False, every=1, measures=watch) as analysis:
        plain(model)
        with context:
            optimizer.step()
    assert not analysis.absent
    return {t: x for t, x in analysis.latest.items() if not t.startswith("cost")}


def test_what_is_around_the_step_changes_no_number():
    expected = around_the_step(contextlib.nullcontext())
    assert expected["autograd/on"] == 1 and "sharpness/trace" in expected
    assert around_the_step(torch.no_grad()) == expected
    assert around_the_step(torch.autocast("cpu", torch.bfloat16)) == expected


def test_a_batch_of_packed_sequences_counts_sequences():
    rows = [torch.randn(length, 6).double() for length in (5, 4, 4, 2)]
    packed = nn.utils.rnn.pack_sequence(rows)
    assert tdi.functional.batch_size((packed, None)) == 4
    model, targets = Sequences().double(), torch.randn(4, 3).double()
    found = tdi.regularizers.gauss_newton(
        model, (packed, targets), "mse", num_samples=None
    )
    model.eval()
    h = model.cell(packed)[1][0]
    expected = tdi.regularizers.last_layer(h, model.head.weight, 0.3)
    torch.testing.assert_close(found.value, expected)


def test_what_a_loss_module_reads_of_several_outputs_is_the_loss():
    model = OfParts()
    model.net[3].p = 0.0
    optimizer = sgd(model)
    x, y = batch()
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        loss = mse(model({"name": "a", "features": {"x": x}})["logits"], y)
        loss.backward()
        optimizer.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_of_outputs_that_a_hook_has_copied_the_right_one_is_followed():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 6)

        def forward(self, x):
            return self.net(x).chunk(2, 1)

    model = Halves()
    model.register_full_backward_hook(lambda *_: None)
    optimizer = sgd(model)
    x, y = batch()
    x.requires_grad_()
    measures = [Regularizer()]
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=measures
    ) as analysis:
        loss = nn.functional.mse_loss(model(x)[1], y)
        loss.backward()
        optimizer.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_passes_of_a_measure_of_the_users_are_none_of_the_scripts():
    class Probes:
        name, needs = "probes", frozenset()

        def __call__(self, snapshot):
            snapshot.model(torch.zeros(2, 6))
            return {}

    model = mlp()
    optimizer = sgd(model)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Probes()]
    ) as analysis:
        plain(model)
        optimizer.step()
        assert analysis._capture.inputs.first_tensor().shape == (8, 6)
