"""What each tag means, and where in the paper it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_PAPER: Final = "Zhang & Xu, Implicit regularization of dropout, TPAMI 2024"

_DESCRIPTIONS: Final = {
    "regularizer/R1": f"What dropout adds to the loss on average, E[R_drop] - R_S, in "
    f"the units of the loss ({_PAPER}, eq. 4). Below it: the parts of sites, which add "
    "up to it on average.",
    "regularizer/R1_standard_error": "Standard error of R_1 from sampling; 0 where a "
    "closed form was used. Below it: that of a site's part, by the spread of few "
    "masks.",
    "regularizer/R2": f"(lr/4) times the squared gradient norm ({_PAPER}, eq. 5).",
    "regularizer/R2_dropout_noise": "(lr/4) tr Cov of the gradient over masks on one "
    "batch: the part of R_2 that dropout adds.",
    "regularizer/R2_dropout_noise_standard_error": "Standard error of that, from the "
    "spread of the differences of pairs of masks: rough where they are few.",
    "loss/R_S": "Loss of the batch with dropout off.",
    "loss/modified": f"R_S + R_1 + R_2 ({_PAPER}, eq. 6).",
    "loss/modified_standard_error": "Standard error of R_1 in it. R_S has none, and "
    "R_2 is of the one gradient that the optimizer receives.",
    "mask/keep_rate": "Share of the elements kept so far; 1 - p is expected.",
    "mask/z_score": "Standard deviations between the number of elements kept and its "
    "expectation; beyond 5 the masks are not what they claim.",
    "condensation/effective_ratio": f"Directions of the neurons' input weights over "
    f"their number ({_PAPER}, Def. 3); low = condensed.",
    "condensation/effective_neurons": "Directions that cover all neurons (cosine above "
    "the threshold, greedy cover: never below the minimum).",
    "condensation/dead_neurons": "Neurons that are zero, weak or not finite.",
    "condensation/movement": "Distance of the input weights from their start, over "
    "their norm there.",
    "condensation/cosine_to_start": "Mean cosine of the neurons with what they were at "
    "the first measurement.",
    "condensation/orientation_amplitude": "Neurons by angle (across, -pi to pi, in "
    "their leading plane) and amplitude over the largest (from the middle outwards), "
    f"colours logarithmic: now above in red, at the start below in blue ({_PAPER}, "
    "Fig. 4).",
    "condensation/cosine": "Cosines between neurons, parallel ones side by side; blue "
    "-1, white 0, red 1.",
    "condensation/cosines": "Cosines between pairs of neurons.",
    "sharpness/top_eigenvalue": "Largest eigenvalue of the Hessian of R_S.",
    "sharpness/top_eigenvalue_residual": "An eigenvalue lies within this distance of "
    "the value shown.",
    "sharpness/trace": f"Trace of the Hessian of R_S: flatness ({_PAPER}, sec. VII).",
    "sharpness/trace_standard_error": "Standard error of the trace; 0 where it is "
    "exact.",
    "sharpness/spectral_density": "Shares of the eigenvalues of the Hessian of "
    "R_S, by Lanczos quadrature from one random probe.",
    "sharpness/loss_slice": "R_S along one random direction that is scaled to the "
    "norms of the filters, drawn as a histogram: height = loss, place = step, -1 to 1 "
    f"({_PAPER}, Fig. 12).",
    "cost/seconds": "Seconds that the measure took.",
    "cost/share": "Share of the analysis in the whole time so far.",
}


def describe_tag(tag: str, notes: Mapping[str, str]) -> str:
    """Return what a tag is and how its number was obtained; empty if not ours."""
    if tag.startswith("uncertainty/"):
        estimate, _, end = tag.removeprefix("uncertainty/").rpartition("/")
        sign = "-" if end == "lower" else "+"
        return f"{estimate} {sign} its error. {describe_tag(estimate, notes)}"
    stem = "/".join(tag.split("/")[:2])
    said = (_DESCRIPTIONS.get(stem, ""), notes.get(tag) or notes.get(stem, ""))
    return " ".join(f"{part.rstrip('.')}." for part in said if part)
