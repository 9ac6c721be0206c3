"""Attention whose weights are made again, against torch's kernel that keeps them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.passes import take_in_parts
from torch_dropout_ir import attention_again
from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.attention_again import AttentionAgain
from torch_dropout_ir.regularizers import (
    clean_pass,
    gauss_newton,
    modified_loss,
    second_order,
)

CAUSAL = {"is_causal": True}
WAYS = {
    "none": lambda: {},
    "causal": lambda: {**CAUSAL, "scale": 0.4},
    "bool": lambda: {"attn_mask": torch.rand(5, 4) > 0.5},
    "of samples": lambda: {"attn_mask": torch.randn(3, 1, 1, 4).double()},
    "of heads": lambda: {"attn_mask": torch.randn(2, 5, 1).double()},
    "of keys": lambda: {"attn_mask": torch.randn(4).double()},
    "of infinities": lambda: {
        "attn_mask": (torch.rand(3, 2, 5, 4) < 0.5).double().log()
    },
    "empty": lambda: {"attn_mask": torch.arange(5)[:, None] > torch.arange(4)},
    "dropout off": lambda: {"dropout_p": 0.0},
}
LEFT = {
    "a mask that learns": lambda: {"attn_mask": torch.randn(5, 4).requires_grad_()},
    "keys of one sample": lambda: {"key": torch.randn(1, 2, 4, 3)},
    "no samples": lambda: {x: torch.randn(4, 3) for x in ("query", "key", "value")},
    "dropout": lambda: {"dropout_p": 0.5},
    "grouped": lambda: {
        "enable_gqa": True,
        **{x: torch.randn(3, 1, 4, 3) for x in ("key", "value")},
    },
    "half": lambda: {
        x: torch.randn(3, 2, 4, 3).half() for x in ("query", "key", "value")
    },
}


@pytest.fixture(params=[1, 12, 50, 10**6])
def most(request, monkeypatch):
    """Weights at once: a query, some queries, a sample, all."""
    monkeypatch.setattr(attention_again, "_WEIGHTS", request.param)
    return request.param


def given(depth=3):
    """Queries, keys, values, and what the result is multiplied with."""
    q, c = torch.randn(3, 2, 5, 3).double(), torch.randn(3, 2, 5, depth).double()
    k, v = torch.randn(3, 2, 4, 3).double(), torch.randn(3, 2, 4, depth)
    return q, k, v.double(), c


def derivatives(tensors, how):
    """The result, its derivatives to third order, each along others."""
    at = [x.clone().requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(*at[:3], **how)
    found, total = [y], (y * at[3]).sum()
    for _ in range(3):
        slopes = torch.autograd.grad(total, at, create_graph=True)
        found += slopes
        total = sum((g * x.sin()).sum() for g, x in zip(slopes, at, strict=True))
    return found


def names(y):
    return {node.name() for node in graph_nodes([y.grad_fn])}


@pytest.mark.parametrize("name", WAYS)
def test_derivatives_are_those_of_attention(most, name):
    torch.manual_seed(0)
    how = WAYS[name]()
    tensors = given(2 if name == "causal" else 3)
    expected = derivatives(tensors, how)
    with AttentionAgain():
        found = derivatives(tensors, how)
    assert ("KeepsGivenBackward" in names(found[0])) == (most < 120)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    if name == "empty":
        assert not found[0][..., 0, :].any()


def test_of_three_dimensions_too(most):
    torch.manual_seed(0)
    tensors = [x[:, 0] for x in given()]
    expected = derivatives(tensors, CAUSAL)
    with AttentionAgain():
        found = derivatives(tensors, CAUSAL)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_keys_that_heads_share(most):
    torch.manual_seed(0)
    q, k, v, c = given()
    tensors = q, k[:, :1], v[:, :1], c
    expected = derivatives(tensors, CAUSAL)
    with AttentionAgain():
        found = derivatives(tensors, CAUSAL)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(monkeypatch, name):
    monkeypatch.setattr(attention_again, "_WEIGHTS", 1)
    q, k, v, _ = (x.float() for x in given())
    how = {"query": q, "key": k, "value": v, **LEFT[name]()}
    how["query"] = how["query"].requires_grad_()
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(**how)
    torch.manual_seed(0)
    with AttentionAgain():
        found = F.scaled_dot_product_attention(**how)
        with pytest.raises(RuntimeError, match="is_causal"):
            F.scaled_dot_product_attention(q, k, v, torch.ones(5, 4), is_causal=True)
    assert "KeepsGivenBackward" not in names(found)
    assert torch.equal(found, expected)


class Texts(nn.Module):
    """Attention with a site before and behind it, in a checkpoint or not."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drops = nn.ModuleList([nn.Dropout(0.3), nn.Dropout(0.2)])
        self.out, self.checkpointed = nn.Linear(8, 3), checkpointed

    def forward(self, x):
        run = self.mixed
        h = self.drops[0](x)
        h = checkpoint(run, h, use_reentrant=False) if self.checkpointed else run(h)
        return self.out(self.drops[1](h)).mean(1)

    def mixed(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def texts(count=6, length=5):
    return torch.randn(count, length, 8).double(), torch.randint(3, (count,))


@pytest.fixture
def parts(monkeypatch):
    """Few weights at once from now on, and what was taken of them."""
    taken = []

    def watch(weights):
        for part in take(weights):
            taken.append(part)
            yield part

    def begin():
        monkeypatch.setattr(attention_again, "_WEIGHTS", 7)
        monkeypatch.setattr(attention_again, "_parts", watch)
        return taken

    take = attention_again._parts
    return begin


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_second_order_is_the_same_in_any_parts(monkeypatch, parts, apart, checkpointed):
    torch.manual_seed(0)
    net, batch = Texts(checkpointed).double(), texts()
    expected = second_order(net, batch, "cross_entropy", num_samples=None)
    taken = parts()
    take_in_parts(monkeypatch, apart)
    found = second_order(net, batch, "cross_entropy", num_samples=None)
    assert taken
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.per_site, expected.per_site)


