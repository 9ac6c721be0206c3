"""Outgoing weights through the graph, and the smaller network of a condensed one."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation as cd


def condense(layer, copies):
    """Make each neuron an exact positive multiple of one of the first few."""
    with torch.no_grad():
        rows = layer.weight.flatten(1)
        kept = len(rows) // copies
        for j in range(len(rows)):
            scale = 0.5 + torch.rand(())
            layer.weight[j] = scale * layer.weight[j % kept]
            if layer.bias is not None:
                layer.bias[j] = scale * layer.bias[j % kept]
    return layer


class Convolutional(nn.Module):
    """Functions, methods, pooling, a dropout of ours and two readers of one layer."""

    def __init__(self):
        super().__init__()
        self.first = condense(nn.Conv2d(3, 8, 3, padding=1), 4)
        self.second = condense(nn.Conv2d(8, 12, 3, bias=False), 4)
        self.third = condense(nn.Linear(12 * 4, 20), 5)
        self.drop = tdi.Dropout(0.5)
        self.left = nn.Linear(20, 5)
        self.right = nn.Linear(20, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.leaky_relu(self.second(x), 0.2)
        x = x.view(x.size(0), -1)
        x = self.drop(self.third(x).relu())
        return self.left(x), self.right(x)


@pytest.mark.parametrize("least_squares", [None, True])
def test_an_exactly_condensed_relu_network_stays_what_it_was(least_squares):
    model = Convolutional()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(60, 3, 8, 8)
    merged = cd.merge_condensed(model, x, 0.9999, least_squares=least_squares)
    assert merged.relative_change < 1e-5
    small = merged.model
    assert small.first.weight.shape == (2, 3, 3, 3)
    assert small.second.weight.shape == (3, 2, 3, 3)
    assert small.third.weight.shape == (4, 12)
    assert (small.left.weight.shape, small.right.weight.shape) == ((5, 4), (3, 4))
    assert (small.second.in_channels, small.third.out_features) == (2, 4)
    fresh = torch.randn(7, 3, 8, 8)
    for got, expected in zip(small(fresh), model.eval()(fresh), strict=True):
        assert (got - expected).norm() < 1e-5 * expected.norm()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    sizes = {n: (m.before, m.after) for n, m in merged.layers.items() if not m.reason}
    assert sizes == {"first": (8, 2), "second": (12, 3), "third": (20, 4)}
    assert "output" in merged.layers["left"].reason
    # The new model trains.
    sum(y.sum() for y in small.train()(fresh)).backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_change_is_measured():
    net = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
    x = torch.randn(50, 3)
    merged = cd.merge_condensed(net, x, 0.9)
    with torch.no_grad():
        moved = merged.model(x) - net(x)
        expected = float(moved.norm() / net(x).norm())
    assert merged.relative_change == pytest.approx(expected, rel=1e-3)
    assert merged.largest_change == pytest.approx(float(moved.abs().max()), rel=1e-3)
    assert 0 < merged.relative_change == merged.layers["0"].change
    assert merged.layers["0"].after == len(merged.model[0].weight) < 40
    bound = merged.relative_change / 2
    kept = cd.merge_condensed(net, x, 0.9, max_change=bound)
    assert kept.relative_change == 0 and "would change" in kept.layers["0"].reason
    assert kept.layers["0"].after == 40 and kept.model[0].out_features == 40
    torch.testing.assert_close(kept.model(x), net(x))
    for enough in (2.1 * bound, math.inf):
        same = cd.merge_condensed(net, x, 0.9, max_change=enough)
        assert same.relative_change == merged.relative_change
    assert cd.merge_condensed(net, x, 0.9, layers=["2"]).layers["0"].after == 40
    with pytest.raises(ValueError, match="`layers`"):
        cd.merge_condensed(net, x, layers=["1"])
    with pytest.raises(TypeError, match="got int"):
        cd.merge_condensed(3, x)


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_finds_what_equal_neurons_allow(bias):
    """Equal tanh neurons: exact. Parallel ones: no worse than any other mixture."""
    net = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 3, bias=bias))
    with torch.no_grad():
        for part in (net[0].weight, net[0].bias):
            part.copy_(part[:5].repeat(6, *(1,) * (part.ndim - 1)))
    x = torch.randn(200, 2)
    merged = cd.merge_condensed(net, x, 0.99999)
    assert len(merged.model[0].weight) == 5 and merged.relative_change < 1e-5
    with torch.no_grad():
        net[0].weight *= 1 + torch.rand(30, 1)
    merged = cd.merge_condensed(net, x, 0.99)
    small = merged.model
    h = torch.tanh(small[0](x)).detach()
    if bias:
        h = torch.cat((h, torch.ones(200, 1)), 1)
    best = torch.linalg.lstsq(h.double(), net(x).detach().double()).solution
    error = (h.double() @ best - net(x).detach()).norm() / net(x).detach().norm()
    assert merged.relative_change == pytest.approx(float(error), rel=1e-3)


def test_dead_neurons_go_and_one_stays():
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        net[0].weight[2:] = 0.0
    merged = cd.merge_condensed(net, torch.randn(9, 3), 0.9999)
    assert len(merged.model[0].weight) == 2 and merged.relative_change < 1e-6
    with torch.no_grad():
        net[0].weight.zero_()
    merged = cd.merge_condensed(net, torch.randn(9, 3))
    assert len(merged.model[0].weight) == 1 and merged.relative_change == 0
    sigmoid = nn.Sequential(net[0], nn.Sigmoid(), net[2])
    merged = cd.merge_condensed(sigmoid, torch.randn(9, 3))
    assert len(merged.model[0].weight) == 1 and merged.relative_change < 1e-6


def test_opposite_neurons_stay_two():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    net[0].weight.data = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    merged = cd.merge_condensed(net, torch.randn(9, 2))
    assert merged.layers["0"].after == 2 and merged.relative_change == 0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.add = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4)
        )
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = x + self.add(x)
        x = self.twice(torch.relu(self.twice(x)))
        return self.last(torch.relu(self.weighted(self.norm(x))))


def test_what_cannot_be_merged_says_why():
    model = Residual()
    x = torch.randn(8, 4)
    merged = cd.merge_condensed(model, x, 0.5)
    reasons = {name: layer.reason for name, layer in merged.layers.items()}
    for name, said in (
        ("add", "add"), ("twice", "more than once"), ("norm.0", "BatchNorm1d"),
        ("weighted", "plain"), ("last", "output"),
    ):  # fmt: skip
        assert said in reasons[name], name
    torch.testing.assert_close(merged.model(x), model.eval()(x))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[3].weight = tied[0].weight
    said = cd.merge_condensed(tied, x, 0.5).layers["0"].reason
    assert "shares" in said
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2))
    said = cd.merge_condensed(grouped, torch.randn(2, 4, 3), 0.5).layers["0"].reason
    assert "grouped" in said
    with pytest.raises(ValueError, match="floating-point"):
        cd.merge_condensed(nn.Sequential(Integers(), nn.Identity()), x)


class Integers(nn.Module):
    def forward(self, x):
        return x.long()


class Branching(nn.Module):
    """A forward that cannot be traced, writes on itself, and has a part that can be."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.head = nn.Linear(3, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        self.last = x
        if x.sum() > 0:
            x = -x
        return self.head(self.body(x))


