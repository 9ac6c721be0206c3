"""Theorem 2: downhill in R_1 is towards flatter minima.

Question: at a minimum of zero loss, does the flatness tr H(R_S) fall along -grad R_1?
Theorem 2 says so of two-layer ReLU networks without biases, on any data.

First part, the theorem: 300 networks a seed of random width, number of inputs, of
samples and scale, with labels that are their own outputs, so that R_S = 0. There tr H
is mean ||grad f||^2; its derivative along -grad R_1 is taken by autograd, and held
against a central difference of the library's trace (exact for ReLU). The same for
networks with biases, with a second hidden layer and with tanh, which the theorem does
not cover.

Second part, its use: one network fits 20 points without dropout, to a loss below
1e-10; from that minimum it goes on with R_S, with R_drop and with R_S + R_1
(keep_prob 0.9), and tr H is followed. Nothing is reduced: the paper has no experiment
of it.

    python tutorials/paper/thm2_flatness.py
    python tutorials/paper/thm2_flatness.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Theorem 2.)

Picture: left, random networks of all seeds; right, one line a seed.
"""

# %% What is run
import copy
import math

import torch
from claims import Claim
from experiment import COLOURS, Experiment
from torch import nn
from torch.func import functional_call, grad, vmap
from two_layer import Track

import torch_dropout_ir as tdi
from torch_dropout_ir import regularizers, sharpness

exp = Experiment(__doc__, "thm2")
P = 0.1  # probability of dropping: keep_prob 0.9
KINDS = ("ReLU, no biases", "ReLU, biases", "ReLU, two hidden layers", "tanh")
NETWORKS = exp.pick(50, 300, 300)
STEPS = exp.pick(4000, 10000, 20000)
EVERY = STEPS // 40
ARMS = {"R_S": "without", "R_drop": "dropout", "R_S + R_1": "R1"}


# %% Flatness and R_1 of a network at zero loss, differentiable
def network(kind, inputs, width):
    """A network of one output, in float64."""
    act, bias = (nn.Tanh() if kind == "tanh" else nn.ReLU()), kind != KINDS[0]
    layers = [nn.Linear(inputs, width, bias=bias), act]
    if kind == KINDS[2]:
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1, bias=bias)).double()


def flatness(net, params, x):
    """tr H at zero loss: the mean over samples of ||grad f||^2."""

    def output(params, row):
        return functional_call(net, params, row[None])[0, 0]

    rows = vmap(grad(output), (None, 0))(params, x)
    return sum(g.square().sum() for g in rows.values()) / len(x)


def r1(net, params, x):
    """R_1 of dropout before the last layer, by the library's closed form."""
    last = len(net) - 1
    body = {n: p for n, p in params.items() if int(n.split(".")[0]) < last}
    features = functional_call(net[:-1], body, x)
    weight = params[f"{last}.weight"]
    return regularizers.last_layer(features, weight, P, loss=tdi.half_squared_error)


def derivative(net, x):
    """Derivative of tr H along -grad R_1 over both gradients' lengths; its check."""
    params = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
    up, steep = (
        torch.autograd.grad(
            measure(net, params, x), list(params.values()), materialize_grads=True
        )
        for measure in (r1, flatness)
    )
    along = -sum((u * s).sum() for u, s in zip(up, steep, strict=True))
    lengths = [sum(t.square().sum() for t in ts).sqrt() for ts in (up, steep)]
    slope = float(along / lengths[0] / lengths[1])
    # The same by the library's trace on either side, each on labels of its own.
    step, sides = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, u in zip(moved.parameters(), up, strict=True):
                p.sub_(sign * step * u / lengths[0])
            op = sharpness.hessian(moved, tdi.half_squared_error, (x, moved(x)))
            sides.append(float(sharpness.trace(op).value))
    difference = (sides[0] - sides[1]) / (2 * step) / float(lengths[1])
    return slope, abs(difference - slope)


def random_network(kind):
    """The derivative for one network, and how far the check is off; nan if R_1 is 0."""
    inputs, width, n = (int(torch.randint(1, k, ())) for k in (9, 33, 17))
    net = network(kind, inputs, width)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_().mul_(torch.rand(()) * 2)
    x = torch.randn(n, inputs, dtype=torch.float64)
    alive = float(r1(net, dict(net.named_parameters()), x).detach()) > 0
    return derivative(net, x) if alive else (math.nan, math.nan)


def random_networks(kind, seed):
    """The derivatives and checks for many networks, ``[N]``."""
    found = Track(1, lambda: random_network(kind))
    for k in exp.steps(kind, seed, NETWORKS, [found]):
        found(k)
    alive = [row for row in found.rows if not math.isnan(row[1])]
    return {"slopes": [row[1] for row in alive], "off": [row[2] for row in alive]}


# %% From one minimum onwards
def minimum(arm, seed):
    """A network at a minimum of R_S, and its data."""
    x = torch.randn(20, 5, dtype=torch.float64)
    y = torch.randn(20, 1, dtype=torch.float64)
    net = network(KINDS[0], 5, 100)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in exp.steps(arm, seed, 20_000, [net, optimizer]):
        optimizer.zero_grad()
        loss = tdi.half_squared_error(net(x), y)
        loss.backward()
        optimizer.step()
        if loss < 1e-10:
            break
    return {"x": x, "y": y, "net": net.state_dict(), "loss": float(loss.detach())}


