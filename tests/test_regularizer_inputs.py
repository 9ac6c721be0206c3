"""What is given to the regularizers, and is none of what they take."""

import functools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_regularizer_edges import every_estimator, last_dropped
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.testing import (
    check_regularizer,
    drop_probabilities,
    enumerate_masks,
    expected_dropout_loss,
)


@pytest.mark.parametrize("count", [2.0, "2", True])
def test_counts_are_integers(count):
    net, batch = last_dropped()
    r2 = functools.partial(gradient_norm, lr=0.1)
    for form, name in ((gauss_newton, "num_samples"), (second_order, "num_samples"),
                       (monte_carlo, "num_masks"), (check_regularizer, "num_masks"),
                       (r2, "num_masks")):  # fmt: skip
        with pytest.raises(TypeError, match=f"`{name}` to be an integer"):
            form(net, batch, "mse", **{name: count})


def test_a_function_is_no_model():
    batch = torch.randn(5, 3), torch.randn(5, 2)
    for run in every_estimator(lambda x: x, batch, "mse"):
        with pytest.raises(TypeError, match=r"nn\.Module, got function"):
            run()


@pytest.mark.parametrize("p", [float("nan"), -0.5, 1.5])
def test_a_probability_that_is_none_is_not_taken_for_off(p):
    net, batch = last_dropped()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    for run in every_estimator(net, batch, "mse"):
        with pytest.raises((ValueError, RuntimeError), match=f"got {p}"):
            run()


@pytest.mark.parametrize("lr", [None, "0.1", torch.ones(2), torch.tensor(1j)])
def test_a_learning_rate_is_a_number(lr):
    net, batch = last_dropped()
    with pytest.raises(TypeError, match="`lr` to be a real number"):
        gradient_norm(net, batch, "mse", lr=lr)
    rates = {name: 0.1 for name, _ in net.named_parameters()} | {"3.bias": lr}
    with pytest.raises(TypeError, match=r"`lr\['3.bias'\]` to be a real number"):
        modified_loss(net, batch, "mse", kind="regu", lr=rates)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, Fraction])
def test_a_number_of_any_kind_is_a_learning_rate(kind):
    net, batch = last_dropped()
    found = []
    for lr in (0.25, kind(0.25)):
        torch.manual_seed(0)
        found.append(gradient_norm(net, batch, "mse", lr=lr).value)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("change, error, match", [
    ({"features": torch.ones(0, 3)}, ValueError, "at least one sample"),
    ({"features": torch.ones(5, 3).long()}, TypeError, "`features`.*int64"),
    ({"features": torch.ones(5, 3).numpy()}, TypeError, "`features`.*ndarray"),
    ({"weight": torch.ones(2, 3) + 0j}, TypeError, "`weight`.*complex64"),
    ({"weight": torch.ones(3, 2)}, ValueError, r"\[3, 2\]"),
    ({"outputs": torch.ones(4, 2)}, ValueError, r"\[4, 2\]"),
    ({"targets": torch.ones(4, 7)}, ValueError, r"`targets`.*\[4, 7\]"),
])  # fmt: skip
@pytest.mark.parametrize("form", [last_layer, leave_one_out])
def test_features_that_are_none(form, change, error, match):
    given = {"features": torch.ones(5, 3), "weight": torch.ones(2, 3),
             "outputs": torch.ones(5, 2), "targets": torch.ones(5, 2)}  # fmt: skip
    if not len(change.get("features", "some")):
        given["outputs"] = torch.ones(0, 2)
    with pytest.raises(error, match=match):
        form(p=0.5, loss="mse", **{**given, **change})


@pytest.mark.parametrize("form", [last_layer, leave_one_out])
@pytest.mark.parametrize(
    "loss",
    ["mse", "cross_entropy", nn.BCEWithLogitsLoss(), lambda f, y: f.cosh().sum()],
)
def test_a_layer_of_no_units_adds_nothing(form, loss):
    y = torch.ones(2, 3, 2)
    y = torch.ones(2, 3).long() if loss == "cross_entropy" else y
    found = form(
        torch.ones(2, 3, 0), torch.ones(2, 0), 0.5,
        outputs=torch.ones(2, 3, 2), targets=y, loss=loss,
    )  # fmt: skip
    assert found.shape == () and found == 0


@pytest.mark.parametrize("form", [last_layer, leave_one_out])
def test_a_layer_of_no_outputs_is_named(form):
    given = {"outputs": torch.ones(3, 0), "targets": torch.ones(3, 0)}
    with pytest.raises(ValueError, match="at least one output"):
        form(torch.ones(3, 4), torch.ones(0, 4), 0.5, loss="mse", **given)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_gradient_norm_of_a_layer_of_no_units():
    net = nn.Sequential(nn.Linear(3, 0), nn.Dropout(0.5), nn.Linear(0, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    found = gradient_norm(net, batch, "mse", lr=1.0)
    slope = net[2].bias.detach() - batch[1]  # of the bias, and there is no other
    expected = slope.mean(0).square().sum() / 4
    torch.testing.assert_close(found.value, expected)


def test_leaving_out_counts_broadcast_targets():
    h, w, y = torch.randn(4, 3), torch.randn(1, 3), torch.randn(4, 5)
    loss = nn.MSELoss(reduction="sum")
    both = (
        form(h, w, 0.5, outputs=h @ w.T, targets=y, loss=loss)
        for form in (last_layer, leave_one_out)
    )
    torch.testing.assert_close(*both)


def test_what_testing_is_given_is_checked():
    net, batch = last_dropped()
    with pytest.raises(ValueError, match=r"`p` in \[0, 1\]"):
        list(enumerate_masks(2, 1.5))
    with pytest.raises(ValueError, match=r"a shape, got \[-2\]"):
        list(enumerate_masks(-2, 0.5))
    with pytest.raises(ValueError, match="`rtol` >= 0"):
        check_regularizer(net, batch, "mse", rtol=-1.0)
    with pytest.raises(ValueError, match="`max_value` < 1"):
        drop_probabilities(0.1, 1.0)
    with pytest.raises(ValueError, match="to return a real scalar"):
        expected_dropout_loss(net, batch, nn.MSELoss(reduction="none").forward)
    with pytest.raises(ValueError, match=r"real scalar, got .*complex"):
        expected_dropout_loss(net, batch, lambda f, _: 1j * f.mean())


@pytest.mark.parametrize("kind", ["L1", "L2", "L3", "L4", "regu"])
@pytest.mark.parametrize("r1", ["gauss_newton", "second_order"])
def test_a_modified_loss_of_what_is_cut_off_is_named(kind, r1):
    class Cut(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    net = Cut(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match="cut off from"):
        modified_loss(net, batch, "mse", kind=kind, r1=r1, lr=0.1)


def test_a_modified_loss_without_dropout_says_so():
    with pytest.warns(UserWarning, match="no dropout site acted"):
        modified_loss(nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2)), "mse",
                      kind="L1")  # fmt: skip


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_a_loss_with_noise_of_its_own_is_refused(form):
    net, batch = last_dropped()
    noisy = lambda f, t: nn.functional.dropout(f - t, 0.5).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match="draws no random numbers"):
        form(net, batch, noisy)


