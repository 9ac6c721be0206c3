"""Networks with batch normalization are merged as what they do in evaluation mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_dropout_ir import condensation as cd

CONV = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d),
        3: (nn.Conv3d, nn.BatchNorm3d)}  # fmt: skip


def condense(layer, norm, kept, signs):
    """Random neurons; after normalization each is a multiple of one of ``kept``."""
    with torch.no_grad():
        for x in (norm.weight, norm.bias, norm.running_mean):
            x.uniform_(-2, 2)
        norm.running_var.uniform_(0.1, 3)
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = 0.0 if layer.bias is None else layer.bias
        shift = s * (bias - norm.running_mean) + norm.bias
        for j in range(kept, len(s)):
            i, scale = j % kept, 0.3 + torch.rand(())
            # Whatever the sign of its own scale: folded, they are parallel.
            s[j] = s[j].abs() * (signs[j % len(signs)])
            norm.weight[j] = s[j] * (norm.running_var[j] + norm.eps).sqrt()
            layer.weight[j] = scale * s[i] / s[j] * layer.weight[i]
            own = 0.0 if layer.bias is None else layer.bias[j]
            norm.bias[j] = scale * shift[i] - s[j] * (own - norm.running_mean[j])


def network(dims, bias, width, kept, signs):
    if dims == 0:
        layer, norm = nn.Linear(5, width, bias=bias), nn.BatchNorm1d(width)
        rest = (nn.Linear(width, 3),)
    else:
        make, normalize = CONV[dims]
        layer, norm = make(2, width, 3, padding=1, bias=bias), normalize(width)
        rest = (nn.Flatten(), nn.Linear(width * 3**dims, 3))
    condense(layer, norm, kept, signs)
    return nn.Sequential(layer, norm, nn.ReLU(), nn.Dropout(0.3), *rest)


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(0, 3), bias=st.booleans(), kept=st.integers(1, 4),
    copies=st.integers(1, 4), signs=st.lists(st.sampled_from((-1, 1)), min_size=1),
    seed=st.integers(0, 999), least_squares=st.booleans(),
)  # fmt: skip
def test_an_exactly_condensed_network_stays_what_it_was(
    dims, bias, kept, copies, signs, seed, least_squares
):
    torch.manual_seed(seed)
    model = network(dims, bias, kept * copies, kept, signs)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(40, *((2, *(3,) * dims) if dims else (5,)))
    merged = cd.merge_condensed(model, x, 0.99999, least_squares=least_squares)
    assert merged.layers["0"].reason == "" and merged.layers["0"].after <= kept
    assert merged.relative_change < 1e-5
    small, fresh = merged.model, torch.randn_like(x)
    with torch.no_grad():
        expected = model.eval()(fresh)
        # A neuron that no example wakes is none to least squares.
        error = (small(fresh) - expected).norm()
        assert least_squares or error <= 1e-5 * expected.norm()
    assert small.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    # The layer keeps what it normalizes, so training goes on from where it was.
    small.train()(fresh).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_mean_and_variance_are_those_of_the_neurons_that_stay():
    torch.manual_seed(0)
    model = network(2, True, 12, 3, [1, -1])
    x = torch.randn(64, 2, 3, 3)
    norm = model[1]
    with torch.no_grad():  # statistics of the data; one direction stays one
        h = model[0](x)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        norm.running_mean.copy_(h.mean((0, 2, 3)))
        norm.running_var.copy_(h.var((0, 2, 3)))
        norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(shift + scale * norm.running_mean)
    small = cd.merge_condensed(model, x, 0.9999).model
    h = small[0](x)
    assert h.shape[1] == 3 == small[1].num_features
    torch.testing.assert_close(small[1].running_mean, h.mean((0, 2, 3)))
    torch.testing.assert_close(small[1].running_var, h.var((0, 2, 3)))


def test_neurons_that_normalization_parts_stay_apart():
    """Parallel weights and other shifts: other neurons. Scale zero: a constant."""
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(),
                        nn.Linear(4, 1))  # fmt: skip
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([1.0, 1.0])
        net[1].bias.copy_(torch.tensor([-3.0, 0.0, 3.0, 2.0]))
        net[1].weight[3] = 0.0
    x = torch.randn(30, 2)
    merged = cd.merge_condensed(net, x, 0.95)
    assert merged.layers["0"].after == 4 and merged.relative_change == 0
    with torch.no_grad():
        net[1].bias[3] = -2.0  # a constant that ReLU takes away
        net[1].bias[2] = -3.0
    merged = cd.merge_condensed(net, x, 0.95)
    assert merged.layers["0"].after == 3 and merged.relative_change < 1e-6


def test_what_does_not_fit_the_bound_is_given_back_whole():
    torch.manual_seed(0)
    model = network(2, False, 8, 8, [1])
    x = torch.randn(20, 2, 3, 3)
    assert cd.merge_condensed(model, x, 0.3).relative_change > 1e-3
    kept = cd.merge_condensed(model, x, 0.3, max_change=1e-6)
    assert "would change" in kept.layers["0"].reason
    for (name, got), expected in zip(
        kept.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), name
    assert kept.model[1].num_features == 8
    torch.testing.assert_close(kept.model(x), model.eval()(x))


def test_equal_neurons_behind_other_activations():
    torch.manual_seed(0)
    model = network(0, True, 6, 6, [1])
    model[2] = nn.Tanh()
    with torch.no_grad():
        for part in model[:2]:
            for x in (*part.parameters(), *part.buffers()):
                if x.ndim:
                    x.copy_(x[:2].repeat(3, *(1,) * (x.ndim - 1)))
    merged = cd.merge_condensed(model, torch.randn(90, 5), 0.99999)
    assert merged.layers["0"].after == 2 and merged.relative_change < 1e-5


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.one(x))) + self.last(self.norm(self.two(x)))


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)  # fmt: skip # noqa: E501

    def forward(self, x):
        h = self.one(x)
        return self.last(F.relu(self.norm(h))) + self.last.weight.sum() * h.sum()


@pytest.mark.parametrize(
    ("make", "shape", "said"),
    [
        (Sharing, (8, 4), "BatchNorm1d"),
        (Skipping, (8, 4), "BatchNorm1d"),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
            ),
            (8, 4, 4),  # the batch normalization normalizes the middle
            "another dimension",
        ),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(6, 2)
            ),
            (8, 3, 4),
            "BatchNorm1d",
        ),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 4),
                nn.BatchNorm1d(4, track_running_stats=False),
                nn.Linear(4, 2),
            ),
            (8, 4),
            "BatchNorm1d",
        ),
    ],
)
def test_what_is_no_affine_map_of_each_neuron_is_left(make, shape, said):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    merged = cd.merge_condensed(model, x, 0.1)
    assert said in next(iter(merged.layers.values())).reason
    assert merged.relative_change == 0
    torch.testing.assert_close(merged.model(x), model.eval()(x))


def test_amplitudes_count_what_normalization_multiplies_by():
    torch.manual_seed(0)
    model = network(0, False, 6, 6, [1])
    found = cd.outgoing_weights(model)["0"]
    norm = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(found.weight, model[4].weight * scale)
    assert (found.norm, found.consumers) == ("1", ("4",)) and found.homogeneous
