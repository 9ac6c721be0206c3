"""The four networks of Fig. 12 and Table I with their data and how they are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from data import cifar, mnist
from torch import nn
from translation import Transformer, multi30k, of_one_length, trim, warmed

SIZES = (50, 4, 20, 20, 256, 3)  # d_model, heads, d_k, d_v, d_ff, layers
BATCH = {"fnn": 128, "vgg9": 128, "transformer": 32}


@dataclass(frozen=True)
class Task:
    """What one network is trained on, and how.

    Attributes:
        train: Inputs and targets.
        test: Those that it does not see.
        net: The network.
        loss: The loss of a batch, as torch_dropout_ir takes it.
        optimizer: Its optimizer.
        schedule: The learning rate at each step.
        steps: Number of steps.
        rows: Draws the rows of a batch.
        trim: Cuts a batch to its longest row.
    """

    train: tuple
    test: tuple
    net: nn.Module
    loss: nn.Module
    optimizer: Any
    schedule: Any
    steps: int
    rows: Callable
    trim: Callable = lambda x, y: (x, y)


# %% The networks
def fnn(p1, p2):
    """The paper's network for MNIST."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(p1),
        nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(p2), nn.Linear(1024, 10),
    )  # fmt: skip


def vgg9(width, side, p):
    """Six convolutions in pairs, each pair with half the side; three linear layers.

    Dropout after each pair and each hidden linear layer.
    """
    layers, last = [], 3
    for channels in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(last, channels, 3, padding=1)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            last = channels
        layers += [nn.MaxPool2d(2), nn.Dropout(p)]
    return nn.Sequential(
        *layers, nn.Flatten(),
        nn.Linear((side // 8) ** 2 * last, 8 * width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(8 * width, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions and what they are added to; dropout after the last ReLU."""

    def __init__(self, inputs, channels, stride, p):
        super().__init__()
        self.two = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.short = nn.Identity()
        if inputs != channels:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(p))

    def forward(self, x):
        return self.last(self.two(x) + self.short(x))


def resnet20(width, classes, p):
    """A convolution, three times three blocks, each three with half the side."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    last = width
    for stage in range(3):
        channels = width * 2**stage
        for k in range(3):
            layers.append(Block(last, channels, 2 if stage and not k else 1, p))
            last = channels
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)
    )


# %% The tasks
def task(exp, name, on):
    """The :class:`Task` of a network; ``on`` is 1 with dropout, else 0."""
    return {"fnn": _fnn, "vgg9": _vgg9, "resnet20": _resnet20}.get(name, _transformer)(
        exp.options.data_root, exp.pick, on
    )


def _fnn(root, pick, on):
    halves = mnist(root, pick(1024, None, None))
    net = fnn(0.2 * on, 0.5 * on)
    optimizer = torch.optim.Adam(net.parameters(), pick(5e-4, 1e-4, 1e-4))
    steps = pick(5, 30, 100) * (len(halves[0][1]) // BATCH["fnn"])
    return _of_images(halves, net, optimizer, steps, BATCH["fnn"])


def _vgg9(root, pick, on):
    halves, side = cifar(root, 10, pick(512, 2048, 2048)), pick(16, 16, 32)
    net = vgg9(pick(8, 16, 64), side, 0.2 * on)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True)
    each, epochs = len(halves[0][1]) // BATCH["vgg9"], pick(5, 60, 300)
    drops = [int(epochs * s) * each for s in (1 / 2, 3 / 4, 11 / 12)]
    return _of_images(
        _smaller(halves, side), net, optimizer, epochs * each, BATCH["vgg9"], drops
    )


def _resnet20(root, pick, on):
    classes, side = pick(5, 20, 100), pick(8, 8, 32)
    halves = [(x[y < classes], y[y < classes]) for x, y in cifar(root, 100)]
    net, momentum = resnet20(16, classes, 0.2 * on), pick(0.9, 0.9, 0.0)
    optimizer = torch.optim.SGD(
        net.parameters(), pick(0.05, 0.05, 0.01), momentum, nesterov=momentum > 0
    )
    batch, steps = pick(64, 64, None), pick(30, 2400, 3000)
    drops = [steps * 3 // 4] if batch else []
    return _of_images(_smaller(halves, side), net, optimizer, steps, batch, drops)


def _of_images(halves, net, optimizer, steps, batch, drops=()):
    count = len(halves[0][1])

    def rows():
        return torch.randint(count, (batch,)) if batch else torch.arange(count)

    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    loss = nn.CrossEntropyLoss()
    return Task(*halves, net, loss, optimizer, schedule, steps, rows)


def _smaller(halves, side):
    """Images of ``side`` pixels, each the mean of some."""
    pool = nn.AdaptiveAvgPool2d(side)
    return [(pool(x), y) for x, y in halves]


def _transformer(root, pick, on):
    train, test, vocabularies = multi30k(root, pick(256, 2048, 2048))
    net = Transformer(vocabularies, SIZES, 0.1 * on)
    optimizer = torch.optim.Adam(net.parameters(), 1.0, betas=(0.9, 0.98), eps=1e-9)
    warm_up = pick(100, 4000, 4000)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmed(step, SIZES[0], warm_up)
    )
    return Task(
        train, test, net, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer, schedule,
        pick(40, 3000, 20000), lambda: of_one_length(train[0], BATCH["transformer"]),
        trim,
    )  # fmt: skip
