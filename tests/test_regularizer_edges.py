"""Where a form of R_1 could be wrong without a word: each against every mask."""

import contextlib
import copy
import functools
import math
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_upper_left
from torch.utils.checkpoint import checkpoint

from tests.passes import take_in_parts
from torch_dropout_ir import attach_analysis, frozen_masks, sharpness
from torch_dropout_ir.analysis.measures import DropoutNoise, Regularizer, received_r2
from torch_dropout_ir.functional import at_sites, call, fresh
from torch_dropout_ir.generators import AllStanding
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.testing import (
    check_regularizer,
    enumerate_masks,
    expected_dropout_loss,
)

torchvision = pytest.importorskip("torchvision")


def truth(net, batch, loss="mse"):
    clean = clean_risk(net, batch, resolve_loss(loss)).detach()
    return float(expected_dropout_loss(net, batch, loss) - clean)


def test_a_loss_that_the_model_has_computed_itself_comes_without_its_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))

        def forward(self, x, labels):
            return {"loss": F.mse_loss(self.net(x), labels)}

    inputs = Inputs((torch.randn(5, 3),), {"labels": torch.randn(5, 2)})
    loss = resolve_loss(lambda outputs, _: outputs["loss"])
    found, _, risk = online(Model(), (inputs, torch.zeros(5)), loss)
    assert not risk.requires_grad and not found.value.requires_grad
    assert float(risk) > 0


class Block(nn.Module):
    """Called dropout in a block that may be computed again in the backward pass."""

    def __init__(self, again):
        super().__init__()
        self.one, self.two, self.again = nn.Linear(3, 4), nn.Linear(4, 2), again

    def body(self, x):
        return torch.tanh(F.dropout(self.one(x), 0.3, self.training))

    def forward(self, x):
        h = (
            checkpoint(self.body, x, use_reentrant=False)
            if self.again
            else self.body(x)
        )
        return self.two(h)


def test_what_is_computed_again_is_computed_without_dropout():
    torch.manual_seed(0)
    nets = Block(False).double(), Block(True).double()
    nets[1].load_state_dict(nets[0].state_dict())
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    for form in (gauss_newton, second_order):
        plain, again = (form(net, batch, "mse", num_samples=None) for net in nets)
        torch.testing.assert_close(plain.value, again.value)
    for kind in ("L1", "L2", "L4"):
        with pytest.raises(RuntimeError, match="checkpoint"):
            modified_loss(nets[1], batch, "mse", kind=kind, lr=0.1, r1="second_order")


class Asks(nn.Module):
    """A model that asks its dropout module whether it is on."""

    def __init__(self):
        super().__init__()
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.drop(x) if self.drop.training else 100 * x)


def test_a_model_may_ask_a_dropout_module_for_its_mode():
    net = Asks().double()
    batch = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    plain = nn.Sequential(nn.Dropout(0.3), net.last)
    expected = truth(plain, batch)
    assert expected > 0
    for found in (truth(net, batch), gauss_newton(net, batch, "mse", num_samples=None)):
        assert float(getattr(found, "value", found)) == pytest.approx(expected)
    with pytest.raises(RuntimeError):  # left as it was, after an exception too
        gauss_newton(nn.Sequential(net.drop, nn.Linear(7, 1).double()), batch, "mse")
    assert net.drop.training and not net.drop._forward_hooks


class Sums(nn.Module):
    """Sample ``i`` reads those before it: the first reads itself alone."""

    def __init__(self):
        super().__init__()
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(torch.cumsum(self.drop(x), 0))


def test_samples_that_meet_though_the_first_is_alone():
    torch.manual_seed(0)
    net = Sums().double()
    batch = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    r1 = truth(net, batch)
    drawn = monte_carlo(net, batch, "mse", num_masks=3000)
    assert abs(float(drawn.value) - r1) < 4 * float(drawn.standard_error)
    for form in (gauss_newton, second_order):
        exact = form(net, batch, "mse", num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9)

    def all_but_the_first(f, t):
        return (f[1:] - t[1:]).square().mean().sqrt()

    few = nn.Sequential(nn.Dropout(0.05), nn.Linear(2, 1)).double()
    with torch.no_grad():
        few[1].weight.mul_(0.1)
    r1 = truth(few, batch, all_but_the_first)
    exact = second_order(few, batch, all_but_the_first, num_samples=None)
    assert float(exact.value) == pytest.approx(r1, rel=0.05)


def test_features_that_are_overwritten():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.inner, self.last = (
                nn.Dropout(0.4), nn.Linear(3, 3), nn.Linear(3, 1),
            )  # fmt: skip

        def forward(self, x):
            h = 1.0 * x
            h += self.inner(self.drop(h))
            return self.last(h)

    net = Residual().double()
    batch = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    r1 = truth(net, batch)
    for form in (gauss_newton, second_order):
        exact = form(net, batch, "mse", num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9)


@pytest.mark.parametrize("late", [False, True])
def test_what_dropout_made_that_is_overwritten(late):
    """At once, or when another site has run: then the pass is run again."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.other = nn.Dropout(0.4), nn.Dropout(0.3)
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            h = self.drop(self.inner(x))
            if late:
                h += self.other(torch.sin(x))
            else:
                h += torch.sin(x)
                h = h + self.other(self.inner(x))
            return self.last(h)

    net = Branches().double()
    batch = torch.randn(2, 3).double(), torch.randn(2, 1).double()
    r1 = truth(net, batch)
    passes = []
    net.last.register_forward_hook(lambda *_: passes.append(1))
    for form in (gauss_newton, second_order):
        passes.clear()
        exact = form(net, batch, "mse", num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9)
        assert len(passes) == 1 + late


def test_a_mask_that_the_batch_shares():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)
            self.drop = torchvision.ops.StochasticDepth(0.3, "batch")

        def forward(self, x):
            return self.last(x + self.drop(torch.sin(x)))

    net = Depth().double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    r1 = truth(net, batch)
    exact = gauss_newton(net, batch, "mse", num_samples=None)
    assert float(exact.value) == pytest.approx(r1, rel=1e-9)


@pytest.mark.parametrize("noise", [
    lambda x: F.alpha_dropout(x, 0.5, True),
    lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)) * 2,
    nn.AlphaDropout(0.5),
])  # fmt: skip
def test_other_noise_makes_nothing_exact(noise):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.2), nn.Linear(3, 2)
            self.noise = noise

        def forward(self, x):
            return self.last(self.drop(self.noise(x)))

    net = Net()
    batch = torch.randn(5, 3), torch.randn(5, 2)
    assert not gauss_newton(net, batch, "mse", num_samples=None).exact
    net.drop.p = 0.0
    assert not gauss_newton(net, batch, "mse", num_samples=None).exact


def test_the_error_counts_noise_that_is_not_ours():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(3, 1)

        def forward(self, x):
            return self.last(self.drop(x + torch.randn_like(x)))

    torch.manual_seed(0)
    net, batch = Noisy(), (torch.randn(8, 3), torch.randn(8, 1))
    draws = [monte_carlo(net, batch, "mse", num_masks=16) for _ in range(100)]
    spread = torch.stack([d.value for d in draws]).std()
    claimed = torch.stack([d.standard_error for d in draws]).square().mean().sqrt()
    assert 0.7 < claimed / spread < 1.4


class NoisyGradient(nn.Module):
    """Whose gradient is the dropped input and noise of another kind."""

    def __init__(self, draw):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.zeros(512)), nn.Dropout(0.5)
        self.draw = draw

    def forward(self, x):
        noise = 10 * self.draw(x)
        return (
            (self.drop(x) + noise + 10 * self.draw(self.drop(x))) * self.weight
        ).sum()


def numpy_noise(x):
    return torch.from_numpy(np.random.standard_normal(x.shape)).float()


class OwnNoise(nn.Module):
    """Noise by a generator of the layer's own."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            return torch.randn(x.shape, generator=self.generator)
        return torch.tensor([self.generator.normalvariate(0, 1) for _ in range(len(x))])


