"""Fig. 4, three layers: dropout condenses the first hidden layer of a deeper network.

A network of two hidden tanh layers fits the points of Fig. 4 with Adam, without dropout
and with it (keep_prob 0.9, behind both hidden layers), from one start. The orientations
of the first layer's neurons go to a few directions with dropout and stay spread out
without.

Where they have to go the next layer decides, so no direction is given: of the neurons
above a tenth of the largest amplitude those are counted that lie within 0.1 rad of one
of four directions, the four that hold the most. The numbers count those near the
target's four (lines in the picture) too: nearly the same ones.

Reduced: both layers 200 wide for 1000, and the learning rate 1e-3, falling to nothing
over the last half, for 100 000 steps (--paper: width 1000). The start is that of Fig. 4
for the first and last layer: normal, of variance width^-0.2. The text leaves the middle
one open, which would saturate at that variance: here it is 1 / width.

    python tutorials/paper/fig04b_three_layers.py
    python tutorials/paper/fig04b_three_layers.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 4 and Appendix A.)

Picture: the first seed; each point is a neuron of the first hidden layer, vertical
lines are the target's directions.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from fig04_condensation import TEACHER, P, X, Y, risk
from torch import nn
from two_layer import relative_amplitudes, show_orientations, train

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation

ARMS = ("without", "dropout")
NAMES = ("without dropout", "with dropout")
REACH, DIRECTIONS = 0.1, 4


def build(width, p):
    """An untrained network of two hidden layers."""
    net = nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Dropout(p),
        nn.Linear(width, width), nn.Tanh(), nn.Dropout(p),
        nn.Linear(width, 1, bias=False),
    )  # fmt: skip
    for name, parameter in net.named_parameters():
        inner = name.startswith("3")
        nn.init.normal_(parameter, std=width ** (-0.5 if inner else -0.1))
    return net


class ThreeLayer(nn.Module):
    """The networks without and with dropout from one start, gradients by hand.

    As :class:`two_layer.TwoLayer`: a parameter of both is one tensor, and each is a
    torch module whose parameters are views. A step costs a third of what it costs by
    autograd.

    Args:
        width: Of both hidden layers.
        p: Probability of dropping of the second network.

    Attributes:
        networks: The torch modules.
    """

    def __init__(self, width, p):
        super().__init__()
        start = build(width, 0.0)
        self.p = p
        self.networks = nn.ModuleList([start, build(width, p)])
        self.tensors = {
            name: value.detach().repeat(2, *[1] * value.dim())
            for name, value in start.named_parameters()
        }  # [2, *shape]
        for name, both in self.tensors.items():
            both.grad = torch.zeros_like(both)
            module, key = name.split(".")
            for net, value, gradient in zip(
                self.networks, both, both.grad, strict=True
            ):
                parameter = nn.Parameter(value)
                parameter.grad = gradient
                setattr(net[int(module)], key, parameter)

    @torch.no_grad()
    def gradient(self, x, y):
        """Put the gradient of R_S and of R_drop at ``x [n, 1]``, ``y [n]`` there."""
        w, b, inner, shift, last = self.tensors.values()
        rows = x.expand(2, -1, -1)
        first, noise = self._hidden(torch.baddbmm(b[:, None], rows, w.mT))
        read = first * noise
        second, other = self._hidden(torch.baddbmm(shift[:, None], read, inner.mT))
        residual = ((second * other) @ last.mT - y[:, None]) * (1 / len(x))
        torch.bmm(residual.mT, second * other, out=last.grad)
        back = residual * last * other * (1 - second * second)
        torch.bmm(back.mT, read, out=inner.grad)
        torch.sum(back, 1, out=shift.grad)
        back = torch.bmm(back, inner) * noise * (1 - first * first)
        torch.bmm(back.mT, rows, out=w.grad)
        torch.sum(back, 1, out=b.grad)

    def _hidden(self, z):
        """tanh, which torch's sigmoid is faster at, and the factors of dropout."""
        noise = torch.ones_like(z)
        noise[1] = tdi.dropout(noise[1], self.p)
        return z.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0), noise


