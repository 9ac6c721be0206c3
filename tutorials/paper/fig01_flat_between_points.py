"""Fig. 1: with dropout the fit is flat between the points, and so is the minimum.

A two-layer ReLU network of 1000 neurons fits relu(-x - 1/3) / 2 + relu(x - 1/3) / 2 on
6 points with Adam, without dropout and with it (keep_prob 0.9), from one start. Between
the points the target is the straight line; how far the network is from it is measured
there. Flatness is the width of the loss along filter-normalized directions below a
level, the mean over ten, one filter a layer.

The setting is the paper's (learning rate 1e-3, falling to nothing over the last tenth
here); the number of steps, which the paper does not state, is 100 000.

    python tutorials/paper/fig01_flat_between_points.py
    python tutorials/paper/fig01_flat_between_points.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 1 and Appendix A.)

Picture: the outputs of the first seed's networks (points: the data; dashed: straight
lines between them), and R_S along ten random directions d, scaled to the norms of the
layers: lines are means, shades the extremes, dotted the level 0.1 at which the width is
taken.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from two_layer import TwoLayer, normal, train

import torch_dropout_ir as tdi
from torch_dropout_ir import sharpness

ARMS = ("without", "dropout")
NAMES = ("without dropout", "with dropout")
P = 0.1
X = torch.linspace(-5 / 3, 5 / 3, 6)[:, None]
LINE = torch.linspace(-5 / 3, 5 / 3, 501)[:, None]
ALPHAS = torch.linspace(-1, 1, 201)
LEVEL = 0.1  # of the loss, under which the slice's width is taken


def target(x):
    """What is learnt, ``[n]``."""
    return (torch.relu(-x - 1 / 3) / 2 + torch.relu(x - 1 / 3) / 2)[:, 0]


def networks(start):
    """Both arms from one start ``[3, 1, width]``."""
    return TwoLayer(start.repeat(1, 2, 1), "relu", dropped=[(slice(1, 2), P)])


# %% Numbers of one seed
def flatness(net):
    """Loss along ten directions ``[10, alphas]``, its mean width, the trace."""
    data = [(X, target(X)[:, None])]
    slices = []
    for seed in range(10):
        torch.manual_seed(seed)
        direction = sharpness.filter_normalized_direction(net, per="layer")
        slices.append(
            sharpness.loss_slice(net, tdi.half_squared_error, data, ALPHAS, direction)
        )
    slices = torch.stack(slices)
    below = (slices < LEVEL).float().mean(1) * float(ALPHAS[-1] - ALPHAS[0])
    op = sharpness.hessian(net, tdi.half_squared_error, data)
    return slices, float(below.mean()), float(sharpness.trace(op).value)


def measure(result):
    """Numbers of one seed, and what is drawn."""
    numbers, drawn = {}, {}
    for arm, net in zip(ARMS, TwoLayer(result["end"], "relu").networks, strict=True):
        net.eval()
        with torch.no_grad():
            output = net(LINE)[:, 0]
            risk = float(tdi.half_squared_error(net(X), target(X)[:, None]))
        slices, width, trace = flatness(net)
        drawn[arm] = output, slices
        numbers[arm] = {
            "R_S": risk,
            "farthest_from_line": float((output - target(LINE)).abs().max()),
            "length_above_line": float(
                output.diff().abs().sum() - target(LINE).diff().abs().sum()
            ),
            "slice_width": width,
            "trace": trace,
        }
    return numbers, drawn


# %% The picture
def draw(numbers, drawn, path):
    """Both fits, and the loss around both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=100, layout="constrained")
    *fits, right = figure.subplots(1, 3)
    fits[1].sharey(fits[0])
    for panel, arm, name in zip(fits, ARMS, NAMES, strict=True):
        output, slices = drawn[arm]
        panel.plot(LINE, target(LINE), "--", color=COLOURS["start"], label="target")
        panel.plot(LINE, output, color=COLOURS[arm], label="network")
        panel.plot(X, target(X), "o", color="black", ms=5)
        far = numbers[arm]["farthest_from_line"]
        panel.set(title=f"{name}:\nat most {far:.3f} from the line", xlabel="input")
        right.plot(ALPHAS, slices.mean(0), color=COLOURS[arm], label=name)
        right.fill_between(
            ALPHAS, slices.amin(0), slices.amax(0), color=COLOURS[arm], alpha=0.15, lw=0
        )
    fits[0].set(ylabel="output")
    fits[0].legend(frameon=False)
    right.axhline(LEVEL, color="black", lw=0.5, ls=":")
    right.set(
        xlabel=r"$\alpha$ (1: the norm of each layer's weights)",
        ylabel=r"$R_S(\theta + \alpha d)$ (units of the loss)",
        ylim=(0, 1),
    )
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path)


# %% All of it
def main(arguments=None):
    """Train, measure, draw and hold the claims against the numbers."""
    exp = Experiment(__doc__, "fig01", arguments=arguments)
    steps = exp.pick(40_000, 100_000, 100_000)

    def compute(arm, seed):
        start = normal(1000)
        data = X, target(X)
        nets = train(exp, arm, seed, networks(start), data, steps, arms=ARMS)
        return {"start": start, "end": nets.state}

    results = exp.cells(["all"], compute)["all"]
    numbers, drawn = zip(*map(measure, results), strict=True)
    draw(numbers[0], drawn[0], exp.picture)
    farther, wider = (
        [one[a][key] / one[b][key] for one in numbers]
        for key, a, b in (
            ("farthest_from_line", *ARMS),
            ("slice_width", *reversed(ARMS)),
        )
    )
    claims = [
        Claim(
            "largest distance of the output from the straight line between the points, "
            "without dropout over with it: above 3",
            "oscillates; flat",
            farther,
            lambda v: v > 3,
            lambda v: v > 1,
            "x",
        ),
        Claim(
            f"width of the loss slice below {LEVEL}, with dropout over without: above "
            "1.2",
            "flatter",
            wider,
            lambda v: v > 1.2,
            lambda v: v > 1,
            "x",
        ),
    ]
    exp.finish(claims, {"seeds": list(numbers)}, exp.picture)


if __name__ == "__main__":
    main()
