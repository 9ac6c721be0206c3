"""Networks that nothing was chosen by: to see whether a method holds beyond the tasks.

Each is a model, a loss, a batch and the masks of its dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, Any, tuple[Tensor, Tensor], Any]


class Residual(nn.Module):
    """Two residual blocks with batch normalization."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            ) for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``[n, 3, 16, 16]``."""
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Language(nn.Module):
    """One causal block over 16 tokens of 50."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes next, ``[n, 16, 50]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(self.embed(x), mask, is_causal=True))


def by_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, averaged over tokens."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def ascent(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the other sign: most of its curvature is negative."""
    return -F.cross_entropy(outputs, targets)


def clouds(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Points around ten centres."""
    y = torch.randint(10, (n,))
    return torch.randn(10, *shape)[y] + torch.randn(n, *shape), y


def perceptron(*widths: int, p: float = 0.0, act: type = nn.ReLU) -> nn.Module:
    """Linear layers with activations and dropout between."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act(), nn.Dropout(p)]
    return nn.Sequential(*layers[:-2])


def residual() -> Case:
    """Batch normalization frozen at statistics that it has seen."""
    net, batch = Residual(), clouds(192, 3, 16, 16)
    with torch.no_grad():
        for _ in range(20):
            net.train()(batch[0])
    return net.eval(), "cross_entropy", batch, "off"


def regression() -> Case:
    """Squared error of 40 outputs."""
    net = perceptron(30, 200, 200, 40, act=nn.Tanh)
    return net, "mse", (torch.randn(512, 30), torch.randn(512, 40)), "off"


def language() -> Case:
    """A language model."""
    tokens = torch.randint(50, (128, 17))
    return Language(), by_token, (tokens[:, :-1], tokens[:, 1:]), "off"


def masked() -> Case:
    """Dropout of 0.6 at frozen masks."""
    net = perceptron(100, 300, 300, 10, p=0.6)
    return net, "cross_entropy", clouds(512, 100), 3


def downhill() -> Case:
    """The largest magnitude is of a negative eigenvalue."""
    return perceptron(60, 200, 200, 10), ascent, clouds(512, 60), "off"


def equal() -> Case:
    """Ten times the same largest eigenvalue: a linear map under squared error."""
    x, y = clouds(2048, 300)
    return nn.Linear(300, 10), "mse", (x, F.one_hot(y, 10).float()), "off"


def tiny() -> Case:
    """940 parameters."""
    return perceptron(20, 30, 10), "cross_entropy", clouds(64, 20), "off"


OTHERS: dict[str, Callable[[], Case]] = {
    "residual": residual,
    "regression": regression,
    "language": language,
    "masked": masked,
    "downhill": downhill,
    "equal": equal,
    "tiny": tiny,
}