def test_a_gradient_of_a_loss_that_is_none():
    """A mean over no target is NaN, and its derivative is 0."""
    net, (x, _) = last_dropped()
    with pytest.raises(ValueError, match="gradient_norm: expected a finite"):
        gradient_norm(net, (x, torch.full((5,), -100)), "cross_entropy", lr=0.1)


class Mapped(nn.Module):
    """A site inside `vmap`."""

    def __init__(self):
        super().__init__()
        self.net = last_dropped()[0]

    def forward(self, x):
        return torch.func.vmap(self.net, randomness="different")(x)


def test_sites_inside_a_transform():
    plain, (x, y) = last_dropped()
    batch = x.double(), y.double()
    expected = gauss_newton(plain.double(), batch, "mse", num_samples=None).value
    mapped = Mapped().double()
    found = monte_carlo(mapped, batch, "mse", num_masks=400)
    assert (found.value - expected).abs() < 5 * found.standard_error
    for form in (gauss_newton, second_order):
        with pytest.raises(RuntimeError, match=r"net\.2.*torch\.func"):
            form(mapped, batch, "mse")
    with pytest.raises(ValueError, match=r"vmap.*got \['net\.2'\]"):
        expected_dropout_loss(mapped, batch, lambda f, y: (f - y).mean(0).norm())


def test_an_average_over_masks_tells_of_other_noise():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = last_dropped()[0]

        def forward(self, x):
            return self.net(x) + torch.rand(2)

    _, batch = last_dropped()
    found = monte_carlo(Noisy(), batch, "mse", num_masks=4)
    assert any("besides its sites" in note for note in found.notes)


class Forces(nn.Module):
    """The derivative of an energy, through a site behind the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(0.2), nn.Dropout(0.3)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        h = torch.tanh(self.first(x) @ self.weight)
        energy = self.second(h).square().sum()
        return torch.autograd.grad(energy, h, create_graph=True)[0]


def test_a_model_that_differentiates_is_named():
    """An added zero would not be there in its derivatives, and R_1 be another."""
    batch = torch.randn(5, 3), torch.randn(5, 3)
    for form in (gauss_newton, second_order):
        with pytest.raises(RuntimeError, match="differentiates in its forward pass"):
            form(Forces(), batch, "mse")
    for r1 in ("gauss_newton", "second_order"):
        with pytest.raises(RuntimeError, match="differentiates in its forward pass"):
            modified_loss(Forces(), batch, "mse", kind="L1", r1=r1)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", [last_layer, leave_one_out])
def test_tensors_of_a_layer_have_one_dtype(form, loss):
    h, w, y = torch.randn(4, 3), torch.randn(2, 3), torch.randint(2, (4,))
    y = y if loss == "cross_entropy" else torch.randn(4, 2)
    with pytest.raises(TypeError, match=r"one dtype, got `features` torch\.float32, "):
        form(h, w.double(), 0.5, loss=loss, outputs=h @ w.T, targets=y)
    with torch.autocast("cpu", torch.bfloat16):  # which casts both
        found = form(h.bfloat16(), w, 0.5, loss=loss, outputs=h @ w.T, targets=y)
    assert found.isfinite()


class Noisy(nn.Module):
    """Noise of another kind than dropout's, before the site."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 6), nn.Linear(6, 2), kind
        self.drop, self.own = nn.Dropout(0.3), torch.Generator().manual_seed(3)

    def forward(self, x):
        h = self.first(x).tanh()
        if self.kind == "numpy":
            h = h + torch.from_numpy(np.random.randn(*h.shape)).to(h)
        elif self.kind == "python":
            h = h * (0.5 + random.random())
        elif self.kind == "own":
            h = h + torch.randn(h.shape, generator=self.own).to(h)
        elif self.kind == "torch":
            h = h + torch.randn_like(h)
        return self.last(self.drop(h))


@pytest.mark.parametrize("kind", ["none", "numpy", "python", "own", "torch"])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_what_another_noise_is_in_is_not_exact(kind, form):
    net, batch = Noisy(kind), (torch.randn(5, 4), torch.randn(5, 2))
    found = form(net, batch, "mse", num_samples=None)
    assert found.exact == (kind == "none")
    said = any("draws noise besides its sites" in note for note in found.notes)
    assert said == (kind != "none")