NOISES = [
    torch.randn_like,
    numpy_noise,
    OwnNoise(torch.Generator()),
    OwnNoise(random.Random(0)),
]


@pytest.mark.parametrize("draw", NOISES)
@pytest.mark.parametrize("count", [1, 4])
def test_the_noise_of_masks_is_of_masks_alone(draw, count):
    torch.manual_seed(0)
    net, batch = NoisyGradient(draw), (torch.ones(512), None)
    batches = [batch] * count
    found = gradient_norm(net, batches, lambda out, _: out, lr=4.0, num_masks=32)
    assert any("besides its sites" in note for note in found.notes)
    # p / (1 - p) of each element; a difference of noise would add 20,000.
    assert abs(found.dropout_noise - 512) < 4 * found.dropout_noise_standard_error < 80
    rest = found.mean_gradient if count == 1 else found.batch_noise
    assert 0.7 < rest / (512 * (200 + (count == 1))) < 1.4
    with frozen_masks(net):
        found = gradient_norm(net, batch, lambda out, _: out, lr=4.0, num_masks=4)
    assert found.dropout_noise == 0


@pytest.mark.parametrize("draw", NOISES)
def test_a_mean_over_masks_has_noise_alike_on_both_sides(draw):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.draw = nn.Dropout(0.5), draw

        def forward(self, x):
            return self.drop(x).square().mean() + 100 * self.draw(x).mean()

    torch.manual_seed(0)
    found = monte_carlo(Net(), (torch.ones(512), None), lambda out, _: out)
    assert abs(found.value - 1) < 4 * found.standard_error < 0.1
    assert any("besides its sites" in note for note in found.notes)


@pytest.mark.parametrize(
    "kind", [torch.Generator, random.Random, np.random.RandomState]
)
@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937])
def test_generators_that_a_model_holds_are_seen_to_move_and_put_back(kind, bits):
    net = OwnNoise(kind())
    net.other = np.random.Generator(bits(3))
    began = AllStanding(net)
    assert not began.moved()
    first = net.other.random()
    assert began.moved()
    began.restore()
    assert not began.moved() and net.other.random() == first
    began.restore()
    if kind is not np.random.RandomState:
        first = net(torch.ones(3))
        assert began.moved()
        began.restore()
        assert torch.equal(net(torch.ones(3)), first)


def test_what_the_noise_of_masks_lacks_is_in_the_record():
    net = NoisyGradient(torch.randn_like)
    only = [DropoutNoise()]
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with attach_analysis(net, measures=only, log_dir=False) as analysis:
        net(torch.ones(512)).backward()
        sgd.step()
    note = analysis.notes["regularizer/R2_dropout_noise"]
    assert "besides its sites" in note


def test_weighted_squares_are_not_plain_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    loss = functools.partial(F.mse_loss, weight=torch.rand(4, 2).double())
    found = gauss_newton(net, batch, loss, num_samples=None)
    assert float(found.value) == pytest.approx(truth(net, batch, loss), rel=1e-9)


def test_a_compiled_wrapper_is_measured_inside():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    wrapped = torch.compile(net, backend="eager")
    for form in (gauss_newton, second_order):
        plain = form(net, batch, "mse", num_samples=None)
        found = form(wrapped, batch, "mse", num_samples=None)
        torch.testing.assert_close(found.value, plain.value)
        assert list(found.per_site) == ["2"]
    modified_loss(wrapped, batch, "mse", kind="L1").backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_in_full_is_torchs_own(dtype):
    class Net(nn.Module):
        def forward(self, x, p=0.5):
            mask = causal_upper_left(3, 3)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, dropout_p=p)

    net, x = Net(), (60 * torch.randn(2, 2, 3, 64)).to(dtype)
    with at_sites(net, fresh):
        found = call(net, x)
    assert found.isfinite().all()
    torch.testing.assert_close(found, net(x, p=0.0), rtol=1e-2, atol=1e-1)


def test_a_loss_that_is_linear_in_the_outputs_says_so():
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    batch = torch.randn(5, 3).double(), torch.rand(5, 4).softmax(1).double()
    loss = nn.KLDivLoss(reduction="batchmean")
    found = gauss_newton(net, batch, loss, num_samples=None)
    assert any("linear in the outputs" in note for note in found.notes)
    full = second_order(net, batch, loss, num_samples=None)
    assert float(full.value) == pytest.approx(truth(net, batch, loss), rel=0.3)


