"""Fig. 7c: with dropout the kernels of a ResNet-18 have fewer directions.

Question: what share of the 3 x 3 kernels of a convolution, each pair of channels by
itself, is needed so that each kernel has a cosine above 0.95 with one of them: the
effective ratio? It is said to fall more with dropout than without it. conv2-1 and
conv3-1 are the first convolutions of the second and third stage: 64 x 128 = 8192 and
128 x 256 = 32768 kernels.

Setting: ResNet-18 with the usual stem for CIFAR-10 (one 3 x 3 convolution), dropout
after the last activation of each block, keep_prob 0.5, Adam 1e-3, cross-entropy, no
augmentation.

Reduced: the network keeps its width, for the ratio of random kernels is set by their
number (512 and 2048 have one of 1.00 and 0.98); images of 8 x 8 (means of 4 x 4
pixels), the first 2000, 16 epochs with batches of 32 instead of 200 of all images with
128: 1008 steps, an eightieth of the paper's. --paper takes whole images, all under
--data-root, batches and epochs.

Not reproduced: the ends. After 1008 steps the ratios have not left those of the start:
that of conv2-1 is 0.947 to 0.950 at the start, 0.947 to 0.949 at the end without
dropout and 0.944 to 0.949 with it. By then the network with dropout has hardly begun to
fit: it finds 14 % of its training images, that without 97 %. (Batch normalization
misleads there, but not by much: with its statistics taken anew without dropout it is
24 %, and 21 % with masks, one seed.)

The start needs no training. Its numbers tell two choices that the text leaves open:
weights are normal (those of torch's default, uniform, give 0.90 and 0.68), and the
cover is taken in the order of the kernels: the first one not covered yet is taken,
again and again. The library's cover is greedy and smaller; the curves are its.

    python tutorials/paper/fig07c_kernels_of_resnet.py --data-root DIR
    python tutorials/paper/fig07c_kernels_of_resnet.py --data-root DIR --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Definition 3, Fig. 7c.)

Picture: one line a seed; dotted are the ends that the paper reports.
"""

# %% What is run
from collections import OrderedDict

import torch
from claims import Claim
from data import accuracy, cifar
from experiment import COLOURS, Experiment
from torch import nn
from torchvision.models.resnet import BasicBlock

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

ARMS = {"without": "without dropout", "dropout": "with dropout"}
# The layer's name here; the paper's ratios: start, end without dropout, end with it.
LAYERS = {
    "conv2-1": ("block2_1.conv1", 0.955, 0.851, 0.682),
    "conv3-1": ("block3_1.conv1", 0.832, 0.755, 0.673),
}
THRESHOLD = 0.95
# Ratios of random kernels differ by half a percent: what is nearer to 1 says nothing.
NOISE = 0.99
MEASURES = ("gradient", "regularizer", "masks")


