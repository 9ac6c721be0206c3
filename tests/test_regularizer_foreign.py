"""Models and losses of other people's: errors and claims against plain torch."""

import itertools

import pytest
import torch
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import (
    gauss_newton,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.testing import check_regularizer, expected_dropout_loss


class Folded(nn.Module):
    """Rows of all samples in one dimension at the site, put together behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.drop = nn.Linear(3, 4), nn.Dropout(0.3)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.drop(self.a(x.flatten(0, 1))))
        return self.out(h.view(len(x), -1))


def unbatched():
    """One image without a batch dimension: its first one counts channels."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Dropout(0.3), nn.Conv2d(3, 1, 2)
    )


def spread(form, net, batch, num_samples, repeats=300):
    """Mean square of the standard errors, over the variance of the values."""
    found = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        found.append(form(net, batch, "mse", num_samples=num_samples))
    values = torch.stack([e.value for e in found])
    errors = torch.stack([e.standard_error for e in found])
    return float(errors.square().mean() / values.var())


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_rows_of_one_sample_are_no_samples(form, num_samples):
    """They share what is drawn, or meet: taken apart, errors were a fifth too small."""
    torch.manual_seed(0)
    net = Folded().double()
    batch = torch.randn(6, 2, 3).double(), torch.randn(6, 2).double()
    ratio = spread(form, net, batch, num_samples)
    assert 0.8 < ratio < (1.3 if num_samples > 1 else 40)


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_channels_of_an_image_without_batch_are_no_samples(form):
    """A single sample has no spread: one draw of it has no error."""
    torch.manual_seed(0)
    net = unbatched().double()
    batch = torch.randn(1, 3, 3).double(), torch.randn(1, 1, 1).double()
    found = form(net, batch, "mse", num_samples=1)
    assert found.standard_error.isnan()
    assert all(x.isnan() for x in found.per_site_standard_error.values())
    assert 0.7 < spread(form, net, batch, 3) < 1.4


def small():
    torch.manual_seed(1)
    layers = nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2)
    return nn.Sequential(*layers).double()


def twice(net, x, evaluated=False):
    """A loss that runs the model again, in evaluation mode or with dropout."""

    def loss(f, y):
        net.train(not evaluated)
        other = net(x)
        net.train()
        return nn.functional.mse_loss(f, y) + nn.functional.mse_loss(other, f)

    return loss


def mean_over_masks(x, y, evaluated):
    """``E[R_drop] - R_S`` of that, by plain products of masks in its own words."""
    net = small()
    h, keep = net[1](net[0](x)), 0.7
    bits = list(itertools.product((0.0, 1.0), repeat=h.numel()))
    masks = torch.tensor(bits, dtype=torch.float64).view(-1, *h.shape)
    chance = torch.where(masks > 0, keep, 1 - keep).flatten(1).prod(1)
    f, clean = net[3](h * masks / keep), net[3](h)
    own = (f - y).square().mean((1, 2))
    if evaluated:
        other = (clean - f).square().mean((1, 2))
        return (chance * (own + other)).sum() - (clean - y).square().mean()
    # Of two independent passes the mean square of the difference is two variances.
    mean = (chance[:, None, None] * f).sum(0)
    variance = (chance[:, None, None] * (f - mean).square()).sum(0)
    return (chance * own).sum() + 2 * variance.mean() - (clean - y).square().mean()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_loss_that_runs_the_model_again(evaluated, hooked):
    """Masks see what drops in it, and it alone; derivatives of the outputs do not."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 2).double(), torch.randn(2, 2).double()
    net = small()
    if hooked:
        net.add_module("4", Passes())
    loss, truth = twice(net, x, evaluated), mean_over_masks(x, y, evaluated)
    found = monte_carlo(net, (x, y), loss, num_masks=600)
    assert (found.value - truth).abs() < 4 * found.standard_error < truth
    mean = expected_dropout_loss(net, (x, y), loss)
    clean = nn.functional.mse_loss(small()[3](small()[:2](x)), y)
    torch.testing.assert_close(mean - clean, truth)
    for form in (gauss_newton, second_order):
        if evaluated:
            torch.testing.assert_close(
                form(net, (x, y), loss, num_samples=None).value, truth
            )
            continue
        for num_samples in (None, 1):
            with pytest.raises(ValueError, match=r"runs the model again.*'2'"):
                form(net, (x, y), loss, num_samples=num_samples)
    for r1 in () if evaluated else ("last_layer", "gauss_newton", "second_order"):
        if r1 != "last_layer" or not hooked:
            with pytest.warns(UserWarning, match=r"runs the model again.*'2'"):
                modified_loss(net, (x, y), loss, kind="L1", r1=r1)


class Passes(nn.Module):
    """A layer that is none of torch's."""

    def forward(self, x):
        return x * 1.0


