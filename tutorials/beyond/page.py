"""The report of the studies: README.md of this folder, from results/*.json alone."""

import json
import statistics
import textwrap
from pathlib import Path

from scipy.stats import spearmanr

HERE = Path(__file__).parent
P = 0.1  # at which all models are measured
# Of each: its title, and -1 where it is less of it that is to mean a larger gap.
PREDICTORS = {
    "R1": ("R_1", 1),
    "R2": ("R_2", 1),
    "trace": ("trace of the Hessian", 1),
    "condensation": ("condensation (less, more gap)", -1),
    "norm": ("norm of the parameters", 1),
    "train_loss": ("training loss (less, more gap)", -1),
}


PAGE = """# Does R_1 predict the generalization gap, beyond the paper's networks?

Two small networks of today's practice, each trained as a grid of models that differ in
the probability of dropping and the weight decay. Afterwards every model is measured at
one and the same p = {p}: R_1 by masks at all its sites (dropout, attention, stochastic
depth), R_2, condensation of the layers before the activations, and what else may tell
the gap between test and training loss, both with dropout off. This page is written by
`page.py` from `results/*.json`; no number of a result is typed in.

{short}

A rank correlation is the mean over the seeds with its extremes. A seed is another start
and other batches and masks on the same images or text, so that the spread does not hold
that of the data; and nine models are few for a rank correlation: of nine that have
nothing to do with each other it is 0.7 or more in size 4 times in 100. Across p a
measure may only have learned p; so one column compares models that were trained at one
p, which differ in weight decay alone: the share of their pairs that is ordered by gap
as predicted, where one half is chance. Whatever weight decay moves one way, the norm of
the parameters first, is right there.

The gap holds the training loss with the other sign, and all models take the same number
of steps: where the test losses lie close together, the gap is little else, and whatever
grows with fitting predicts it. So R_1 is held against the training loss, and the last
column correlates with the test loss alone: there, and not in the gap, is what a user
would gain. An answer is "yes" when every seed meets the bound in the question, and "in
direction" when every seed lies on its side. This says nothing of cause, nor of networks
of another size.
"""
ANSWERS = {
    "reproduced": "yes",
    "reproduced in direction": "in direction",
    "not reproduced": "no",
}


def spread(values):
    mean = statistics.fmean(values)
    return f"{mean:.2f} [{min(values):.2f}, {max(values):.2f}]"


def with_test_loss(models, name):
    """Spearman's rank correlation of a predictor and the test loss, seed by seed."""
    sign = PREDICTORS[name][1]
    return [
        sign * float(spearmanr(values, losses).statistic)
        for values, losses in zip(
            zip(*(model[name] for model in models), strict=True),
            zip(*(model["test_loss"] for model in models), strict=True),
            strict=True,
        )
    ]


def farthest(models, key):
    """The largest distance between two models of one seed."""
    seeds = zip(*(model[key] for model in models), strict=True)
    return max(max(values) - min(values) for values in seeds)


def short(records):
    """The answer in one paragraph: R_1 with the gap, the training and the test loss."""
    found = []
    for record in records:
        gap, _, more, test = (claim["values"] for claim in record["claims"])
        found.append(
            f"{record['title'][0].lower()}{record['title'][1:]}: {spread(gap)} with "
            f"the gap, {-statistics.fmean(more):.2f} less than that of the training "
            f"loss, and {spread(test)} with the test loss"
        )
    return (
        "In short: R_1 ranks these models by their gap, and so does the training loss, "
        "better and at no cost; which of them is best on unseen data R_1 does not "
        "tell. "
        f"Rank correlations of R_1, mean [lowest, highest seed]: {'; '.join(found)}."
    )


def error(models, name):
    """Largest standard error of a measure over its value, in percent."""
    return 100 * max(
        part / value
        for model in models
        for part, value in zip(
            model[f"{name}_standard_error"], model[name], strict=True
        )
    )


def section(record, script):
    """Lines of the page on one study."""
    numbers = record["numbers"]
    gaps = [gap for model in numbers["models"].values() for gap in model["gap"]]
    yield f"## {record['title']}\n"
    yield (
        f"`python tutorials/beyond/{script.name}`: "
        f"{len(numbers['models'])} models, {record['seeds']} seeds, "
        f"{record['seconds'] / 60:.0f} minutes of one core; gaps from {min(gaps):.2f} "
        f"to {max(gaps):.2f}.\n\n| question | mean over seeds ± half of their range | "
        "answer |\n|---|---|---|"
    )
    for claim in record["claims"]:
        answer = ANSWERS[claim["verdict"]]
        yield f"| {claim['text']} | {claim['ours']} | **{answer}** |"
    models = list(numbers["models"].values())
    yield (
        "\nThe training losses of a seed lie up to "
        f"{farthest(models, 'train_loss'):.2f} apart, the test losses up to "
        f"{farthest(models, 'test_loss'):.2f}. Standard error of one measurement, at "
        f"most: {error(models, 'R1'):.0f} % of R_1, over masks, and "
        f"{error(models, 'trace'):.0f} % of the trace, over probes; drawn where it is "
        "larger than its point.\n\n"
        "| predictor | rank correlation with the gap | pairs at one p in order | "
        "rank correlation with the test loss |\n|---|---|---|---|"
    )
    for name, (title, _) in PREDICTORS.items():
        found = *numbers["predictors"][name].values(), with_test_loss(models, name)
        yield f"| {title} | {' | '.join(map(spread, found))} |"
    yield f"\n![Gap against each predictor](results/{record['figure']}.png)\n"
    yield script.read_text().split('"""')[1].split("\n\n", 2)[2]


def write_page(home=HERE):
    """README.md of this folder, from the records alone."""
    paths = sorted((home / "results").glob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    lines = [PAGE.format(p=P, short="\n".join(textwrap.wrap(short(records), 88)))]
    for record in records:
        lines += section(record, HERE / f"{record['figure']}.py")
    (home / "README.md").write_text("\n".join(lines))
