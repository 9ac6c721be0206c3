"""What an attached analysis costs a training script: time by cadence, and peak memory.

Models of practice: an MLP on images of 784 pixels, ResNet-18 at 32 x 32 with dropout, a
small GPT. A bare script and a watched one take turns in one process, so that a drift of
the machine's pace falls out:

* off cadence: steps of one script at which nothing is due, with the hooks of the
  analysis in place and without, by turns step by step (bare, watched, watched, bare and
  the reverse), on a few samples: what the hooks take does not depend on how many, and
  a short step shows it with a smaller error. The median over these rounds of what
  watched steps take more, of wall time and of the thread's own, its standard error, and
  the objects that a step leaves for the collector, either way. The share is of a step
  on a batch of practice;
* ``every="auto"``: two scripts in blocks of steps, as wall time over all rounds from
  the first step on, beside the share that the analysis counts itself. The error of the
  ratio is that of the rounds' differences, less what the analysis counts;
* one measurement, by measure, in training steps: over N it is the cost of ``every=N``;
* peak memory of fresh processes, by measure and of all: as a whole, interpreter and
  torch included, as a user has them; and beyond what they hold before the model is
  made. For these, a tiny model has been trained before, with the same measures: what
  code they load is in memory once, whatever its size; and what is freed is given
  back at once, so that holes in the heap do not count. Beside it a floor: parameters,
  their gradient and what the optimizer keeps are in memory when a measurement is made,
  and a product with the Hessian is of one vector of that size and makes another, so
  sharpness cannot do with less than four times the parameters and that, nor the process
  with less than training.

    python benchmarks/overhead.py --png overhead.png
    python benchmarks/overhead.py --models mlp --seconds 20

A run in pieces, one table and one picture of all of them:

    python benchmarks/overhead.py --models gpt --parts off costs --rows rows.json
    python benchmarks/overhead.py --models gpt --parts auto --rows rows.json
    python benchmarks/overhead.py --models resnet18 --parts auto --batch 4 ...
    python benchmarks/overhead.py --models --rows rows.json --png overhead.png
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from overhead_memory import memory
from overhead_models import MODELS, OPTIMIZERS
from overhead_report import draw, joined, report
from overhead_time import automatic, by_measure, off_cadence

PARTS = ("off", "costs", "auto", "memory")


def row(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure one model."""
    found: dict[str, Any] = {"model": name}
    parts, seconds, batch = chosen.parts, chosen.seconds, chosen.batch
    if "off" in parts:
        found |= off_cadence(name, seconds)
    if name == "tiny":
        return found
    if "costs" in parts:
        found |= by_measure(name)
    if "auto" in parts:
        found["auto"] = automatic(name, seconds, batch)
    if "memory" in parts:
        size = f"batch {batch or 'of practice'}"
        found["memory"] = {
            f"{o}, {size}, {title}": peaks
            for o in chosen.optimizers
            for title, peaks in memory(name, o, batch).items()
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int,
                        help="samples, for the parts auto and memory")  # fmt: skip
    parser.add_argument("--png", type=Path)
    parser.add_argument("--rows", type=Path,
                        help="JSON of earlier runs, added to")  # fmt: skip
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for name in chosen.models:
        rows.append(row(name, chosen))
        if chosen.rows:  # at once: a run that is cut off has left what it has
            joined(rows[-1:], chosen.rows)
    if chosen.rows:
        rows = joined([], chosen.rows)
    print(f"torch {torch.__version__}, {chosen.threads} threads")
    print(report(rows))
    if chosen.png:
        draw(rows, chosen.png)


if __name__ == "__main__":
    main()