def test_attention_without_dropout_has_second_derivatives_too():
    """The fused kernel has none: the forms take the other one by themselves."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net.self_attn.dropout = 0.0
    net = nn.Sequential(nn.Dropout(0.2), net)
    batch = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    found = second_order(net, batch, "mse", num_samples=4)
    assert found.per_site["0"].isfinite() and found.standard_error > 0


def test_a_model_that_returns_its_loss():
    """One number for all samples: they meet in it."""
    torch.manual_seed(0)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(2, 1)

        def forward(self, x):
            return self.last(self.drop(x)).square().mean()

    net, batch = Loss().double(), (torch.randn(3, 2).double(), None)
    loss = lambda f, _: f  # noqa: E731
    found = second_order(net, batch, loss, num_samples=None)
    assert float(found.value) == pytest.approx(truth(net, batch, loss), rel=1e-9)


def test_the_online_r1_takes_the_linear_part_away():
    from torch_dropout_ir.regularizers.excess import ExcessRisk
    from torch_dropout_ir.regularizers.first_order import FirstOrder
    from torch_dropout_ir.regularizers.online import online

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.05), nn.Linear(64, 64), nn.Tanh(),
        nn.Linear(64, 4),
    ).double()  # fmt: skip
    batch = torch.randn(8, 5).double(), torch.randn(8, 4).double()
    loss = resolve_loss("mse")
    values = torch.stack([online(net, batch, loss)[0].value for _ in range(60)])
    plain = []
    for _ in range(60):
        excess = ExcessRisk(net, batch, loss, FirstOrder([]))
        excess.draw(8)
        plain.append(excess.mean()[0])
    assert values.std() < 0.5 * torch.stack(plain).std()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_online_r1_is_the_truth_within_its_error(loss):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        net[3].weight *= 3
        net[5].weight *= 3
    x = torch.randn(2, 3).double()
    near = net.eval()(x).detach() + 0.1  # where R_1 is no small difference
    batch = x, torch.tensor([0, 2]) if loss == "cross_entropy" else near
    found, how, _ = online(net.train(), batch, resolve_loss(loss), num_masks=2000)
    assert "unbiased" in how and "no standard error" not in how
    error = float(found.standard_error)
    assert abs(float(found.value) - truth(net, batch, loss)) < 4 * error
    assert error < 0.1 * abs(float(found.value))  # twice the truth is far away


@pytest.mark.parametrize("outlives", [False, True])
def test_a_pass_keeps_nothing_from_below_the_first_site(outlives):
    """Diagnostics hold what lies above it; training objectives all of it."""
    from torch_dropout_ir.regularizers.clean_pass import clean_pass

    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 4), nn.Dropout(0.3),
        nn.Linear(4, 1),
    )  # fmt: skip
    weights = [net[k].weight for k in (0, 3, 5)]
    with clean_pass(net, torch.randn(5, 3), outlives=outlives) as clean:
        found = torch.autograd.grad(clean.outputs.sum(), weights, allow_unused=True)
    assert [g is not None for g in found] == [outlives, True, True]


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_masks_that_are_the_same_in_each_pass_have_no_standard_error(frozen, fitted):
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    batch = torch.randn(6, 3), torch.randn(6, 2)
    if fitted:  # where noise moves the loss in second order alone
        batch = batch[0], net.eval()(batch[0]).detach()
    seeds = net.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    if frozen:
        seeds.remove()
    with frozen_masks(net) if frozen else contextlib.nullcontext():
        found = monte_carlo(net, batch, "mse", num_masks=100)
    assert found.standard_error.isnan()
    assert "frozen_masks" in found.notes[-1]


@pytest.mark.parametrize("p, num_masks", [(1e-9, 64), (0.999, 64), (0.99, 8)])
def test_masks_that_hardly_differ_have_no_standard_error(p, num_masks):
    """A mean over masks that are all alike is off by what they do not show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(p), nn.Linear(3, 2)).double()
    batch = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    for _ in range(10):
        found = monte_carlo(net, batch, "mse", num_masks=num_masks)
        assert found.standard_error.isnan() and found.notes
    sure = monte_carlo(net, batch, "mse", num_masks=num_masks, rtol=0.5)
    assert not sure.converged


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_difference_of_losses_is_known_better_than_they_are(sign):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2)).double()
    batch = torch.randn(6, 50).double(), None
    found = monte_carlo(net, batch, lambda f, _: 1e-30 * f.sum() + sign * 5)
    assert found.standard_error >= 5 * torch.finfo(torch.float64).eps


def test_a_loss_of_zero_stops_at_once():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.zero_()
    batch = torch.randn(6, 50).double(), torch.zeros(6, 2).double()
    found = monte_carlo(net, batch, "mse", num_masks=64, rtol=0.1)
    assert found.value == found.standard_error == 0
    assert found.converged and found.num_samples < 64


def test_sites_of_another_shape_than_without_noise():
    """Columns that are dropped for all are left out: the next site has fewer."""

    class Narrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.2)

        def forward(self, x):
            h = self.first(x)
            return self.second(h[:, h.any(0)]).sum(1)

    batch = torch.rand(2, 40).double(), torch.zeros(2).double()
    found = monte_carlo(Narrows(), batch, lambda f, _: f.mean(), num_masks=200)
    assert abs(found.value) < 4 * found.standard_error  # it is linear in the noise
    assert found.standard_error < 1


