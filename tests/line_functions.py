"""Functions of positive numbers, ``[6, 4]``, and others that tests of lines share."""

import torch
import torch.nn.functional as F
from torch import nn

MASK = torch.tensor([True, False, False, True]).repeat(6, 1)
ROWS = torch.tensor([0, 2, 1, 0, 1, 2])
MATRIX = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Halved(torch.autograd.Function):
    """A derivative that is not linear in that of what follows."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g.sin() / 2


def seen_in_part(x):
    part = x[:, :3]
    x = x.sin()  # nobody holds what it was of, but a part
    return x[:, :3] * part


def seen_as_a_copy(x):
    same = x.clone()
    x = x.exp()
    return (x + 1).tanh() * same


def drawn(x):
    """The same each time: noise does not move."""
    torch.manual_seed(5)
    return (torch.rand_like(x) + torch.randn_like(x) + (x / 2).bernoulli()) * x


def made_of_shapes(x):
    numbers = [torch.ones_like(x), torch.zeros_like(x), torch.full_like(x, 2.0)]
    numbers += [x.new_ones(4), x.new_zeros(4), x.new_full((4,), 2.0)]
    numbers += [torch.empty_like(x).fill_(2.0), x.new_empty(4).fill_(2.0)]
    return sum(numbers) * x


def seen_as_written(x):
    y = x * 1.5
    y += x
    y *= 0.7
    y.tanh_()
    return y + x


BY_NAME = {
    **{
        name: getattr(torch, name)
        for name in (
            "asinh", "atan", "cosh", "erf", "erfc", "exp2", "log10", "log2", "sinc",
            "sinh",
        )
    },
    **{name: getattr(F, name) for name in ("celu", "softsign", "tanhshrink")},
    "tan": lambda x: torch.tan(x / 2), "logit": lambda x: torch.logit(x / 3),
    "clamp_max": lambda x: torch.clamp_max(x, 0.7),
    "threshold": lambda x: F.threshold(x, 0.5, 0.1),
    "softshrink": lambda x: F.softshrink(x, 0.4),
    "hardshrink": lambda x: F.hardshrink(x, 0.4),
    "prelu": lambda x: F.prelu(x - 0.5, torch.tensor([0.3]).double()),
    "steps": lambda x: (x.sign() + (3 * x).floor() + x.round() + (3 * x).ceil()) * x,
    "truncated": lambda x: (3 * x).trunc() * x, "drawn": drawn,
    "made of shapes": made_of_shapes,
    "std_mean": lambda x: sum(torch.std_mean(x, 1)),
    "to a power": lambda x: x**x, "of a number": lambda x: 2**x,
    "atan2": lambda x: torch.atan2(x, 1 + x.flip(0)),
    "hypot": lambda x: torch.hypot(x, x.flip(0)), "xlogy": lambda x: torch.xlogy(x, x),
    "logaddexp": lambda x: torch.logaddexp(x, 2 * x.flip(0)),
    "addcmul": lambda x: torch.addcmul(x, x.exp(), x.sin(), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), x),
    "logaddexp of a column": lambda x: torch.logaddexp(x[:, :1], x.sin()),
    "clamped by itself": lambda x: torch.clamp(x, x.mean(0), 1.5 * x.mean(1, True)),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3), "glu": lambda x: F.glu(x, 1),
    "norm": lambda x: x.norm(dim=1), "normalized": F.normalize,
    "third": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "var": lambda x: x.var(1), "var_mean": lambda x: torch.var_mean(x, 1)[0],
    "std": lambda x: (x - x.mean(1, True)) / x.std(1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(1), "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1), "mv": lambda x: x @ x[0],
    "dot": lambda x: x[0] @ x[1],
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]),
    "baddbmm": lambda x: torch.baddbmm(
        x.view(2, 3, 4).sum(2, True), x.view(2, 3, 4), x.view(2, 4, 3)
    ),
    "bilinear": lambda x: F.bilinear(x, x.sin(), MATRIX.view(3, 2, 2).repeat(1, 2, 2)),
}  # fmt: skip


def resized(*shape, **how):
    return lambda x: F.interpolate(x.view(shape), **how)


def padded(mode, shape, *sizes):
    return lambda x: F.pad(x.view(shape), sizes, mode=mode)


SHAPES = {
    "repeat": lambda x: x.repeat(2, 1).exp(), "unfold": lambda x: x.unfold(1, 2, 1),
    "im2col": lambda x: F.unfold(x.view(2, 1, 3, 4), 2),
    "col2im": lambda x: F.fold(x.view(1, 4, 6), (3, 4), 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.view(1, 4, 2, 3), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.view(1, 1, 6, 4), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x.view(1, 4, 2, 3), 2),
    "nearest 1d": resized(2, 3, 4, scale_factor=2),
    "linear": resized(2, 3, 4, scale_factor=2, mode="linear"),
    "bicubic": resized(2, 1, 3, 4, scale_factor=2, mode="bicubic"),
    "exact": resized(2, 1, 3, 4, scale_factor=2, mode="nearest-exact"),
    "smoothed": resized(2, 1, 3, 4, size=2, mode="bilinear", antialias=True),
    "area": resized(2, 1, 3, 4, size=2, mode="area"),
    "nearest 3d": resized(2, 1, 1, 3, 4, scale_factor=2),
    "trilinear": resized(2, 1, 1, 3, 4, scale_factor=2, mode="trilinear"),
    "replicated": padded("replicate", (2, 3, 4), 1, 1),
    "replicated 3d": padded("replicate", (2, 1, 1, 3, 4), 1, 1, 1, 1, 0, 0),
    "reflected 3d": padded("reflect", (2, 1, 1, 3, 4), 1, 1, 1, 1, 0, 0),
    "triangles": lambda x: x.tril() + x.triu().exp(),
    "permuted": lambda x: x.permute(1, 0).sin(),
    "unbound": lambda x: torch.stack(x.unbind(1)[1:]).exp(),
    "by sizes": lambda x: x.split([1, 3], 1)[1].exp(),
    "unsafe_split": lambda x: x.unsafe_split(2, 1)[0].exp(),
    "unsafe, by sizes": lambda x: x.unsafe_split_with_sizes([1, 3], 1)[1].exp(),
    "alias": lambda x: torch.ops.aten.alias(x).sin(),
    "copied": lambda x: torch.zeros_like(x).copy_(x.exp()),
    "diagonal": lambda x: x.diagonal().exp(), "cumsum": lambda x: x.cumsum(1).exp(),
    "avg_pool1d": lambda x: F.avg_pool1d(x.view(2, 3, 4), 2).exp(),
    "avg_pool3d": lambda x: F.avg_pool3d(x.view(1, 2, 3, 2, 2), 2).exp(),
    "volumes": lambda x: F.adaptive_avg_pool3d(x.view(1, 2, 3, 2, 2), 2).exp(),
    "bilinear, resized": resized(2, 1, 3, 4, scale_factor=2, mode="bilinear"),
    "exact 1d": resized(2, 3, 4, scale_factor=2, mode="nearest-exact"),
    "exact 3d": resized(2, 1, 1, 3, 4, scale_factor=2, mode="nearest-exact"),
    "smoothed more": resized(2, 1, 3, 4, size=2, mode="bicubic", antialias=True),
    "reflected": padded("reflect", (2, 3, 4), 1, 1),
    "reflected 2d": padded("reflect", (2, 1, 3, 4), 1, 1, 1, 1),
    "replicated 2d": padded("replicate", (2, 1, 3, 4), 1, 1, 1, 1),
    "matrix": lambda x: x @ x.T,
}  # fmt: skip
CHOICES = {
    "max_pool1d": lambda x: F.max_pool1d(x.view(2, 3, 4), 2) * 1.5,
    "max_pool3d": lambda x: F.max_pool3d(x.view(1, 2, 3, 2, 2), 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(x.view(2, 1, 3, 4), 2),
    "max of all": lambda x: x.max() * x, "min of all": lambda x: x.exp().min() * x,
    "max": lambda x: x.max(1).values, "min": lambda x: x.min(1, True)[0] * x,
    "amax": lambda x: x.amax(1), "amin": lambda x: x.amin(()) * x,
    "amax of the same": lambda x: torch.cat([x, x], 1).amax(1),
    "maximum": lambda x: torch.maximum(x, x.flip(0)) * torch.maximum(x, x.clone()),
    "half": lambda x: torch.maximum(x, x.detach()) * x,
    "minimum": lambda x: torch.minimum(x, 0.7 * x.flip(0)),
    "smaller": lambda x: torch.minimum(x[0].exp(), x),
    "where": lambda x: torch.where(MASK, x.exp(), -x),
    "where, a number": lambda x: torch.where(x > 0.4, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(MASK, -3.0).exp(),
    "sort": lambda x: x.sort(1)[0] * x, "topk": lambda x: x.topk(2, 0)[0],
    "index_add": lambda x: MATRIX.index_add(0, ROWS, x.exp(), alpha=2),
    "index_put": lambda x: x.index_put((ROWS,), x.exp(), accumulate=True),
    "scatter_add": lambda x: x[:3].scatter_add(0, ROWS[:, None].expand(6, 4), x),
    "scatter": lambda x: x.scatter(1, ROWS[:, None], 0.5),
    "slice_scatter": lambda x: x.slice_scatter(x[:2].exp(), 0, 1, 3),
    "adaptive 3d": lambda x: F.adaptive_max_pool3d(x.view(1, 2, 3, 2, 2), (3, 1, 1)),
    "select_scatter": lambda x: x.select_scatter(x[0].exp(), 0, 2),
    "gather": lambda x: x.gather(1, ROWS[:, None]).exp(),
    "taken": lambda x: x.take(ROWS), "masked": lambda x: x[MASK],
    "accumulated": lambda x: torch.zeros_like(x).add_(x.exp()).mul_(x),
}  # fmt: skip


def filtered(x):
    """A filter by frequencies, of numbers of both kinds."""
    found = torch.fft.rfft(x, dim=0)
    found = torch.cat([found * (0.5 + 1j), found.exp() * 0.1], 1)
    return torch.fft.irfft(found / found.abs().add(1), dim=0) * found.angle().sum()


BY_GRAPH = {
    "fmod": lambda x: torch.fmod(x, 0.4), "erfinv": lambda x: (x / 9).erfinv(),
    "erfinv, in place": lambda x: (x / 9).erfinv_() * x,
    "cosine": lambda x: F.cosine_similarity(x, x.sin(), 1),
    "short ones": lambda x: F.cosine_similarity(x, x.sin(), 0, eps=1.5),
    "distances": lambda x: torch.cdist(x, x.flip(0).exp()),
    "pairs": lambda x: F.pdist(x), "pairwise": lambda x: F.pairwise_distance(x, -x[:1]),
    "spectrum": lambda x: torch.fft.fft(x).abs(), "filtered": filtered,
    "complex": lambda x: (x[:3] + 1j * x[3:]).square().real * x[:3],
    "power": lambda x: torch.view_as_real((y := torch.fft.rfft(x)) * y * y.conj()),
    "inverse": lambda x: torch.linalg.inv(x[:4].sin() + 3 * torch.eye(4)),
    "median": lambda x: x.median(1)[0] * x.kthvalue(2, 1)[0],
    "cummax": lambda x: x.cummax(1)[0] * x, "renorm": lambda x: x.renorm(2, 0, 0.5),
    "sampled": lambda x: F.grid_sample(
        MATRIX.view(1, 1, 3, 4), x.view(1, 3, 4, 2).tanh(), align_corners=False
    ),
    "weighed rows": lambda x: F.layer_norm(x, (4,), x[0], x[1]),
    "whole": lambda x: F.layer_norm(x, (6, 4)),
    "weighed channels": lambda x: F.batch_norm(
        x, None, None, x[0].exp(), x[1], training=True
    ),
    "weighed groups": lambda x: F.group_norm(x, 2, x[0]),
}  # fmt: skip


FUNCTIONS = {
    **BY_NAME, **BY_GRAPH, **SHAPES, **CHOICES,
    "part": seen_in_part, "copy": seen_as_a_copy, "written": seen_as_written,
    "held": lambda x: (y := 1.5 * x).sin() * y + y.exp(),
    "spread": lambda x: x.mean(0).expand_as(x).sin(),
    "columns": lambda x: x.t().sigmoid().t() * x,
    "divided": lambda x: (x.sin() + 2).div_(x + 1),
    "by rows": lambda x: x / x.sum(1, True),
    **{
        name: getattr(torch, name)
        for name in (
            "abs", "cos", "exp", "expm1", "log1p", "reciprocal", "rsqrt", "sigmoid",
            "sin", "sqrt", "tanh", "square", "log",
        )
    },
    **{
        name: getattr(F, name)
        for name in (
            "elu", "gelu", "hardswish", "hardtanh", "leaky_relu",
            "logsigmoid", "mish", "relu", "relu6", "silu", "softplus", "selu",
        )
    },
    "clamp": lambda x: x.clamp(0.3, 1.2), "clamp_min": lambda x: x.clamp(min=0.4),
    "softmax": lambda x: x.softmax(1),
    "softmax of columns": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(1),
    "quotient": lambda x: x / (1 + x * x), "rsub": lambda x: 2 - x.pow(3),
    "difference": lambda x: torch.sub(x.exp(), x.sin(), alpha=0.5) - x,
    "subtracted": lambda x: torch.sub(x[0], x, alpha=0.5).exp(),
    "parts": lambda x: torch.cat([y * y for y in x.split(2, 1)], 1)[:, :3],
    "lifted": lambda x: (x.unsqueeze(1) * x.unsqueeze(2)).sum(1) + x.mean(0),
    "rounded": lambda x: torch.div(x, 0.3, rounding_mode="floor") * x,
    "counted": lambda x: (2 * x).long().double() * x,
    "pooled": lambda x: F.max_pool2d(x.view(2, 3, 4), 2) * 1.5,
    "chosen": lambda x: x.index_select(1, torch.tensor([2, 0])).exp(),
}  # fmt: skip
