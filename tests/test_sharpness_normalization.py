"""Second derivatives of batch normalization: dense oracles, and few passes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir import sharpness, vectors
from torch_dropout_ir.sharpness import linearization
from torch_dropout_ir.sharpness.normalization import normalization

CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normalized(dims, affine=True, track=True):
    """Normalization between smooth layers, with statistics far from 0 and 1."""
    layer, norm = CONVOLUTIONS[dims], NORMS[dims]
    rest = (2,) * (dims > 0)
    net = nn.Sequential(
        layer(2, 3, *rest), norm(3, affine=affine, track_running_stats=track),
        nn.Tanh(), layer(3, 2, *rest), norm(2, momentum=None), nn.Softplus(),
        nn.Flatten(), nn.LazyLinear(3),
    ).double()  # fmt: skip
    batch = torch.randn(4, 2, *(4,) * dims).double(), torch.randint(3, (4,))
    net(batch[0])
    for name, x in net.named_parameters():
        if name.startswith(("1.", "4.")):
            nn.init.normal_(x, 1.0)
    for name, x in net.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(x, 0.5, 2.0)
    return net, batch


def oracle(net, batch, params):
    def of(flat):
        buffers = {n: x.clone() for n, x in net.named_buffers()}
        moved = {**buffers, **vectors.to_params(flat, params)}
        return F.cross_entropy(
            torch.func.functional_call(net, moved, batch[0]), batch[1]
        )

    return torch.autograd.functional.hessian(of, vectors.to_vector(params))


@pytest.mark.parametrize("own", [None, ("0.weight",), ("1.bias",), ("1.weight",)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", range(4))
def test_products_are_those_of_the_dense_matrix(dims, training, own):
    net, batch = normalized(dims)
    before = {n: x.clone() for n, x in net.named_buffers()}
    op = sharpness.hessian(net.train(training), "cross_entropy", batch, params=own)
    expected = oracle(net, batch, op.params)
    v = torch.randn(len(expected), 2).double()
    torch.testing.assert_close(op @ v[:, 0], expected @ v[:, 0])
    torch.testing.assert_close(op @ v, expected @ v)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_without_factors_or_running_statistics(affine):
    net, batch = normalized(2, affine, track=False)
    op = sharpness.hessian(net.eval(), "cross_entropy", batch)
    expected = oracle(net, batch, op.params)
    torch.testing.assert_close(op.dense(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_gauss_newton_products_are_as_without(training, monkeypatch):
    net, batch = normalized(1)
    op = sharpness.ggn(net.train(training), "cross_entropy", batch)
    v = torch.randn(op.shape[0]).double()
    found = op @ v
    monkeypatch.setattr(linearization, "LeanDerivatives", contextlib.nullcontext)
    plain = sharpness.ggn(net, "cross_entropy", batch)
    torch.testing.assert_close(found, plain @ v)


class Passes(TorchDispatchMode):
    """How many entries are written, in tensors of at least some size."""

    def __init__(self, least):
        super().__init__()
        self.least, self.made = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        several = found if isinstance(found, (tuple, list)) else [found]
        own = (x for x in several if isinstance(x, torch.Tensor))
        views = func.is_view
        self.made += sum(x.numel() >= self.least and not views for x in own)
        return found


@pytest.mark.parametrize("training", [True, False])
def test_a_product_passes_over_the_input_a_few_times(training, monkeypatch):
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh())
    batch = torch.randn(9, 50, 2), torch.randn(450, 5)
    net.train(training)
    op = sharpness.hessian(net, "mse", batch)
    v = torch.randn(op.shape[0])
    with Passes(450 * 5) as seen:
        op @ v
    monkeypatch.setattr(linearization, "LeanDerivatives", contextlib.nullcontext)
    plain = sharpness.hessian(net, "mse", batch)
    with Passes(450 * 5) as torchs:
        plain @ v
    assert seen.made <= 0.7 * torchs.made


def tokens_last(x):
    """The same numbers, in memory as positions of channels are, of no first stride."""
    rows = x.flatten(2).mT.contiguous()
    return rows.mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("turned", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_single_sample_in_another_order_in_memory(training, turned):
    torch.manual_seed(0)
    given = [torch.randn(1, 4, 3, 3).double() for _ in range(3)]
    weight, along = torch.rand(2, 4).double()
    running = torch.rand(4).double(), torch.rand(4).double()

    def derivatives(normalize, x, g, v):
        x, w = x.detach().requires_grad_(), weight.clone().requires_grad_()
        y = normalize(x, w)
        root = g.detach().requires_grad_()
        first = torch.autograd.grad(y, [x, w], root, create_graph=True)
        second = torch.autograd.grad(first, [x, w, root], [v, along])
        return [*(f.detach() for f in first), *second]

    expected = derivatives(
        lambda x, w: F.batch_norm(x, *running, w, None, training), *given
    )
    moved = [tokens_last(x) if i in turned else x for i, x in enumerate(given)]
    kept = running[0].clone(), running[1].clone()
    found = derivatives(
        lambda x, w: normalization(x, kept, w, None, training, (0.1, 1e-5)), *moved
    )
    torch.testing.assert_close(found, expected)
