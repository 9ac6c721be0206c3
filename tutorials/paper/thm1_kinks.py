"""Theorem 1: at zero loss, two kinks of one sign in one interval can lower R_1.

Question: f(x) = sum_j a_j relu(w_j x + b_j) + c x + d fits its data. Where two neurons
bend it the same way at different places between two neighbouring samples, is there a
perturbation that leaves the loss at zero and lowers R_1? So says Theorem 1: among the
interpolants R_1 prefers those with one bend an interval.

First part, the theorem: random networks and data, labels their own outputs; every pair
of neurons of the theorem is perturbed explicitly. With s = a|w| and kink k, neuron 1
loses and neuron 2 gains t v in (s, s k), the linear term takes up the difference where
they face opposite ways; v is the slope of R_1 along that, t is halved until kinks and
signs stay where they are.

Second part, what training makes of it: one network of 100 neurons on 8 points, without
dropout, with dropout and with R_1 in the loss (keep_prob 0.9): the spread of kinks of
one sign within each interval between samples, weighted by |s|, over the length of the
interval; 0.29 for kinks spread evenly. The paper has no experiment of it; nothing is
reduced.

Not reproduced: nothing of the theorem, which does not say what training makes of it,
and little it does: dropout leaves R_S at 6e-3, not zero, and where the loss is not zero
the neurons need not move within their interval for R_1 to fall, they can shrink, which
they do.

    python tutorials/paper/thm1_kinks.py
    python tutorials/paper/thm1_kinks.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Theorem 1.)

Picture: left, all pairs of all seeds. Middle and right, the first seed: outputs with
the data (points), and places where the output bends, with the samples as lines.
"""

# %% What is run
import copy
from itertools import combinations

import torch
from claims import Claim
from experiment import COLOURS, Experiment
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import regularizers
from torch_dropout_ir.analysis.measures import default_measures

exp = Experiment(__doc__, "thm1")
P = 0.1  # probability of dropping: keep_prob 0.9
NETWORKS = exp.pick(50, 300, 300)
WIDTH = exp.pick(50, 100, 100)
STEPS = exp.pick(6000, 20000, 100_000)
ARMS = {"R_S": "without", "R_drop": "dropout", "R_S + R_1": "R1"}


class Net(nn.Module):
    """Two-layer ReLU network of one input, and a linear term that is never dropped."""

    def __init__(self, width):
        super().__init__()
        self.hidden, self.drop = nn.Linear(1, width), nn.Dropout(P)
        self.last = nn.Linear(width, 1, bias=False)
        self.line = nn.Linear(1, 1)

    def forward(self, x):
        """Outputs ``[n, 1]``."""
        return self.last(self.drop(torch.relu(self.hidden(x)))) + self.line(x)

    def kinks(self):
        """Where each neuron bends, and its change of slope ``a |w|``."""
        w, b, a = self.hidden.weight[:, 0], self.hidden.bias, self.last.weight[0]
        return (-b / w).detach(), (a * w.abs()).detach()


def r1(net, x):
    """R_1, by the library's closed form."""
    h = torch.relu(net.hidden(x))
    return regularizers.last_layer(h, net.last.weight, P, loss=tdi.half_squared_error)


# %% The perturbation
def pairs(net, x):
    """Pairs of neurons of one sign with kinks between the same two samples."""
    kinks, s = net.kinks()
    place = torch.bucketize(kinks, x[:, 0])
    inside = [j for j in range(len(s)) if 0 < place[j] < len(x)]
    return [
        (i, j)
        for i, j in combinations(inside, 2)
        if place[i] == place[j] and s[i] * s[j] > 0 and kinks[i] != kinks[j]
    ]


@torch.no_grad()
def perturbed(net, x, pair):
    """The network with the two kinks moved; None if no step is small enough."""
    kinks, s = net.kinks()
    one = torch.stack((x[:, 0], -torch.ones(len(x), dtype=x.dtype)), 1)
    place = torch.bucketize(kinks[pair[0]], x[:, 0])
    low, high = x[place - 1, 0], x[place, 0]
    values = [torch.stack((s[j], s[j] * kinks[j])) for j in pair]
    faces = [net.hidden.weight[j, 0].sign() for j in pair]
    slopes = []
    for value, j, face in zip(values, pair, faces, strict=True):
        seen = one[(x[:, 0] - kinks[j]) * face > 0]
        slopes.append((seen @ value) @ seen)
    v = slopes[0] - slopes[1]
    for halving in range(60):
        t = 0.5**halving
        moved = [values[0] - t * v, values[1] + t * v]
        if all(
            m[0] * s[j] > 0 and low < m[1] / m[0] < high
            for m, j in zip(moved, pair, strict=True)
        ):
            new = copy.deepcopy(net)
            for (slope, offset), j in zip(moved, pair, strict=True):
                w = new.hidden.weight[j, 0]
                new.last.weight[0, j] = slope / w.abs()
                new.hidden.bias[j] = -w * offset / slope
            if faces[0] != faces[1]:
                new.line.weight += faces[0] * t * v[0]
                new.line.bias -= faces[0] * t * v[1]
            if r1(new, x) < r1(net, x):
                return new
    return None


def random_networks(seed):
    """For each pair: the fall of R_1, relative, and the largest change of outputs."""
    falls, changes = [], []
    for _ in range(NETWORKS):
        net = Net(int(torch.randint(4, 33, ()))).double()
        for p in net.parameters():
            nn.init.normal_(p)
        n = int(torch.randint(3, 13, ()))
        x = torch.randn(n, 1, dtype=torch.float64).sort(0).values
        net.eval()
        for pair in pairs(net, x):
            new = perturbed(net, x, pair)
            if new is None:
                falls.append(0.0)
            else:
                falls.append(float((1 - r1(new, x) / r1(net, x)).detach()))
                change = (new(x) - net(x)).abs().max() / net(x).abs().max()
                changes.append(float(change.detach()))
    return {"falls": falls, "changes": changes}