@pytest.mark.parametrize("value", [float("nan"), math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_though_its_gradient_is(value):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(6, 3), torch.randn(6, 2)
    with pytest.raises(ValueError, match="finite"):
        gradient_norm(net, batch, lambda f, y: F.mse_loss(f, y) + value, lr=0.1)


def squares(f, y):
    return (f - y).square().mean()


class Gated(nn.Module):
    """Stochastic depth: one element a sample."""

    def __init__(self):
        super().__init__()
        self.drop, self.body = nn.Dropout(0.2), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.drop(x.new_ones(len(x), 1)) * torch.tanh(self.body(x))


@pytest.mark.parametrize(("most", "tells"), [(8, False), (49, False), (64, True)])
def test_where_few_elements_are_dropped_as_many_masks_as_tell_an_error(most, tells):
    """Of two elements 0.4 are dropped, of 50 masks 20."""
    torch.manual_seed(0)
    batch, loss = (torch.randn(2, 3), torch.randn(2, 3)), resolve_loss("mse")
    found, how, _ = online(Gated(), batch, loss, num_masks=8, most_masks=most)
    assert 50 <= found.num_samples <= 51 if tells else found.num_samples == 8
    assert bool(found.standard_error.isfinite()) == tells
    assert ("no standard error" in how) != tells


def test_closed_forms_online_are_taken_where_they_hold():
    """Of squares the truth; of a cross-entropy a form without an error of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    net, x = net.double(), torch.randn(4, 3).double()
    y, labels = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 0])
    for loss in ("mse", squares, nn.MSELoss(reduction="sum")):
        found, how, _ = online(net, (x, y), resolve_loss(loss))
        assert found.exact and how.startswith("exact, closed form"), loss
        assert float(found.value) == pytest.approx(truth(net, (x, y), loss))
    found, how, _ = online(net, (x, labels), resolve_loss("cross_entropy"))
    assert "closed form" not in how and not found.exact
    assert found.per_site_standard_error["2"] == found.standard_error > 0
    found, how, _ = online(net, (x, None), resolve_loss("cross_entropy"))
    h = net[:2](x)
    form = last_layer(
        h, net[3].weight, 0.3, loss="cross_entropy", outputs=net[3](h), targets=labels
    )
    torch.testing.assert_close(found.per_site["2"], form.detach())
    assert "closed form" in how and not found.exact
    assert found.per_site_standard_error["2"] == 0
    # Its classes are in dimension 1, which the last layer's are not here.
    batch = torch.randn(4, 3, 3).double(), torch.randint(3, (4, 3))
    found, how, _ = online(net, batch, resolve_loss("cross_entropy"))
    assert "closed form" not in how
    with pytest.raises(ValueError, match="second derivative"):  # and no targets
        online(net, (x, None), resolve_loss(lambda f, _: f.abs().sum()))


def test_few_masks_of_few_units_cover():
    """A fit of the linear part to a handful of kept units pretends to know."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2)).double()
    batch = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    r1 = float(gauss_newton(net, batch, "mse", num_samples=None).value)
    draws = [monte_carlo(net, batch, "mse", num_masks=70) for _ in range(100)]
    far = [abs(float(d.value) - r1) > 2 * float(d.standard_error) for d in draws]
    assert sum(far) <= 12


def test_rare_drops_break_no_claim():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(1e-6), nn.Linear(2, 1)).double()
    batch = torch.randn(2, 2).double(), torch.randn(2, 1).double()
    report = check_regularizer(net, batch, "mse", rtol=1e-9, num_masks=64)
    report.assert_holds()
    assert "monte_carlo" not in report.agreeing


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo])
@pytest.mark.parametrize("loss", ["cross_entropy", lambda f, t: F.cross_entropy(f, t)])
def test_a_loss_of_no_target_is_no_zero(form, loss):
    """Its value is NaN, its derivatives are 0."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.full((4,), -100)
    with pytest.raises(ValueError, match="finite"):
        form(net, batch, loss)


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f * f

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f * f

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Squares(nn.Sequential):
    """Its outputs, or what its last layer is given, are such squares."""

    def __init__(self, last):
        super().__init__(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))
        self.last = last

    def forward(self, x):
        if self.last:
            return OnceSquare.apply(super().forward(x))
        return self[2](OnceSquare.apply(self[1](self[0](x))))


def plain():
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2))


ONCE = {
    "loss": (plain, lambda f, t: OnceSquare.apply(f - t).mean()),
    "inside": (lambda: Squares(last=False), "mse"),
    "last": (lambda: Squares(last=True), "mse"),
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("form", ["second_order", "L1", "hessian", "ggn"])
def test_what_can_be_differentiated_once_is_no_number(form, name):
    """Torch takes it for linear: all of these would be 0, or a part of the truth."""
    make, loss = ONCE[name]
    net, batch = make(), (torch.randn(5, 3), torch.randn(5, 2))
    with pytest.raises((ValueError, NotImplementedError), match=r"once|again"):
        if form == "second_order":
            second_order(net, batch, loss)
        elif form == "L1":
            modified_loss(net, batch, loss, kind="L1", r1="gauss_newton").backward()
        else:
            op = getattr(sharpness, form)(net, loss, [batch])
            op @ torch.ones(op.shape[0])


@pytest.mark.parametrize(
    "loss", [lambda f, t: Square.apply(f - t).mean(), lambda f, _: f.sum()]
)
def test_a_function_of_its_own_that_can_be_differentiated_again_is_measured(loss):
    net = plain().double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    exact = second_order(net, batch, loss, num_samples=None).value.item()
    assert exact == pytest.approx(truth(net, batch, loss), abs=1e-12)


class OnceSquared(torch.autograd.Function):
    """A squared error that can be differentiated once."""

    @staticmethod
    def forward(ctx, f, t):
        ctx.save_for_backward(f, t)
        return (f - t).square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        f, t = ctx.saved_tensors
        return 2 * (f - t) / f.numel() * g, None


@pytest.mark.parametrize("kind", ["L2", "L3", "regu"])
def test_a_loss_that_can_be_differentiated_once_cannot_be_penalized(kind):
    """Torch alone drops its second derivative and says nothing."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        modified_loss(net, batch, OnceSquared.apply, kind=kind, lr=0.1).backward()


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo])
def test_noise_that_is_left_out_is_said(form):
    net = nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(0.3), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.randn(5, 2)
    assert any("AlphaDropout" in note for note in form(net, batch, "mse").notes)
    plain = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2))
    assert not form(plain, batch, "mse").notes


class Centred(torch.autograd.Function):
    """Samples less their mean, of which no graph tells."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_samples_that_meet_where_no_graph_tells_have_no_error_each(num_samples):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(Centred.apply(self.drop(x)))

    batch, errors = (torch.randn(6, 3), torch.randn(6, 2)), []
    for _ in range(100):
        found = gauss_newton(Net(), batch, "mse", num_samples=num_samples)
        errors.append(found.standard_error / found.value)
    # Of two draws as they differ, now by little and now by much; not of rows.
    errors = torch.stack(errors)
    assert errors.isnan().all() if num_samples == 1 else errors.min() < 0.02


def r2(net, batch, loss):
    return gradient_norm(net, batch, loss, lr=0.1)


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo, r2])
def test_noise_of_a_function_that_is_left_out_is_said(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.2), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.drop(F.rrelu(x, training=self.training)))

    notes = form(Net(), (torch.randn(5, 3), torch.randn(5, 2)), "mse").notes
    assert any("besides its sites, which is not in it" in note for note in notes)


@pytest.mark.parametrize("form", [monte_carlo, r2])
def test_a_site_that_drops_everything_is_in_the_record(form):
    net = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(3, 4), nn.Dropout(1.0), nn.Linear(4, 2)
    )
    notes = form(net, (torch.randn(5, 3), torch.randn(5, 2)), "mse").notes
    assert notes == ("site `2` drops everything (p = 1)",)


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo])
def test_inference_mode_is_named(form):
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        form(net, (torch.randn(5, 3), torch.randn(5, 2)), "mse")


# ---- R_2 of unusual parameters, masks and rates


class Spectral(nn.Module):
    """A complex weight, as of a layer in Fourier space."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.drop, self.last = nn.Dropout(0.0), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.drop((x.to(self.weight.dtype) @ self.weight).abs()))


