"""Losses without a closed form that make most of what a step holds, their models."""

import torch
import torch.nn.functional as F
from regularizers_costs import focal
from regularizers_models import in_turns, step
from torch import nn

from torch_dropout_ir.regularizers import gauss_newton, second_order

WORDS = 3000


def large_outputs() -> dict:
    """Losses without a closed form, by name, of 1024 rows of many words each."""

    def labels(f, y):
        return F.cross_entropy(f.view(-1, WORDS), y.view(-1))

    def cosh(f, y):
        off = f - F.one_hot(y, WORDS)
        return (off + F.softplus(-2 * off)).mean()

    def pairs(f, y):
        return labels(f - f.mean(0), y)

    def squares(f, y):
        return ((f - F.one_hot(y, WORDS)) ** 2).mean()

    def errors(f, y):
        return F.mse_loss(f - f.mean(0), F.one_hot(y, WORDS).to(f.dtype))

    pair = {name: loss for name, (loss, _) in paired_outputs().items()}
    return {"labels": labels, "focal": focal, "log cosh": cosh, "squares": squares,
            "centred, labels": pairs, "centred, squares": errors, **pair}  # fmt: skip


def paired_outputs() -> dict:
    """Losses of two outputs that couple rows, by name, and the outputs' width."""

    def contrast(f, y):
        a, b = [F.normalize(x, dim=1) for x in f]
        logits, own = a @ b.T / 0.1, torch.arange(len(y))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def apart(c):
        return c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten()

    def spread(f, y):
        total = F.mse_loss(*f)
        for x in f:
            x = x - x.mean(0)
            total = total + F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
            total = total + apart(x.T @ x / (len(y) - 1)).square().sum() / x.shape[1]
        return total

    def twins(f, y):
        a, b = [(x - x.mean(0)) / x.std(0) for x in f]
        c = a.T @ b / len(y)
        return (c.diagonal() - 1).square().sum() + 0.005 * apart(c).square().sum()

    def distances(f, y):
        return torch.cdist(*f).logsumexp(1).mean()

    def volume(f, y):
        a, b = [x - x.mean(0) for x in f]
        own = a.T @ a / len(y) + torch.eye(a.shape[1])
        return (a - b).square().mean() - torch.logdet(own)

    return {"contrast of pairs": (contrast, WORDS),
            "variance and covariance": (spread, 1000),
            "cross-correlation": (twins, 1000),
            "distances": (distances, 200), "volume": (volume, 400)}  # fmt: skip


class Heads(nn.Module):
    """Two outputs of a language model of width 32."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(WORDS, 32), nn.Dropout(0.1))
        self.heads = nn.ModuleList([nn.Linear(32, width) for _ in range(2)])

    def forward(self, x):
        """Return both."""
        h = self.body(x)
        return [head(h) for head in self.heads]


def large_model(name: str):
    """Return a language model of width 32 for such a loss, and a batch for it."""
    x, y = torch.randint(WORDS, (2, 1024))
    if name in paired_outputs():
        return Heads(paired_outputs()[name][1]), x, y
    body = Heads(WORDS).body
    return nn.Sequential(*body, nn.Linear(32, WORDS)), x, y


def large_costs(turns: int) -> None:
    """Print the time of one sample with losses of many words a row, in passes."""
    print(f"\n1024 rows of {WORDS} outputs, one sample, in passes")
    for name in ("labels", "squares", "log cosh", "focal"):
        loss, (net, x, y) = large_outputs()[name], large_model(name)
        batch = x, y
        found = in_turns(
            {
                "pass": step(net, batch, loss),
                "gauss_newton": lambda: gauss_newton(net, batch, loss),  # noqa: B023
                "second_order": lambda: second_order(net, batch, loss),  # noqa: B023
            },
            turns,
        )
        base = found.pop("pass")
        costs = "".join(f"{own / base:>8.2f} {form}" for form, own in found.items())
        print(f"  {name:14}pass {1e3 * base:>6.2f} ms{costs}")
