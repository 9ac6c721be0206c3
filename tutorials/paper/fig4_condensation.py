"""Dropout condenses neurons: the paper's Fig. 4, run to its end.

Three copies of one two-layer tanh network of 1000 neurons, from one start, fit
tanh(x - 6) + tanh(x + 6) on 15 points with Adam: without dropout, with dropout
(p = 0.1), and without dropout but with R_1, what dropout adds to the loss on average,
added to it. The neurons' orientations go to the two directions of the target and their
opposites in the second and third and stay in the first; the condensed networks are then
merged into ones of a few neurons.

    python tutorials/paper/fig4_condensation.py --png condensation.png
    python tutorials/paper/fig4_condensation.py --steps 20000 --seed 3

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 4 and Appendix A.)
"""

# %% What is run
import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation

RUNS = ("without dropout", "with dropout", "with R_1 in the loss")
P = 0.1
X = torch.linspace(-12, 12, 15)[:, None]
Y = (torch.tanh(X - 6) + torch.tanh(X + 6))[:, 0]
# (w, b) of the target's neurons, and their opposites: the angles +-1.4056, +-1.7360.
TEACHER = torch.tensor([[1.0, -6.0], [1.0, 6.0], [-1.0, -6.0], [-1.0, 6.0]])


# %% The three networks as one tensor [run, (w, b, a), neuron], and their gradient
def gradient(state, noise):
    """Gradient of R_S, R_drop and R_S + R_1, for the three runs; written out by hand.

    ``noise`` is what dropout multiplies each neuron by, for each sample. Autograd gives
    the same (the tests compare) in three times the time.
    """
    n = len(X)
    rows = torch.cat((X, torch.ones_like(X)), 1)
    a = state[:, 2, None]
    h = torch.tanh(rows @ state[:, :2])
    read = h.clone()
    read[1] *= noise
    residual = ((read * a).sum(2) - Y) / n
    back = residual[:, :, None] * a
    back[1] *= noise
    found = torch.empty_like(state)
    found[:, 2] = (residual[:, None] @ read)[:, 0]
    # R_1 = p / (2 (1 - p) n) sum h^2 a^2
    share = P / (1 - P) / n
    back[2] += share * h[2] * a[2].square()
    found[2, 2] += share * h[2].square().sum(0) * a[2, 0]
    found[:, :2] = rows.T @ torch.addcmul(back, back * h, h, value=-1)
    return found


def train(steps, width, seed):
    """Train the three at once; returns their start and their end."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    start = torch.randn(3, width) * width**-0.1  # variance width^-0.2
    state = start.repeat(3, 1, 1)
    optimizer = torch.optim.Adam([state], lr=1e-3, fused=True)
    ones = torch.ones(len(X), width)
    for step in tqdm(range(steps), unit="step", mininterval=0.5):
        # Adam oscillates to the end; over the last tenth its steps fall to nothing, or
        # the step at which one stops would decide the loss.
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 10 * (1 - step / steps))
        state.grad = gradient(state, tdi.dropout(ones, P))
        optimizer.step()
    return start, state


# %% Orientations and amplitudes
def network(state):
    """The network of one run as a torch module."""
    w, b, a = state
    net = nn.Sequential(nn.Linear(1, len(w)), nn.Tanh(), nn.Linear(len(w), 1))
    with torch.no_grad():
        net[0].weight.copy_(w[:, None])
        net[0].bias.copy_(b)
        net[2].weight.copy_(a[None])
        net[2].bias.zero_()
    return net


@torch.no_grad()
def risk(net):
    """R_S, the paper's: half the mean squared error."""
    return float((net(X)[:, 0] - Y).square().mean() / 2)


@torch.no_grad()
def amplitude(net):
    """Amplitudes over the largest."""
    size = condensation.amplitudes(condensation.input_weights(net[0]), net[2].weight)
    return size / size.max()


def near_teacher(net):
    """Of the neurons above a tenth of the largest amplitude: within 0.1 rad; all."""
    large = amplitude(net) > 0.1
    weights = condensation.input_weights(net[0]).detach()[large]
    cosines, _ = condensation.closest(weights, TEACHER)
    return int((cosines > math.cos(0.1)).sum()), int(large.sum())


# %% The network that a condensed one is
def merge(net):
    """A merged network whose R_S is at most a tenth higher.

    Of those with at most a dozen neurons the one nearest to the function between the
    points; if there is none, the smallest.
    """
    found = [
        condensation.merge_condensed(net, X, 1 - apart, min_amplitude=share)
        for share in (0.01, 0.05, 0.1, 0.2)
        for apart in (5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 2e-5, 1e-5, 0)
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


# %% The picture
def draw(start, nets, merged, path):
    """Orientation against amplitude, at the start, at the end and merged; the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, len(RUNS), sharey="row")
    first = network(start)
    line = torch.linspace(-14, 14, 400)[:, None]
    for panel, below, net, small, name in zip(
        top, bottom, nets, merged, RUNS, strict=True
    ):
        for angle in condensation.orientation_angles(TEACHER).tolist():
            panel.axvline(angle, color="#f4a582", lw=1.2, zorder=0)
        for shown, colour, size, label in (
            (first, "#bdbdbd", 4, "start"),
            (net, "#2166ac", 8, "end"),
        ):
            weights = condensation.input_weights(shown[0]).detach()
            angles = condensation.orientation_angles(weights)
            panel.scatter(angles, amplitude(shown), s=size, color=colour, label=label)
        near, large = near_teacher(net)
        panel.set_title(f"{name}\n{near} of {large} near the target's directions")
        panel.set(xlabel="orientation (rad)", xlim=(-math.pi, math.pi))
        with torch.no_grad():
            below.plot(line, net(line), color="#2166ac", label=f"{len(net[0].weight)}")
            count = len(small.model[0].weight)
            below.plot(line, small.model(line), "--", color="#b2182b", label=f"{count}")
        below.plot(X, Y, "o", color="black", ms=4)
        below.legend(frameon=False, title="neurons")
        below.set(xlabel="input", ylim=(-8.5, 8.5))
    top[0].set_ylabel("amplitude / largest")
    bottom[0].set_ylabel("output")
    top[0].legend(loc="upper left", framealpha=1)
    figure.savefig(path)


# %% All of it
def main():
    """Train, measure, merge and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--width", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, default=Path("condensation.png"))
    chosen = parser.parse_args()
    if chosen.steps < 1 or chosen.width < 2:
        parser.error("expected --steps of at least 1 and --width of at least 2")
    torch.set_num_threads(1)  # waiting for a second costs more than it brings here
    began = time.perf_counter()
    start, state = train(chosen.steps, chosen.width, chosen.seed)
    print(
        f"{chosen.steps} steps of three networks: {time.perf_counter() - began:.0f} s"
    )
    nets = [network(one) for one in state]
    merged = [merge(net) for net in nets]
    print(f"{'':22}{'near':>6}{'large':>7}{'share':>7}{'neurons':>9}{'merged':>8}"
          f"{'R_S':>11}{'merged R_S':>12}{'change between points':>23}")  # fmt: skip
    for name, net, small in zip(RUNS, nets, merged, strict=True):
        near, large = near_teacher(net)
        change = change_between(net, small.model)
        print(f"{name:22}{near:>6}{large:>7}{near / large:>7.2f}{chosen.width:>9}"
              f"{len(small.model[0].weight):>8}{risk(net):>11.2e}"
              f"{risk(small.model):>12.2e}{change:>23.1e}")  # fmt: skip
    draw(start, nets, merged, chosen.png)
    print(f"picture: {chosen.png}")


if __name__ == "__main__":
    sys.exit(main())
