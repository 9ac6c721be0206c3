"""What an operator is given: what it cannot multiply is said, with what to do."""

import numpy as np
import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi

SIZE = 26


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(name="op")
def operator():
    batch = torch.randn(8, 3), torch.randn(8, 2)
    return tdi.sharpness.hessian(network(), "mse", batch)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (np.zeros(SIZE), "ndarray"),
        ([0.0] * SIZE, "list"),
        (3, "int"),
        (None, "NoneType"),
        ([torch.zeros(4, 3)], "list"),
    ],
)
def test_what_is_no_tensor_is_named_with_what_to_do(op, given, kind):
    with pytest.raises(TypeError, match=f"got {kind}.*torch.as_tensor.*zip"):
        op @ given
    with pytest.raises(TypeError, match="'CurvatureOperator'"):
        given @ op


@pytest.mark.parametrize("given", [np.ones(SIZE), [1.0] * SIZE, 3])
def test_a_start_that_is_no_tensor_is_named(op, given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=f"`start` to be a tensor of 26 .*got {kind}"):
        tdi.sharpness.top_eigenvalues(op, start=given)
    with pytest.raises(TypeError, match=f"`start` to be a tensor of 4 .*got {kind}"):
        tdi.sharpness.top_eigenvalues(torch.eye(4), start=given)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("0.weight", torch.zeros(3, 4), ValueError, r"\[3, 4\] for '0.weight'.*\[4, 3"),
        ("0.weight", np.zeros((4, 3)), TypeError, "got ndarray for '0.weight'"),
        ("0.weight", None, TypeError, "got NoneType for '0.weight'"),
        (
            "0.bias",
            torch.zeros(4) * 1j,
            TypeError,
            "Tensor of torch.complex64 for '0.b",
        ),
        ("other", torch.zeros(1), ValueError, r"got \['other'\] besides.*op.params"),
    ],
)
def test_dictionaries_say_which_entry_is_wrong_and_how(op, name, value, error, match):
    given = {n: torch.zeros_like(x) for n, x in op.params.items()}
    with pytest.raises(error, match=match):
        op @ {**given, name: value}


def test_dictionaries_say_what_is_missing(op):
    with pytest.raises(ValueError, match=r"none for \['0.bias', '2.weight', '2.bias'"):
        op @ {"0.weight": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=r"`start` .* none for \['0.weight'"):
        tdi.sharpness.top_eigenvalues(op, start={"x": torch.ones(26)})


def test_a_start_by_name_is_read_in_the_order_of_the_parameters(op):
    found = tdi.sharpness.top_eigenvalues(op, tol=1e-6)
    turned = dict(reversed(found.vectors[0].items()))
    again = tdi.sharpness.top_eigenvalues(op, tol=1e-3, start=turned, stop="residual")
    assert again.num_matvecs == 5  # one, and a look in a random direction
    torch.testing.assert_close(again.values, found.values, rtol=1e-4, atol=0)


def test_other_dtypes_are_converted(op):
    given = {n: torch.ones_like(x, dtype=torch.long) for n, x in op.params.items()}
    whole = op @ torch.ones(SIZE)
    found = op @ given
    assert all(x.dtype == torch.float32 for x in found.values())
    torch.testing.assert_close(torch.cat([x.flatten() for x in found.values()]), whole)


def test_standard_errors_are_of_one_vector():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    batch = torch.randn(8, 3), torch.randn(8, 2)
    op = tdi.sharpness.hessian(net, "mse", batch, masks=range(3))
    with pytest.raises(ValueError, match=r"one vector, got columns of shape \[26, 2\]"):
        op.with_standard_error(torch.zeros(26, 2))
    with pytest.raises(ValueError, match=r"a vector of shape \[26\].* got \[3\]"):
        op.with_standard_error(torch.zeros(3))
    with pytest.raises(TypeError, match=r"torch\.as_tensor"):
        op.with_standard_error(np.zeros(26))


