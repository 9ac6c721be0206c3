"""The trace of a loss that is not known, or that the model makes itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.sharpness import hessian, trace

LOSSES = {
    "labels": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()),
    "soft labels": lambda f, y: -(f.log_softmax(-1).flatten(0, 1) * F.one_hot(
        y.flatten(), 3)).sum(1).mean(),
    "focal": lambda f, y: (
        (1 - torch.exp(-F.cross_entropy(f.mT, y, reduction="none"))) ** 2
        * F.cross_entropy(f.mT, y, reduction="none")
    ).mean(),
    "squares": lambda f, y: (f - F.one_hot(y, 3)).square().sum(-1).mean() / 4,
    "lengths": lambda f, y: (f - F.one_hot(y, 3)).norm(dim=-1).mean(),
    "coupled": lambda f, y: (f - f.mean(0)).square().mean() * f.exp().mean(),
    "hard": lambda f, y: (F.hardsigmoid(f) - F.one_hot(y, 3)).square().mean(),
}  # fmt: skip


class Net(nn.Module):
    """Symbols of five texts; the loss is made inside where targets are given."""

    def __init__(self, loss, beside=False, norm=False, parts=False, hidden=True):
        super().__init__()
        first = [nn.BatchNorm1d(4)] if norm else []
        self.body = nn.Sequential(
            nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4), *first,
            nn.Tanh(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head, self.loss = nn.Linear(4, 3), loss
        self.beside, self.parts, self.hidden = beside, parts, hidden

    def forward(self, x, y=None):
        h = self.body(x)
        logits = self.head(h)
        if y is None:
            return logits
        loss = self.loss(logits, y)
        if self.beside:
            loss = loss + 0.1 * h.square().mean()
        if self.parts:
            logits = logits.unbind(1)
        found = {"hidden": h} if self.hidden else {}
        return {**found, "logits": logits, "loss": loss}


def made(name, **options):
    torch.manual_seed(0)
    net = Net(LOSSES[name], **options).double()
    return net, (torch.randn(5, 4, 2).double(), torch.randint(3, (5, 4)))


COUPLED = ("coupled",)


def inside(net, batch, masks="off"):
    return hessian(net, lambda out, _: out["loss"], (batch, batch[1]), masks=masks)


def outside(net, batch, masks="off"):
    return hessian(net, lambda f, y: net.loss(f, y), batch, masks=masks)


def dense_trace(net, batch):
    """Of the loss as a function of all parameters, in plain torch."""
    own = dict(net.named_parameters())

    def risk(*at):
        params = dict(zip(own, at, strict=True))
        return torch.func.functional_call(net, params, batch)["loss"]

    with torch.random.fork_rng(devices=[]):
        blocks = torch.autograd.functional.hessian(risk, tuple(own.values()))
    sizes = [x.numel() for x in own.values()]
    diagonal = [blocks[i][i].reshape(n, n).trace() for i, n in enumerate(sizes)]
    return torch.stack(diagonal).sum()


def many(name):
    """A sample has 360 outputs."""
    net, _ = made(name)
    return net, (torch.randn(5, 120, 2).double(), torch.randint(3, (5, 120)))


def drawn(op, method="auto", num_matvecs=40, seeds=range(12)):
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(trace(op, num_matvecs, method=method))
    return found


@pytest.mark.parametrize("make", [made, many])
@pytest.mark.parametrize("name", LOSSES)
def test_inside_and_outside_are_one(name, make):
    net, batch = make(name)
    own, other = (drawn(f(net, batch), seeds=(0,))[0] for f in (inside, outside))
    assert own.method == other.method
    torch.testing.assert_close(own.value, other.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        own.standard_error, other.standard_error, rtol=1e-9, atol=0
    )
    assert own.num_matvecs == other.num_matvecs
    entries = make is many and name in ("focal", "lengths")
    split = name not in COUPLED and not entries
    assert own.method == ("gauss_newton" if split else "hutchinson")


@pytest.mark.parametrize(("name", "make", "gain"), [
    ("labels", made, 3), ("squares", made, 3), ("focal", made, 3),
    ("squares", many, 1), ("labels", many, 1.1),
])  # fmt: skip
def test_it_is_the_trace_and_its_error_is_less_than_of_probes(name, make, gain):
    net, batch = make(name)
    truth = dense_trace(net.eval(), batch)
    op = inside(net, batch)
    found = drawn(op)
    values = torch.stack([x.value for x in found])
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5
    plain = torch.stack([x.standard_error for x in drawn(op, "hutchinson")])
    error = torch.stack([x.standard_error for x in found])
    assert error.square().mean().sqrt() * gain < plain.square().mean().sqrt()


def test_linear_in_each_layer_it_is_exact():
    net, batch = made("labels")
    net.body[1] = net.body[4] = torch.nn.ReLU()
    found = trace(inside(net, batch), 40)
    assert found.method == "exact"
    torch.testing.assert_close(found.value, dense_trace(net.eval(), batch))


def test_at_masks_and_resumed():
    net, batch = made("labels")
    for op in (inside(net, batch, masks=3), inside(net, batch, masks=[3, 4])):
        truth = op.dense().trace()
        first = drawn(op, seeds=(0,))[0]
        found = trace(op, 400, state=first.state)
        assert found.method == "gauss_newton"
        assert abs(found.value - truth) < 5 * found.standard_error
        assert found.standard_error < first.standard_error


@pytest.mark.parametrize(
    "options", [{"beside": True}, {"parts": True, "hidden": False}]
)
def test_where_no_tensor_is_a_cut_it_is_probed(options):
    net, batch = made("labels", **options)
    assert trace(inside(net, batch), 40).method == "hutchinson"


def test_labels_that_do_not_count_and_class_weights():
    weights = torch.tensor([0.5, 2.0, 1.0]).double()
    net, (x, y) = many("labels")
    y = y.where(torch.rand(y.shape) > 0.4, -100)
    net.loss = lambda f, t: F.cross_entropy(f.flatten(0, 1), t.flatten(), weights)
    truth = dense_trace(net.eval(), (x, y))
    found = drawn(inside(net, (x, y)))
    assert {one.method for one in found} == {"gauss_newton"}
    values = torch.stack([one.value for one in found])
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5
