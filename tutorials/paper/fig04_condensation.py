"""Fig. 4: dropout condenses neurons, without it they stay where they started.

Three two-layer tanh networks of 1000 neurons, from one start, fit
tanh(x - 6) + tanh(x + 6) on 15 points with Adam for 100 000 steps: without dropout,
with dropout (keep_prob 0.9), and without dropout but with R_1, what dropout adds to the
loss on average, added to it. The orientations go to the two directions of the target
and their opposites in the second and third and stay in the first; the condensed
networks are then merged into ones of a few neurons.

The setting is the paper's; its learning rate is 1e-3 too, and falls to nothing over the
last tenth here. The network of three layers is in fig04b_three_layers.py.

    python tutorials/paper/fig04_condensation.py
    python tutorials/paper/fig04_condensation.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 4 and Appendix A.)

Picture: the first seed. Above, each point is a neuron; vertical lines are the target's
directions. Below, the outputs of the whole networks and of the merged ones; points are
the data.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from two_layer import TwoLayer, near, normal, show_orientations, train

from torch_dropout_ir import condensation

ARMS = ("without", "dropout", "R1")
NAMES = ("without dropout", "with dropout", "with R_1 in the loss")
P = 0.1
X = torch.linspace(-12, 12, 15)[:, None]
Y = (torch.tanh(X - 6) + torch.tanh(X + 6))[:, 0]
# (w, b) of the target's neurons, and their opposites: the angles +-1.4056, +-1.7360.
TEACHER = torch.tensor([[1.0, -6.0], [1.0, 6.0], [-1.0, -6.0], [-1.0, 6.0]])


def networks(start):
    """The three arms from one start ``[3, 1, width]``."""
    return TwoLayer(
        start.repeat(1, len(ARMS), 1),
        dropped=[(slice(1, 2), P)],
        regularized=[(slice(2, 3), P)],
    )


# %% The network that a condensed one is
@torch.no_grad()
def risk(net):
    """R_S, the paper's: half the mean squared error."""
    return float((net(X)[:, 0] - Y).square().mean() / 2)


def merge(net):
    """A merged network whose R_S is at most a tenth higher.

    Of those with at most a dozen neurons the one nearest to the function between the
    points; if there is none, the smallest.
    """
    net = net.eval()
    found = [
        condensation.merge_condensed(net, X, 1 - apart, min_amplitude=share)
        for share in (0.01, 0.1)
        for apart in (*(5e-2 * 0.6**k for k in range(22)), 0)
    ]
    close = [small for small in found if risk(small.model) <= 1.1 * risk(net)]
    few = [small for small in close if len(small.model[0].weight) <= 12]
    if few:
        return min(few, key=lambda small: change_between(net, small.model))
    return min(close or found[-1:], key=lambda small: len(small.model[0].weight))


@torch.no_grad()
def change_between(net, small):
    """Relative change of the function on a grid: between the points too."""
    grid = torch.linspace(-12, 12, 481)[:, None]
    return float((small(grid) - net(grid)).norm() / net(grid).norm())


# %% Numbers of one seed
def measure(state):
    """``{arm: numbers}`` of the trained networks, and the merged ones."""
    nets = list(networks(state["start"]).networks)
    ends = TwoLayer(state["end"]).networks
    found, merged = {}, []
    for arm, net in zip(ARMS, ends, strict=True):
        close, large = near(net, TEACHER)
        small = merge(net)
        merged.append(small.model)
        found[arm] = {
            "near": close,
            "large": large,
            "share": close / large,
            "R_S": risk(net),
            "merged_neurons": len(small.model[0].weight),
            "merged_R_S_ratio": risk(small.model) / risk(net),
            "merged_change_between": change_between(net, small.model),
        }
    return found, (nets[0], ends, merged)


def fewest(numbers):
    """Neurons of the larger merged network; all where its R_S is too high."""
    both = [numbers[arm] for arm in ("dropout", "R1")]
    return max(
        one["merged_neurons"] if one["merged_R_S_ratio"] <= 1.1 else 1000
        for one in both
    )


# %% The picture
def draw(start, nets, merged, numbers, path):
    """Orientation against amplitude, at the start, at the end and merged; the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=92, layout="constrained")
    top, bottom = figure.subplots(2, len(ARMS), sharey="row")
    line = torch.linspace(-14, 14, 400)[:, None]
    for panel, below, net, small, arm, name in zip(
        top, bottom, nets, merged, ARMS, NAMES, strict=True
    ):
        show_orientations(panel, start, COLOURS["start"], TEACHER, "start", 4)
        show_orientations(panel, net, COLOURS[arm], TEACHER, "end")
        panel.set_title(
            f"{name}\n{numbers[arm]['near']} of {numbers[arm]['large']} near the "
            "target's directions"
        )
        with torch.no_grad():
            below.plot(line, net.eval()(line), color=COLOURS[arm], label="1000")
            count = len(small[0].weight)
            below.plot(line, small(line), "--", color="#fdae61", label=f"{count}")
        below.plot(X, Y, "o", color="black", ms=4)
        below.legend(frameon=False, title="neurons")
        below.set(xlabel="input", ylim=(-8.5, 8.5))
    top[0].set_ylabel("amplitude / largest")
    bottom[0].set_ylabel("output")
    top[0].legend(loc="upper left", framealpha=1)
    figure.savefig(path)


# %% All of it
def main(arguments=None):
    """Train, measure, merge, draw and hold the claims against the numbers."""
    exp = Experiment(__doc__, "fig04", arguments=arguments)
    steps = exp.pick(24_000, 100_000, 100_000)

    def compute(arm, seed):
        start = normal(1000)
        nets = train(exp, arm, seed, networks(start), (X, Y), steps, arms=ARMS)
        return {"start": start, "end": nets.state}

    states = exp.cells(["all"], compute)["all"]
    numbers, shown = zip(*map(measure, states), strict=True)
    draw(shown[0][0], shown[0][1], shown[0][2], numbers[0], exp.picture)
    shares = {arm: [one[arm]["share"] for one in numbers] for arm in ARMS}
    what = "of the neurons above a tenth of the largest amplitude, within 0.1 rad of "
    claims = [
        Claim(
            f"{name}: {what}the target's directions, above 0.9",
            paper,
            shares[arm],
            lambda v: v > 0.9,
            lambda v: v > 0.5,
        )
        for arm, name, paper in (
            ("dropout", "with dropout", "210 of 213"),
            ("R1", "with R_1", "condensed"),
        )
    ] + [
        Claim(
            f"without dropout: {what}them, below 0.2",
            "14 of 286",
            shares["without"],
            lambda v: v < 0.2,
            lambda v: v < 0.5,
        ),
        Claim(
            "neurons, with dropout or R_1, that a merged network with R_S at most 10 % "
            "above has, at most 12 (the larger of the two)",
            "no number",
            [fewest(one) for one in numbers],
            lambda v: v <= 12,
            lambda v: v <= 100,
        ),
    ]
    exp.finish(claims, {"seeds": list(numbers)}, exp.picture)


if __name__ == "__main__":
    main()
