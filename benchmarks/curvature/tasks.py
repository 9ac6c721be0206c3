"""Networks and batches whose curvature is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """One block over eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.up, self.down = (
            nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify ``[n, 8, 8]``."""
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1))


def mlp() -> nn.Module:
    """The common task's network."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def tanh() -> nn.Module:
    """A smooth one."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(),
        nn.Linear(256, 10),
    )  # fmt: skip


def conv() -> nn.Module:
    """A small convolutional one."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


TASKS = {
    "mlp": (mlp, (784,), 512),
    "tanh": (tanh, (784,), 512),
    "conv": (conv, (1, 28, 28), 128),
    "attention": (Attention, (8, 8), 256),
}


def images(root: Path | None, shape: tuple[int, ...], n: int):
    """MNIST where it is given and fits, else ten clouds of points."""
    size = torch.Size(shape).numel()
    if root is not None and size == 784:
        from torchvision import datasets

        found = datasets.MNIST(root, train=True)
        return found.data[:n].float().view(n, *shape) / 255, found.targets[:n]
    y = torch.randint(10, (n,))
    return (torch.randn(10, size)[y] + torch.randn(n, size)).view(n, *shape), y


def trained(model: nn.Module, batch, steps: int) -> nn.Module:
    """Some steps of gradient descent on the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model


def states(
    tasks: Sequence[str], steps: Sequence[int], root: Path | None
) -> Iterator[tuple[str, int, nn.Module, tuple]]:
    """Task, steps of training, the model after them, and its batch."""
    for task in tasks:
        make, shape, n = TASKS[task]
        torch.manual_seed(0)
        batch = images(root, shape, n)
        model, done = make(), 0
        for count in steps:
            trained(model, batch, count - done)
            done = count
            yield task, count, model.eval(), batch
