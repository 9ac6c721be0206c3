"""Shared modules, hooks, attributes: what a script keeps is as it was."""

import contextlib
import copy
import functools
import itertools
import pickle
import warnings
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir.analysis.measures import DropoutNoise, Masks, Regularizer

criterion = nn.CrossEntropyLoss()


def loss_of(model):
    return criterion(model(torch.randn(8, 6)), torch.randint(3, (8,)))


class Shared(nn.Module):
    """A layer, a normalization and a dropout that stand in it under two names each."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = (
            nn.Linear(6, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(),
        )
        self.again, self.norm_again, self.drop_again = self.layer, self.norm, self.drop
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.drop(self.norm(self.layer(x)))
        return self.head(self.drop_again(self.norm_again(self.again(torch.tanh(h)))))


class Tied(nn.Module):
    """Two layers that hold one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("make", [Shared, Tied])
def test_what_is_shared_stays_shared(make):
    analysis = traces.compared(make, loss_of)
    traces.assert_measured(analysis)


def test_curvature_moves_both_places_of_a_tied_tensor():
    model = Tied().double()
    batch = torch.randn(8, 6).double(), torch.randint(3, (8,))
    op = tdi.sharpness.hessian(model, "cross_entropy", batch)
    v = {n: torch.randn_like(x) for n, x in op.params.items()}
    at = {n: x.detach().clone() for n, x in model.named_parameters()}

    def slope(alpha):
        with torch.no_grad():
            for n, x in model.named_parameters():
                x.copy_(at[n] + alpha * v[n])
        model.drop.eval()
        found = torch.autograd.grad(
            criterion(model(batch[0]), batch[1]), list(model.parameters())
        )
        model.drop.train()
        return found

    step = 1e-5
    pairs = zip(slope(step), slope(-step), strict=True)
    expected = [(a - b) / (2 * step) for a, b in pairs]
    slope(0.0)
    found = op @ v
    for (n, _), e in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[n], e, rtol=1e-5, atol=1e-8)


