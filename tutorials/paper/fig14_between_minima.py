"""Fig. 14: barriers lie between R_1's minima and R_2's, not within either kind.

Question: are the minima that L1 = R_S + R_1 and L3 = R_drop - R_2 find in one valley,
those of L2 = R_S + R_2 and L4 = R_drop - R_1 in another, and is the first flatter?
All four start from the same parameters; R_S is taken on the lines between their ends.

Setting: as Fig. 13, at one keep_prob and learning rate, to a small loss.

Reduced: as Fig. 13 (50 whitened principal components instead of pixels), with the first
300 images and 400 neurons, where all four losses come near zero; keep_prob 0.95,
learning rate 0.1, 6000 steps. --paper takes pixels, 1000 images, 1000 neurons,
keep_prob 0.9 and learning rate 0.05.

    python tutorials/paper/fig14_between_minima.py --data-root DIR
    python tutorials/paper/fig14_between_minima.py --data-root DIR --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, eq. 7 and Fig. 14.)

Picture: one line a seed; the points are the two minima.
"""

# %% What is run
from itertools import combinations

import torch
from claims import Claim
from experiment import Experiment
from four_losses import COLOURS, KINDS, LOSS, images, network, train

from torch_dropout_ir import sharpness

exp = Experiment(__doc__, "fig14")
KEEP, LR = exp.pick((0.95, 0.1), (0.95, 0.1), (0.9, 0.05))
STEPS = exp.pick(600, 6000, 100_000)
SIZE = exp.pick(
    {"samples": 300, "components": 50, "width": 200, "std": 0.15},
    {"samples": 300, "components": 50, "width": 400, "std": 0.12},
    {"samples": 1000, "components": None, "width": 1000, "std": 0.075},
)
PAIRS = [*combinations(KINDS, 2)]
SAME = [("L1", "L3"), ("L2", "L4")]
ALPHAS = torch.linspace(-0.5, 1.5, 41)


# %% The lines between minima
def lines(minima):
    """R_S between the four networks of one seed: ``{"L1-L2": [41], ...}``."""
    batch, _ = images(exp.options.data_root, SIZE["samples"], SIZE["components"])
    nets = {}
    for kind in KINDS:
        nets[kind] = network(batch[0].shape[1], SIZE["width"], SIZE["std"], 0.0)
        nets[kind].load_state_dict(minima[kind]["net"])
    between = sharpness.interpolate
    return {
        f"{a}-{b}": between(nets[a], nets[b], LOSS, batch, ALPHAS).tolist()
        for a, b in PAIRS
    }


def barrier(line):
    """The highest point between the ends over the higher end."""
    inside = line[10:31]
    return max(inside) / max(inside[0], inside[-1])


# %% The picture
def draw(found):
    """R_S along the six lines, each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    order = [*SAME, *(p for p in PAIRS if p not in SAME)]
    for panel, (a, b) in zip(panels, order, strict=True):
        for line in found:
            panel.semilogy(ALPHAS, line[f"{a}-{b}"], color="#4d4d4d", lw=1.2)
            panel.plot(0, line[f"{a}-{b}"][10], "o", ms=5, color=COLOURS[a])
            panel.plot(1, line[f"{a}-{b}"][30], "o", ms=5, color=COLOURS[b])
        kind = "one kind" if (a, b) in SAME else "R$_1$'s to R$_2$'s"
        panel.set_title(f"{a} to {b}: {kind}")
    for panel in panels[3:]:
        panel.set_xlabel(r"$\alpha$")
    for panel in panels[::3]:
        panel.set_ylabel("R$_S$((1−α)θ$_a$ + αθ$_b$)")  # noqa: RUF001
    figure.savefig(exp.picture)


# %% All of it
def main():
    """Compute, decide and draw."""
    rates = {"keep_prob": KEEP, "lr": LR, "steps": STEPS}
    minima = exp.cells(KINDS, lambda kind, s: train(exp, kind, s, kind, SIZE, **rates))
    by_seed = [{k: minima[k][s] for k in KINDS} for s in range(len(exp.seeds))]
    found = [lines(one) for one in by_seed]

    def barriers(pairs, take):
        return [take(barrier(line[f"{a}-{b}"]) for a, b in pairs) for line in found]

    across = [pair for pair in PAIRS if pair not in SAME]
    claims = [
        Claim("the minima are at a small loss: the largest R_S of the four, below 5 % "
              "of that of a network of output zero", "near 0",
              # Of ten one-hot outputs one is 1: the mean square is a tenth.
              [100 * max(one[k]["R_S"] for k in KINDS) / 0.1 for one in by_seed],
              lambda v: v < 5, lambda v: v < 20, " %"),
        *(Claim(f"no barrier between {a} and {b}: highest loss between over the higher "
                "end, within 5 %", "1", barriers([(a, b)], max),
                lambda v: v < 1.05, lambda v: v < 1.5) for a, b in SAME),
        Claim("a barrier between any R_1-type and R_2-type minimum: the lowest of the "
              "four, above 1.05", "> 1", barriers(across, min),
              lambda v: v > 1.05, lambda v: v > 1),
        Claim("R_1's minima are flatter: tr H of the sharper of L1 and L3 over the "
              "flatter of L2 and L4, below 0.5", "< 1",
              [max(one["L1"]["trace"], one["L3"]["trace"])
               / min(one["L2"]["trace"], one["L4"]["trace"]) for one in by_seed],
              lambda v: v < 0.5, lambda v: v < 1),
    ]  # fmt: skip
    kept = ("accuracy", "R_S", "R_1", "trace")
    numbers = {
        "alphas": ALPHAS.tolist(),
        "lines": found,
        "minima": [{k: {n: one[k][n] for n in kept} for k in KINDS} for one in by_seed],
    }  # fmt: skip
    draw(found)
    exp.finish(claims, numbers, exp.picture)


if __name__ == "__main__":
    main()