def compute(exp, arm, seed, width, steps):
    """Train both networks; their first and last parameters."""
    nets = ThreeLayer(width, P)
    start = {
        name: value.clone() for name, value in nets.networks[0].state_dict().items()
    }
    train(exp, arm, seed, nets, (X, Y), steps, arms=ARMS, settle=0.5)
    ends = {a: net.state_dict() for a, net in zip(ARMS, nets.networks, strict=True)}
    return {"start": start, **ends}


# %% Numbers of one network
def share_near_fullest(angles, count=DIRECTIONS, reach=REACH):
    """Share of ``angles [n]`` within ``reach`` of ``count`` of them, greedily."""
    apart = (angles[:, None] - angles).remainder(2 * torch.pi)
    near = torch.minimum(apart, 2 * torch.pi - apart) <= reach
    left = torch.ones(len(angles), dtype=torch.bool)
    for _ in range(count):
        fullest = int((near & left).sum(1).argmax())
        left &= ~near[fullest]
    return 1 - float(left.float().mean())


def parts(state):
    """The network, and its first layer as :mod:`two_layer` looks at one."""
    net = build(len(state["0.weight"]), P)
    net.load_state_dict(state)
    return net.eval(), [net[0], net[3]]


def measure(state):
    """Numbers of one trained network."""
    net, first = parts(state)
    weights = condensation.input_weights(net[0]).detach()
    large = relative_amplitudes(first) > 0.1
    angles = condensation.orientation_angles(weights[large])
    teacher = condensation.closest(weights[large], TEACHER)[0]
    return {
        "share": share_near_fullest(angles),
        "near_teacher": float((teacher > torch.cos(torch.tensor(0.1))).float().mean()),
        "large": int(large.sum()),
        "R_S": risk(net),
    }


# %% The picture
def draw(result, numbers, path):
    """Orientations of the first layer at the start and the end; the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    *scatters, right = figure.subplots(1, 3)
    line = torch.linspace(-14, 14, 400)[:, None]
    for panel, arm, name in zip(scatters, ARMS, NAMES, strict=True):
        for key, colour, label, size in (
            ("start", COLOURS["start"], "start", 5),
            (arm, COLOURS[arm], "end", 10),
        ):
            net, first = parts(result[key])
            show_orientations(panel, first, colour, TEACHER, label, size)
        share = 100 * numbers[arm]["share"]
        panel.set(title=f"{name}: {share:.0f} % near\n{DIRECTIONS} directions")
        with torch.no_grad():
            right.plot(line, net(line), color=COLOURS[arm], label=name)
    scatters[0].set_ylabel("amplitude / largest")
    right.plot(X, Y, "o", color="black", ms=4, label="samples")
    right.set(xlabel="input", title="output")
    scatters[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, fontsize=8)
    figure.savefig(path)


# %% All of it
def main(arguments=None):
    """Train, measure, draw and hold the claims against the numbers."""
    exp = Experiment(__doc__, "fig04b", arguments=arguments)
    width, steps = exp.pick((100, 10_000), (200, 100_000), (1000, 100_000))
    results = exp.cells(["all"], lambda a, s: compute(exp, a, s, width, steps))["all"]
    numbers = {arm: [measure(one[arm]) for one in results] for arm in ARMS}
    draw(results[0], {arm: numbers[arm][0] for arm in ARMS}, exp.picture)
    what = (
        f"of the first layer's neurons above a tenth of the largest amplitude, within "
        f"{REACH} rad of the {DIRECTIONS} fullest directions"
    )
    claims = [
        Claim(
            f"with dropout: {what}, above 0.9",
            "condensed",
            [one["share"] for one in numbers["dropout"]],
            lambda v: v > 0.9,
            lambda v: v > 0.7,
        ),
        Claim(
            f"without dropout: {what}, below 0.5",
            "not condensed",
            [one["share"] for one in numbers["without"]],
            lambda v: v < 0.5,
            lambda v: v < 0.7,
        ),
    ]
    exp.finish(claims, {"seeds": numbers}, exp.picture)


if __name__ == "__main__":
    main()