class Collects(nn.Module):
    """Counts, averages and collects in attributes that are no buffers."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.head = (
            nn.Linear(6, 6),
            nn.Dropout(),
            nn.Linear(6, 3),
        )
        self.calls, self.mean, self.total = 0, torch.zeros(6), torch.zeros(6)
        self.norms, self.seen, self.shapes = [], {}, set()
        self.by_size, self.counts = defaultdict(list), Counter()
        self.order, self.sums = OrderedDict(), np.zeros(6)

    def forward(self, x):
        h = self.drop(self.layer(x))
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.total += h.detach().sum(0)
        self.norms.append(float(h.detach().norm()))
        self.seen[self.calls] = float(h.detach().sum())
        self.shapes.add((self.calls, *h.shape))
        self.latest = self.calls
        setattr(self, f"call_{self.calls}", self.latest)
        self.by_size[len(h)].append(self.calls)
        self.counts.update(["all", "odd"] if self.calls % 2 else ["all"])
        self.order[f"call {self.calls}"] = float(h.detach().sum())
        self.sums += h.detach().sum(0).numpy()
        self.layer.weight.calls = self.calls
        return self.head(h) + self.mean.mean() + 0.01 * self.calls


def collected(attach):
    told = []
    _, _, analysis = traces.train(
        Collects, lambda model: (told.append(model), loss_of(model))[1], attach
    )
    model = told[0]
    digest = traces.digest(model.mean, model.total, *model.parameters())
    counted = (
        model.calls, model.norms, model.seen, model.shapes, model.latest,
        model.by_size, model.counts, model.order, model.sums.tolist(),
        [name for name in vars(model) if name.startswith("call_")],
        model.layer.weight.calls,
    )  # fmt: skip
    return (digest, *counted), analysis


def test_attributes_are_given_back():
    expected, _ = collected(False)
    seen, analysis = collected(True)
    assert seen == expected and expected[1] == 3
    traces.assert_measured(analysis, {"drop"})


def shifts(_, __, out):
    out.add_(0.5)


def hooked(attach):
    """A script whose hooks count, and some of which act on what passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3))
    counts = dict.fromkeys(("root", "in", "out", "back", "gradient", "late"), 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    model.register_forward_pre_hook(count("root"))
    model[0].register_forward_hook(lambda _, __, out: out * 2)
    model[0].register_forward_hook(shifts)
    model[1].register_forward_hook(count("out"))
    model[2].register_forward_pre_hook(count("in"))
    model[3].register_full_backward_hook(count("back"))
    model[3].weight.register_hook(count("gradient"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trail, analysis, x = [], None, torch.randn(8, 6)
    y = torch.randint(3, (8,))
    if attach:
        analysis = tdi.attach_analysis(model, log_dir=False, every=2)
    model[3].register_forward_pre_hook(count("late"))
    order = [list(m._forward_hooks) for m in model]
    for _ in range(4):
        sgd.zero_grad()
        criterion(model(x), y).backward()
        sgd.step()
        trail.append((traces.digest(*model.parameters()), dict(counts)))
    if attach:
        analysis.detach()
    assert [list(m._forward_hooks) for m in model] == order
    assert all(
        type(h).__name__ == "function"
        for m in model
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    return trail, analysis


def test_hooks_that_look_on_are_not_called_by_measures():
    expected, _ = hooked(False)
    trail, analysis = hooked(True)
    assert trail == expected
    assert set(expected[-1][1].values()) == {4}
    assert not analysis.absent


def test_hooks_that_act_are_part_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda _, __, out: out * 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    expected = tdi.regularizers.last_layer(
        2 * torch.nn.functional.linear(x, model[0].weight, model[0].bias),
        model[2].weight, 0.5,
    )  # fmt: skip
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(x), y).backward()
        sgd.step()
    assert analysis.latest["regularizer/R1"] == pytest.approx(float(expected.detach()))


def keeps_input(layer, args, _):
    layer.kept = [*getattr(layer, "kept", []), args[0].detach()]


def of_each_sample(layer, _, outputs):
    """Gradients of samples, added to a parameter's attribute; an input serves once."""
    own = torch.einsum("ni,nj->nij", outputs[0], layer.kept.pop())
    before = getattr(layer.weight, "of_samples", None)
    layer.weight.of_samples = own if before is None else before + own
    if not layer.kept:
        del layer.kept


def private(attach):
    """A script that clips gradients of samples, which hooks collect."""
    torch.manual_seed(0)
    model, trail = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3)), []
    layer = model[2]
    layer.register_forward_hook(keeps_input)
    layer.register_full_backward_hook(of_each_sample)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = [Regularizer(), DropoutNoise()]
    analysis = attach and tdi.attach_analysis(
        model, log_dir=False, every=1, measures=measures
    )
    for _ in range(4):
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        sgd.zero_grad()
        criterion(model(x), y).backward()
        of_samples = layer.weight.of_samples
        norms = of_samples.flatten(1).norm(dim=1)
        layer.weight.grad = ((1 / norms).clamp(max=1) @ of_samples.flatten(1)).view(
            3, 6
        )
        sgd.step()  # what hooks have collected stays, and the next pass adds to it
        trail.append(traces.digest(*model.parameters(), layer.weight.of_samples))
    if attach:
        analysis.detach()
    return trail, analysis


def test_hooks_that_collect_gradients_of_samples_are_not_called_by_measures():
    trail, analysis = private(True)
    assert trail == private(False)[0]
    assert set(analysis.absent) <= {traces.PARTS}
    assert "regularizer/R1/1" in analysis.latest


class Gain(nn.Module):
    gain = torch.ones(())

    def forward(self, x):
        return self.gain * x


def measures_itself(module, args):
    module.gain = args[0].detach().abs().max()


def triples(_, __, out):
    out.mul_(3)


@pytest.mark.parametrize("how", [measures_itself, triples])
def test_hooks_that_write_are_part_of_the_model(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), Gain(), nn.Linear(6, 3))
    if how is triples:
        model[0].register_forward_hook(how)
    else:
        model[2].register_forward_pre_hook(how)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        criterion(model(x), y).backward()
        sgd.step()
    clean = float(criterion(model.eval()(x), y).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean)


