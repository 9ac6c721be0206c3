"""The models that ``regularizers.py`` times, and the calls it makes on them."""

import copy
import functools
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    monte_carlo,
    second_order,
)


def seconds(run) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict, turns: int) -> dict[str, float]:
    """Median wall time of each of several calls, taken in turns."""
    times = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(each) for name, each in times.items()}


def step(net, batch, loss):
    """A forward-backward pass, as a script would run it."""

    def run():
        net.zero_grad()
        loss(net(batch[0]), batch[1]).backward()

    return run


class Functions(nn.Module):
    """A user's own module, which calls functions of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        """Two hidden layers with dropout."""
        for layer in (self.one, self.two):
            x = F.dropout(F.relu(layer(x)), 0.5, self.training)
        return self.last(x)


class Encoder(nn.Module):
    """A transformer encoder layer, the mean over positions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.last = nn.Linear(32, 5)

    def forward(self, x):
        """Classify sequences ``[n, positions, 32]``."""
        return self.last(self.layer(x).mean(1))


def small_models() -> dict:
    """Networks whose pass takes less than some milliseconds, with their batches."""
    drop, relu = functools.partial(nn.Dropout, 0.5), nn.ReLU
    conv = nn.Sequential(
        nn.Conv2d(1, 8, 3), relu(), nn.MaxPool2d(2), nn.Dropout2d(0.2),
        nn.Conv2d(8, 16, 3), relu(), nn.MaxPool2d(2), nn.Flatten(), drop(),
        nn.Linear(400, 10),
    )  # fmt: skip
    toy = nn.Sequential(
        nn.Linear(20, 64), relu(), drop(), nn.Linear(64, 64), relu(), drop(),
        nn.Linear(64, 3),
    )  # fmt: skip
    wide = nn.Sequential(nn.Linear(20, 200), relu(), drop(), nn.Linear(200, 10))
    digits = nn.Sequential(nn.Linear(784, 128), relu(), drop(), nn.Linear(128, 10))
    normed = nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), relu(), drop(), nn.Linear(64, 64),
        nn.BatchNorm1d(64), relu(), drop(), nn.Linear(64, 3),
    )  # fmt: skip
    return {
        "20-64-64-3, batch 32": (toy, torch.randn(32, 20), torch.randint(3, (32,))),
        "20-200-10, batch 32": (wide, torch.randn(32, 20), torch.randint(10, (32,))),
        "20-64-64-3, batch norm, batch 32": (
            normed, torch.randn(32, 20), torch.randint(3, (32,))
        ),
        "20-64-64-3, functions, batch 32": (
            Functions(), torch.randn(32, 20), torch.randint(3, (32,))
        ),
        "encoder layer, 8 x 32, batch 16": (
            Encoder(), torch.randn(16, 8, 32), torch.randint(5, (16,))
        ),
        "784-128-10, batch 64": (
            digits, torch.randn(64, 784), torch.randint(10, (64,))
        ),
        "convolutional, 28 x 28, batch 64": (
            conv, torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
        ),
    }  # fmt: skip


def models() -> dict:
    """Models of practice with their batches."""
    mlp = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, 1024),
        nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip
    conv = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Dropout2d(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(4096, 10),
    )  # fmt: skip
    both = (("784-1024-1024-10", mlp), ("convolutional", conv))
    at_the_input = {
        f"{name}, a site at the input": nn.Sequential(
            nn.Dropout(0.1), *copy.deepcopy(net)
        )
        for name, net in both
    }
    apart = [m for m in copy.deepcopy(conv) if not isinstance(m, nn.BatchNorm2d)]
    at_the_input["convolutional, no batch norm, a site at the input"] = nn.Sequential(
        nn.Dropout(0.1), *apart
    )
    images = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    rows = torch.randn(128, 784), torch.randint(10, (128,))
    nets = {**dict(both), **at_the_input}
    return {
        name: (net, *(images if name.startswith("conv") else rows))
        for name, net in nets.items()
    }


def passes(net, x, y) -> dict:
    """What is timed against a forward-backward pass."""
    batch, loss = (x, y), "cross_entropy"
    objective = functools.partial(modified_loss, net, batch, loss, lr=0.1)

    def closed(form):
        with torch.no_grad():
            h = net[:-2](x)
            f = net[-1](h)
            return form(h, net[-1].weight, 0.5, loss=loss, outputs=f, targets=y)

    def objective_of(kind, **options):
        net.zero_grad()
        objective(kind=kind, **options).backward()

    return {
        "forward-backward": step(net, batch, F.cross_entropy),
        "last_layer": lambda: closed(last_layer),
        "leave_one_out": lambda: closed(leave_one_out),
        "gauss_newton, 1": lambda: gauss_newton(net, batch, loss),
        "second_order, 1": lambda: second_order(net, batch, loss),
        "monte_carlo, 8": lambda: monte_carlo(net, batch, loss, num_masks=8),
        "gradient_norm, 2": lambda: gradient_norm(net, batch, loss, lr=0.1),
        "L1, gauss_newton": lambda: objective_of("L1", r1="gauss_newton"),
        "L1, monte_carlo": lambda: objective_of("L1", r1="monte_carlo"),
        "L2": lambda: objective_of("L2"),
        "L3": lambda: objective_of("L3"),
        "regu": lambda: objective_of("regu"),
        "regu, graph of all": lambda: objective_of("regu", max_bytes=2**40),
        "regu, torch's graph": lambda: objective_of("regu", max_bytes=None),
    }