def test_parts_that_can_be_traced_are_and_tracing_leaves_no_trace():
    model = Branching()
    model.body.register_forward_hook(lambda *_: model.seen.append(1))
    generator, names = torch.get_rng_state(), sorted(model.__dict__)
    found = cd.outgoing_weights(model)
    assert model.seen == [] and sorted(model.__dict__) == names
    assert torch.equal(torch.get_rng_state(), generator)
    assert found["body.0"].consumers == ("body.2",) and not found["body.0"].homogeneous
    assert torch.equal(found["body.0"].weight, model.body[2].weight)
    assert found["head"].weight is None and "traced" in found["head"].reason


class Counting(nn.Module):
    """Counts its passes in a buffer, which tracing calls it with."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.last = nn.Linear(6, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        h = F.dropout(self.net(x), 0.3, self.training)
        return self.last(h)


def test_what_a_model_counts_in_buffers_stays_and_what_is_merged_is_narrow():
    net = Counting()
    condense(net.net[0], 2)
    merged = cd.merge_condensed(net, torch.randn(9, 4)).model
    assert len(merged.net[1].running_mean) == merged.net[0].out_features == 3
    cd.outgoing_weights(net)
    assert not net.passes and not merged.passes


def test_other_threads_go_on_while_a_model_is_traced():
    """Torch puts its tracing in the place of every module's call."""
    net, seen = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), []
    x = torch.randn(3, 4)
    expected = net(x)

    def serve():
        seen.extend([net(x), net[0].weight])

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
            return self.net(x)

    found = cd.outgoing_weights(Slow())
    assert found["net.0"].consumers == ("net.2",)
    assert torch.equal(seen[0], expected) and seen[1] is net[0].weight


def test_outgoing_weights_of_every_reader():
    model = Convolutional()
    found = cd.outgoing_weights(model)
    assert found["third"].consumers == ("left", "right")
    both = torch.cat((model.left.weight, model.right.weight))
    assert torch.equal(found["third"].weight, both)
    reads = model.third.weight.unflatten(1, (12, 4))
    norms = reads.norm(dim=(0, 2))
    torch.testing.assert_close(found["second"].weight.norm(dim=0), norms)
    channels = model.second.weight.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(found["first"].weight.norm(dim=0), channels)
    assert found["first"].homogeneous and found["first"].reason == ""
    wide = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2))
    assert "another dimension" in cd.outgoing_weights(wide)["0"].reason
    across = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(4, 2))
    assert "another dimension" in cd.outgoing_weights(across)["0"].reason


class Follows(nn.Module):
    """A convolution, a step, and a layer that reads what it makes."""

    def __init__(self, step, width):
        super().__init__()
        self.one, self.two, self.step = nn.Conv1d(3, 4, 1), nn.Linear(width, 2), step

    def forward(self, x):
        return self.two(self.step(torch.relu(self.one(x))))


