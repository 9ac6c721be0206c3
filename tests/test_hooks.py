"""Hooks of ours are called where torch's would be."""

import sys
import threading

import pytest
import torch
from torch import nn

from torch_dropout_ir import functional, hooks, module_calls
from torch_dropout_ir.hooks import after_call, before_call


class _Failing(nn.Module):
    def forward(self, x):
        if x.isnan().any():
            raise ArithmeticError
        return -x


def _hooked(module, ours):
    """Return who is called, with hooks of a user's between two pairs of ours."""
    called = []

    def note(name):
        return lambda *given: called.append((name, given[1:]))

    if ours:
        removers = [
            before_call(module, note("inner")),
            after_call(module, note("behind"), always=True),
        ]
    else:
        removers = [
            module.register_forward_pre_hook(note("inner"), prepend=True).remove,
            module.register_forward_hook(note("behind"), always_call=True).remove,
        ]
    module.register_forward_pre_hook(note("user"))
    module.register_forward_hook(note("user"))
    if ours:
        removers += [
            before_call(module, note("outer")),
            after_call(module, note("plain")),
            after_call(module, note("first"), first=True, always=True),
        ]
    else:
        removers += [
            module.register_forward_pre_hook(note("outer"), prepend=True).remove,
            module.register_forward_hook(note("plain")).remove,
            module.register_forward_hook(
                note("first"), prepend=True, always_call=True
            ).remove,
        ]
    return called, removers


@pytest.mark.parametrize("fails", [False, True])
def test_they_are_called_when_torchs_are_and_leave_nothing(fails):
    x = torch.full((2,), torch.nan if fails else 1.0)
    found = []
    for ours in (True, False):
        module = _Failing()
        called, removers = _hooked(module, ours)
        for remove in (None, *removers):
            if remove is not None:
                remove()
            try:
                module(x)
            except ArithmeticError:
                called.append("error")
            called.append("next")
        for remove in removers:  # once more does nothing
            remove()
        assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
        assert not module._forward_hooks_always_called
        found.append(str(called))
    assert found[0] == found[1]
    assert ("error" in found[0]) == fails


class _Block(nn.Sequential):
    """No layer of torch's: a pass has hooks on it."""

    def forward(self, x):
        return super().forward(x)


def _interrupt(place, seen):
    """Return what traces the code around hooks, and interrupts at a line of it."""
    names = {"before_call", "after_call", "switch_off", "_hook", "_enter", "<lambda>"}
    files = {x.__file__ for x in (functional, hooks, module_calls)}

    def line(_, event, __):
        if event == "line":
            seen.append(None)
            if len(seen) == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    def call(frame, *_):
        code = frame.f_code
        return line if code.co_filename in files and code.co_name in names else None

    return call


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_anywhere_between_hooks_leaves_none(threads):
    done = threading.Event()
    others = [threading.Thread(target=done.wait) for _ in range(threads - 1)]
    for other in others:
        other.start()
    try:
        interrupted_anywhere()
    finally:
        done.set()


def interrupted_anywhere():
    model = _Block(nn.Linear(2, 2), _Block(nn.Dropout(0.5), nn.Linear(2, 2)))
    x, place, seen = torch.ones(3, 2), 0, []
    while len(seen) == place:  # it has been interrupted there
        seen.clear()
        place += 1
        sys.settrace(_interrupt(place, seen))
        try:
            with functional.at_sites(model, functional.fresh):
                model(x)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert module.training and "forward" not in vars(module)
        assert not torch._C._len_torch_function_stack()
    assert place > 50
