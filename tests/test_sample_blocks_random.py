"""Blocks read off the graphs of random programs, against the dense Hessian."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F

from torch_dropout_ir.loss_terms import nodes_of
from torch_dropout_ir.sample_blocks import blocks_of

SHAPES = [(3, 3), (2, 2), (4, 2), (1, 3), (3, 1), (5, 3), (2, 4), (4, 4), (10, 2)]
OF_ONE = (
    torch.sin, torch.tanh, torch.sigmoid, torch.relu, F.softplus, F.logsigmoid,
    torch.abs, torch.clone, torch.neg, lambda x: x * x, lambda x: (x * x + 1).sqrt(),
    lambda x: (x * x + 1).log(), lambda x: 1 / (x * x + 1), lambda x: x**3,
    lambda x: x.tanh().exp(), lambda x: x.tanh().cosh(), lambda x: 1 - x,
    lambda x: x / 3, lambda x: x.clamp(-1, 1), lambda x: (x.tanh() + 2).lgamma(),
    lambda x: x.masked_fill(x > 0.3, 0.2), lambda x: x * 0.5, F.silu, F.gelu, torch.erf,
    lambda x: F.elu(x, 0.5), torch.atan, lambda x: x[[0] * len(x)], lambda x: x - 1,
)  # fmt: skip
ALONG = (
    torch.sum, torch.mean, torch.logsumexp, torch.softmax, torch.log_softmax,
    torch.unsqueeze, torch.squeeze, lambda x, d: x.sum(d, keepdim=True),
    lambda x, d: x.logsumexp(d, keepdim=True), lambda x, d: x.select(d, -1),
    lambda x, d: x.narrow(d, 0, 1), lambda x, d: x.split(1, d)[-1],
    lambda x, d: x.unbind(d)[0], lambda x, d: x.chunk(2, d)[0],
    lambda x, d: x.gather(d, torch.zeros_like(x).long()), lambda x, _: x.sum(),
    lambda x, _: x[::2], lambda x, _: x.flatten(), lambda x, _: x.flatten(1),
    lambda x, d: x.transpose(0, d), lambda x, _: x.expand(2, *x.shape),
    lambda x, d: x.transpose(-1, d), lambda x, d: torch.cat((x, x.sin()), d),
    lambda x, d: torch.stack((x, x.cos()), d), lambda x, _: torch.hstack((x, x)),
    lambda x, d: x.index_select(d, torch.zeros(2).long()), torch.cumprod, torch.prod,
    torch.logcumsumexp, lambda x, d: x.flip(d), lambda x, d: x.sort(d)[0], torch.amax,
    lambda x, d: x.max(d)[0], lambda x, d: x.cummax(d)[0], lambda x, d: x.roll(1, d),
    lambda x, _: x[torch.arange(len(x)), -1], lambda x, d: x.unfold(d, 1, 2),
)  # fmt: skip
OF_TWO = (
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.rsub,
    lambda x, y: x / (y * y + 1), lambda x, y: torch.where(x > y, x, y * 2),
    lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: torch.xlogy(x, y * y + 1),
    torch.atan2, torch.logaddexp, lambda x, y: torch.lerp(x, y, 0.3),
    torch.matmul, lambda x, y: x @ y.mT, lambda x, y: x.mT @ y,
    lambda x, y: torch.cat((y, x), -1), lambda x, y: torch.baddbmm(x, y, x.mT @ y),
    lambda x, y: torch.addmm(y, x, y.mT @ y),
    lambda x, y: x[..., None] @ y[..., None, :],
)  # fmt: skip


def program(seed, f):
    """A loss of some random steps, of the last few things that were made."""
    draw = random.Random(seed)
    y = torch.randn(f.shape, generator=torch.Generator().manual_seed(seed)).to(f)
    made = [f]
    for _ in range(draw.randrange(2, 9)):
        x, other = draw.choice(made[-4:]), draw.choice([*made[-4:], y, y[:1], y[:, :1]])
        kind = draw.random()
        try:
            if kind < 0.35:
                x = draw.choice(OF_ONE)(x)
            elif kind < 0.65 and x.ndim:
                x = draw.choice(ALONG)(x, draw.randrange(-x.ndim, x.ndim))
            else:
                x = draw.choice(OF_TWO)(x, other)
        except (RuntimeError, IndexError, TypeError, UserWarning):  # do not fit
            continue
        made += [x] if 0 < x.numel() <= 200 else []
    value = sum(draw.choice((torch.sum, torch.mean))(x) for x in made[-2:])
    return value * draw.choice((1.0, 0.5))


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_blocks_of_random_programs(start):
    """A graph that tells never tells what is not so, and about half of them do."""
    told = 0
    for seed in range(start, start + 100):
        shape = random.Random(seed).choice(SHAPES)
        rows = torch.arange(shape[0])
        f = torch.randn(shape, generator=torch.Generator().manual_seed(~seed % 2**32))
        f = f.double().requires_grad_()
        found = blocks_of(f, nodes_of(program(seed, f)))
        if found is None:
            continue
        told += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch.autograd.functional.hessian(
                lambda x, seed=seed: program(seed, x), f.detach()
            )
        blocks = expected[rows, :, rows].movedim(0, 1).clone()
        expected[rows, :, rows] = 0
        assert found.couples or not expected.any(), f"rows meet in program {seed}"
        torch.testing.assert_close(found.columns, blocks, rtol=1e-8, atol=1e-9)
    assert told > 30
