"""Networks of practice whose products are measured, each with a batch and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torchvision
from overhead_models import GPT
from torch import nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with its batch.

    Attributes:
        make: Makes the network.
        shape: Shape of the inputs, sample in front.
        classes: Number of classes; 0: one real target, squared error.
        tokens: Number of symbols that inputs are drawn from; 0: real inputs.
        normalizes: Whether batch normalization is in training mode.
        masks: Seed of frozen masks; None: dropout off.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    tokens: int = 0
    normalizes: bool = False
    masks: int | None = None

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random inputs and targets."""
        x = torch.randn(self.shape)
        if self.tokens:
            x = torch.randint(self.tokens, self.shape)
        n = self.shape if self.classes == self.tokens else self.shape[:1]
        y = torch.randint(self.classes, n) if self.classes else torch.randn(n[0], 1)
        return x, y


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32 x 32."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
    return model


def vgg() -> nn.Module:
    """Six convolutions and three dense layers with dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    for size in (2048, 256):
        layers += [nn.Linear(size, 256), nn.ReLU(True), nn.Dropout()]
    layers.insert(-6, nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(256, 10))


def vit() -> nn.Module:
    """A small vision transformer."""
    model = torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 256, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.05)  # zeros as it comes
    return model


class Recurrent(nn.Module):
    """Classifies sequences of symbols by the last state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.symbols, self.head = nn.Embedding(500, 64), nn.Linear(128, 10)
        self.cells = kind(64, 128, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ``[n, T]`` symbols."""
        return self.head(self.cells(self.symbols(x))[0][:, -1])


def dense(activation: type[nn.Module], outputs: int = 10) -> Callable[[], nn.Module]:
    """A network of three dense layers."""
    return lambda: nn.Sequential(
        nn.Linear(256, 512), activation(), nn.Linear(512, 512), activation(),
        nn.Linear(512, outputs),
    )  # fmt: skip


_IMAGES = (16, 3, 32, 32)
CASES = {
    "ResNet-18, statistics of the batch": Case(resnet18, _IMAGES, normalizes=True),
    "ResNet-18, running statistics": Case(resnet18, _IMAGES),
    "VGG, frozen masks": Case(vgg, _IMAGES, masks=0),
    "VGG, dropout off": Case(vgg, _IMAGES),
    "ViT": Case(vit, _IMAGES),
    "GPT": Case(lambda: GPT(96, 96, 64), (8, 64), 96, 96),
    "LSTM": Case(lambda: Recurrent(nn.LSTM), (32, 24), tokens=500),
    "GRU": Case(lambda: Recurrent(nn.GRU), (32, 24), tokens=500),
    "tanh": Case(dense(nn.Tanh), (256, 256)),
    "GELU": Case(dense(nn.GELU), (256, 256)),
    "ReLU, squared error": Case(dense(nn.ReLU, 1), (256, 256), 0),
    "tanh, squared error": Case(dense(nn.Tanh, 1), (256, 256), 0),
}
