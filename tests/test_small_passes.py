"""Short ways of small passes give what the long ones do."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.passes import take_in_parts
from torch_dropout_ir import functional, output_hessian, output_products, tracing
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.output_scales import (
    cross_entropy_scale,
    even_scale,
    is_convex,
    logistic_diagonal,
)
from torch_dropout_ir.regularizers import (
    gauss_newton,
    monte_carlo,
    second_order,
    site_forms,
)
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.root_forms import RootForms


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(
    "shapes", [{"a": 6}, {"a": 6, "b": 6}, {"a": 6, "b": 12}, {"a": 1}, {}]
)
def test_few_numbers_are_added_up_as_many_are(shapes, coupled, monkeypatch):
    torch.manual_seed(0)
    draw = [(name, torch.rand(n).double()) for name, n in shapes.items()]
    draw += draw[:1]  # a site that is used twice
    like, uses = torch.zeros(3, 2, dtype=torch.float64), [*shapes, "unreached"]
    found = []
    for few in (10**6, 0):
        monkeypatch.setattr(site_forms, "_FEW", few)
        known = site_forms.Known(uses, 1, False, like, ())
        found.append(site_forms.assemble(known, [draw], coupled))
    short, long = found
    assert short.notes == long.notes and [*short.per_site] == [*long.per_site] == uses
    errors = short.per_site_standard_error, long.per_site_standard_error
    assert [*errors[0]] == [*errors[1]] == uses and errors[0]["unreached"] == 0
    pairs = [(short.per_site[name], long.per_site[name]) for name in uses]
    pairs += [(errors[0][name], errors[1][name]) for name in uses]
    pairs += [(short.value, long.value), (short.standard_error, long.standard_error)]
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape == ()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0, equal_nan=True)
    apart = shapes and not coupled and shapes not in ({"a": 6, "b": 12}, {"a": 1})
    assert math.isfinite(long.standard_error) == bool(apart or not shapes)


def test_numbers_that_are_not_finite_are_no_error_of_pythons():
    draw = [("a", torch.tensor([1e200, math.inf, 1.0], dtype=torch.float64))]
    known = site_forms.Known(["a"], 1, False, draw[0][1], ())
    found = site_forms.assemble(known, [draw], False)
    assert found.value == math.inf and found.standard_error.isnan()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_that_weigh_alike_have_the_scale_of_each(reduction, shape):
    torch.manual_seed(0)
    f = torch.randn(shape).double()
    y = torch.randint(3, (shape[0], *shape[2:]))
    loss = resolve_loss(nn.CrossEntropyLoss(reduction=reduction, ignore_index=7))
    even = even_scale(loss, f, y)
    expected = cross_entropy_scale(loss, f, y)
    torch.testing.assert_close(expected, torch.full_like(expected, even))
    weighted = nn.CrossEntropyLoss(torch.ones(3).double(), reduction=reduction)
    assert even_scale(resolve_loss(weighted), f, y) is None
    assert even_scale(loss, f.half(), y) is None
    assert even_scale(loss, f, f.softmax(1)) is None
    y.view(-1)[1] = 7
    assert even_scale(loss, f, y) is None


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2), (3,)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_has_its_closed_form(reduction, weigh, smoothing, soft, shape):
    classes = 1 if len(shape) > 1 else 0
    f, v = torch.randn(shape).double(), torch.randn(shape).double()
    if soft:
        y = torch.rand(shape).double()  # of any sum
    else:
        y = torch.randint(3, shape[:classes] + shape[classes + 1 :])
        if y.ndim:
            y.view(-1)[1] = 7
    weight = torch.rand(3).double() if weigh else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= {} if soft else {"ignore_index": 7}
    loss = resolve_loss(nn.CrossEntropyLoss(weight, **options))
    s = f.softmax(classes)
    found = s * (v - (s * v).sum(classes, keepdim=True))
    found = cross_entropy_scale(loss, f, y) * found
    expected = output_products.HessianProduct(loss, f, y)(v).detach()
    torch.testing.assert_close(found, expected)
    if not soft and not weigh:  # of targets that are not known none is ignored
        some = torch.zeros_like(y)
        unknown = cross_entropy_scale(loss, f, None)
        torch.testing.assert_close(unknown, cross_entropy_scale(loss, f, some))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, torch.rand(3), torch.rand(6, 1)])
@pytest.mark.parametrize("positive", [None, torch.tensor(3.0), torch.rand(3)])
def test_binary_cross_entropy_has_its_closed_form(reduction, weight, positive):
    torch.manual_seed(0)
    f, y = 4 * torch.randn(6, 3).double(), torch.rand(6, 3).double()
    loss = resolve_loss(
        nn.BCEWithLogitsLoss(weight, reduction=reduction, pos_weight=positive)
    )
    expected = output_products.HessianProduct(loss, f, y)(torch.ones_like(f)).detach()
    torch.testing.assert_close(logistic_diagonal(loss, f, y), expected)
    assert is_convex(loss) == (weight is None and positive is None)
    assert not is_convex(resolve_loss(F.binary_cross_entropy))


class Reused(nn.Module):
    """One site for two sequences, of tokens, and one that the outputs do not reach."""

    def __init__(self):
        super().__init__()
        self.drop, self.idle = nn.Dropout(0.4), nn.Dropout(0.2)
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.drop(self.one(self.drop(x)).unsqueeze(1).tanh().expand(-1, 2, -1))
        self.idle(h)
        return self.two(h).flatten(0, 1)[::2]


def plain():
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3)
    )


def channels():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.Dropout1d(0.3), nn.Tanh(),
        nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("make", [plain, channels, Reused])
@pytest.mark.parametrize("num_samples", [1, 3, None])
def test_a_pass_that_takes_no_short_way_gives_the_same(
    num_samples, make, loss, monkeypatch
):
    torch.manual_seed(0)
    net = make().double()
    labels, x = torch.randint(3, (6,)), torch.randn(6, 5).double()
    y = labels if loss == "cross_entropy" else F.one_hot(labels, 3).double()
    found = []
    take_in_parts(monkeypatch, parts=False)
    for short in (True, False):
        if not short:
            monkeypatch.setattr(site_forms, "_FEW", 0)
            monkeypatch.setattr(RootForms, "sums", lambda *_, **__: None)
            monkeypatch.setattr(output_products, "_DRAWN_IN_ONE", 0)
            monkeypatch.setattr(output_hessian, "even_scale", lambda *_: None)
            monkeypatch.setattr(tracing, "_ENGINE", None)
        torch.manual_seed(1)
        found.append(gauss_newton(net, (x, y), loss, num_samples=num_samples))
    short, long = found
    for name in ("value", "standard_error"):
        torch.testing.assert_close(
            getattr(short, name),
            getattr(long, name),
            rtol=1e-12,
            atol=0,
            equal_nan=True,
        )
    torch.testing.assert_close(short.per_site, long.per_site, rtol=1e-12, atol=0)
    errors = short.per_site_standard_error, long.per_site_standard_error
    torch.testing.assert_close(*errors, rtol=1e-12, atol=0, equal_nan=True)
    assert [*errors[0]] == [*errors[1]] == [*short.per_site]
    assert [*short.per_site] == [*long.per_site] and short.notes == long.notes
    assert short.num_samples == long.num_samples and short.exact == long.exact


class Counting(nn.Module):
    """Two names of one buffer, which its forward pass moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.zeros(()))
        self.register_buffer("two", self.one)
        self.register_buffer("none", None)

    def forward(self, x):
        self.one.add_(1)
        if self.two != self.one or x.sum() > 100:
            raise ValueError("moved apart, or a stop")
        return F.dropout(x, 0.5) * self.two


