"""Second derivatives of linear layers, and the sums that they are added to."""

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from tests.live import Live
from torch_dropout_ir.sharpness import linear as module


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.symbols.weight

    def forward(self, x):
        h = self.symbols(x)
        return self.head(torch.tanh(self.inner(self.inner(h)))).mean(1)


def normed():
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(5, 7))


CASES = {
    "rows": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)),
             lambda: torch.randn(6, 4, dtype=torch.float64)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(),
                                        nn.Linear(5, 7), nn.Flatten(),
                                        nn.ReLU(inplace=True), nn.Linear(14, 7)),
                  lambda: torch.randn(6, 2, 4, dtype=torch.float64)),
    "tied": (Tied, lambda: torch.randint(7, (6, 3))),
    "parametrized": (normed, lambda: torch.randn(6, 4, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dense_matrix(monkeypatch, case, kind):
    make, draw = CASES[case]
    net, batch = make().double(), (draw(), torch.randint(7, (6,)))
    op = getattr(tdi.sharpness, kind)(net, "cross_entropy", batch)
    v, total = torch.randn(2, op.shape[0], dtype=torch.float64)
    found = total.clone()
    op.add_product(v, found)
    monkeypatch.setattr(module, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(
        "torch_dropout_ir.sharpness.derivatives.linear", torch.nn.functional.linear
    )
    plain = getattr(tdi.sharpness, kind)(net, "cross_entropy", batch)
    dense = plain.dense()
    torch.testing.assert_close(found, total + dense @ v)
    torch.testing.assert_close(op @ v, dense @ v)
    torch.testing.assert_close(op.dense(), dense)
    assert not module._SUMS


def test_a_product_makes_nothing_of_the_size_of_a_weight():
    net = nn.Sequential(*(nn.Linear(300, 300) for _ in range(3)))
    op = tdi.sharpness.hessian(net, "mse", (torch.randn(4, 300), torch.randn(4, 300)))
    v, total = torch.randn(2, op.shape[0])
    with Live((v, total, *net.parameters(), *op.params.values())) as seen:
        op.add_product(v, total)
    assert 0 < seen.most < 300 * 300 * 4 / 2
