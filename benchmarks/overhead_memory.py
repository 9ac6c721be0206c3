"""Peak memory of `overhead.py`, in fresh processes; run as a script, in this one."""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from overhead_models import OPTIMIZERS, Script
from torch.profiler import ProfilerActivity, profile

# What is freed is given back at once, so that holes in the heap do not count.
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")


class Noted:
    """A measure, and the peak of the process while it is taken, in kilobytes."""

    def __init__(self, measure, peaks: dict[str, float]) -> None:
        self._measure, self._peaks = measure, peaks

    def __getattr__(self, name: str):
        return getattr(self._measure, name)

    def __call__(self, snapshot):
        """What the measure returns."""
        note(self._peaks, "all")
        forget()
        try:
            return self._measure(snapshot)
        finally:
            note(self._peaks, self._measure.name)
            note(self._peaks, "all")


def note(peaks: dict[str, float], name: str) -> None:
    """Keep the peak since the last one was forgotten, if it is the highest so far."""
    peaks[name] = max(resident("VmHWM"), peaks.get(name, 0))


def forget() -> None:
    """Forget this process's peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str) -> int:
    """Memory of this process in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what))


def peaks(
    name: str, optimizer: str, batch: int | None, watched: bool
) -> dict[str, float]:
    """Return the peaks of two steps, and what the process held before, in kilobytes."""
    found: dict[str, float] = {}

    def script(model: str) -> Script:
        if not watched:
            return Script(model, optimizer, batch)
        # A bare script does without.
        from torch_dropout_ir.analysis.measures import default_measures

        measures = default_measures()
        # Of products there are two vectors, from the first few on.
        measures[-1].max_matvecs = measures[-1].density_steps = 4
        noted = [Noted(m, found) for m in measures]
        return Script(model, optimizer, batch, every=1, measures=noted)

    # The code that measures load is in memory once, whatever the model's size.
    script("tiny").run(3)
    gc.collect()
    found.clear()
    empty = resident("VmRSS")
    forget()
    script(name).run(2)  # what condensation keeps is there from the second one on
    note(found, "all")
    return found | {"empty": empty}


def memory(name: str, optimizer: str, batch: int | None) -> dict[str, dict[str, float]]:
    """Return peak memory over that of a bare script, by measure and of all.

    That of processes as a whole, as a user has them; and of what is beyond what they
    hold before the model is made, where what is freed is given back at once.
    """
    found = {}
    for title, malloc in (("process", {}), ("beyond", MALLOC)):
        bare, own = (
            _child(name, optimizer, batch, watched, malloc) for watched in (False, True)
        )
        least, empty = bare.pop("empty"), own.pop("empty")
        if title == "process":
            least = empty = 0
        found[title] = {
            key: max(1.0, (x - empty) / (bare["all"] - least)) for key, x in own.items()
        }
    found["beyond"]["floor"] = floor(name, optimizer, batch)
    return found


def _child(
    name: str, optimizer: str, batch: int | None, watched: bool, malloc: dict[str, str]
) -> dict[str, float]:
    """Return the peaks of a fresh process."""
    given = [sys.executable, __file__, name, "--optimizer", optimizer]
    given += ["--batch", str(batch)] if batch else []
    given += ["--watched"] if watched else []
    said = subprocess.run(given, env=os.environ | malloc, check=True, text=True,
                          stdout=subprocess.PIPE).stdout  # fmt: skip
    return json.loads(said.splitlines()[-1])


def floor(name: str, optimizer: str, batch: int | None) -> float:
    """Return the least peak of sharpness over training's.

    That is four times the parameters, and what the optimizer keeps.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        script = Script(name, optimizer, batch)
        script.run(2)
    own = sum(x.nbytes for x in script.model.parameters())
    states = script.optimizer.state.values()
    state = sum(x.nbytes for s in states for x in s.values() if torch.is_tensor(x))
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if "Allocation" in str(event.tag):
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    peak = max(itertools.accumulate(size for _, size in sorted(sizes)))
    return max(1.0, (4 * own + state + script.inputs.nbytes) / peak)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=peaks.__doc__)
    parser.add_argument("model")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--watched", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        json.dumps(peaks(chosen.model, chosen.optimizer, chosen.batch, chosen.watched))
    )
