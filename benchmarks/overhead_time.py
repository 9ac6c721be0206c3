"""Step times of `overhead.py`: off cadence, by measure, and of ``every="auto"``."""

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.optim.optimizer as hooks
from overhead_models import MODELS
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import default_measures

NEVER = 10**9
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01),
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-3),
}
Run = Callable[[int], float]  # from steps to seconds


class Script:
    """A training loop, watched or not."""

    clock = staticmethod(CLOCKS["wall"])

    def __init__(self, name: str, optimizer: str = "sgd", **options):
        torch.manual_seed(0)
        self.model, self.inputs, self.targets = MODELS[name]()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()
        self.analysis = None
        if options:
            self.analysis = tdi.attach_analysis(
                self.model, optimizer=self.optimizer, log_dir=False, **options
            )

    def switch(self) -> Callable[[bool], None]:
        """Attach what has nothing to do; return what puts its hooks there or away."""
        cheap = [m for m in default_measures() if m.name in ("gradient", "masks")]
        self.analysis = tdi.attach_analysis(
            self.model, optimizer=self.optimizer, log_dir=False, every=NEVER,
            measures=cheap,
        )  # fmt: skip
        self.run(5)  # the step that measures is among these
        places = (
            hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks,
            self.model._forward_pre_hooks, self.model._forward_pre_hooks_with_kwargs,
        )  # fmt: skip
        kept = [dict(place) for place in places]

        def watch(on: bool) -> None:
            for place, own in zip(places, kept, strict=True):
                place.clear()
                place.update(own if on else {})

        return watch

    def run(self, steps: int) -> float:
        """Train; return the seconds that it took."""
        if self.analysis is not None:
            # It has stood still while the other script ran: that earns it nothing.
            self.analysis._clock = time.perf_counter()
        started = self.clock()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(self.inputs), self.targets).backward()
            self.optimizer.step()
        return self.clock() - started


class Turns:
    """Rounds of bare, watched, watched, bare, in blocks of steps."""

    def __init__(self, bare: Run, watched: Run, seconds: float, fewest: int = 8):
        block = max(1, round(0.05 / statistics.median(bare(1) for _ in range(5))))
        self.bare, self.watched, self.steps = [], [], 2 * block
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(self.bare) < fewest:
            a, b = bare(block), watched(block)
            c, d = watched(block), bare(block)
            self.bare.append(a + d)
            self.watched.append(b + c)

    def outside(self) -> float:
        """Share of the watched script's wall time that the bare one does not need."""
        return 1 - sum(self.bare) / sum(self.watched)


def off_cadence(name: str, seconds: float) -> dict[str, Any]:
    """Steps at which nothing is due, beside bare ones, by turns step by step."""
    script = Script(name)
    watch = script.switch()
    left = dict.fromkeys((True, False), math.inf)
    for on in (True, False) * 2:
        watch(on)
        script.run(1)
        gc.collect()
        gc.disable()
        before = gc.get_count()[0]
        script.run(50)
        left[on] = min(left[on], (gc.get_count()[0] - before) / 50)
        gc.enable()
    extra, bare, order = [], [], (False, True, True, False)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        took = []
        for on in order:
            watch(on)
            took.append(script.run(1))
        pairs = list(zip(took, order, strict=True))
        bare.append(sum(t for t, on in pairs if not on) / 2)
        extra.append(sum(t for t, on in pairs if on) / 2 - bare[-1])
        order = tuple(not on for on in order)
    script.analysis.detach()
    return {"left": [left[False], left[True]], "bare": bare, "extra": extra}


def off_share(row: dict[str, Any]) -> tuple[float, float]:
    """What a step takes more off cadence, over a bare one's time, and its error."""
    # Of medians of samples drawn again: outliers are the machine's own.
    draw, extra = random.Random(0), row["extra"]
    again = [statistics.median(draw.choices(extra, k=len(extra))) for _ in range(400)]
    step = statistics.median(row["bare"])
    return statistics.median(extra) / step, statistics.stdev(again) / step


def by_measure(name: str, step: float) -> dict[str, float]:
    """Return what each measure costs when it is taken again, in training steps."""
    script = Script(name, every=NEVER)
    script.run(2)
    latest = script.analysis.measure()
    script.analysis.detach()
    stem = "cost/seconds/"
    return {
        tag.removeprefix(stem): seconds / step
        for tag, seconds in latest.items()
        if tag.startswith(stem)
    }


def automatic(name: str, seconds: float) -> dict[str, float]:
    """Shares of `every="auto"`, from outside and as it counts itself."""
    bare, watched = Script(name), Script(name, every="auto", budget=0.05)
    watched.run(1)
    cadence = watched.analysis._cadence
    credit = cadence.measured_seconds
    turns = Turns(bare.run, watched.run, seconds)
    later = cadence.measured_seconds - credit
    watched.analysis.detach()
    whole = sum(turns.watched)
    return {
        "outside": turns.outside(),
        "own": later / whole,
        "credit": credit / (credit + whole),
        "told": watched.analysis.cost_share,
        "seconds": whole,
        "taken": len(watched.analysis.history.get("regularizer/R2", [])),
    }
