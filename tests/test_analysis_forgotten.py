"""Analyses that nobody detaches."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)

import torch_dropout_ir as tdi


def train(model, sgd):
    F.mse_loss(model(torch.ones(4, 2)), torch.ones(4, 2)).backward()
    sgd.step()


@pytest.fixture
def collected_by_hand():
    gc.collect()
    tdi.attach_analysis(nn.Linear(1, 1), log_dir=False).detach()  # others' hooks go
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collected_by_hand")
def test_one_that_is_collected_in_a_step_does_not_break_it():
    """Torch goes through its hooks then, of which some are the analysis's."""
    before = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    found = []

    def collect(*_):
        found.append(forgotten() is not None)
        gc.collect()

    collects = register_optimizer_step_pre_hook(collect)
    held = [tdi.attach_analysis(nn.Linear(2, 2), log_dir=False)]
    held.append(held)  # a cycle: it lives until a collection
    forgotten = weakref.ref(held[0])
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        del held
        train(model, sgd)
        train(model, sgd)
        assert analysis.step == 2 and len(analysis.history["regularizer/R2"]) == 2
    collects.remove()
    assert found == [True, False]
    assert (
        dict(_global_optimizer_pre_hooks),
        dict(_global_optimizer_post_hooks),
    ) == before