# %% The network
def resnet18(width, p):
    """Four stages of two blocks; channels double and sides halve from one to the next.

    Convolutions are normal with variance 2 / (outputs x 9), as torchvision's.
    """
    layers = OrderedDict(
        conv1=nn.Conv2d(3, width, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
    )
    last = width
    for stage in range(4):
        for place in range(2):
            channels, stride = width * 2**stage, 2 if stage and not place else 1
            short = None
            if last != channels:
                short = nn.Conv2d(last, channels, 1, stride, bias=False)
                short = nn.Sequential(short, nn.BatchNorm2d(channels))
            name = f"{stage + 1}_{place + 1}"
            layers[f"block{name}"] = BasicBlock(last, channels, stride, short)
            layers[f"dropout{name}"] = nn.Dropout(p)
            last = channels
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["linear"] = nn.Linear(last, 10)
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


# %% The measure
def kernels(net, name):
    """The kernels of a layer, ``[outputs * inputs, 9]``."""
    module = net.get_submodule(LAYERS[name][0])
    return tdi.condensation.input_weights(module, "kernel").detach()


class Kernels:
    """Effective ratios of the kernels of both layers, for the analysis."""

    name = "kernels"
    needs = frozenset()

    def __call__(self, snapshot):
        """One record a layer."""
        effective = tdi.condensation.effective_neurons
        return {
            f"condensation/effective_ratio/{name}": effective(
                kernels(snapshot.model, name), THRESHOLD
            ).ratio
            for name in LAYERS
        }


def in_order(rows, threshold=THRESHOLD):
    """Share of directions in the cover that takes each row not yet covered, in turn."""
    rows = nn.functional.normalize(rows, dim=1)
    left, count = torch.ones(len(rows), dtype=torch.bool), 0
    for k, row in enumerate(rows):
        if left[k]:
            left[k:] &= rows[k:] @ row <= threshold
            count += 1
    return count / len(rows)


def start():
    """Ratios of the paper's network before training, by either cover."""
    net = resnet18(64, 0.5)
    effective = tdi.condensation.effective_neurons
    return {
        "greedy": {k: effective(kernels(net, k), THRESHOLD).ratio for k in LAYERS},
        "in_order": {k: in_order(kernels(net, k)) for k in LAYERS},
    }


# %% Training
def rows_of(step, count, batch, seed):
    """The images of a step: each epoch in an order of its own, found again at will."""
    epoch, place = divmod(step, -(-count // batch))
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(count, generator=generator)[place * batch :][:batch]


def compute(exp, arm, seed):
    """One network: its curves of the effective ratio, and its accuracies."""
    if arm == "start":
        return start()
    pick = exp.pick
    pool = nn.AdaptiveAvgPool2d(pick(8, 8, 32))
    count = pick(256, 2000, None)
    (x, y), test = [(pool(x), y) for x, y in cifar(exp.options.data_root, 10, count)]
    net = resnet18(pick(32, 64, 64), 0.5 * (arm == "dropout"))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    batch, epochs = pick(32, 32, 128), pick(6, 16, 200)
    each = -(-len(x) // batch)
    analysis = tdi.attach_analysis(
        net, "cross_entropy", optimizer=adam, log_dir=exp.log_dir(arm, seed),
        every=each * pick(2, 2, 5),
        measures=[Kernels(), *(m for m in default_measures() if m.name in MEASURES)],
    )  # fmt: skip
    with analysis:
        for step in exp.steps(arm, seed, each * epochs, [net, adam, analysis]):
            chosen = rows_of(step, len(x), batch, seed)
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
            adam.step()
        analysis.measure()
    curves = {k: analysis.history[f"condensation/effective_ratio/{k}"] for k in LAYERS}
    return {
        "epochs": [at / each for at, _ in curves["conv2-1"]],
        **{name: [ratio for _, ratio in curve] for name, curve in curves.items()},
        "accuracy": accuracy(net, *test),
        "train_accuracy": accuracy(net, x, y),
    }


# %% The picture
def draw(exp, found):
    """Effective ratio against epochs, a panel a layer, a line a seed; the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    for panel, name in zip(figure.subplots(1, 2, sharey=True), LAYERS, strict=True):
        for arm, label in ARMS.items():
            for k, one in enumerate(found[arm]):
                panel.plot(one["epochs"], one[name], color=COLOURS[arm], lw=1.5,
                           label=None if k else label)  # fmt: skip
            end = LAYERS[name][2 + (arm == "dropout")]
            panel.axhline(end, color=COLOURS[arm], lw=1, ls=":",
                          label=f"the paper's end, {label}")  # fmt: skip
        panel.set(title=name, xlabel="epoch")
    figure.axes[0].set_ylabel("effective ratio of the kernels")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, ncol=2, loc="outside upper center")
    figure.savefig(exp.picture)


# %% All of it
def claims_of(name, found):
    """The start and the end of one layer."""
    _, first, without, with_it = LAYERS[name]
    ends = {arm: [one[name][-1] for one in found[arm]] for arm in ARMS}
    starts = [one[name][0] for one in found["dropout"]]
    return [
        Claim(f"{name}, at the start of the full width: effective ratio of the cover "
              "taken in order, within 0.01", f"{first}",
              [one["in_order"][name] for one in found["start"]],
              lambda v: abs(v - first) < 0.01, lambda v: abs(v - first) < 0.05),
        Claim(f"{name}, and of the library's greedy cover: below it by at most 0.05",
              f"{first}", [one["greedy"][name] for one in found["start"]],
              lambda v: 0 <= first - v < 0.05, lambda v: abs(v - first) < 0.1),
        Claim(f"{name}: effective ratio at the end, with dropout over without: below "
              "0.95", f"{with_it} / {without}",
              [a / b for a, b in zip(ends["dropout"], ends["without"], strict=True)],
              lambda v: v < 0.95, lambda v: v < NOISE),
        Claim(f"{name}: effective ratio with dropout, the end over the start: below "
              "0.95", f"{with_it} / {first}",
              [a / b for a, b in zip(ends["dropout"], starts, strict=True)],
              lambda v: v < 0.95, lambda v: v < NOISE),
    ]  # fmt: skip


def main(arguments=None):
    """Compute, decide and draw."""
    exp = Experiment(__doc__, "fig07c", arguments=arguments)
    found = exp.cells(["start", *ARMS], lambda arm, seed: compute(exp, arm, seed))
    draw(exp, found)
    claims = [claim for name in LAYERS for claim in claims_of(name, found)]
    exp.finish(claims, found, exp.picture)


if __name__ == "__main__":
    main()
