"""Second derivatives of our own: dense oracles, and no more work than needed."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.live import Live
from torch_dropout_ir import sharpness, vectors
from torch_dropout_ir.sharpness import linearization

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 4)),
    "wide": (lambda: nn.Conv2d(2, 13, (3, 2), (2, 1), (1, 0)), (2, 3, 3)),
    "3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 2, 3)),
    "grouped": (lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), (4, 4, 4)),
    "no bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 3, 3)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 3, 3)),
    "circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (2, 3, 3),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2),
        (4, 2, 3),
    ),
}


class Around(nn.Module):
    """A convolution below and above nonlinearities, so that all of its terms count."""

    def __init__(self, convolution, shape):
        super().__init__()
        self.shape, self.convolution = shape, convolution
        self.below = nn.Linear(4, torch.Size(shape).numel())
        self.above = nn.LazyLinear(2)

    def forward(self, x):
        h = torch.tanh(self.below(x)).unflatten(1, self.shape)
        h = torch.relu(self.convolution(h))  # some entries are dropped
        return self.above(torch.tanh(h + h.square()).flatten(1))


def around(name):
    make, shape = CONVOLUTIONS[name]
    net = Around(make(), shape)
    x, y = torch.randn(3, 4), torch.randint(2, (3,))
    net(x)
    return net.double(), (x.double(), y)


def oracle(net, batch):
    params = {n: p.detach() for n, p in net.named_parameters()}

    def of(flat):
        moved = vectors.to_params(flat, params)
        return F.cross_entropy(
            torch.func.functional_call(net, moved, batch[0]), batch[1]
        )

    return torch.autograd.functional.hessian(of, vectors.to_vector(params))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_are_those_of_the_dense_matrix(name):
    net, batch = around(name)
    expected = oracle(net, batch)
    op = sharpness.hessian(net, "cross_entropy", batch)
    v = torch.randn(len(expected), 3).double()
    torch.testing.assert_close(op @ v, expected @ v)  # columns at once
    torch.testing.assert_close(op @ v[:, 0], expected @ v[:, 0])
    for end in ("weight", "bias"):
        own = [n for n in op.params if n.endswith(end)]
        part = sharpness.hessian(net, "cross_entropy", batch, params=own)
        places = torch.cat([
            torch.full((x.numel(),), n in own) for n, x in op.params.items()
        ])  # fmt: skip
        found = part @ v[places, 0]
        torch.testing.assert_close(found, expected[places][:, places] @ v[places, 0])


def test_gauss_newton_products_are_as_without(monkeypatch):
    for name in ("1d", "grouped", "transposed"):
        net, batch = around(name)
        op = sharpness.ggn(net, "cross_entropy", batch)
        v = torch.randn(op.shape[0], 2).double()
        with monkeypatch.context() as patch:
            patch.setattr(linearization, "LeanDerivatives", contextlib.nullcontext)
            expected = sharpness.ggn(net, "cross_entropy", batch) @ v
        torch.testing.assert_close(op @ v, expected)


class Counts(TorchDispatchMode):
    """Which derivatives of convolutions are computed, and what else."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward, self.names = 0, [0, 0, 0], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if func is torch.ops.aten.convolution.default:
            self.forward += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.backward = [
                a + b for a, b in zip(self.backward, args[10], strict=True)
            ]
        return func(*args, **kwargs or {})


def test_no_derivative_is_computed_that_leads_nowhere():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Flatten())
    op = sharpness.hessian(net, "mse", (torch.randn(5, 1, 5, 5), torch.randn(5, 2)))
    v = torch.randn(op.shape[0])
    with Counts() as counts:
        op @ v
    # Tangents: of the first layer in its weight, of the second in both. In the inputs:
    # of the second layer twice; in weights: of the first once, of the second twice.
    assert (counts.forward, counts.backward) == (3, [2, 3, 2])


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_add_to_a_sum(kind):
    net, batch = around("wide")
    op = getattr(sharpness, kind)(net, "cross_entropy", batch)
    v, total = torch.randn(2, op.shape[0]).double()
    found = total.clone()
    op.add_product(v, found)
    torch.testing.assert_close(found, total + op.dense() @ v)


