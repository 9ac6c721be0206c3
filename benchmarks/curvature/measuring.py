"""Seconds and megabytes of a call, and the unit of time."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir import vectors

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt


def seconds(run: Callable, turns: int = 5) -> float:
    """Median wall time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(turns):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def side_by_side(runs: dict[str, Callable], turns: int = 5) -> dict[str, float]:
    """Median wall time of each of several calls, taken in turns.

    A machine that is slower for a while is then slower for all of them. Each runs once
    before it is timed, so that none pays for what another has left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run, 1))
    return {name: statistics.median(x) for name, x in times.items()}


def resident(field: str) -> float:
    """Megabytes of this process, as Linux counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def peak(run: Callable) -> float:
    """Megabytes that a call adds at its peak, in a process of its own.

    What is freed is given back at once in it, so that holes in the heap do not count.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        heap = ctypes.CDLL(None)  # glibc
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            heap.mallopt(option, 2**16)
        heap.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the parent's peak
        before = resident("VmRSS")
        run()
        queue.put(resident("VmHWM") - before)

    process = context.Process(target=child)
    process.start()
    used = queue.get()
    process.join()
    return used


def plain_product(model: nn.Module, batch) -> Callable:
    """One product by jvp(grad), from scratch each time."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    v = vectors.random_like(params)

    def loss(p):
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(
                torch.func.functional_call(model, p, (batch[0],)), batch[1]
            )

    return lambda: torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]