# %% Training
X = torch.linspace(-1, 1, 8)[:, None]
Y = torch.tensor([0.0, 0.9, 0.3, -0.6, -0.2, 0.8, 0.5, -0.4])[:, None]


def spread(net):
    """Spread of kinks of one sign within an interval, over its length."""
    kinks, s = net.kinks()
    place = torch.bucketize(kinks, X[:, 0])
    total, weight = 0.0, 0.0
    for k in range(1, len(X)):
        for sign in (-1, 1):
            chosen = (place == k) & (s * sign > 0)
            size = s[chosen].abs()
            if len(size):
                mean = (size * kinks[chosen]).sum() / size.sum()
                std = ((size * (kinks[chosen] - mean) ** 2).sum() / size.sum()).sqrt()
                total += float(std / (X[k, 0] - X[k - 1, 0]) * size.sum())
                weight += float(size.sum())
    return total / weight


def train(arm, seed):
    """One network; its kinks, spread and loss."""
    net = Net(WIDTH)
    for p in net.parameters():
        nn.init.normal_(p, std=WIDTH**-0.1)
    net.drop.p = 0.0 if arm == "R_S" else P
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    first = spread(net)
    analysis = tdi.attach_analysis(
        net, tdi.half_squared_error, optimizer=optimizer, data=(X, Y),
        log_dir=exp.log_dir(arm.replace(" ", ""), seed), every=STEPS // 2,
        measures=[m for m in default_measures() if m.name != "sharpness"],
    )  # fmt: skip
    with analysis:
        for step in exp.steps(arm, seed, STEPS, [net, optimizer, analysis]):
            # Over the last tenth the steps fall to nothing, or where they stop decides.
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 10 * (1 - step / STEPS))
            if arm == "R_S + R_1":
                net.eval()
                loss = tdi.half_squared_error(net(X), Y) + r1(net, X)
                net.train()
            else:
                loss = tdi.half_squared_error(net(X), Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    grid = torch.linspace(-1.1, 1.1, 441)[:, None]
    with torch.no_grad():
        kinks, s = net.kinks()
        return {"start": first, "spread": spread(net), "kinks": kinks, "s": s,
                "R_S": float(tdi.half_squared_error(net(X), Y)),
                "R_1": float(r1(net, X)), "output": net(grid)[:, 0]}  # fmt: skip


# %% The picture
def draw(randoms, found):
    """Falls of R_1; outputs and kinks after training, first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    falls = torch.tensor([f for one in randoms for f in one["falls"]])
    left.hist(falls.clamp(min=1e-8).log10(), 60, color="#b2182b")
    left.set(xlabel="log$_{10}$ of the relative fall of R$_1$", ylabel="pairs",
             title=f"{len(falls)} perturbed pairs, loss still zero")  # fmt: skip
    grid = torch.linspace(-1.1, 1.1, 441)
    for row, (arm, colour) in enumerate(ARMS.items()):
        one = found[arm][0]
        middle.plot(grid, one["output"], color=COLOURS[colour], lw=1.5, label=arm)
        size = one["s"].abs()
        right.scatter(one["kinks"], row + 0.3 * one["s"].sign(), color=COLOURS[colour],
                      s=60 * size / size.max(), alpha=0.6, lw=0)  # fmt: skip
    middle.plot(X[:, 0], Y[:, 0], "o", color="black", ms=5)
    middle.set(xlabel="x", title="outputs (seed 0)", xlim=(-1.1, 1.1))
    middle.legend(frameon=False, fontsize=8)
    for place in X[:, 0].tolist():
        right.axvline(place, color="#d9d9d9", lw=1, zorder=0)
    right.set(xlabel="kink; area: change of slope; up: convex", xlim=(-1.1, 1.1),
              title="kinks between samples (lines)", ylim=(-0.6, 2.6))  # fmt: skip
    right.set_yticks(range(len(ARMS)), ARMS)
    figure.savefig(exp.picture)


# %% All of it
def main():
    """Compute, decide and draw."""
    randoms = exp.cells(["random"], lambda _, seed: random_networks(seed))["random"]
    found = exp.cells(ARMS, train)
    lowered = [100 * sum(f > 0 for f in o["falls"]) / len(o["falls"]) for o in randoms]

    def over_without(arm):
        each = zip(found[arm], found["R_S"], strict=True)
        return [one["spread"] / without["spread"] for one, without in each]

    claims = [
        Claim("Theorem 1: the perturbation lowers R_1: share of all pairs of random "
              "networks, all of them", "100 %", lowered,
              lambda v: v == 100, lambda v: v > 90, " %"),
        Claim("and leaves the outputs on the data: largest relative change, below "
              "1e-10", "0", [max(one["changes"]) for one in randoms],
              lambda v: v < 1e-10, lambda v: v < 1e-6),
        *(Claim(f"beyond the theorem, trained with {arm}: spread of kinks of one sign "
                "within an interval over that without dropout, below 0.5", "no number",
                over_without(arm),
                lambda v: v < 0.5, lambda v: v < 1) for arm in ("R_drop", "R_S + R_1")),
    ]  # fmt: skip
    kept = ("start", "spread", "R_S", "R_1")
    numbers = {
        "pairs": [len(one["falls"]) for one in randoms],
        **{arm: [{k: one[k] for k in kept} for one in found[arm]] for arm in ARMS},
    }
    draw(randoms, found)
    exp.finish(claims, numbers, exp.picture)


if __name__ == "__main__":
    main()