class Behind(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.layer, self.step = nn.Linear(3, 2), step

    def forward(self, x):
        return self.step(self.layer(x))


BATCH = torch.ones(4, 3), torch.zeros(4, 2)


@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_rounded_quotients_are_steps(mode, kind):
    net = Behind(lambda y: torch.div(y, 0.1, rounding_mode=mode))
    with pytest.raises(ValueError, match="by steps alone"):
        getattr(tdi.sharpness, kind)(net, "mse", BATCH)
    assert tdi.sharpness.used_parameters(net, "mse", BATCH) == []


def test_quotients_are_none():
    net = Behind(lambda y: torch.div(y, 3.0))
    op = tdi.sharpness.hessian(net, "mse", BATCH)
    x = torch.cat((BATCH[0], torch.ones(4, 1)), 1)
    # d^2/dw^2 of the mean over 2 outputs of (w x / 3)^2
    assert float(op.dense().trace()) == pytest.approx(
        float(x.square().sum(1).mean()) * 2 / 9, rel=1e-5
    )


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (lambda y: y // 0.1, "floor_divide"),
        (lambda y: torch.heaviside(y, torch.zeros(1)), "heaviside"),
    ],
)
def test_what_torch_cannot_differentiate_is_explained(step, what):
    net = Behind(step)
    one = "expected a model and a loss that can be differentiated"
    for take in (
        lambda: tdi.sharpness.hessian(net, "mse", BATCH),
        lambda: tdi.sharpness.ggn(net, "mse", BATCH),
        lambda: tdi.sharpness.used_parameters(net, "mse", BATCH),
        lambda: tdi.sharpness.sam_sharpness(net, "mse", BATCH),
        lambda: tdi.sharpness.hessian(net, "mse", [BATCH, BATCH]) @ torch.ones(8),
    ):
        with pytest.raises(NotImplementedError, match=f"{one}.*{what}.*params="):
            take()


def test_what_fails_in_the_forward_pass_is_said_as_it_is():
    def refuses(outputs, targets):
        raise RuntimeError("no derivative of interest: not implemented for 'Int'")

    with pytest.raises(RuntimeError, match=r"^no derivative of interest") as caught:
        tdi.sharpness.hessian(network(), refuses, (torch.ones(2, 3), torch.ones(2, 2)))
    assert type(caught.value) is RuntimeError


def test_a_covariance_says_what_it_cannot_multiply():
    steps = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 1.0])}]
    noise = tdi.sharpness.trajectory_covariance(steps)
    with pytest.raises(TypeError, match=r"`v` to be a dictionary .* got ndarray"):
        noise @ np.ones(2)
    with pytest.raises(ValueError, match=r"none for \['w'\]"):
        noise @ {"x": torch.ones(2)}
    with pytest.raises(ValueError, match=r"got \[3\] for 'w', which has \[2\]"):
        noise @ {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"expected 2 numbers, got \[3\]"):
        noise @ torch.ones(3)


@pytest.mark.parametrize("name", ["top_eigenvalues", "trace", "spectral_density"])
@pytest.mark.parametrize("op", [np.eye(4), [[1.0]], None])
def test_what_is_no_operator_is_named(name, op):
    kind = type(op).__name__
    with pytest.raises(TypeError, match=rf"{name}: .*`@` and `shape`.* got {kind}\."):
        getattr(tdi.sharpness, name)(op)


def test_a_grid_is_a_tensor():
    with pytest.raises(TypeError, match=r"`grid` to be a tensor, got list\."):
        tdi.sharpness.spectral_density(torch.eye(4), grid=[0.0, 1.0])


def test_what_is_no_covariance_is_named(op):
    batch = torch.randn(8, 3), torch.randn(8, 2)
    with pytest.raises(TypeError, match=r"expected `covariance` .* got Tensor"):
        tdi.sharpness.variance_flatness(network(), "mse", batch, torch.eye(SIZE))
    with pytest.raises(TypeError, match=r"expected `covariance` .* CurvatureOperator"):
        tdi.sharpness.hessian_variance_alignment(torch.eye(SIZE), op)
    hessian = torch.diag(torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"negative eigenvalues, got one of -1"):
        tdi.sharpness.hessian_variance_alignment(torch.eye(3), hessian)


def test_a_state_dictionary_may_hold_more_than_tensors():
    steps = [{"w": torch.tensor([x, 1.0]), "_extra_state": "a"} for x in (0.0, 2.0)]
    assert float(tdi.sharpness.trajectory_covariance(steps).trace()) == 2.0


def test_parameters_are_chosen_by_name():
    net, batch = network(), (torch.randn(8, 3), torch.randn(8, 2))
    with pytest.raises(ValueError, match=r"`params` to name .* got \['Parameter'\]"):
        tdi.sharpness.hessian(net, "mse", batch, params=net.parameters())
    names = (name for name in ("0.weight",))
    assert tdi.sharpness.hessian(net, "mse", batch, params=names).shape == (12, 12)


def test_steps_are_rows_and_directions_pairs():
    net, batch = network(), (torch.randn(8, 3), torch.randn(8, 2))
    with pytest.raises(TypeError, match="`alphas` to be a row of numbers, got tensor"):
        tdi.sharpness.loss_slice(net, "mse", batch, torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"expected a pair of dictionaries .* got 3"):
        tdi.sharpness.loss_plane(net, "mse", batch, [0.0], directions=3)
