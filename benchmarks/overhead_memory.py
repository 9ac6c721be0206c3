"""Peak memory of `overhead.py`, in fresh processes."""

import gc
import itertools
import multiprocessing
import os
import warnings
from pathlib import Path

import torch
from overhead_time import Script
from torch.profiler import ProfilerActivity, profile

from torch_dropout_ir.analysis.measures import default_measures

MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")


def peak(
    name: str, optimizer: str, batch: int | None, measures: list[str] | None, queue
) -> None:
    """Put the peak memory of two steps above an empty process's, in kilobytes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def script(model: str) -> Script:
        if measures is None:
            return Script(model, optimizer, batch)
        chosen = [m for m in default_measures() if m.name in measures]
        return Script(model, optimizer, batch, every=1, measures=chosen)

    script("tiny").run(3)
    gc.collect()
    empty = resident("VmRSS")
    watched = script(name)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    # What condensation keeps is in memory from the second measurement on.
    watched.run(1 if measures == ["sharpness"] else 2)
    queue.put(resident("VmHWM") - empty)


def resident(what: str) -> int:
    """Memory of this process in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what))


def memory(name: str, optimizer: str, batch: int | None) -> dict[str, float]:
    """Return peak memory over that of a bare script: by measure, and of all."""
    context = multiprocessing.get_context("spawn")
    kept = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    names = [m.name for m in default_measures()]
    peaks = {}
    for measures in (None, *([n] for n in names), names):
        queue = context.Queue()
        given = (name, optimizer, batch, measures, queue)
        process = context.Process(target=peak, args=given)
        process.start()
        key = measures and ("all" if measures is names else measures[0])
        peaks[key] = queue.get()
        process.join()
    for key, value in kept.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value
    bare = peaks.pop(None)
    over = {key: found / bare for key, found in peaks.items()}
    return over | {"floor": floor(name, optimizer, batch)}


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
