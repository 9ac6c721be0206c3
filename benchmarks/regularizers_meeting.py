"""Layers of networks with batch normalization that are not torch's alone."""

import torch
from torch import nn


class Swish(torch.autograd.Function):
    """A product with a sigmoid that keeps its input alone."""

    @staticmethod
    def forward(ctx, x):
        """Return the product."""
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        """Make the sigmoid again."""
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s * (1 + x * (1 - s)))


class OwnSwish(nn.Module):
    """An activation with a derivative of its own."""

    def forward(self, x):
        """Apply it."""
        return Swish.apply(x)


class Shifted(nn.Module):
    """Some channels are those of the row above or below, written into a new tensor."""

    def forward(self, x):
        """Shift them, and take what is positive."""
        found = torch.zeros_like(x)
        found[:, :4, 1:] = x[:, :4, :-1]
        found[:, 4:8, :-1] = x[:, 4:8, 1:]
        found[:, 8:] = x[:, 8:]
        return found.relu()


class Recurrent(nn.Module):
    """Two recurrent layers of 128 with batch normalization behind each."""

    def __init__(self, kind):
        super().__init__()
        self.drop, self.end = nn.Dropout(0.1), nn.Linear(128, 10)
        self.layers = nn.ModuleList([kind(64, 128), kind(128, 128)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(128), nn.BatchNorm1d(128)])

    def forward(self, x):
        """Return what the mean over time says, ``[samples, 10]``."""
        h = self.drop(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            out = layer(h)[0]
            h = norm(out.flatten(0, 1)).view(out.shape)
        return self.end(h.mean(0))
