"""Peak memory of the estimators against that of a step; Linux only.

A step holds what is kept for going backward, what is made on the way, and the
parameters' gradients, which it allocates; parameters, batch and state of an optimizer
are there before.
"""

import multiprocessing
import os
from pathlib import Path

from regularizers_models import models, passes


def memory() -> None:
    """Print what a call adds at its peak, and its ratio to what a step adds."""
    for model, batch in models().items():
        print(f"\n{model}: peak memory added")
        for name in passes(*batch):
            try:
                added = peak(model, name)
            except RuntimeError as err:  # batch norm has no third derivative
                print(f"  {name:20}none: {err}")
                continue
            if name == "forward-backward":
                base = added
            print(f"  {name:20}{added:>8.0f} MiB,{added / base:>6.2f} of a step's")


def peak(model: str, name: str) -> float:
    """Peak memory that a call adds, MiB, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_dropout_ir", __name__])
    with context.Pool(1) as pool:
        return pool.apply(_added, (model, name))


def _added(model: str, name: str) -> float:
    net, x, y = models()[model]
    passes(net, x[:2], y[:2])[name]()  # what is loaded once is nobody's
    net.zero_grad()
    run = passes(net, x, y)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of this process's memory, KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))