def doubles_at_times(_, __, out):
    return 2 * out if len(out) == 4 else None


def test_a_hook_that_acts_at_times_is_part_of_the_model():
    torch.manual_seed(0)
    layer, drop = nn.Linear(6, 3), nn.Dropout()
    model = nn.ModuleList([layer, drop])
    model.forward = lambda x: torch.cat([layer(drop(x[:4])), layer(drop(x[4:]))])
    layer.register_forward_hook(doubles_at_times)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(10, 6), torch.randint(3, (10,))
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        criterion(model(x), y).backward()
        sgd.step()
    clean = float(criterion(model.eval()(x), y).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean)


def looks(*_):
    """A hook that can be pickled."""


def test_copies_carry_the_scripts_own_hooks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].register_forward_hook(looks)
    with tdi.attach_analysis(model, log_dir=False):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(twin[0]._forward_hooks.values()) == [looks]
    assert list(model[0]._forward_hooks.values()) == [looks]


def traced(block):
    return torch.jit.trace(block, torch.zeros(4, 6), check_trace=False)


@pytest.mark.parametrize("scripted", [torch.jit.script, traced])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore::torch.jit.TracerWarning",
)  # fmt: skip
def test_scripted_code_is_told_and_trains_alike(scripted):
    def make():
        block = nn.Sequential(
            nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh()
        )
        return nn.Sequential(scripted(block), nn.Dropout(), nn.Linear(6, 3))

    outcomes = []
    for attach in (False, False, True):  # the first one warms torch's compiler up
        _, seen, analysis = traces.train(make, loss_of, attach)
        outcomes.append(seen)
    assert outcomes[1] == outcomes[2]
    hidden = {s.name: s.reason for s in analysis.sites if not s.observed}
    assert "scripted" in hidden["0.2"] and hidden["0.2"] in analysis.summary()
    traces.assert_measured(analysis, ["1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_on_frozen_code_which_has_no_mode_is_measured():
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh())
    block = torch.jit.freeze(torch.jit.script(block.eval()))
    batch = torch.randn(8, 6), torch.randn(8, 3)
    model = nn.Sequential(block, nn.Dropout(), nn.Linear(6, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(batch[0]), batch[1]).backward()
        sgd.step()
    traces.assert_measured(analysis, ["1"])
    exact = tdi.sharpness.hessian(model, "mse", batch).dense().trace()
    found = analysis.latest["sharpness/trace"]
    assert found == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_that_is_scripted_as_a_whole_is_refused():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    batch = torch.ones(1, 2), torch.ones(1, 2)
    for ask in (
        lambda: tdi.attach_analysis(model, log_dir=False),
        lambda: tdi.regularizers.monte_carlo(model, batch, "mse"),
        lambda: tdi.regularizers.modified_loss(model, batch, "mse", kind="L1"),
        lambda: tdi.sharpness.hessian(model, "mse", batch),
        lambda: tdi.condensation.merge_condensed(model, batch[0]),
    ):
        with pytest.raises(TypeError, match="scripted"):
            ask()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_graph_between_does_not_displace_the_batch(without):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    h = model[0](x).detach()
    expected = tdi.regularizers.last_layer(h, model[2].weight, 0.5)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        outputs = model(x)
        with without():
            model(torch.randn(5, 6))  # masks averaged over, say
        nn.MSELoss()(outputs, y).backward()
        sgd.step()
    assert not analysis.absent
    assert analysis.latest["regularizer/R1"] == pytest.approx(float(expected.detach()))


def test_masks_are_left_out_where_a_second_pass_draws_otherwise():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)
            self.calls = [itertools.count(1)]

        def forward(self, x):
            for _ in range(next(self.calls[0])):  # an iterator cannot be given back
                torch.rand(1)
            return self.head(self.drop(x))

    model = Grows()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[tdi.analysis.measures.Masks()]
    ) as analysis:
        nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        model.eval()
        model(torch.randn(2, 6))
        model.train()
        with pytest.warns(UserWarning, match="draws other random numbers"):
            sgd.step()
    assert "draws other random numbers" in analysis.notes["masks"]
    assert analysis.absent["masks"] == analysis.notes["masks"]


