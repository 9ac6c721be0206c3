"""Step times of `overhead.py`: off cadence, by measure, and of ``every="auto"``."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch.optim.optimizer as hooks
from overhead_models import FEW, Script

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

NEVER = 10**9
REPEATED, ENOUGH = 8, 30  # measurements of a kind, and seconds of them


def switch(script: Script) -> Callable[[bool], None]:
    """Attach what has nothing to do; return what puts its hooks there or away."""
    cheap = [m for m in default_measures() if m.name in ("gradient", "masks")]
    script.analysis = tdi.attach_analysis(
        script.model, optimizer=script.optimizer, log_dir=False, every=NEVER,
        measures=cheap,
    )  # fmt: skip
    script.run(5)  # the step that measures is among these
    places = (
        hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks,
        script.model._forward_pre_hooks, script.model._forward_pre_hooks_with_kwargs,
    )  # fmt: skip
    kept = [dict(place) for place in places]

    def watch(on: bool) -> None:
        for place, own in zip(places, kept, strict=True):
            place.clear()
            place.update(own if on else {})

    return watch


def off_cadence(name: str, seconds: float) -> dict[str, Any]:
    """Steps at which nothing is due, beside bare ones, by turns step by step."""
    script = Script(name, batch=FEW[name])
    watch = switch(script)
    left = dict.fromkeys((True, False), math.inf)
    for on in (True, False) * 2:
        watch(on)
        script.run(1)
        gc.collect()
        gc.disable()
        before = gc.get_count()[0]
        script.run(20)
        left[on] = min(left[on], (gc.get_count()[0] - before) / 20)
        gc.enable()
    extra, order = {"wall": [], "cpu": []}, (False, True, True, False)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        more = dict.fromkeys(extra, 0.0)
        for on in order:
            watch(on)
            cpu = time.thread_time()
            wall = script.run(1)
            took = {"wall": wall, "cpu": time.thread_time() - cpu}
            more = {k: x + (took[k] if on else -took[k]) / 2 for k, x in more.items()}
        for clock, x in more.items():
            extra[clock].append(x)
        order = tuple(not on for on in order)
    script.analysis.detach()
    return {"left": [left[False], left[True]], **extra}


def extra(row: dict[str, Any], clock: str) -> tuple[float, float]:
    """Seconds that a step takes more off cadence, and their error."""
    # Of medians of samples drawn again: outliers are the machine's own.
    draw, found = random.Random(0), row[clock]
    again = [statistics.median(draw.choices(found, k=len(found))) for _ in range(400)]
    return statistics.median(found), statistics.stdev(again)


def by_measure(name: str) -> dict[str, Any]:
    """Return a bare step's seconds, and each measure's own when it is taken again."""
    script = Script(name)
    script.run(2)
    bare = [script.run(1) for _ in range(8)]
    cheap, dear = [], []
    for measure in default_measures():
        (dear if measure.name == "sharpness" else cheap).append(measure)
    costs = {}
    for measures in (cheap, dear):
        script.analysis = tdi.attach_analysis(
            script.model, optimizer=script.optimizer, log_dir=False, every=NEVER,
            measures=measures,
        )  # fmt: skip
        started = time.perf_counter()
        script.run(1)
        while len(script.analysis.history.get("cost/share", ())) < REPEATED and (
            time.perf_counter() - started < ENOUGH
        ):
            script.analysis.measure()
        for tag, seen in script.analysis.history.items():
            if tag.startswith("cost/seconds/"):
                again = [seconds for _, seconds in seen]
                found = statistics.median(again[1:] or again)
                costs[tag.removeprefix("cost/seconds/")] = found
        script.analysis.detach()
    bare += [script.run(1) for _ in range(8)]
    return {"bare": bare, "costs": costs}


def automatic(name: str, seconds: float, batch: int | None) -> dict[str, Any]:
    """Share of `every="auto"` from the first step on, from outside and by own count."""
    bare = Script(name, batch=batch)
    watched = Script(name, batch=batch, every="auto", budget=0.05)
    bare.run(2)
    # What the other script has left in caches is little beside a second.
    block = max(1, round(1 / bare.run(1)))
    cadence = watched.analysis._cadence
    found = {"bare": [], "watched": [], "own": []}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        before = cadence.measured_seconds
        first, alone, second = (x.run(block) for x in (watched, bare, watched))
        found["bare"].append(2 * alone)
        found["watched"].append(first + second)
        found["own"].append(cadence.measured_seconds - before)
    taken = {
        measure: len(watched.analysis.history.get(f"cost/seconds/{measure}", []))
        for measure in cadence._debt
    }
    watched.analysis.detach()
    return found | {
        "taken": taken,
        "told": watched.analysis.cost_share,
        "batch": len(watched.inputs),
    }


def share(found: dict[str, Any]) -> tuple[float, float]:
    """Share of the wall time that a bare script does not need, and its error."""
    whole, bare = sum(found["watched"]), sum(found["bare"])
    rounds = zip(found["watched"], found["bare"], found["own"], strict=True)
    noise = [w - b - own for w, b, own in rounds]
    return 1 - bare / whole, statistics.stdev(noise) * len(noise) ** 0.5 / whole
