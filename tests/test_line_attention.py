"""Lines through attention some queries at a time, against attention of all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.line_oracle import line_and_graph, linear_and_graph
from tests.test_attention_again import WAYS, given
from torch_dropout_ir import attention_again
from torch_dropout_ir.attention_again import Attention
from torch_dropout_ir.regularizers import line_functions
from torch_dropout_ir.regularizers.line_functions import along_queries


@pytest.fixture
def few(monkeypatch):
    """Few weights at once, and the attention that lines went through so."""
    taken = []

    def watch(attention, line_of):
        taken.append(attention)
        return along_queries(attention, line_of)

    monkeypatch.setattr(attention_again, "_WEIGHTS", 7)
    monkeypatch.setattr(line_functions, "along_queries", watch)
    return taken


def dense(how, given, orders):
    """Attention of ``x + t u + t^2 w / 2`` and its derivatives at ``t = 0``."""

    def at(t):
        moved = [
            x + sum(0 if u is None else u * t ** (k + 1) / (k + 1)
                    for k, u in enumerate(line))
            for x, line in zip(given, orders, strict=True)
        ]  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*moved, **how)

    zero, one = torch.zeros(()).double(), torch.ones(()).double()

    def slope(t):
        return torch.func.jvp(at, (t,), (one,))[1]

    return at(zero), *torch.func.jvp(slope, (zero,), (one,))


ORDERS = {
    "all": [(1, 1), (1, 1), (1, 1)], "a query": [(1, 0), (0, 0), (0, 0)],
    "first": [(1, 0), (1, 0), (1, 0)], "second": [(0, 1), (0, 0), (0, 1)],
}  # fmt: skip


@pytest.mark.parametrize("most", [1, 12, 50])  # a query, some queries, a sample
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WAYS)
def test_a_line_is_that_of_dense_attention(monkeypatch, most, name, order):
    torch.manual_seed(0)
    monkeypatch.setattr(attention_again, "_WEIGHTS", most)
    how, tensors = WAYS[name](), given()[:3]
    lines = [
        tuple(torch.randn_like(x) if own else None for own in each)
        for x, each in zip(tensors, ORDERS[order], strict=True)
    ]
    expected = dense(how, tensors, lines)
    known = {id(x): line for x, line in zip(tensors, lines, strict=True)}
    ((y,), ((first, second),)) = along_queries(
        Attention.of(*tensors, **how), lambda x: known[id(x)]
    )
    torch.testing.assert_close((y, first, second), expected, rtol=1e-10, atol=1e-12)


class Heads(nn.Module):
    """Attention of one's own to oneself, or to what does not move."""

    def __init__(self, keys=None, mask=None):
        super().__init__()
        self.keys, self.mask = keys, mask

    def forward(self, x):
        q = x.view(3, 4, 2, 3).transpose(1, 2)
        k = q.sin() if self.keys is None else self.keys
        mask = None if self.mask is None else self.mask(q)
        return F.scaled_dot_product_attention(q, k, k, mask).sum((1, 3)).exp()


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x.view(3, 4, 6)
        return self.layer(x, x, x, need_weights=False)[0].exp()


LAYERS = {
    "own": Heads, "module": Module,
    "still keys": lambda: Heads(torch.linspace(-1, 1, 72).double().view(3, 2, 4, 3)),
    "twice": lambda: nn.Sequential(Module(), Module()),
}  # fmt: skip


@pytest.mark.parametrize("oracle", [line_and_graph, linear_and_graph])
@pytest.mark.parametrize("name", LAYERS)
def test_a_line_through_a_model_is_that_of_a_graph(few, name, oracle):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = oracle(layer, torch.randn(3, 24).double())
    assert few
    torch.testing.assert_close(found, expected)


def test_a_mask_that_moves_is_left_to_torch(few):
    torch.manual_seed(0)
    layer = Heads(mask=lambda q: q @ q.mT)
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = line_and_graph(layer, torch.randn(3, 24).double())
    assert not few
    torch.testing.assert_close(found, expected)