def test_an_evaluation_pass_that_draws_leaves_the_masks_of_the_step():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.drop(x + 0.1 * torch.randn_like(x)))

    model = Draws()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(8, 6)), torch.randn(8, 3)).backward()
        model.eval()
        model(torch.randn(2, 6))
        model.train()
        sgd.step()
    assert analysis._view.statistics()["drop"].num_elements == 48


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_measures_do_not_count_towards_what_torch_optimizes_of_scripted_code():
    seen = []

    class Asks(nn.Module):
        def forward(self, x):
            seen.append(torch._C._get_graph_executor_optimize())
            return x

    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model = nn.Sequential(scripted, nn.Dropout(), Asks(), nn.Linear(6, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[tdi.analysis.measures.Regularizer()]
    ):
        loss_of(model).backward()
        sgd.step()
    assert seen[0] and len(seen) > 2 and not any(seen[1:])
    assert torch._C._get_graph_executor_optimize()


def test_operations_of_measures_are_not_counted_in_the_scripts():
    def counted(attach):
        torch.manual_seed(0)
        model = Collects()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with contextlib.ExitStack() as stack:
            analysis = (
                stack.enter_context(tdi.attach_analysis(model, log_dir=False, every=1))
                if attach else None
            )  # fmt: skip
            counter = stack.enter_context(FlopCounterMode(display=False))
            loss_of(model).backward()
            sgd.step()
        return counter.get_total_flops(), analysis

    (expected, _), (seen, analysis) = counted(False), counted(True)
    assert seen == expected > 0
    traces.assert_measured(analysis, {"drop"})


class Taps(nn.Module):
    """Reads in its forward what hooks of its own have kept."""

    def __init__(self, how):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 6))
        self.head, self.kept, self.last = nn.Linear(12, 3), {}, None
        kept = self.kept
        hook = {
            "method": self.keep,
            "partial": functools.partial(Taps.keep, self),
            "closure": lambda _, __, out: kept.update(last=out),
        }[how]
        self.body[1].register_forward_hook(hook)

    def keep(self, _, __, out):
        self.last = out

    def forward(self, x):
        out = self.body(x)
        tapped = self.kept.pop("last") if self.kept else self.last
        return self.head(torch.cat([out, tapped], 1))


@pytest.mark.parametrize("how", ["method", "partial", "closure"])
def test_hooks_that_keep_what_the_model_reads_are_part_of_it(how):
    torch.manual_seed(0)
    model = Taps(how)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer(), Masks()]
    ) as analysis:
        for _ in range(3):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            criterion(model(x), y).backward()
            with torch.no_grad():
                clean = criterion(model.eval()(x), y)
            model.train()
            sgd.step()
            assert not analysis.absent and not analysis.notes["loss/R_S"]
            assert analysis.latest["loss/R_S"] == pytest.approx(float(clean))


def test_an_attribute_whose_memory_is_released_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = nn.Linear(3, 2), torch.ones(1000)
            self.kept.untyped_storage().resize_(0)  # to read it ends the process

        def forward(self, x):
            return self.net(x)

    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(4, 3)), torch.zeros(4, 2)).backward()
        sgd.step()
    assert analysis.latest["loss/R_S"] > 0


