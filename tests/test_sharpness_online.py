"""Sharpness in a training run: eigenvalue, notes, what cannot be differentiated."""

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import Sharpness
from torch_dropout_ir.analysis.records import Histogram
from torch_dropout_ir.sharpness.recurrence import Quadrature, Settled, recurrence


class Sink:
    def __init__(self):
        self.records, self.notes = [], {}

    def write(self, step, records, notes):
        self.records.append(dict(records))
        self.notes.update(notes)

    def close(self):
        pass


class Idle(nn.Module):
    """Has a parameter that the loss does not depend on."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 12), activation(), nn.Dropout(), nn.Linear(12, 3)
        )
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)


def train(model, steps=4):
    torch.manual_seed(0)
    sink, criterion = Sink(), nn.CrossEntropyLoss()
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    analysis = tdi.attach_analysis(model, log_dir=False, every=1, sinks=[sink])
    with analysis:
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return analysis, sink


class Counted:
    """A matrix that counts its products."""

    def __init__(self, values):
        turn = torch.linalg.qr(torch.randn(len(values), len(values)).double())[0]
        self.matrix = turn * torch.as_tensor(values).double() @ turn.T
        self.shape, self.dtype, self.device = self.matrix.shape, torch.float64, "cpu"
        self.count = 0

    def __matmul__(self, v):
        self.count += 1
        return self.matrix @ v


def test_the_largest_node_has_the_residual_that_it_says():
    torch.manual_seed(0)
    op = Counted([5.0, 4.5, *torch.rand(70).tolist()])
    found = recurrence(op, 60, Settled(1e-6, 4))
    assert op.count == len(found.nodes) < 40
    assert found.error <= 1e-6 * found.top and found.error < found.residual
    assert found.top == pytest.approx(5, rel=1e-9)
    assert float(found.weights.sum()) == pytest.approx(1)
    least = recurrence(op, 60, Settled(1.0, 9))
    assert len(least.nodes) == 9  # settled at once, and a density asked for more


def test_an_error_is_the_square_of_the_residual_over_the_gap():
    op, found = Counted([5.0, 4.0, 1.0, *torch.rand(30).tolist()]), []
    recurrence(op, 12, lambda q: found.append(q))
    for q in found[5:]:
        assert abs(q.top - 5.0) <= q.error * (1 + 1e-6) + 1e-12
        assert q.error <= q.residual
    assert found[8].error < found[8].residual / 10
    alone = recurrence(op, 1)
    assert alone.error == alone.residual > 0


def test_a_claim_must_hold_for_three_more_products():
    def says(count, top, error, residual=0.0):
        nodes = torch.full((count,), top)
        return settled(Quadrature(nodes, torch.ones(1), residual, error))

    settled = Settled(0.01, 0)
    assert not says(3, 1.0, 0.005) and not says(4, 1.0, 0.005)
    assert not says(5, 2.0, 0.005)  # a larger one has come up
    assert not any(says(count, 2.0, 0.005) for count in (6, 7)) and says(8, 2.0, 0.005)
    settled = Settled(0.01, 0)
    assert not says(3, 1.0, 0.005) and not says(4, 1.0, 0.05)
    assert not any(says(count, 1.0, 0.005) for count in (5, 6, 7)) and says(8, 1.0, 0.0)
    settled = Settled(0.01, 0)
    assert not any(says(count, 1.0, 0.0, 0.041) for count in range(3, 12))
    assert not says(12, 1.0, 0.0, 0.039) and says(15, 1.0, 0.0, 0.039)


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="finite products"):
        recurrence(Counted([float("inf"), 1.0, 2.0]), 3)


def test_records_notes_and_idle_parameters():
    torch.manual_seed(0)
    analysis, sink = train(Idle())
    assert "sharpness" not in analysis.absent
    assert analysis.notes["sharpness/trace"].startswith("exact")
    assert analysis.latest["sharpness/trace_standard_error"] == 0
    last = sink.records[-1]
    density, slice_ = last["sharpness/spectral_density"], last["sharpness/loss_slice"]
    assert isinstance(density, Histogram)
    assert float(density.counts.sum()) == pytest.approx(1.0, abs=0.01)
    assert density.high > last["sharpness/top_eigenvalue"] * 0.9
    assert slice_.counts.numel() == 11
    assert float(slice_.counts[5]) == pytest.approx(last["loss/R_S"], rel=1e-5)
    smooth, _ = train(Idle(nn.Tanh), 1)
    assert "Gauss-Newton" in smooth.notes["sharpness/trace"]


@pytest.mark.parametrize("points", [1, 4, 11])
def test_a_slice_has_a_bin_around_each_step(points):
    torch.manual_seed(0)
    model, x, y = Idle().double(), torch.randn(9, 4).double(), torch.arange(9) % 3
    sink, sgd = Sink(), torch.optim.SGD(model.parameters(), lr=0.0)
    own = [Sharpness(max_matvecs=1, density_steps=0, slice_points=points)]
    with tdi.attach_analysis(model, log_dir=False, every=1, sinks=[sink], measures=own):
        nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
    found = sink.records[0]["sharpness/loss_slice"]
    width = (found.high - found.low) / len(found.counts)
    line = tdi.sharpness.filter_normalized_direction(
        model, torch.Generator().manual_seed(0)
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.eval()
    assert len(found.counts) == points
    for k, height in enumerate(found.counts):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] + (found.low + (k + 0.5) * width) * line[n])
            loss = nn.functional.cross_entropy(model(x), y)
        torch.testing.assert_close(height, loss, rtol=1e-6, atol=0)
    assert points == 1 or width == pytest.approx(2 / (points - 1))


def test_the_error_of_the_trace_is_the_spread_of_its_values():
    torch.manual_seed(0)
    model = nn.Sequential(Idle(nn.Tanh).net[:2], nn.Linear(12, 12), nn.Tanh(),
                          nn.Linear(12, 3)).double()  # fmt: skip
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    own = [Sharpness(max_matvecs=1, density_steps=0, slice_points=0)]
    with tdi.attach_analysis(model, log_dir=False, every=1, measures=own) as analysis:
        for _ in range(30):
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
    values, errors = (
        torch.tensor([x for _, x in analysis.history[f"sharpness/trace{end}"]])
        for end in ("", "_standard_error")
    )
    op = tdi.sharpness.hessian(model, "cross_entropy", (x, y))
    scores = (values - float(op.dense().trace())) / errors
    assert len(scores) == 30 and 0.5 < float(scores.square().mean()) < 2.0


def test_used_parameters():
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    used = tdi.sharpness.used_parameters(Idle(), "cross_entropy", batch)
    assert used == ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]


def test_branches_that_change_from_step_to_step_are_measured():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.turn = nn.Linear(4, 5), 0
            self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

        def forward(self, x):
            return self.heads[self.turn](self.trunk(x).tanh())

    torch.manual_seed(0)
    model = Heads().double()
    x, y = torch.randn(40, 4).double(), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    measures = [Sharpness(tol=1e-6, max_matvecs=60)]
    with tdi.attach_analysis(model, log_dir=False, every=1, measures=measures) as seen:
        for model.turn in (0, 1, 0):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            named = {n: p for n, p in model.named_parameters() if p.grad is not None}
            op = tdi.sharpness.hessian(model, "cross_entropy", [(x, y)], params=named)
            top = float(torch.linalg.eigvalsh(op.dense())[-1])
            optimizer.step()
            found = seen.latest["sharpness/top_eigenvalue"]
            assert found == pytest.approx(top, rel=1e-5)


def probe():
    """A last layer that begins at zero."""
    net = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3))
    for x in net.parameters():
        nn.init.zeros_(x)
    return net


def biases():
    """Trained in their biases alone."""
    net = Idle().net
    for layer in (net[0], net[3]):
        layer.weight.requires_grad_(False)
    return net


@pytest.mark.parametrize("make", [probe, biases])
def test_curvature_is_measured_where_no_line_has_a_direction(make):
    analysis, sink = train(make(), steps=1)
    assert analysis.latest["sharpness/trace"] > 0
    assert analysis.latest["sharpness/top_eigenvalue"] > 0
    assert "sharpness/loss_slice" not in sink.records[0]
    assert "its direction" in analysis.absent["sharpness/loss_slice"]
    assert "sharpness" not in analysis.absent


def test_a_slice_of_a_negative_loss_is_said_to_be_absent():
    net, x, y = Idle().net, torch.randn(40, 4), torch.randn(40, 3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        (nn.functional.mse_loss(net(x), y) - 90).backward()
        sgd.step()
    assert "negative" in analysis.absent["sharpness/loss_slice"]


@pytest.mark.parametrize("seed", range(6))
def test_of_few_parameters_no_trace_is_left_to_chance(seed):
    """Draws of so few agree, and an error of 0 was false of one seed of these."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    x, y = torch.randn(1, 2).double(), torch.randn(1, 2).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    only = {"measures": [Sharpness()], "log_dir": False, "every": 1}
    with tdi.attach_analysis(model, **only) as analysis:
        nn.functional.mse_loss(model(x), y).backward()
        sgd.step()
    parameters = list(model.parameters())
    risk = nn.functional.mse_loss(model(x), y)
    slopes = torch.autograd.grad(risk, parameters, create_graph=True)
    exact = 0.0
    for slope, own in zip(slopes, parameters, strict=True):
        for k, g in enumerate(slope.flatten()):
            exact += torch.autograd.grad(g, own, retain_graph=True)[0].flatten()[k]
    assert analysis.latest["sharpness/trace"] == pytest.approx(float(exact), rel=1e-9)
    assert analysis.latest["sharpness/trace_standard_error"] == 0