def descend(arm, seed, start):
    """tr H, R_1 and R_S on the way, from the minimum of this seed."""
    x, y = start["x"], start["y"]
    layers = network(KINDS[0], 5, 100)
    layers.load_state_dict(start["net"])
    drop = nn.Dropout(P if arm != "R_S" else 0.0)
    net = nn.Sequential(*layers[:-1], drop, layers[-1])
    optimizer = torch.optim.SGD(net.parameters(), lr=5e-3)
    points = Track(EVERY, lambda: state(net, x, y))
    analysis = tdi.attach_analysis(
        net, tdi.half_squared_error, optimizer=optimizer, data=(x, y),
        log_dir=exp.log_dir(arm.replace(" ", ""), seed), every=STEPS // 4,
    )  # fmt: skip
    with analysis:
        for step in exp.steps(arm, seed, STEPS, [net, optimizer, points, analysis]):
            if step % EVERY == 0:
                points(step)
            if arm == "R_S + R_1":
                loss = regularizers.modified_loss(
                    net, (x, y), tdi.half_squared_error, kind="L1"
                )
            else:
                loss = tdi.half_squared_error(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    points(STEPS)
    return {"points": [row[1:] for row in points.rows]}


def state(net, x, y):
    """Trace, R_1 and R_S, the first by the library from the Hessian itself."""
    op = sharpness.hessian(net, tdi.half_squared_error, (x, y))
    with torch.no_grad():
        features = net[1](net[0](x))
        excess = regularizers.last_layer(
            features, net[3].weight, P, loss=tdi.half_squared_error
        )
        risk = tdi.half_squared_error(net[3](features), y)
    return [float(sharpness.trace(op).value), float(excess), float(risk)]


# %% The picture
def draw(randoms, ways):
    """Derivatives of random networks; tr H from one minimum on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = torch.linspace(-1, 1, 61).tolist()
    colours = ("#2166ac", "#92c5de", "#f4a582", "#b2182b")
    for kind, colour in zip(KINDS, colours, strict=True):
        slopes = [s for one in randoms[kind] for s in one["slopes"]]
        below = 100 * sum(s < 0 for s in slopes) / len(slopes)
        left.hist(slopes, bins, histtype="step", lw=1.8, color=colour,
                  label=f"{kind}: {below:.1f} % < 0")  # fmt: skip
    left.axvline(0, color="black", lw=1)
    left.set(xlabel="cosine of -grad R$_1$ and grad tr H", ylabel="networks",
             title="Random networks at zero loss")  # fmt: skip
    left.legend(frameon=False, fontsize=8)
    steps = [k * EVERY for k in range(len(ways[0]["R_S"]))]
    for arm, colour in ARMS.items():
        for k, one in enumerate(ways):
            traces = [p[0] for p in one[arm]]
            right.plot(steps, traces, color=COLOURS[colour], lw=1.5,
                       label=arm if k == 0 else None)  # fmt: skip
    right.set(xlabel="steps from a minimum of R_S", ylabel="tr H of R_S",
              title="From one minimum on (each seed)", ylim=(0, None))  # fmt: skip
    right.legend(frameon=False)
    figure.savefig(exp.picture)


# %% All of it
def main():
    """Compute, decide and draw."""
    randoms = exp.cells(KINDS, random_networks)
    minima = exp.cells(["minimum"], minimum)["minimum"]
    cells = exp.cells(ARMS, lambda arm, seed: descend(arm, seed, minima[seed]))
    ways = [{arm: cells[arm][seed]["points"] for arm in ARMS} for seed in exp.seeds]

    def below(kind):
        return [100 * sum(s < 0 for s in one["slopes"]) / len(one["slopes"])
                for one in randoms[kind]]  # fmt: skip

    claims = [
        Claim("Theorem 2: derivative of tr H along -grad R_1 is negative at zero loss, "
              "two-layer ReLU without biases: share of random networks, all of them",
              "100 %", below(KINDS[0]), lambda v: v == 100, lambda v: v > 90, " %"),
        Claim("the library's trace, by central differences, gives the same derivative: "
              "largest difference of the cosines, below 1e-4",
              "0", [max(one["off"]) for one in randoms[KINDS[0]]],
              lambda v: v < 1e-4, lambda v: v < 1e-2),
        *(Claim(f"from a minimum of R_S (loss < 1e-10) on with {arm}: tr H at the end "
                "over tr H at the minimum, below 0.9", "< 1",
                [one[arm][-1][0] / one[arm][0][0] for one in ways],
                lambda v: v < 0.9, lambda v: v < 1) for arm in ("R_drop", "R_S + R_1")),
        Claim("and with R_S it stays (within 1 %)", "no number",
              [one["R_S"][-1][0] / one["R_S"][0][0] for one in ways],
              lambda v: abs(v - 1) < 0.01, lambda v: abs(v - 1) < 0.1),
    ]  # fmt: skip
    numbers = {
        "share below zero (%)": {kind: below(kind) for kind in KINDS},
        "least steep cosine": {
            k: [max(o["slopes"]) for o in randoms[k]] for k in KINDS
        },
        "trace, R_1, R_S at the end": {a: [o[a][-1] for o in ways] for a in ARMS},
        "loss at the minimum": [one["loss"] for one in minima],
    }  # fmt: skip
    draw(randoms, ways)
    exp.finish(claims, numbers, exp.picture)


if __name__ == "__main__":
    main()