def test_complex_parameters_are_pairs_of_real_ones():
    torch.manual_seed(0)
    net = Spectral().double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    slopes = torch.autograd.grad(F.mse_loss(net(batch[0]), batch[1]), net.parameters())
    expected = sum(torch.view_as_real(g).square().sum() if g.is_complex()
                   else g.square().sum() for g in slopes) / 4  # fmt: skip
    found = gradient_norm(net, batch, "mse", lr=1.0)
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(found.mean_gradient, expected)
    value = modified_loss(net, batch, "mse", kind="regu", lr=1.0)
    risk = F.mse_loss(net(batch[0]), batch[1])
    torch.testing.assert_close(value - risk, expected)
    value.backward()
    names = [name for name, _ in net.named_parameters()]
    given = dict(zip(names, slopes, strict=True))
    online = received_r2(given, dict.fromkeys(names, 1.0))
    assert online == pytest.approx(float(expected))


@pytest.mark.parametrize("num_masks", [2, 4])
def test_parameters_that_are_added_up_have_a_gradient_each(num_masks):
    """Autograd gives one tensor for both."""

    class Sum(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
            self.drop, self.scale = nn.Dropout(0.5), scale

        def forward(self, x):
            two = self.two if self.scale is None else self.scale * self.two
            return self.drop(x) @ (self.one + two).T

    batch = torch.randn(5, 3), torch.randn(5, 2)
    found = []
    for scale in (None, 1.0):
        torch.manual_seed(0)
        net = Sum(scale)
        found.append(gradient_norm(net, [batch] * 2, "mse", lr=1.0,
                                   num_masks=num_masks))  # fmt: skip
    torch.testing.assert_close(found[0].mean_gradient, found[1].mean_gradient)
    torch.testing.assert_close(found[0].dropout_noise, found[1].dropout_noise)


def test_r2_of_half_precision_does_not_vanish():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 2))
    batch = torch.randn(8, 8), torch.randn(8, 2)
    found = []
    for dtype in (torch.float64, torch.float16):
        torch.manual_seed(1)
        data = tuple(x.to(dtype) for x in batch)
        net.to(dtype)
        loss = lambda f, t: 1e-3 * F.mse_loss(f, t)  # noqa: E731
        found.append(gradient_norm(net, data, loss, lr=1e-3, num_masks=4))
    for name in ("value", "mean_gradient", "dropout_noise", "standard_error"):
        expected = float(getattr(found[0], name))
        assert float(getattr(found[1], name)) == pytest.approx(expected, rel=0.05)


def test_one_mask_for_all_samples_needs_a_row_for_each():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.drop(x.flatten(0, 1)))

    batch = torch.randn(4, 5, 3), torch.randn(20, 2)
    with pytest.raises(ValueError, match=r"site `drop`.* 4 samples, got 20"):
        gradient_norm(Tokens(), batch, "mse", lr=0.1, shared_mask=True)
    assert gradient_norm(Tokens(), batch, "mse", lr=0.1).value > 0
    whole = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    assert gradient_norm(whole, batch, "mse", lr=0.1, shared_mask=True).value > 0


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_learning_rates_that_are_none(lr):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="`lr`"):
        gradient_norm(net, batch, "mse", lr=lr)
    with pytest.raises(ValueError, match="`lr`"):
        modified_loss(net, batch, "mse", kind="regu", lr=lr)


# ---- inputs of which no number can be made


def every_estimator(net, batch, loss):
    """Each function of a model, to be run."""
    return (
        *(partial(f, net, batch, loss)
          for f in (gauss_newton, second_order, monte_carlo, check_regularizer)),
        partial(gradient_norm, net, batch, loss, lr=0.1),
        partial(expected_dropout_loss, net, batch, loss),
        *(partial(modified_loss, net, batch, loss, kind=kind, lr=0.1)
          for kind in ("L1", "L2", "L3", "L4", "regu")),
    )  # fmt: skip


def last_dropped(p=0.5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2))
    return net, (torch.randn(5, 3), torch.randn(5, 2))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = last_dropped()[0]

    def forward(self, x):
        return self.net(x), x


@pytest.mark.parametrize("name, error, match", [
    ("one tensor", TypeError, "expected a batch"),
    ("three", TypeError, "expected a batch"),
    ("meta", ValueError, "meta device"),
    ("tuple", TypeError, "one tensor for this loss"),
    ("broadcast", (RuntimeError, ValueError), "size"),
    ("labels", IndexError, "out of bounds"),
])  # fmt: skip
def test_what_does_not_fit_is_said_by_every_function(name, error, match):
    net, (x, y) = last_dropped()
    case = {
        "one tensor": (net, x, "mse"),
        "three": (net, (x, x, y), "mse"),
        "meta": (copy.deepcopy(net).to("meta"), (x.to("meta"), y.to("meta")), "mse"),
        "tuple": (Pair(), (x, y), "mse"),
        "broadcast": (net, (x, y[:4]), "mse"),
        "labels": (net, (x, torch.tensor([0, 1, -1, 0, 1])), "cross_entropy"),
    }[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the shapes
        for run in every_estimator(*case):
            with pytest.raises(error, match=match):
                run()


def test_losses_that_compare_need_targets():
    net, (x, _) = last_dropped()
    for run in every_estimator(net, (x, None), "mse")[1:]:
        with pytest.raises(ValueError, match="`targets`"):
            run()


def test_complex_features_are_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.drop(x + 0j).abs())

    batch = torch.randn(5, 3), torch.randn(5, 2)
    for run in every_estimator(Net(), batch, "mse")[:6]:
        with pytest.raises(TypeError, match=r"site `drop`.*complex64"):
            run()


@pytest.mark.parametrize("r1", ["last_layer", "leave_one_out"])
def test_the_negative_likelihood_of_no_log_probabilities_is_linear(r1):
    net, (x, _) = last_dropped()
    batch = x.double(), torch.tensor([0, 1, 1, 0, 1])
    found = modified_loss(net.double(), batch, nn.NLLLoss(), kind="L1", r1=r1)
    plain = clean_risk(net, batch, resolve_loss(nn.NLLLoss()))
    assert found.item() == pytest.approx(plain.item(), abs=1e-12)
    assert truth(net, batch, nn.NLLLoss()) == pytest.approx(0, abs=1e-12)


