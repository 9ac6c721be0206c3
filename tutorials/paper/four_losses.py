"""One network on MNIST trained on the four modified losses, for Figs. 13 and 14."""

import torch
from data import accuracy, mnist
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import regularizers, sharpness
from torch_dropout_ir.analysis.measures import default_measures

KINDS = ("L1", "L2", "L3", "L4")
COLOURS = {"L1": "#b2182b", "L3": "#ef8a62", "L2": "#1b7837", "L4": "#7fbf7b"}
# Torch's mean over samples and outputs: what the numbers of Fig. 2 point to.
LOSS = "mse"


def images(root, samples, components):
    """``(x, one-hot y), (test_x, test_y)`` of the first MNIST images.

    x are the leading whitened principal components of the images; the pixels themselves
    where ``components`` is None.
    """
    (x, labels), (test_x, test_y) = mnist(root, samples)
    if components is not None:
        mean = x.mean(0)
        _, sizes, axes = torch.linalg.svd((x - mean).double(), full_matrices=False)
        to = (axes[:components].T / sizes[:components] * samples**0.5).float()
        x, test_x = (x - mean) @ to, (test_x - mean) @ to
    return (x, nn.functional.one_hot(labels, 10).float()), (test_x, test_y)


def network(inputs, width, std, p):
    """The paper's layers; every parameter of one standard deviation."""
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 10)
    )
    for one in net.parameters():
        nn.init.normal_(one, std=std)
    return net


def train(exp, arm, seed, kind, size, *, keep_prob, lr, steps):
    """Full-batch gradient descent on one of the losses; the network and its numbers.

    Args:
        exp: The :class:`experiment.Experiment`.
        arm: Name of the cell.
        seed: Its seed.
        kind: One of :data:`KINDS`, or ``"R_drop"``.
        size: ``samples``, ``components``, ``width`` and ``std``.
        keep_prob: The paper's p.
        lr: Learning rate, and the coefficient of R_2.
        steps: Their number.
    """
    batch, test = images(exp.options.data_root, size["samples"], size["components"])
    net = network(batch[0].shape[1], size["width"], size["std"], 1 - keep_prob)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    analysis = tdi.attach_analysis(
        net, LOSS, optimizer=optimizer, data=batch,
        log_dir=exp.log_dir(arm, seed), every=steps // 2,
        measures=[m for m in default_measures() if m.name != "sharpness"],
    )  # fmt: skip
    with analysis:
        for _ in exp.steps(arm, seed, steps, [net, optimizer, analysis]):
            optimizer.zero_grad()
            if kind in KINDS:
                loss = regularizers.modified_loss(net, batch, LOSS, kind=kind, lr=lr)
            else:
                loss = nn.functional.mse_loss(net(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
    op = sharpness.hessian(net, LOSS, batch)
    with torch.no_grad():
        h = net[:2](batch[0])
        risk = nn.functional.mse_loss(net[3](h), batch[1])
        r1 = regularizers.last_layer(h, net[3].weight, 1 - keep_prob, loss=LOSS)
    return {
        "net": {n: x.detach() for n, x in net.state_dict().items()},
        "accuracy": accuracy(net, *test),
        "R_S": float(risk),
        "R_1": float(r1),
        "trace": float(sharpness.trace(op).value),
    }
