"""What the two studies share: the grid of models, their measures, the report.

Every model of a grid is trained from the same start and data, for each seed, and then
measured: the generalization gap, and what may predict it. All models are measured at
one probability of dropping, ``P``, whatever they were trained with: R_1 at a model's
own p would be zero without dropout, and tell p more than the model.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.ops import StochasticDepth

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis import measures

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))
from claims import Claim
from data import cifar
from experiment import Experiment
from page import HERE, PREDICTORS, P, spread, with_test_loss, write_page

__all__ = ["Study", "cifar"]
LR = 5e-3
COLOURS = ("#4d4d4d", "#92c5de", "#2166ac", "#053061")


class Study:
    """One grid: probabilities of dropping x weight decays."""

    def __init__(self, doc, name, drops, decays):
        self.exp = Experiment(doc, name, home=HERE)
        self.grid = {
            f"p{p:g}-decay{decay:g}": (p, decay)
            for p, decay in itertools.product(
                self.exp.pick(*drops), self.exp.pick(*decays)
            )
        }

    def run(self, network, batch, steps, train, test, size):
        """Train all models, measure them, report.

        Args:
            network: Makes the model of a probability of dropping.
            batch: Draws a mini-batch.
            steps: Number of steps.
            train: Inputs and targets that were trained on.
            test: Others.
            size: Number of samples of ``train`` that R_1 and the like are taken of.
        """

        def compute(arm, seed):
            p, decay = self.grid[arm]
            model, criterion = network(p), nn.CrossEntropyLoss()
            adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
            seen = [measures.Regularizer(), measures.ReceivedGradient()]
            with tdi.attach_analysis(
                model,
                log_dir=self.exp.log_dir(arm, seed),
                every=max(1, (steps - 1) // 2),  # the start, half-way, near the end
                measures=[*seen, measures.Masks(), measures.Condensation()],
            ) as analysis:
                state = model, adam, schedule, analysis
                for _ in self.exp.steps(arm, seed, steps, state):
                    x, y = batch()
                    adam.zero_grad()
                    criterion(model(x), y).backward()
                    adam.step()
                    schedule.step()
            part = tuple(tensor[:size] for tensor in train)
            masks, products = self.exp.pick(8, 32, 64), self.exp.pick(4, 8, 50)
            return measure(model, train, test, part, masks, products)

        report(self.exp, self.grid, self.exp.cells(self.grid, compute))


def measure(model, train, test, part, masks, products):
    """The gap with dropout off, and its predictors at ``P`` on ``part`` of the data."""
    model.eval()
    with torch.no_grad():
        losses = [float(cross_entropy(model(x), y)) for x, y in (train, test)]
    for site in model.modules():
        if isinstance(site, nn.Dropout | StochasticDepth):
            site.p = P
    model.train()
    loss = "cross_entropy"
    r1 = tdi.regularizers.monte_carlo(model, part, loss, num_masks=masks)
    r2 = tdi.regularizers.gradient_norm(model, part, loss, lr=LR, num_masks=masks // 4)
    trace = tdi.sharpness.trace(tdi.sharpness.hessian(model, loss, part), products)
    return {
        "R1": float(r1.value),
        "R1_standard_error": float(r1.standard_error),
        "R2": float(r2.value),
        "trace": float(trace.value),
        "trace_standard_error": float(trace.standard_error),
        "condensation": condensation(model),
        "norm": float(nn.utils.get_total_norm(list(model.parameters()))),
        "train_loss": losses[0],
        "test_loss": losses[1],
        "gap": losses[1] - losses[0],
    }


def condensation(model):
    """Mean squared cosine of two neurons times their number of weights.

    It is 1 for random orientations, whatever the width. The mean is over the layers
    before the activations: those that have four outputs an input.
    """
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 4 * layer.in_features:
            weights = tdi.condensation.input_weights(layer)
            one = tdi.condensation.cosine_statistics(weights)
            mean_square = float(one.total_squares) / one.num_pairs
            found.append(mean_square * weights.shape[1])
    return statistics.fmean(found)


def correlation(rows, name):
    """Spearman's rank correlation of a predictor and the gap over the models."""
    values = [PREDICTORS[name][1] * row[name] for row in rows]
    return float(spearmanr(values, [row["gap"] for row in rows]).statistic)