@pytest.mark.parametrize("estimator", [gauss_newton, second_order, monte_carlo])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_a_dropout_layer_says_its_own_mode(estimator, training):
    net, x = nn.Dropout(0.3).train(training), torch.rand(4, 3)
    found = estimator(net, (x, torch.rand(4, 3)), "mse")
    assert [*found.notes] == [n for n in found.notes if "evaluation mode" in n]
    assert bool(found.notes) == (not training) and net.training == training


def test_a_first_call_loads_nothing_of_torchs_compiler():
    """Its symbols take seconds, more than a small network's training."""
    code = """
import sys, torch, torch_dropout_ir as tdi
from torch import nn
there = "sympy" in sys.modules
for width in (8, 600):
    layers = nn.Linear(5, width), nn.Dropout(), nn.Linear(width, 4)
    net, batch = nn.Sequential(*layers), (torch.rand(128, 5), torch.rand(128, 4))
    for estimator in (tdi.regularizers.gauss_newton, tdi.regularizers.second_order):
        estimator(net, batch, "mse")
print(there or "sympy" not in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "True"


def test_buffers_are_copied_for_a_call_and_given_back_after_an_error():
    net = nn.Sequential(Counting(), nn.BatchNorm1d(3))
    held = {name: (x, x.clone()) for name, x in net.named_buffers()}
    functional.call(net, torch.rand(4, 3))
    with clean_pass(net, torch.rand(4, 3)) as clean:
        assert len(clean.uses) == 1
    with pytest.raises(ValueError, match="stop"), clean_pass(net, torch.ones(99, 3)):
        pass
    for name, x in net.named_buffers():
        assert x is held[name][0] and torch.equal(x, held[name][1])
    functional.call(net, torch.rand(4, 3), move_buffers=True)
    assert net[0].one == 1 and net[1].num_batches_tracked == 1


def test_layers_of_torch_alone_keep_their_running_statistics():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: x.clone() for name, x in net.state_dict().items()}
    gauss_newton(net, (torch.randn(5, 3), torch.randn(5, 3)), "mse")
    for name, x in net.state_dict().items():
        assert torch.equal(x, before[name])


def test_running_statistics_move_for_who_may_read_them():
    """Torch's layers alone leave theirs; hooks on every module see copies that move."""
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    x, seen = torch.randn(5, 3), []

    def look(module, *_):
        if isinstance(module, nn.BatchNorm1d):
            seen.append(bool(module.running_mean.any()))

    with clean_pass(net, x) as clean:
        alone = clean.outputs.detach()
    hook = nn.modules.module.register_module_forward_hook(look)
    with clean_pass(net, x) as clean:
        hook.remove()
        assert seen == [True]
        assert torch.equal(clean.outputs, alone)
    net[2].p = 0.0
    assert torch.equal(net(x), alone)


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo])
def test_blocks_that_a_backward_pass_runs_again_keep_theirs(form):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(
                nn.Dropout(0.3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()
            )
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(checkpoint(self.block, x, use_reentrant=False))

    net = Again()
    before = [x.clone() for x in net.buffers()]
    form(net, (torch.randn(8, 3), torch.randn(8, 2)), "mse")
    torch.testing.assert_close(list(net.buffers()), before, rtol=0, atol=0)
