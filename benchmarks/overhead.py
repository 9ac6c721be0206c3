"""What an attached analysis costs a training script: time by cadence, and peak memory.

Models of practice: an MLP on images of 784 pixels, ResNet-18 at 32 x 32 with dropout, a
small GPT. A bare script and a watched one take turns in one process, so that a drift of
the machine's pace falls out:

* off cadence: steps of one script at which nothing is due, with the hooks of the
  analysis in place and without, by turns step by step (bare, watched, watched, bare and
  the reverse). All else is the same for both, the state of Python's garbage collector
  included. The median over these rounds of what watched steps take more, its standard
  error, and the objects that a step leaves for the collector, either way;
* ``every="auto"``: two scripts in blocks of steps, as wall time over all rounds, beside
  the share that the analysis counts itself, both after the first measurement, which is
  on credit;
* one measurement, by measure, in training steps: over N it is the cost of ``every=N``;
* peak memory of fresh processes beyond what they hold before the model is made, by
  measure and of all. A tiny model has been trained in them before, with the same
  measures: the code that these load is in memory once, whatever the model's size. What
  is freed is given back at once in them, so that holes in the heap do not count. Beside
  it a floor: parameters, their gradient and what the optimizer keeps are in memory when
  a measurement is made, and a product with the Hessian is of one vector of that size
  and makes another, so sharpness cannot do with less than four times the parameters
  and that, nor the process with less than training.

    python benchmarks/overhead.py --png overhead.png
    python benchmarks/overhead.py --models mlp --seconds 20

A run in pieces, one table and one picture of all of them:

    python benchmarks/overhead.py --models gpt --parts off costs --rows rows.json
    python benchmarks/overhead.py --models gpt --parts auto --rows rows.json
    python benchmarks/overhead.py --models gpt --parts memory --rows rows.json
    python benchmarks/overhead.py --models --rows rows.json --png overhead.png
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from overhead_memory import memory
from overhead_models import MODELS
from overhead_report import draw, joined, report, step
from overhead_time import (
    CLOCKS,
    OPTIMIZERS,
    Script,
    automatic,
    by_measure,
    off_cadence,
)

from torch_dropout_ir.analysis.measures import default_measures

MEASURES = (*(m.name for m in default_measures()), "all")
PARTS = ("off", "costs", "auto", "memory")


def row(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure one model."""
    found: dict[str, Any] = {"model": name}
    parts, seconds = chosen.parts, chosen.seconds
    if "off" in parts or "costs" in parts:
        found |= off_cadence(name, seconds if "off" in parts else 5)
    if name == "tiny":
        return found
    if "costs" in parts:
        found["costs"] = by_measure(name, step(found))
    if "auto" in parts:
        found["auto"] = automatic(name, seconds)
    if "memory" in parts:
        found["memory"] = {
            o: memory(name, o, chosen.measures) for o in chosen.optimizers
        }
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=40, help="for each timing")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS,
                        default=["sgd"], help="of the peaks")  # fmt: skip
    parser.add_argument("--measures", nargs="*", choices=MEASURES, default=MEASURES,
                        help="whose peaks")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: on a busy machine")  # fmt: skip
    parser.add_argument("--png", type=Path)
    parser.add_argument("--rows", type=Path,
                        help="JSON of earlier runs, added to")  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    Script.clock = staticmethod(CLOCKS[chosen.clock])
    rows = [row(name, chosen) for name in chosen.models]
    if chosen.rows:
        rows = joined(rows, chosen.rows)
    print(f"torch {torch.__version__}, {chosen.threads} threads, {chosen.clock} clock")
    print(report(rows))
    if chosen.png:
        draw(rows, chosen.png)


if __name__ == "__main__":
    main()
