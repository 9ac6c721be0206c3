"""Graphs as sparse matrices, which have no memory of one piece."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests.passes import take_in_parts
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    modified_loss,
    monte_carlo,
    second_order,
)


class Edges(nn.Module):
    """Two layers along the edges of a graph, which it holds or is given."""

    def __init__(self, edges, where):
        super().__init__()
        self.where = where
        if where == "buffer":
            self.register_buffer("edges", edges)
        else:
            self.held = edges
        self.drop, self.again = nn.Dropout(0.5), nn.Dropout(0.3)
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x, edges=None):
        if edges is None:
            edges = self.edges if self.where == "buffer" else self.held
        h = self.norm(edges @ self.first(self.drop(x))).tanh()
        return edges @ self.last(self.again(h))


def made(where, kind):
    torch.manual_seed(0)
    edges = (torch.rand(6, 6).double() - 0.5).relu()
    edges = {"coo": edges.to_sparse, "csr": edges.to_sparse_csr, "dense": edges.clone}[
        kind
    ]()
    net = Edges(edges, where).double()
    x = torch.randn(6, 4).double()
    inputs = (x, edges) if where == "input" else x
    return net, inputs, torch.randint(3, (6,))


FORMS = {
    "second_order": lambda *a: second_order(*a).value,
    "second_order, sum": lambda *a: second_order(*a, num_samples=None).value,
    "gauss_newton": lambda *a: gauss_newton(*a, num_samples=3).value,
    "monte_carlo": lambda *a: monte_carlo(*a, num_masks=4).value,
    "gradient_norm": lambda *a: gradient_norm(*a, lr=0.1).value,
    **{
        kind: lambda *a, kind=kind: modified_loss(
            *a, kind=kind, lr=0.1, r1="gauss_newton", max_bytes=0
        )
        for kind in ("L1", "L2", "regu")
    },
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", ["coo", "csr"])
@pytest.mark.parametrize("where", ["buffer", "attribute", "input"])
def test_numbers_are_those_of_dense_matrices(monkeypatch, where, kind, parts):
    if parts:
        take_in_parts(monkeypatch)
    sparse, dense = made(where, kind), made(where, "dense")
    for name, form in FORMS.items():
        found = []
        for net, inputs, y in (sparse, dense):
            torch.manual_seed(1)
            found.append(form(net, (inputs, y), "cross_entropy"))
        torch.testing.assert_close(*found, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("where", ["buffer", "attribute", "input"])
def test_training_on_sparse_graphs_is_measured(where):
    def train(attach):
        net, inputs, y = made(where, "coo")
        analysis = tdi.attach_analysis(net, every=1, log_dir=False) if attach else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = net(*inputs) if where == "input" else net(inputs)
            F.cross_entropy(outputs, y).backward()
            optimizer.step()
        return net, analysis

    net, analysis = train(attach=True)
    assert set(analysis.absent) <= {"regularizer/R1_standard_error/<site>"}
    assert {"regularizer/R1", "sharpness/trace"} <= set(analysis.latest)
    analysis.detach()
    bare = train(attach=False)[0]
    for a, b in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_what_a_pass_writes_on_is_given_back(where):
    net, x, y = made(where, "coo")
    edges = net.edges if where == "buffer" else net.held
    was = edges._values().clone()

    def halve(*_):
        edges._values().mul_(0.5)

    net.register_forward_pre_hook(halve)
    if where == "buffer":
        monte_carlo(net, (x, y), "cross_entropy", num_masks=2)
    else:
        analysis = tdi.attach_analysis(net, "cross_entropy", data=[(x, y)],
                                       every=1, log_dir=False)  # fmt: skip
        assert "regularizer/R1" in analysis.measure()
    assert torch.equal(edges._values(), was)
