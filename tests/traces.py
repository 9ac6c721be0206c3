"""A script with the analysis and without it: what it measures, what it leaves."""

import contextlib
import hashlib
import math
import random

import numpy as np
import torch

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import (
    Condensation,
    DropoutNoise,
    Masks,
    ReceivedGradient,
    Regularizer,
    Sharpness,
)


def digest(*things):
    """A hash of tensors and states, bit for bit."""
    found = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            flat = thing.detach().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(thing).encode())
    return found.hexdigest()


def left_behind(model, optimizer):
    """Everything that a step leaves behind, by name."""
    state = optimizer.state_dict()["state"]
    slots = [x for s in state.values() for x in s.values() if torch.is_tensor(x)]
    return {
        "parameters": digest(*model.parameters()),
        "gradients": digest(
            *(p.grad for p in model.parameters() if p.grad is not None)
        ),
        "buffers": digest(*model.buffers()),
        "optimizer": digest(*slots),
        "modes": digest([m.training for m in model.modules()]),
        "torch": digest(torch.get_rng_state()),
        "python": digest(random.getstate()),
        "numpy": digest([x.tolist() for x in np.random.get_state()[1:3:2]]),
    }


def anatomy(model):
    """Classes, hooks and attributes of all modules, by name."""
    return {
        name: (
            type(m).__module__, type(m).__qualname__, sorted(vars(m)),
            [len(x) for key, x in sorted(vars(m).items()) if key.endswith("_hooks")],
            {k: x for k, x in vars(m).items() if isinstance(x, (int, float, str))},
        ) for name, m in model.named_modules()
    }  # fmt: skip


def train(make, loss_of, attach, loss=None):
    """A script of three steps, measured at the first and the third.

    ``loss_of(model)`` draws a batch and returns the script's loss on it; ``loss`` is
    what the analysis is told of it.
    """
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen, analysis = [], None
    with contextlib.ExitStack() as stack:
        if attach:
            measures = [
                ReceivedGradient(), Regularizer(num_masks=5), DropoutNoise(), Masks(),
                Condensation(),
                Sharpness(
                    max_matvecs=2, trace_matvecs=2, density_steps=2, slice_points=3
                ),
            ]  # fmt: skip
            analysis = stack.enter_context(
                tdi.attach_analysis(
                    model, loss, log_dir=False, every=2, measures=measures
                )
            )
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            seen.append(left_behind(model, optimizer))
    return model, seen, analysis


def compared(make, loss_of, loss=None):
    """Train with and without the analysis; return it where it has left no trace."""
    plain, expected, _ = train(make, loss_of, False)
    model, seen, analysis = train(make, loss_of, True, loss)
    assert seen == expected
    assert anatomy(model) == anatomy(plain)
    return analysis


# Errors of the sites' parts of R_1, which one draw does not tell where samples meet.
PARTS = "regularizer/R1_standard_error/<site>"


def assert_measured(analysis, sites=(), lacking=None):
    """Every applicable tag is there and finite; ``lacking`` is what cannot be, why."""
    lacking = lacking or {}
    # Masks of a small batch can be too alike to have a standard error, and samples that
    # meet, or a single one, leave the sites' parts without.
    error = "regularizer/R1_standard_error"
    alike = {error} if "no standard error" in analysis.absent.get(error, "") else set()
    apart = PARTS not in analysis.absent
    alike |= set() if apart else {PARTS}
    assert set(analysis.absent) - alike == set(lacking), analysis.absent
    assert all(reason in analysis.absent[n] for n, reason in lacking.items())
    latest = analysis.latest
    assert all(math.isfinite(value) for value in latest.values())
    wanted = {
        "loss/R_S", "loss/modified", "regularizer/R1", "regularizer/R2",
        "regularizer/R1_standard_error", "regularizer/R2_dropout_noise",
        "regularizer/R2_dropout_noise_standard_error",
    }  # fmt: skip
    if "sharpness" not in lacking:
        wanted |= {"sharpness/top_eigenvalue", "sharpness/trace"}
    assert wanted - alike <= set(latest)
    assert any(tag.startswith("condensation/effective_ratio/") for tag in latest)
    observed = {site.name for site in analysis.sites if site.observed and site.p > 0}
    measured = {t.removeprefix("regularizer/R1/") for t in latest if "/R1/" in t}
    assert set(sites) <= measured <= observed
    for site in measured:
        assert not apart or latest[f"{error}/{site}"] >= 0
        assert 0 <= latest[f"mask/keep_rate/{site}"] <= 1
        assert abs(latest[f"mask/z_score/{site}"]) < 5
    return observed, measured