@pytest.mark.parametrize(
    "step",
    [
        lambda h: h.flatten(1), lambda h: torch.flatten(h, 1, -1),
        lambda h: torch.flatten(h, start_dim=1), lambda h: h.flatten(1, end_dim=-1),
        lambda h: h.view(h.shape[0], -1), lambda h: h.reshape(h.size(0), -1),
    ],
)  # fmt: skip
def test_what_is_flattened_is_read_by_channel(step):
    model = Follows(step, 20)
    found = cd.outgoing_weights(model)["one"]
    assert found.consumers == ("two",) and found.homogeneous
    by_channel = model.two.weight.unflatten(1, (4, 5)).norm(dim=(0, 2))
    torch.testing.assert_close(found.weight.norm(dim=0), by_channel)


@pytest.mark.parametrize(
    "step",
    [
        lambda h: h.transpose(1, -1), lambda h: h.unsqueeze(1).flatten(1, 2),
        lambda h: torch.transpose(h, 1, -1), lambda h: h.flatten(0, 1).view(-1, 4),
        lambda h: h.flatten(end_dim=1), lambda h: torch.flatten(h, end_dim=1),
    ],
)  # fmt: skip
def test_what_is_turned_over_is_not_taken_for_flattened(step):
    found = cd.outgoing_weights(Follows(step, 4))["one"]
    assert not found.consumers and "follows it" in found.reason


class TwoReads(nn.Module):
    """A reader that two layers share: fewer neurons of one would break the other."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)  # fmt: skip # noqa: E501

    def forward(self, x):
        return self.last(torch.relu(self.one(x))) + self.last(torch.relu(self.two(x)))


class Tied(nn.Module):
    """The first layer's weight is also read as a tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        h = self.two(torch.relu(self.one(x)))
        return F.linear(F.linear(h, self.one.weight), torch.ones(2, 6))


class TiedReader(nn.Module):
    """The weight of what reads the first layer is also read as a tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        h = self.two(torch.relu(self.one(x)))
        return F.linear(torch.relu(h), self.two.weight.T)


@pytest.mark.parametrize(
    ("make", "said"),
    [(TwoReads, "elsewhere"), (Tied, "tensor"), (TiedReader, "does not run with")],
)
def test_a_layer_that_is_needed_whole_elsewhere_is_left(make, said):
    torch.manual_seed(0)
    model, x = make(), torch.randn(20, 4)
    merged = cd.merge_condensed(model, x, 0.1)
    assert said in merged.layers["one"].reason, merged.layers
    assert merged.relative_change == 0
    torch.testing.assert_close(merged.model(x), model.eval()(x))


def test_what_has_no_finite_outputs_is_not_merged():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="finite"):
        cd.merge_condensed(net, torch.full((9, 4), float("nan")))
    with pytest.raises(ValueError, match="one sample at least"):
        cd.merge_condensed(net, torch.randn(0, 4))
    net[0].weight.data[1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        cd.merge_condensed(net, torch.randn(9, 4))


def test_what_few_samples_do_not_show_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    x, new = torch.randn(20, 3).double(), torch.randn(100, 3).double()
    merged = cd.merge_condensed(net, x, 0.999)
    assert merged.layers["0"].after == 50  # nothing is parallel
    assert torch.equal(merged.model(new), net(new))
    with torch.no_grad():
        net[0].weight[40:], net[0].bias[40:] = net[0].weight[:10], net[0].bias[:10]
    merged = cd.merge_condensed(net, x, 0.999)
    assert merged.layers["0"].after == 40
    torch.testing.assert_close(merged.model(new), net(new))


def test_dropout_that_is_always_on_is_off():
    class Always(nn.Sequential):
        def forward(self, x):
            return self[1](F.dropout(torch.relu(self[0](x)), 0.5))

    torch.manual_seed(0)
    net = Always(condense(nn.Linear(4, 12), 3), nn.Linear(12, 2))
    merged = cd.merge_condensed(net, torch.randn(30, 4))
    assert merged.layers["0"].after == 4 and merged.relative_change < 1e-5


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_neurons_is_left():
    net = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 2))
    merged = cd.merge_condensed(net, torch.randn(9, 4))
    assert merged.layers["0"].reason == "it has no neurons"


@pytest.mark.parametrize(
    "measure", [cd.effective_neurons, cd.cosine_statistics, cd.cluster_order]
)
def test_weights_without_real_values_are_refused(measure):
    for weights in (
        torch.randn(4, 5, dtype=torch.complex64),
        torch.randn(4, 5, device="meta"),
        torch.ones(4, 5, dtype=torch.int64),
    ):
        with pytest.raises(TypeError, match="real floating-point"):
            measure(weights)


def test_complex_layers_are_passed_over():
    net = nn.Sequential(nn.Linear(4, 5, dtype=torch.complex64), nn.Linear(5, 2))
    assert [name for name, _ in cd.named_input_weights(net)] == ["1"]
