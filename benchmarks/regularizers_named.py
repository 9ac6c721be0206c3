"""Losses that have names in the literature, each of as many outputs as it takes."""

import torch
import torch.distributions as D
import torch.nn.functional as F


def named_losses(n: int) -> dict:
    """Return losses by name, each with the number of its outputs, and targets."""
    real, rate = torch.randn(n), torch.rand(n) * 2 + 0.1
    labels, counts = torch.randint(10, (n,)), torch.poisson(3 * torch.ones(n))
    turns = torch.linalg.qr(torch.randn(n, 3, 3))[0]
    return {
        "quantiles by Huber": (3, quantiles, real),
        "evidence": (4, evidence, real),
        "Dirichlet": (4, dirichlet, labels % 4),
        "Weibull": (2, weibull, rate),
        "counts": (2, negative_binomial, counts),
        "boxes": (4, overlap_of_boxes, torch.rand(n, 4)),
        "mixture": (6, mixture, real),
        "rotations": (6, rotation, turns),
        "Brier": (10, brier, labels),
        "generalized": (10, generalized, labels),
        "poly": (10, poly, labels),
        "angles of classes": (10, normalized, labels),
        "triplets": (12, triplets, None),
        "pairs of views": (16, pairs, None),
        "ranks": (1, ranks, real[:, None]),
    }  # fmt: skip


def quantiles(f, y):
    """Return the pinball loss of three quantiles, smoothed at zero."""
    q, off = f.new_tensor([0.1, 0.5, 0.9]), y[:, None] - f
    return (F.huber_loss(f, y[:, None].expand_as(f), reduction="none")
            * torch.where(off > 0, q, 1 - q)).mean()  # fmt: skip


def evidence(f, y):
    """Return minus the log-likelihood of evidential regression."""
    g, (v, a, b) = f[:, 0], F.softplus(f[:, 1:]).unbind(1)
    a, omega = a + 1, 2 * b * (1 + v)
    return (
        0.5 * torch.log(torch.pi / v) - a * omega.log()
        + (a + 0.5) * torch.log(v * (y - g) ** 2 + omega)
        + torch.lgamma(a) - torch.lgamma(a + 0.5)
    ).mean()  # fmt: skip


def dirichlet(f, y):
    """Return the expected cross-entropy under a Dirichlet distribution."""
    a = F.softplus(f) + 1
    each = a.sum(1, keepdim=True).digamma() - a.digamma()
    return (F.one_hot(y, f.shape[1]) * each).sum(1).mean()


def weibull(f, y):
    """Return minus the log-likelihood of Weibull's distribution of lifetimes."""
    k, scale = (F.softplus(f) + 0.1).unbind(1)
    return -((k / scale).log() + (k - 1) * (y / scale).log() - (y / scale) ** k).mean()


def negative_binomial(f, y):
    """Return minus the log-likelihood of counts."""
    found = D.NegativeBinomial(F.softplus(f[:, 0]) + 0.1, logits=f[:, 1])
    return -found.log_prob(y).mean()


def overlap_of_boxes(f, y):
    """Return one minus the overlap of boxes over their union."""
    corners = [torch.cat((b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2), 1)
               for b in (f.sigmoid(), y)]  # fmt: skip
    low = torch.max(*(c[:, :2] for c in corners))
    high = torch.min(*(c[:, 2:] for c in corners))
    both = (high - low).clamp(min=0).prod(1)
    one, other = ((c[:, 2:] - c[:, :2]).prod(1) for c in corners)
    return (1 - both / (one + other - both)).mean()


def mixture(f, y):
    """Return minus the log-likelihood of a mixture of two normal densities."""
    parts = D.Normal(f[:, 2:4], F.softplus(f[:, 4:]) + 0.1)
    shares = D.Categorical(logits=f[:, :2])
    return -D.MixtureSameFamily(shares, parts).log_prob(y).mean()


def rotation(f, y):
    """Return the squared distance of rotations that are given by two axes."""
    first = F.normalize(f[:, :3], dim=1)
    rest = f[:, 3:] - (first * f[:, 3:]).sum(1, keepdim=True) * first
    second = F.normalize(rest, dim=1)
    found = torch.stack((first, second, torch.linalg.cross(first, second)), 2)
    return (found - y).square().sum((1, 2)).mean()


def brier(f, y):
    """Return the squared error of probabilities."""
    return (f.softmax(1) - F.one_hot(y, f.shape[1])).square().sum(1).mean()


def generalized(f, y):
    """Return the generalized cross-entropy."""
    return ((1 - f.softmax(1).gather(1, y[:, None]) ** 0.7) / 0.7).mean()


def poly(f, y):
    """Return the cross-entropy with a linear term more."""
    p = (F.one_hot(y, f.shape[1]) * f.softmax(1)).sum(1)
    return (F.cross_entropy(f, y, reduction="none") + 1 - p).mean()


def normalized(f, y):
    """Return the cross-entropy of logits of one length."""
    return F.cross_entropy(f / (f.norm(dim=1, keepdim=True) + 1e-7) / 0.5, y)


def triplets(f, _):
    """Return the softened triplet loss."""
    anchor, near, far = f.chunk(3, 1)
    gap = (anchor - near).square().sum(1) - (anchor - far).square().sum(1)
    return F.softplus(gap).mean()


def pairs(f, _):
    """Return the contrastive loss of two views of each sample."""
    a, b = F.normalize(f, dim=1).chunk(2)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def ranks(f, y):
    """Return the loss of all pairs that are in the wrong order."""
    before = (y > y.T).to(f)
    return (F.softplus(f.T - f) * before).sum() / before.sum()
