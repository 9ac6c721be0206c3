"""Draws of the trace: of which blocks, how many, and that they stay unbiased."""

import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir import sharpness
from torch_dropout_ir.sharpness.residual import Block, Residual


class Positions(nn.Module):
    """Tokens by themselves, or some that meet in a product, by their partners."""

    def __init__(self, meet=None):
        super().__init__()
        self.a, self.b, self.meet = nn.Linear(3, 4), nn.Linear(4, 2), meet

    def forward(self, x):
        h = F.gelu(self.a(x.unflatten(1, (4, 3))))
        if self.meet:
            h = h * h[:, self.meet]
        return self.b(h.mean(1))


class Attends(nn.Module):
    """Queries, keys and values of one projection."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 1, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = x.unflatten(1, (4, 6))
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


def operator(net, inputs, n=16):
    x, y = torch.randn(n, inputs).double(), torch.randint(2, (n,))
    return sharpness.hessian(net.double(), "cross_entropy", (x, y))


def test_positions_that_do_not_meet_are_exact_by_their_diagonal():
    op = operator(Positions(), 12)
    found = sharpness.trace(op, 24, method="layerwise")
    assert found.method == "gauss_newton" and found.standard_error < 1e-12
    torch.testing.assert_close(found.value, op.dense().trace())


def test_positions_that_meet_are_probed_together():
    op = operator(Positions([1, 2, 3, 0]), 12)
    found = sharpness.trace(op, 800, method="layerwise")
    assert 0 < found.standard_error < 0.05 * found.value.abs()
    error = (found.value - op.dense().trace()).abs()
    assert error <= 4.5 * found.standard_error


def test_few_rows_are_not_taken_for_positions_that_do_not_meet():
    """Of a single sample a half may well hold both or neither of each pair."""
    op = operator(Positions([1, 0, 3, 2]), 12, n=1)
    for _ in range(12):
        found = sharpness.trace(op, 20, method="layerwise")
        assert found.state["moved"][0, None][0] is False


def test_queries_keys_and_values_are_probed_apart(monkeypatch):
    op = operator(Attends(), 24)
    truth = op.dense().trace()
    apart = sharpness.trace(op, 300, method="layerwise")
    assert (apart.value - truth).abs() <= 4.5 * apart.standard_error
    monkeypatch.setattr(Block, "split", lambda self: [self])
    together = sharpness.trace(op, 300, method="layerwise")
    assert (together.value - truth).abs() <= 4.5 * together.standard_error
    assert apart.standard_error < 0.8 * together.standard_error


def deep(activation):
    """More layers than can be looked at one by one on a small budget."""
    layers = [m for _ in range(7) for m in (nn.Linear(6, 6), activation())]
    return nn.Sequential(*layers, nn.Linear(6, 2))


def test_layers_without_a_residual_are_exact_however_many():
    op = operator(deep(nn.ReLU), 6)
    found = sharpness.trace(op, 12, method="layerwise")
    assert found.method == "exact" and found.num_matvecs <= 8
    torch.testing.assert_close(found.value, op.dense().trace())
    curved = operator(deep(nn.Tanh), 6)
    found = sharpness.trace(curved, 400, method="layerwise")
    assert found.method == "gauss_newton"
    error = (found.value - curved.dense().trace()).abs()
    assert error <= 4.5 * found.standard_error


def test_groups_are_no_more_than_can_tell_their_own_error():
    for budget in (20, 24, 32, 60):
        found = sharpness.trace(operator(deep(nn.Tanh), 6), budget, method="layerwise")
        draws = [len(x) for x in found.state["draws"]]
        assert sum(draws) / len(draws) >= 4 and found.num_matvecs <= budget


def scaled():
    """The first layer's block has nearly all of the noise."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        net[2].weight.mul_(4)
        net[4].weight.mul_(4)
    return net


def test_noisy_blocks_are_drawn_more_often_and_none_less_than_twice():
    torch.manual_seed(0)
    op = operator(scaled(), 6)
    found = sharpness.trace(op, 120, method="layerwise")
    draws = found.state["draws"]
    noise = [torch.tensor(x).std() for x in draws]
    order = sorted(range(len(draws)), key=lambda i: noise[i])
    counts = [len(draws[i]) for i in order]
    assert counts == sorted(counts) and counts[-1] > 2 * counts[0] >= 4
    assert found.num_matvecs == 120


def test_variances_of_signs_are_estimated_from_normal_probes():
    """On average over probes, for a block whose parameters are the targets."""
    matrix = torch.randn(100, 100).double()
    matrix = matrix + matrix.T
    x = torch.randn(100).double().requires_grad_()
    residual = Residual({id(x): matrix @ x})
    block = Block("", [], [x])
    expected = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    found = torch.tensor([residual.variances(block)[0] for _ in range(2000)]).double()
    error = found.std() / 2000**0.5
    assert (found.mean() - expected).abs() < 5 * error < 0.05 * expected
    forms = torch.stack([residual.form([block]) for _ in range(2000)])
    torch.testing.assert_close(forms.var(), expected, rtol=0.15, atol=0)


def test_errors_cover_whatever_the_shares():
    op = operator(scaled(), 6)
    truth = op.dense().trace()
    found = [sharpness.trace(op, 50, method="layerwise") for _ in range(40)]
    z = torch.stack([(f.value - truth) / f.standard_error for f in found])
    assert z.mean().abs() < 4 / 40**0.5 and 0.6 < z.std() < 1.6