def test_squares_of_a_second_run_make_nothing_exact():
    """In training the loss is averaged over masks, of both runs."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 2).double(), torch.randn(2, 2).double()
    net, truth = small(), mean_over_masks(x, y, False)
    found, how, _ = online(net, (x, y), resolve_loss(twice(net, x)), num_masks=400)
    assert (found.value - truth).abs() < 4 * found.standard_error < truth
    assert "unbiased" in how and not found.exact
    assert found.per_site == {"2": found.value}


class Switches(nn.Module):
    """A model that sets its own mode for a second pass of a part of it."""

    def __init__(self):
        super().__init__()
        self.part = small()

    def forward(self, x):
        f = self.part(x)
        self.eval()
        other = self.part(x)
        self.train()
        return f - other


def test_a_model_that_evaluates_itself_has_no_noise_there():
    torch.manual_seed(0)
    x, zero = torch.randn(2, 2).double(), torch.zeros(2, 2).double()
    net, part = Switches(), small()
    f = part[3](part[:2](x))
    truth = mean_over_masks(x, f.detach(), False) / 3  # thrice the variance
    for form in (gauss_newton, second_order):
        torch.testing.assert_close(
            form(net, (x, zero), "mse", num_samples=None).value, truth
        )
    torch.testing.assert_close(expected_dropout_loss(net, (x, zero), "mse"), truth)


class Accumulates(nn.Module):
    """Sums of exponentials, of which padding is masked.

    What is sent back to them is 0 there, where torch takes its logarithm.
    """

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 1)])

    def forward(self, x):
        h = self.drop(x).logcumsumexp(1) * torch.tensor([1.0, 0.0, 1.0])
        return [head(h) for head in self.heads]


def test_derivatives_that_torch_has_not_are_no_number():
    """They were lost on the way back, and the form was a part of itself."""
    torch.manual_seed(0)
    net, x = Accumulates().double(), torch.randn(4, 3).double()

    def loss(outputs, _):
        return sum(x.square().mean() for x in outputs)

    with pytest.raises(ValueError, match=r"not finite: .*set_detect_anomaly"):
        gauss_newton(net, (x, None), loss, num_samples=None)
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(RuntimeError, match="LogBackward0"):
            gauss_newton(net, (x, None), loss, num_samples=None)


class Called(nn.Module):
    """Layers with weights that are none of their own, made of the noise or not."""

    def __init__(self, noisy):
        super().__init__()
        self.noisy, self.drop = noisy, nn.Dropout(0.3)
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        h = self.drop(x)
        weight = 1.5 * self.out.weight
        if self.noisy:
            weight = weight * (1 + h.mean())
        return torch.func.functional_call(self.out, {"weight": weight}, h)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_last_weight_is_that_of_the_call(noisy):
    """Closed forms took the layer's own, and called what they made of it exact."""
    torch.manual_seed(0)
    net = Called(noisy).double()
    batch = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    masks = list(itertools.product((0.0, 1.0), repeat=6))
    with torch.no_grad():
        net.eval()
        at = [
            (0.3 ** (6 - sum(mask)) * 0.7 ** sum(mask))
            * nn.functional.mse_loss(
                net(batch[0] * torch.tensor(mask).double().view(2, 3) / 0.7), batch[1]
            )
            for mask in masks
        ]
        truth = sum(at) - nn.functional.mse_loss(net(batch[0]), batch[1])
        net.train()
    found, how, _ = online(net, batch, resolve_loss("mse"), num_masks=400)
    assert found.exact != noisy and ("closed form" in how) != noisy
    assert (found.value - truth).abs() < 5 * found.standard_error + 1e-12
    check_regularizer(net, batch, "mse", num_masks=400, num_samples=16).assert_holds()
    for form in (gauss_newton, second_order):
        assert form(net, batch, "mse", num_samples=None).exact != noisy


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_errors_of_several_draws_do_not_vanish_in_float16(form):
    """Their squares did: an error of 0 was claimed of a sample."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 16), nn.Tanh(),
        nn.Dropout(0.2), nn.Linear(16, 3),
    )  # fmt: skip
    x, y = torch.randn(512, 6), torch.randint(3, (512,))
    found = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        one = form(net.to(dtype), (x.to(dtype), y), "cross_entropy", num_samples=4)
        errors = [one.standard_error, *one.per_site_standard_error.values()]
        assert all(error.dtype == dtype for error in errors)
        found[dtype] = torch.stack(errors).float()
    torch.testing.assert_close(*found.values(), rtol=0.2, atol=0)
