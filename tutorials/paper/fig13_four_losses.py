"""Fig. 13: R_1 carries dropout's accuracy, R_2 does not.

Question: of the two terms that dropout adds, which generalises? L1 = R_S + R_1 and
L3 = R_drop - R_2 have R_1 in them, L2 = R_S + R_2 and L4 = R_drop - R_1 have R_2.

Setting: 784-1000-10, ReLU, dropout before the last layer, squared error on one-hot
labels, the first 1000 MNIST images, full-batch gradient descent, keep_prob 0.5 to 0.9,
two learning rates (they are R_2's coefficient too); test accuracy on 10 000 images.

Reduced: inputs are the first 50 principal components, whitened, the hidden layer has
200 neurons (a step of all four losses takes 25 ms instead of half a second, and the
loss falls in a tenth of the steps: 600), keep_prob 0.5, 0.7, 0.9. The learning rates
are 0.1 and 0.02, not 0.05 and 0.005; the start has std 0.15, at which the outputs are
as large as in Fig. 2. On whitened inputs all accuracies are lower than on pixels.
--paper takes pixels, 1000 neurons, std 0.075 and the paper's learning rates.

    python tutorials/paper/fig13_four_losses.py --data-root DIR
    python tutorials/paper/fig13_four_losses.py --data-root DIR --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, eq. 7 and Fig. 13.)

Picture: means over the seeds with their extremes as bars; R_drop, L1 and L3 lie on one
another.
"""

# %% What is run
from claims import Claim
from experiment import Experiment
from four_losses import COLOURS, KINDS, train

exp = Experiment(__doc__, "fig13")
KEEP = exp.pick((0.7,), (0.5, 0.7, 0.9), (0.5, 0.6, 0.7, 0.8, 0.9))
RATES = exp.pick((0.1,), (0.1, 0.02), (0.05, 0.005))
STEPS = exp.pick(400, 600, 100_000)
SIZE = exp.pick(
    {"samples": 1000, "components": 50, "width": 200, "std": 0.15},
    {"samples": 1000, "components": 50, "width": 200, "std": 0.15},
    {"samples": 1000, "components": None, "width": 1000, "std": 0.075},
)
ALL = ("R_drop", *KINDS)


# %% The picture
def draw(found):
    """Test accuracy against keep_prob, one panel a learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(RATES), squeeze=False, sharey=True)[0]
    for panel, lr in zip(panels, RATES, strict=True):
        for kind in ALL:
            values = [[o["accuracy"] for o in found[f"{kind}-{q}-{lr}"]] for q in KEEP]
            means = [sum(v) / len(v) for v in values]
            both = [*zip(means, values, strict=True)]
            spread = [m - min(v) for m, v in both], [max(v) - m for m, v in both]
            style = "--" if kind in ("L3", "L4") else "-"
            panel.errorbar(KEEP, means, spread, fmt=f"o{style}", ms=4, capsize=3,
                           color=COLOURS.get(kind, "#9ecae1"), label=kind,
                           lw=1.5 if kind in KINDS else 7)  # fmt: skip
        panel.set(xlabel="keep_prob", title=f"learning rate {lr}")
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(frameon=False)
    figure.savefig(exp.picture)


# %% All of it
def compute(arm, seed):
    """One cell."""
    kind, q, lr = arm.split("-")
    rates = {"keep_prob": float(q), "lr": float(lr), "steps": STEPS}
    found = train(exp, arm, seed, kind, SIZE, **rates)
    return {name: value for name, value in found.items() if name != "net"}


def main():
    """Compute, decide and draw."""
    arms = [f"{k}-{q}-{r}" for q in KEEP for r in RATES for k in ALL]
    found = exp.cells(arms, compute)

    def over(number, take=min):
        """``take`` over all settings of ``number(accuracy by loss)``, by seed."""
        return [
            take(
                number({k: found[f"{k}-{q}-{r}"][s]["accuracy"] for k in ALL})
                for q in KEEP for r in RATES
            )
            for s in range(len(exp.seeds))
        ]  # fmt: skip

    claims = [
        Claim("R_1 carries the accuracy: the worse of L1 and L3 above the better of L2 "
              "and L4 by 1 point at each keep_prob and learning rate: least distance",
              "> 0", over(lambda a: min(a["L1"], a["L3"]) - max(a["L2"], a["L4"])),
              lambda v: v > 1, lambda v: v > 0, " points"),
        Claim("taking R_2 out changes nothing: L3 and L1 within 1 point, largest "
              "distance", "small", over(lambda a: abs(a["L3"] - a["L1"]), max),
              lambda v: v < 1, lambda v: v < 3, " points"),
        Claim("both are dropout's: L1 and R_drop within 1 point, largest distance",
              "small", over(lambda a: abs(a["R_drop"] - a["L1"]), max),
              lambda v: v < 1, lambda v: v < 3, " points"),
        Claim("L2 and L4 are alike: their distance below half of that to L1, largest "
              "share", "small",
              over(lambda a: abs(a["L2"] - a["L4"]) / abs(a["L1"] - a["L2"]), max),
              lambda v: v < 0.5, lambda v: v < 1),
    ]  # fmt: skip
    draw(found)
    exp.finish(claims, found, exp.picture)


if __name__ == "__main__":
    main()