@pytest.mark.parametrize("max_bytes", [0, None])
def test_so_are_roots_and_what_is_trained_on(parts, max_bytes):
    torch.manual_seed(0)
    net, (x, y) = Texts().double(), texts()

    def loss(f, y):  # outputs mix: it is differentiated twice
        return F.cross_entropy(f, y) + f.softmax(1).prod(1).mean()

    def both():
        net.zero_grad()
        once = gauss_newton(net, (x, y), loss, num_samples=None)
        torch.manual_seed(1)
        value = modified_loss(
            net, (x, y), "cross_entropy", kind="L1", r1="gauss_newton",
            max_bytes=max_bytes,
        )  # fmt: skip
        value.backward()
        return [once.value, value.detach(), *[p.grad for p in net.parameters()]]

    expected = both()
    taken = parts()
    found = both()
    assert taken
    torch.testing.assert_close(found, expected)


def test_its_graph_tells_that_samples_are_apart(monkeypatch):
    monkeypatch.setattr(attention_again, "_WEIGHTS", 7)
    net, (x, _) = Texts().double(), texts()
    asked = []
    monkeypatch.setattr(clean_pass, "told_by_powers", lambda *_: asked.append(1))
    with clean_pass.clean_pass(net, x, twice=True) as clean:
        assert "KeepsGivenBackward" in names(clean.outputs)
        assert clean.samples_meet(clean.outputs) is False
    swapped = Texts().double()
    swapped.attention.batch_first = False
    with clean_pass.clean_pass(swapped, x, twice=True) as clean:
        assert "KeepsGivenBackward" in names(clean.outputs)
        assert clean.samples_meet(clean.outputs) is None
