"""Fig. 6: the noise of small batches does not condense neurons.

The network of Fig. 4, without dropout, trained with Adam on batches of 2 of the 15
points for 100 000 steps: as in full-batch training the orientations stay spread out.
Dropout's noise has an R_1, which condenses; that of batches has none.

The setting is the paper's, at the learning rate 1e-3 of Fig. 4, kept to the end.

    python tutorials/paper/fig06_sgd_noise.py
    python tutorials/paper/fig06_sgd_noise.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 6 and Appendix A.)

Picture: the first seed: neurons and the target's directions (vertical), output with the
data (points), and R_S on the way.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from fig04_condensation import TEACHER, X, Y
from two_layer import Track, TwoLayer, near, normal, show_orientations, train

from torch_dropout_ir import condensation


def compute(exp, arm, seed, steps):
    """Train on batches of two; start, end and R_S on the way."""
    start = normal(1000)
    nets = TwoLayer(start)
    track = Track(max(1, steps // 500), lambda: nets.risk(X, Y).tolist())
    train(exp, arm, seed, nets, (X, Y), steps, batch=2, arms=[arm], settle=False,
          track=track)  # fmt: skip
    return {"start": start, "end": nets.state, "rows": torch.tensor(track.rows)}


def measure(result):
    """Numbers of one seed."""
    (first,), (last,) = (TwoLayer(result[k]).networks for k in ("start", "end"))
    weights = [condensation.input_weights(net[0]).detach() for net in (last, first)]
    moved = condensation.movement(*weights)
    (before, all_before), (close, large) = near(first, TEACHER), near(last, TEACHER)
    return {
        "share": close / large,
        "near": close,
        "large": large,
        "share_at_start": before / all_before,
        "R_S": float(result["rows"][-20:, 1].median()),
        "movement": moved.relative,
    }


# %% The picture
def draw(result, numbers, path):
    """Orientations, the fit and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    (first,), (last,) = (TwoLayer(result[k]).networks for k in ("start", "end"))
    show_orientations(left, first, COLOURS["start"], TEACHER, "start", 4)
    show_orientations(left, last, COLOURS["without"], TEACHER, "end")
    left.set(
        ylabel="amplitude / largest",
        title=f"{numbers['near']} of {numbers['large']} near the target's directions",
    )
    left.legend(loc="upper left", framealpha=1)
    line = torch.linspace(-14, 14, 400)[:, None]
    with torch.no_grad():
        middle.plot(line, last.eval()(line), color=COLOURS["without"])
    middle.plot(X, Y, "o", color="black", ms=4)
    middle.set(xlabel="input", title="output")
    steps, risk = result["rows"].T
    right.semilogy(steps / 1000, risk, color=COLOURS["without"], lw=0.8)
    right.set(xlabel="thousand steps", title="R_S")
    figure.savefig(path)


# %% All of it
def main(arguments=None):
    """Train, draw and hold the claim against the numbers."""
    exp = Experiment(__doc__, "fig06", arguments=arguments)
    steps = exp.pick(30_000, 100_000, 100_000)
    results = exp.cells(["batch2"], lambda a, s: compute(exp, a, s, steps))["batch2"]
    numbers = [measure(result) for result in results]
    draw(results[0], numbers[0], exp.picture)
    claims = [
        Claim(
            "with batches of 2 and no dropout, of the neurons above a tenth of the "
            "largest amplitude, within 0.1 rad of the target's directions, below 0.2",
            "not condensed",
            [one["share"] for one in numbers],
            lambda v: v < 0.2,
            lambda v: v < 0.5,
        )
    ]
    exp.finish(claims, {"seeds": numbers}, exp.picture)


if __name__ == "__main__":
    main()