def agreement(rows, drops, name):
    """Of the pairs of models trained at one p, the share that is ordered as predicted.

    One half is chance. What p alone explains does not count here.
    """
    pairs = [
        PREDICTORS[name][1] * (a[name] - b[name]) * (a["gap"] - b["gap"]) > 0
        for (a, p), (b, q) in itertools.combinations(zip(rows, drops, strict=True), 2)
        if p == q
    ]
    return sum(pairs) / len(pairs)


def claims_of(found, models):
    """What R_1 is asked, of each seed's numbers."""
    across, within = found["R1"].values()
    fitted = found["train_loss"]["correlation"]
    more = [ours - loss for ours, loss in zip(across, fitted, strict=True)]
    return [
        Claim(
            "Over all models, does R_1 predict the gap? Rank correlation above 0.5 "
            "(direction: above 0)",
            "no number",
            across,
            lambda v: v > 0.5,
            lambda v: v > 0,
        ),
        Claim(
            "And among models trained at one p? More than two thirds of their pairs "
            "in order (direction: more than half)",
            "no number",
            within,
            lambda v: v > 2 / 3,
            lambda v: v > 0.5,
        ),
        Claim(
            "Does it say more than the training loss does? Difference of the two rank "
            "correlations above 0",
            "no number",
            more,
            lambda v: v > 0,
            lambda v: v > 0,
        ),
        Claim(
            "And the test loss itself, where a user would gain? Rank correlation above "
            "0.5 (direction: above 0)",
            "no number",
            with_test_loss(models, "R1"),
            lambda v: v > 0.5,
            lambda v: v > 0,
        ),
    ]


def report(exp, grid, cells):
    """Correlate, draw, write the record and the page."""
    drops = [p for p, _ in grid.values()]
    seeds = [[cells[arm][k] for arm in grid] for k in exp.seeds]
    found = {
        name: {
            "correlation": [correlation(rows, name) for rows in seeds],
            "agreement": [agreement(rows, drops, name) for rows in seeds],
        }
        for name in PREDICTORS
    }
    models = {
        arm: {key: [row[key] for row in cells[arm]] for key in cells[arm][0]}
        for arm in grid
    }
    claims = claims_of(found, list(models.values()))
    draw(exp.picture, drops, seeds, found)
    exp.finish(claims, {"p": P, "predictors": found, "models": models}, exp.picture)
    if exp.profile != "quick":
        write_page()


def draw(path, drops, seeds, found):
    """The gap against each predictor, one point a model and seed, coloured by p.

    The bars are standard errors, of those predictors that are sampled.
    """
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    for panel, (name, (title, _)) in zip(panels.flat, PREDICTORS.items(), strict=True):
        for p, colour in zip(sorted(set(drops)), COLOURS, strict=False):
            rows = [
                row
                for one in seeds
                for row, q in zip(one, drops, strict=True)
                if q == p
            ]
            x, y = ([row[key] for row in rows] for key in (name, "gap"))
            error = [row.get(f"{name}_standard_error", 0.0) for row in rows]
            panel.errorbar(x, y, xerr=error, fmt="o", ms=4, lw=1, color=colour,
                           label=f"trained at p = {p:g}")  # fmt: skip
        shown = spread(found[name]["correlation"])
        panel.set_title(f"rank correlation {shown}", fontsize=10)
        panel.set_xlabel(title)
        panel.locator_params(axis="x", nbins=5)
    for row in panels:
        row[0].set_ylabel("gap: test - training loss (nats)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