class Unusual(nn.Module):
    """Holds tensors that grow, are written on in inference mode, or have no numbers."""

    def __init__(self):
        super().__init__()
        self.net, self.bank = nn.Linear(3, 2), torch.zeros(0)
        with torch.inference_mode():
            self.count = torch.zeros(())
        self.shape_of = torch.zeros(3, device="meta")
        self.lengths = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def forward(self, x):
        self.bank.resize_(len(self.bank) + 1).fill_(1)
        with torch.inference_mode():
            self.count += 1
        return self.net(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attributes_of_unusual_tensors_are_given_back():
    model = Unusual()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(2):
            nn.MSELoss()(model(torch.randn(4, 3)), torch.zeros(4, 2)).backward()
            sgd.step()
    assert "capture" not in analysis.absent and analysis.latest["loss/R_S"] > 0
    assert model.bank.tolist() == [1, 1] and float(model.count) == 2


def test_attributes_that_no_pass_changes_are_not_written_on():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = nn.Linear(3, 2), torch.ones(3)
            self.fixed = np.ones(3)
            self.fixed.flags.writeable = False

        def forward(self, x):
            return self.net(x * self.kept)

    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, "mse", log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(4, 3)), torch.zeros(4, 2)).backward()
        sgd.step()
    assert "capture" not in analysis.absent and analysis.latest["loss/R_S"] > 0
    assert model.kept._version == 0  # a graph that has kept it is still good


class Follows(nn.Module):
    """Its forward pass writes on parameters, as one that moves a key encoder does."""

    def __init__(self, how):
        super().__init__()
        self.one, self.drop, self.two = (
            nn.Linear(6, 8),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        )
        self.slow = nn.Parameter(torch.ones(3), requires_grad=False)
        self.how = how

    def forward(self, x):
        if self.how == "data":
            self.slow.data.mul_(0.9)
        elif self.how == "another tensor":
            self.slow.data = 0.9 * self.slow.data
        elif self.how == "in place":
            with torch.no_grad():
                self.slow.mul_(0.9)
        elif self.how == "trained":
            self.one.weight.data = nn.functional.normalize(self.one.weight.data)
        elif self.how == "replaced":
            self.slow = nn.Parameter(0.9 * self.slow, requires_grad=False)
        return self.two(self.drop(self.one(x))) * self.slow


@pytest.mark.parametrize(
    "how", ["data", "another tensor", "in place", "trained", "replaced"]
)
def test_parameters_that_the_pass_itself_writes_on_do_not_move(how):
    ended, analysis, clean = [], None, []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Follows(how)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        if attached:
            analysis = tdi.attach_analysis(model, log_dir=False, every=1)
        for _ in range(3):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            sgd.zero_grad()
            criterion(model(x), y).backward()
            with torch.no_grad():
                twin = copy.deepcopy(model)
                twin.drop.p = 0.0
                clean.append(float(criterion(twin(x), y)))
            sgd.step()
        ended.append([*model.parameters(), torch.get_rng_state()])
    analysis.detach()
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
    assert not set(analysis.absent)
    found = [value for _, value in analysis.history["loss/R_S"]]
    assert found == pytest.approx(clean[3:])


def test_a_model_whose_first_pass_makes_its_parameters():
    model = nn.Sequential(nn.LazyLinear(8), nn.Dropout(0.3), nn.LazyLinear(3))
    with (
        warnings.catch_warnings(record=True) as said,
        tdi.attach_analysis(model, log_dir=False, every=1) as analysis,
    ):
        warnings.simplefilter("always")
        model(torch.randn(8, 6))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model).backward()
        sgd.step()
    assert analysis.latest["regularizer/R1"] > 0 and not analysis.absent
    assert not [w for w in said if "not looked at" in str(w.message)]
