"""Fig. 5: switched on at a minimum of R_S, dropout leaves it and condenses.

The network of Fig. 4 is trained without dropout for 200 000 steps, to a minimum that is
not condensed. From there it is trained on for 100 000 steps on R_S, on R_drop
(keep_prob 0.9) and on R_S + R_1: the last two leave the minimum and condense, the first
stays.

The setting is the paper's; the first learning rate falls to nothing over its last
tenth, so that the minimum is one. How long the paper trains on is not stated.

    python tutorials/paper/fig05_leaving_the_minimum.py
    python tutorials/paper/fig05_leaving_the_minimum.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 5 and Appendix A.)

Picture: the first seed. Above, on the way from the minimum; below, neurons at the
minimum (grey) and at the end; vertical lines are the target's directions.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from fig04_condensation import ARMS, NAMES, TEACHER, P, X, Y, networks
from two_layer import Track, TwoLayer, near, normal, show_orientations, train

import torch_dropout_ir as tdi


def numbers_of(nets):
    """R_S, R_1 at keep_prob 0.9 and share near the target's directions, arm by arm."""
    for net, risk in zip(nets.networks, nets.risk(X, Y).tolist(), strict=True):
        with torch.no_grad():
            r1 = tdi.regularizers.last_layer(
                net[1](net[0](X)), net[-1].weight, P, loss=tdi.half_squared_error
            )
        close, large = near(net, TEACHER)
        yield [risk, float(r1), close / large]


def compute(exp, seed, steps):
    """To the minimum, then on from it three ways; the curves and the three ends."""
    first = TwoLayer(normal(1000))
    train(exp, "first", seed, first, (X, Y), steps[0])
    nets = networks(first.state)
    track = Track(
        max(1, steps[1] // 500), lambda: [v for row in numbers_of(nets) for v in row]
    )
    train(exp, "all", seed, nets, (X, Y), steps[1], arms=ARMS, track=track)
    return {"minimum": first.state, "end": nets.state, "rows": torch.tensor(track.rows)}


# %% The picture
def draw(result, path):
    """The way from the minimum, and orientations there and at the three ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=80, layout="constrained")
    top, bottom = figure.subplots(2, 3)
    rows = result["rows"]
    for panel, column, title in zip(
        top, range(3), ("R_S", "R_1", "share near the target's directions"), strict=True
    ):
        for k, arm in enumerate(ARMS):
            curve = rows[:, 1 + 3 * k + column]
            panel.plot(
                rows[:, 0] / 1000, curve, color=COLOURS[arm], lw=1, label=NAMES[k]
            )
        panel.set(title=title, xlabel="thousand steps from the minimum")
        panel.set_yscale("log" if column < 2 else "linear")
    top[2].set_ylim(0, 1.05)
    top[2].legend(frameon=False, loc="center right")
    minimum = TwoLayer(result["minimum"]).networks[0]
    for panel, net, arm, name in zip(
        bottom, TwoLayer(result["end"]).networks, ARMS, NAMES, strict=True
    ):
        show_orientations(panel, minimum, COLOURS["start"], TEACHER, "minimum", 4)
        show_orientations(panel, net, COLOURS[arm], TEACHER, "end")
        panel.set_title(name)
    bottom[0].set_ylabel("amplitude / largest")
    bottom[0].legend(loc="upper left", framealpha=1)
    figure.savefig(path)


# %% What is claimed
def claims_of(rows):
    """The paper's sentences, of each seed's curves ``[points, 10]``."""
    share = (
        "share of neurons above a tenth of the largest amplitude within 0.1 rad of the "
        "target's directions"
    )
    end = {a: [float(one[-1, 3 + 3 * k]) for one in rows] for k, a in enumerate(ARMS)}
    # Not the highest on the way: on R_S there are spikes too, for Adam oscillates.
    above = {
        arm: [float(one[-1, 1 + 3 * k] / one[-1, 1]) for one in rows]
        for k, arm in enumerate(ARMS)
    }
    return [
        Claim(f"at the minimum, {share}: below 0.2", "not condensed",
              [float(one[0, 3]) for one in rows], lambda v: v < 0.2, lambda v: v < 0.5),
    ] + [
        claim
        for arm, name in (("dropout", "R_drop"), ("R1", "R_S + R_1"))
        for claim in (
            Claim(f"on {name}, R_S at the end over that of training on R_S: above 10",
                  "leaves the minimum", above[arm], lambda v: v > 10, lambda v: v > 2,
                  "x"),
            Claim(f"on {name}, {share} at the end: above 0.9", "condensed",
                  end[arm], lambda v: v > 0.9, lambda v: v > 0.5),
        )
    ] + [
        Claim("on R_S the share stays below 0.2", "no number", end["without"],
              lambda v: v < 0.2, lambda v: v < 0.5),
    ]  # fmt: skip


# %% All of it
def main(arguments=None):
    """Train to the minimum and on, draw, hold the claims against the numbers."""
    exp = Experiment(__doc__, "fig05", arguments=arguments)
    steps = exp.pick((20_000, 20_000), (200_000, 100_000), (200_000, 100_000))
    results = exp.cells(["all"], lambda arm, seed: compute(exp, seed, steps))["all"]
    draw(results[0], exp.picture)
    rows = [result["rows"] for result in results]
    columns = ("R_S", "R_1", "share")
    found = []
    for one in rows:
        last = dict(zip(ARMS, one[-1, 1:].view(3, 3).tolist(), strict=True))
        places = {"minimum": one[0, 1:4].tolist(), **last}
        found.append({k: dict(zip(columns, v, strict=True)) for k, v in places.items()})
    exp.finish(claims_of(rows), {"seeds": found}, exp.picture)


if __name__ == "__main__":
    main()