def test_a_loss_of_differences_of_outputs_is_curved():
    """A step that its tensors share changes nothing."""
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Linear(3, 2))

        def forward(self, *inputs):
            return tuple(self.net(x) for x in inputs)

    loss = lambda f, _: F.triplet_margin_loss(*f, margin=9.0)  # noqa: E731
    batch = tuple(torch.randn(2, 3).double() + k for k in (0, 0.5, -1)), None
    found = gauss_newton(Three().double(), batch, loss, num_samples=None)
    assert found.value.abs() > 1e-4


def test_samples_that_meet_at_some_masks_alone():
    """A hinge that is not met without dropout has no derivative there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.4), nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(2, 3).double()

    def apart(f, _):
        return (9.0 - (f[0] - f[1]).square().sum()).clamp(min=0)

    batch = 30 * x, None
    assert clean_risk(net, batch, resolve_loss(apart)) == 0
    expected = expected_dropout_loss(net, batch, apart, coupled=True)
    assert float(expected) > 0.01
    torch.testing.assert_close(expected_dropout_loss(net, batch, apart), expected)


@pytest.mark.parametrize("other", [1, 2, 4])
def test_rows_that_meet_in_a_hinge_have_no_units_left_out(other):
    h, w = torch.zeros(5, 2).double(), torch.eye(2).double()
    h[0, 0] = h[other, 1] = 3.0

    def apart(f, _):
        return (5 - (f[0] - f[other]).square().sum()).clamp(min=0)

    assert apart(h, None) == 0  # not met, and without a derivative
    with pytest.raises(ValueError, match="couples rows"):
        leave_one_out(h, w, 0.5, outputs=h, targets=None, loss=apart)


@pytest.mark.parametrize("draw", [
    random.random, np.random.rand, lambda: torch.rand(()),
])  # fmt: skip
def test_other_noise_is_drawn_for_each_mask_and_the_same_on_both_sides(draw):
    """What is linear has no R_1; a risk at one draw alone would be off by that draw."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return self.drop(self.drop(x) + draw()) + draw()

    batch = torch.full((9, 100), 0.1), torch.zeros(9)
    found = monte_carlo(Shifted(), batch, lambda y, _: y.mean(), num_masks=64)
    assert abs(found.value) < 4 * found.standard_error
    assert found.standard_error < 2e-3  # 0.05 with noise of its own on each side
    seen = []
    monte_carlo(Shifted(), batch, lambda y, _: seen.append(y.mean()) or y.mean())
    assert torch.stack(seen).std() > 0.1


@pytest.mark.parametrize("kind", ["L1", "L4"])
def test_noise_that_a_modified_loss_leaves_out_is_said(kind):
    net = nn.Sequential(nn.AlphaDropout(0.3), nn.Linear(3, 4), nn.Dropout(0.2),
                        nn.Linear(4, 2))  # fmt: skip
    batch = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.warns(UserWarning, match="AlphaDropout"):
        modified_loss(net, batch, "mse", kind=kind, r1="second_order")


@pytest.mark.parametrize("kind", ["L2", "L3", "regu"])
def test_penalties_under_weight_normalization_have_torchs_gradient_put_right(kind):
    """The kernel's second derivative is not even symmetric."""
    net, (x, y) = last_dropped()
    net.double()
    torch.nn.utils.parametrizations.weight_norm(net[3])
    batch = x.double(), y.double()

    def value():
        torch.manual_seed(3)
        return modified_loss(net, batch, "mse", kind=kind, lr=1.0)

    params = list(net.parameters())
    steps = [torch.randn_like(q) for q in params]
    found = torch.autograd.grad(value(), params)
    slope = sum((g * s).sum() for g, s in zip(found, steps, strict=True))
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for q, s in zip(params, steps, strict=True):
                q.add_(s, alpha=sign * 1e-6)
        ends.append(float(value().detach()))
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("kind, r1", [("L2", "last_layer"), ("L4", "monte_carlo")])
def test_dropout_in_place_at_the_input_does_not_feed_the_next_pass(kind, r1):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 2)).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    x = batch[0].clone()
    found = []
    for inplace in (True, False):
        net[0].inplace = inplace
        torch.manual_seed(1)
        found.append(modified_loss(net, batch, "mse", kind=kind, r1=r1, lr=0.1))
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(batch[0], x)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_are_broadcast_count_an_output_several_times():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1)).double()
    batch = torch.randn(4, 3).double(), torch.randn(4).double()
    for loss in (nn.MSELoss(reduction="sum"), nn.MSELoss()):
        r1 = truth(net, batch, loss)
        exact = gauss_newton(net, batch, loss, num_samples=None)
        assert float(exact.value) == pytest.approx(r1, rel=1e-9)
        drawn = gauss_newton(net, batch, loss, num_samples=500)
        assert abs(float(drawn.value) - r1) < 5 * float(drawn.standard_error)
        value = modified_loss(net, batch, loss, kind="L1")
        expected = expected_dropout_loss(net, batch, loss)
        torch.testing.assert_close(value.detach(), expected)


@pytest.mark.parametrize("name", ["margin", "argmax", "round", "once"])
def test_losses_that_no_second_order_form_can_take(name):
    net, (x, y) = last_dropped()
    labels = torch.tensor([0, 1, 1, 0, 1])
    loss, targets = {
        "margin": (nn.MultiMarginLoss(), labels),
        "argmax": (lambda f, t: (f.argmax(1) == t).float().mean(), labels),
        "round": (lambda f, t: F.mse_loss(f.round(), t), y),
        "once": (OnceSquared.apply, y),
    }[name]
    batch = x, targets
    for form in (gauss_newton, second_order):
        for count in (1, None):
            with pytest.raises(ValueError, match=r"second derivative|cut off"):
                form(net, batch, loss, num_samples=count)
    for form in ("last_layer", "gauss_newton", "second_order"):
        with pytest.raises(ValueError, match=r"second derivative|cut off"):
            modified_loss(net, batch, loss, kind="L1", r1=form)
    found = monte_carlo(net, batch, loss, num_masks=200)
    report = check_regularizer(net, batch, loss, num_masks=200)
    report.assert_holds()
    assert found.value.isfinite()
    by_name = {f.name: f.claim for f in report.findings}
    assert by_name["gauss_newton"] == by_name["second_order"] == "not applicable"
    if name == "argmax":
        for run in every_estimator(net, batch, loss):
            if run.func is gradient_norm or run.keywords.get("kind") in ("L2", "regu"):
                with pytest.raises(ValueError, match="cut off"):
                    run()