def test_weights_larger_than_their_patches_are_not_rearranged():
    net = nn.Sequential(
        nn.Conv2d(3, 200, 3, padding=1), nn.ReLU(True), nn.Conv2d(200, 200, 3, 2),
        nn.Flatten(),
    )  # fmt: skip
    batch = torch.randn(4, 3, 4, 4), torch.randn(4, 200)
    op = sharpness.hessian(net, "mse", batch)
    v, total = torch.randn(2, op.shape[0])
    with Counts() as counts, Live((v, total, *op.params.values())) as seen:
        op.add_product(v, total)
    assert counts.backward[1] == 0
    assert 0 < seen.most < 200 * 200 * 9 * 4 / 2


def test_relu_in_place_writes_on_its_input():
    class Written(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            if self.training:
                h = h.relu()
            else:
                nn.functional.relu(h, inplace=True)
            return self[1](h)

    net = Written(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    expected = sharpness.hessian(net, "mse", batch).dense()
    found = sharpness.hessian(net.eval(), "mse", batch).dense()
    torch.testing.assert_close(found, expected)


def test_relu_makes_no_zeros():
    zeros_of_tanh = None
    relus = (nn.ReLU(), torch.relu, lambda x: x.relu())
    relus += (nn.ReLU(inplace=True), torch.relu_, lambda x: x.relu_(), F.relu_)
    for layer in (torch.tanh, *relus):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].register_forward_hook(lambda *args, layer=layer: layer(args[2] + 0))
        batch = torch.randn(5, 3), torch.randn(5, 2)
        op = sharpness.hessian(net, "mse", batch)
        v = torch.randn(op.shape[0])
        with Counts() as counts:
            found = op @ v
        torch.testing.assert_close(found, op.dense() @ v)
        zeros = sum("zeros" in n or "fill" in n for n in counts.names)
        if layer is torch.tanh:
            zeros_of_tanh = zeros  # the product's own: its result, gradients let go
            continue
        assert zeros == zeros_of_tanh
        assert counts.names.count("aten::threshold_backward") == 2


class Odd(nn.Module):
    """Convolutions in surroundings of their own."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Conv1d(2, 2, 2)
        self.below, self.head = nn.Conv1d(2, 2, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.below(x.unflatten(1, (2, 3))))
        if self.how == "checkpoint":
            h = checkpoint(self.layer, x, use_reentrant=False)
        elif self.how == "vmap":
            h = torch.vmap(self.layer)(x[:, None])
        elif self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                h = self.layer(x).to(x)
        else:
            h = torch.stack([self.layer(one) for one in x])
        return self.head(torch.tanh(h).flatten(1))


@pytest.mark.parametrize("how", ["checkpoint", "vmap", "autocast", "unbatched"])
def test_other_surroundings_are_as_without(how, monkeypatch):
    net = Odd(how)
    batch = torch.randn(4, 6), torch.randint(2, (4,))
    op = sharpness.hessian(net, "cross_entropy", batch)
    v = torch.randn(op.shape[0])
    monkeypatch.setattr(linearization, "LeanDerivatives", contextlib.nullcontext)
    expected = sharpness.hessian(net, "cross_entropy", batch) @ v
    torch.testing.assert_close(op @ v, expected)


def test_a_sum_of_exponentials_has_a_curvature():
    torch.manual_seed(0)

    class Sums(nn.Sequential):
        def forward(self, x):
            return super().forward(x).logcumsumexp(1)

    net, x = Sums(nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    jacobian = torch.func.jacrev(
        lambda p: torch.func.functional_call(net, p, (x,)).flatten()
    )({n: p.detach() for n, p in net.named_parameters()})
    flat = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    dense = sharpness.ggn(net, F.mse_loss, (x, x[:, :2])).dense()
    torch.testing.assert_close(dense, flat.T @ flat * (2 / 8))
