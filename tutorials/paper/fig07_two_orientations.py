"""Fig. 7ab: with dropout a network of ten inputs has two orientations.

A 10-100-1 tanh network learns tanh(x_1 + ... + x_10) from 30 samples with Adam, without
dropout and with it (keep_prob 0.5), from one start. The target has one neuron; it and
its opposite are the orientations that dropout leaves, of the neurons above a tenth of
the largest amplitude.

The paper's width, number of samples and learning rate, 1e-3, which falls to nothing
over the last half of 200 000 steps. The text leaves steps, start and samples open: here
the start is standard normal, and samples are of standard deviation 0.2. Two is where
R_1 leads: over all networks of any width it is the squared sum of |a_j| rms(h_j), and
by the inequality of Cauchy and Schwarz the least of those that fit has neurons with h
proportional to the targets alone. Neurons that saturate hardly see that way, and
samples of this size keep them from it.

The choice was made on 24 seeds that are not reported, 10 to 33 of another program of
the same training, with one rule for all, that of the claim: 22 of them ended with two
orientations, two with one or two more, of two neurons in all. With samples of variance
1 / 10, a start of variance width^-0.2 and the rate falling over the last tenth alone
seven of eight did, three of these with neurons at the edge of the threshold; on the
reported seeds, where that was tried first, the orientations were 2, 2 and 3.

    python tutorials/paper/fig07_two_orientations.py
    python tutorials/paper/fig07_two_orientations.py --quick

(Zhang & Xu, Implicit regularization of dropout, TPAMI 2024, Fig. 7 and Appendix A.)

Picture: the first seed: cosines between the neurons above a tenth of the largest
amplitude, sorted by orientation, and all neurons by their cosine to the target's and
their amplitude.
"""

# %% What is run
import torch
from claims import Claim
from experiment import COLOURS, Experiment
from two_layer import TwoLayer, near, normal, relative_amplitudes, train

from torch_dropout_ir import condensation

ARMS = ("without", "dropout")
NAMES = ("without dropout", "with dropout")
P, INPUTS, WIDTH, SAMPLES, SCALE = 0.5, 10, 100, 30, 0.2
TEACHER = torch.cat((torch.ones(INPUTS), torch.zeros(1)))
TEACHER = torch.stack((TEACHER, -TEACHER))


def compute(exp, arm, seed, steps):
    """Train both arms from one start on one draw of samples."""
    x = SCALE * torch.randn(SAMPLES, INPUTS)
    start = normal(WIDTH, INPUTS, variance=1.0)
    nets = TwoLayer(start.repeat(1, 2, 1), dropped=[(slice(1, 2), P)])
    data = x, torch.tanh(x.sum(1))
    train(exp, arm, seed, nets, data, steps, arms=ARMS, settle=0.5)
    return {"x": x, "start": start, "end": nets.state}


# %% Numbers of one seed
def measure(result):
    """``{arm: numbers}``."""
    nets, x = TwoLayer(result["end"]), result["x"]
    risks = nets.risk(x, torch.tanh(x.sum(1))).tolist()
    generator = torch.Generator().manual_seed(0)
    fresh = SCALE * torch.randn(10_000, INPUTS, generator=generator)
    errors = nets.risk(fresh, torch.tanh(fresh.sum(1))).tolist()
    found = {}
    for arm, net, risk, error in zip(ARMS, nets.networks, risks, errors, strict=True):
        large = relative_amplitudes(net) > 0.1
        weights = condensation.input_weights(net[0]).detach()[large]
        close, count = near(net, TEACHER, angle=0.3)
        found[arm] = {
            "orientations": condensation.effective_neurons(weights, 0.95).count,
            "large": count,
            "near_teacher": close,
            "R_S": risk,
            "test_R_S": error,
        }
    return found


# %% The picture
def draw(result, numbers, path):
    """Cosines between the neurons, and to the target's against the amplitude."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
    *maps, right = figure.subplots(1, 3)
    nets = TwoLayer(result["end"]).networks
    for panel, net, arm, name in zip(maps, nets, ARMS, NAMES, strict=True):
        size = relative_amplitudes(net)
        weights = condensation.input_weights(net[0]).detach()
        large = weights[size > 0.1]
        order = condensation.cluster_order(large)
        shown = panel.imshow(
            condensation.cosine_similarity(large[order]), cmap="RdBu_r", vmin=-1, vmax=1
        )
        count = numbers[arm]["orientations"]
        panel.set(
            title=f"{name}:\n{count} orientations of {len(large)} neurons",
            xlabel="neuron, sorted by orientation",
        )
        cosines = condensation.cosine_similarity(weights, TEACHER[:1])[:, 0]
        right.scatter(cosines, size, s=12, color=COLOURS[arm], label=name)
    maps[0].set(ylabel="neuron")
    figure.colorbar(shown, ax=maps, label="cosine", shrink=0.8)
    right.set(
        xlabel="cosine to the target's neuron", ylabel="amplitude / largest",
        xlim=(-1.05, 1.05),
    )  # fmt: skip
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    figure.savefig(path)


# %% All of it
def main(arguments=None):
    """Train, measure, draw and hold the claims against the numbers."""
    exp = Experiment(__doc__, "fig07", arguments=arguments)
    steps = exp.pick(40_000, 200_000, 200_000)
    results = exp.cells(["all"], lambda a, s: compute(exp, a, s, steps))["all"]
    numbers = [measure(result) for result in results]
    draw(results[0], numbers[0], exp.picture)
    counts = {arm: [one[arm]["orientations"] for one in numbers] for arm in ARMS}
    claims = [
        Claim(
            "directions that cover the neurons above a tenth of the largest amplitude "
            "at cosine > 0.95, with dropout: exactly 2",
            "2",
            counts["dropout"],
            lambda v: v == 2,
            lambda v: v <= 10,
        ),
        Claim(
            "the same without dropout: above 20",
            "spread out",
            counts["without"],
            lambda v: v > 20,
            lambda v: v > 10,
        ),
    ]
    exp.finish(claims, {"seeds": numbers}, exp.picture)


if __name__ == "__main__":
    main()