@pytest.mark.parametrize("compared", ["by sample", "over samples"])
def test_losses_that_see_differences_of_outputs(compared):
    """A direction that both outputs share is one that they do not see."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(6, 3)

        def forward(self, x):
            return tuple(self.last(self.drop(part)) for part in x.chunk(2, -1))

    def loss(outputs, _):
        distance = (outputs[0] - outputs[1]).square().sum(1)
        return distance.mean() if compared == "by sample" else distance.var()

    def clean(features):
        return loss((net.last(features[:5]), net.last(features[5:])), None)

    net, x = Pair().double(), torch.randn(5, 12).double()
    features = torch.cat(x.chunk(2, -1))
    hessian = torch.autograd.functional.hessian(clean, features).view(60, 60)
    expected = 0.3 / 0.7 / 2 * (hessian.diagonal() * features.flatten() ** 2).sum()
    for form in (gauss_newton, second_order):
        found = form(net, (x, None), loss, num_samples=None).value
        torch.testing.assert_close(found, expected)


def test_a_loss_that_fits_to_the_last_bit_is_none_of_these():
    """Nothing is left of its derivatives, though it has them."""
    net, (x, _) = last_dropped()
    with torch.no_grad():
        net[3].weight.zero_()
        net[3].bias.fill_(200.0)
    loss, batch = nn.BCEWithLogitsLoss(), (x, torch.ones(5, 2))
    assert gauss_newton(net, batch, loss, num_samples=None).value == 0


@pytest.mark.parametrize("form", [gauss_newton, second_order, monte_carlo])
def test_that_no_site_acted_is_said(form):
    net, batch = last_dropped()

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(F.dropout(x, 0.5, self.training))

    assert form(net, batch, "mse").notes == ()
    assert any("no dropout site" in n for n in form(net[:2], batch, clipped).notes)
    called = Called()
    assert form(called, batch, "mse").notes == ()
    notes = form(called.eval(), batch, "mse").notes
    assert any("no dropout site" in n for n in notes)
    assert any("evaluation mode" in n for n in notes)
    notes = form(net.eval(), batch, "mse").notes
    assert len(notes) == 1 and "evaluation mode" in notes[0]


def clipped(f, t):
    return F.mse_loss(f[:, :2], t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [nn.HuberLoss(), nn.BCEWithLogitsLoss(), clipped])
def test_half_precision_does_not_round_a_unit_away(loss, dtype):
    torch.manual_seed(0)
    h, w = torch.randn(64, 128), torch.randn(2, 128) / 20
    f, y = h @ w.T, torch.rand(64, 2)
    options = {"outputs": f, "targets": y}
    expected = leave_one_out(h.double(), w.double(), 0.3, loss=loss,
                             **{k: x.double() for k, x in options.items()})  # fmt: skip
    weight = w.to(dtype).requires_grad_()
    found = leave_one_out(h.to(dtype), weight, 0.3, loss=loss,
                          **{k: x.to(dtype) for k, x in options.items()})  # fmt: skip
    assert found.dtype == dtype
    assert float(found.detach()) == pytest.approx(float(expected), rel=0.05)
    found.backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_that_float16_loses_small_parts_is_said(form):
    net, (x, y) = last_dropped()
    loss = lambda f, t: 1e-4 * F.mse_loss(f, t)  # noqa: E731
    assert form(net.bfloat16(), (x.bfloat16(), y.bfloat16()), loss).value > 0
    lost = form(net.half(), (x.half(), y.half()), loss)
    assert any("float16" in note for note in lost.notes)


class Spectrum(nn.Module):
    """Complex outputs, alone or beside real ones."""

    def __init__(self, alone):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3))
        self.last = nn.Linear(4, 2)
        self.alone = alone

    def forward(self, x):
        h = self.net(x)
        waves = torch.fft.fft(h).conj()
        return waves if self.alone else {"y": self.last(h), "waves": waves}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_complex_outputs_are_read_as_pairs_of_real_ones(form, alone):
    torch.manual_seed(0)
    net = Spectrum(alone).double()
    batch = torch.randn(2, 3).double(), torch.randn(2, 2).double()

    def loss(f, t):
        waves = f if alone else f["waves"]
        real = waves.real[:, :2] if alone else f["y"]
        return waves.abs().square().mean() + F.mse_loss(real, t)

    found = form(net, batch, loss, num_samples=None)
    assert found.value.item() == pytest.approx(truth(net, batch, loss), rel=1e-9)


def test_a_loss_of_complex_outputs_is_followed():
    net, x = Spectrum(True), torch.randn(5, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with attach_analysis(net, log_dir=False, measures=[Regularizer()]) as analysis:
        loss = net(x).abs().square().mean()
        loss.backward()
        optimizer.step()
    assert analysis.latest["loss/R_S"] > 0 and "regularizer/R1" in analysis.latest


class WithLoss(nn.Module):
    """A model that returns its loss, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))

    def forward(self, x, y):
        return {"loss": F.mse_loss(self.net(x), y)}


class Keeps(nn.Module):
    """A model whose loss reads what it keeps, or what it returns of that."""

    def __init__(self, returns):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.2))
        self.head, self.spread = nn.Linear(3, 2), nn.Linear(3, 2)
        self.returns = returns

    def forward(self, x):
        h = self.body(x)
        self.kept = self.spread(h)
        return (self.head(h), self.kept) if self.returns else self.head(h)


def test_what_a_loss_reads_beside_the_outputs_is_said_to_be_left_out():
    torch.manual_seed(0)
    batch = torch.randn(3, 3), torch.randn(3, 2)
    found = {}
    for returns in (False, True):
        torch.manual_seed(1)
        net = Keeps(returns)

        def loss(outputs, targets, net=net):
            f, kept = outputs if net.returns else (outputs, net.kept)
            return F.mse_loss(f, targets) + kept.square().mean()

        part = gauss_newton(net, batch, loss, num_samples=None)
        found[returns] = float(part.value)
        assert any("beside its outputs" in note for note in part.notes) != returns
        whole, how, _ = online(net, batch, resolve_loss(loss), num_masks=400)
        assert "beside its outputs" not in how  # nothing is left out
        assert abs(whole.value - truth(net, batch, loss)) < 5 * whole.standard_error
        for r1 in () if returns else ("last_layer", "gauss_newton"):
            with pytest.warns(UserWarning, match="beside its outputs"):
                modified_loss(net, batch, loss, kind="L1", r1=r1)
    assert found[True] == pytest.approx(truth(net, batch, loss), rel=0.05)
    assert found[False] < 0.7 * found[True]


def test_squares_of_what_the_model_keeps_make_nothing_exact():
    """Lemma 1 would hold for the squares of the outputs alone."""

    class Activity(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.2), nn.Linear(3, 2)

        def forward(self, x):
            self.kept = self.drop(x)
            return self.last(self.kept)

    net, batch = Activity(), (torch.randn(3, 3), torch.randn(3, 2))
    loss = lambda f, y: F.mse_loss(f, y) + net.kept.square().mean()  # noqa: E731
    for form in (gauss_newton, second_order):
        assert not form(net, batch, loss, num_samples=None).exact
    *_, how, _ = online(net, batch, resolve_loss(loss))
    assert "unbiased" in how
    check_regularizer(net, batch, loss, num_masks=200).assert_holds()


def test_a_form_that_is_zero_for_a_linear_loss_says_only_that():
    batch = (torch.randn(5, 3), torch.randn(5, 2)), None
    of_outputs = lambda outputs, _: outputs["loss"]  # noqa: E731
    found = gauss_newton(WithLoss(), batch, of_outputs, num_samples=None)
    assert len(found.notes) == 1 and "linear" in found.notes[0]
    with pytest.warns(UserWarning, match="linear in the outputs"):
        modified_loss(WithLoss(), batch, of_outputs, kind="L1", r1="gauss_newton")


@pytest.mark.parametrize(
    ("r1", "max_bytes"),
    [("gauss_newton", None), ("gauss_newton", 0), ("second_order", 0)],
)
def test_a_modified_loss_says_which_site_it_does_not_depend_on(
    r1, max_bytes, monkeypatch
):
    take_in_parts(monkeypatch)

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.live = nn.Dropout(0.3), nn.Dropout(0.3)
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.live(x)) * self.drop(x[:, :2]).detach()

    batch = torch.randn(16, 3), torch.randn(16, 2)
    with pytest.warns(UserWarning, match="site `drop`: 0") as said:
        modified_loss(Cut(), batch, "mse", kind="L1", r1=r1, max_bytes=max_bytes)
    assert [one.filename for one in said] == [__file__]


@pytest.mark.filterwarnings("ignore:size_average")
def test_reductions_of_old_are_the_losss_own():
    net, (x, y) = last_dropped()
    net, batch = net.double(), (x.double(), y.double())
    loss = functools.partial(F.mse_loss, size_average=False)
    found = gauss_newton(net, batch, loss, num_samples=None)
    assert found.value.item() == pytest.approx(truth(net, batch, loss), rel=1e-9)


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.binary_cross_entropy_with_logits, F.huber_loss]
)
def test_outputs_may_be_a_single_number(loss):
    class Squeezed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
    x, y = torch.randn(1, 3), torch.rand(1, 1)
    expected = gauss_newton(net, (x, y), loss, num_samples=None)
    found = gauss_newton(Squeezed(*net), (x, y.squeeze()), loss, num_samples=None)
    torch.testing.assert_close(found.value, expected.value)


class Generated(nn.Module):
    """Its layers run with other weights than they keep."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = last_dropped()[0], nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        own = {name: self.scale * w for name, w in self.net.named_parameters()}
        return torch.func.functional_call(self.net, own, (x,))


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_the_last_weight_is_that_which_the_pass_had(p):
    torch.manual_seed(0)
    net, batch = Generated().double(), last_dropped()[1]
    batch = tuple(x.double() for x in batch)
    net.net[2].p = p
    r1 = truth(net, batch, "mse")
    found, how, _ = online(net, batch, resolve_loss("mse"))
    assert found.exact and "closed form" in how
    assert float(found.value) == pytest.approx(r1, rel=1e-9)
    check_regularizer(net, batch, "mse").assert_holds()
    params = list(net.parameters())
    own = net.scale * net.net[0].weight, net.scale * net.net[0].bias
    h = F.linear(batch[0], *own).tanh()
    w, b = net.scale * net.net[3].weight, net.scale * net.net[3].bias
    expected = sum(
        chance * F.mse_loss(F.linear(h * mask / (1 - p), w, b), batch[1])
        for mask, chance in enumerate_masks(4, p)
    )
    value = modified_loss(net, batch, "mse", kind="L1")
    torch.testing.assert_close(value, expected)
    pair = (torch.autograd.grad(x, params) for x in (value, expected))
    torch.testing.assert_close(*pair)


def test_scores_of_one_list_meet_in_a_cross_entropy():
    """Outputs without a batch dimension: the rows of the model are the classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 1), nn.Flatten(0)
    ).double()
    batch = torch.randn(3, 2).double(), torch.tensor(1)
    assert second_order(net, batch, "cross_entropy").standard_error.isnan()
    found = second_order(net, batch, "cross_entropy", num_samples=None).value
    h = net[:2](batch[0]).detach()

    def shifted(eta):
        return F.cross_entropy(net[3:](h * (1 + eta)), batch[1])

    dense = torch.autograd.functional.hessian(shifted, torch.zeros(3, 3).double())
    torch.testing.assert_close(found, dense.reshape(9, 9).trace() * 0.3 / 0.7 / 2)


@pytest.mark.parametrize("soft", [False, True])
def test_parts_of_one_list_are_no_lists(soft, monkeypatch):
    """A part of the classes has another softmax."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0)
    ).double()
    x = torch.randn(16, 3).double()
    y = torch.randn(16).double().softmax(0) if soft else torch.tensor(3)
    h, params = net[:2](x).detach(), list(net.parameters())

    def shifted(eta):
        return F.cross_entropy(net[3:](h * (1 + eta)), y)

    dense = torch.autograd.functional.hessian(shifted, torch.zeros(16, 4).double())
    dense = dense.reshape(64, 64).trace() / 2
    found = []
    for max_bytes in (None, 0):
        torch.manual_seed(1)
        value = modified_loss(
            net, (x, y), "cross_entropy", kind="L1", r1="gauss_newton",
            max_bytes=max_bytes,
        )  # fmt: skip
        found.append((value, torch.autograd.grad(value, params)))
        take_in_parts(monkeypatch)
    torch.testing.assert_close(*found)
    whole = second_order(net, (x, y), "cross_entropy", num_samples=None)
    torch.testing.assert_close(whole.value, dense)


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_that_one_draw_of_samples_that_meet_has_no_error_is_said(form):
    net, (x, _) = last_dropped()

    def spread(f, _):
        return (f - f.mean(0)).square().mean()

    one = form(net, (x, None), spread)
    assert one.standard_error.isnan() and "num_samples=8" in one.notes[-1]
    for found in (
        form(net, (x, None), spread, num_samples=2),
        form(net, (x, None), lambda f, _: f.square().mean()),
    ):
        assert found.standard_error > 0 and found.notes == ()
