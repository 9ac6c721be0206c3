"""What is private to torch may be gone in another version."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir
from torch_dropout_ir import arrivals, collectives, recomputation
from torch_dropout_ir.regularizers import line_calls

PACKAGE = Path(torch_dropout_ir.__file__).parent
# Those that torch has had for years, or that scripted modules alone need.
RELIED_ON = {
    "DisableTorchFunction", "_TorchDispatchModeKey", "_autograd", "_set_grad_enabled",
    "_get_graph_executor_optimize", "_set_graph_executor_optimize",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda x: str(x.relative_to(PACKAGE))
)
def test_names_of_torchs_core_are_asked_for(path):
    """By ``getattr``, with what to do where there is none."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch._C"
    }
    assert used <= RELIED_ON


def test_what_cannot_be_known_to_be_alone_is_not_written_on(monkeypatch):
    x = torch.ones(3)
    assert line_calls.room(x, alone=True) is x
    monkeypatch.setattr(line_calls, "_USES", None)
    assert line_calls.room(x, alone=True) is not x


def test_a_collective_ends_where_nothing_tells_who_holds_a_tensor(monkeypatch):
    monkeypatch.setattr(collectives, "_USES", lambda _: 0)
    with collectives.released(torch.ones(3)):
        pass


def test_blocks_of_a_torch_that_hides_how_they_run_again_are_blocks(monkeypatch):
    monkeypatch.setattr(recomputation, "checkpointed_block", lambda: None)
    seen = []

    def block(x):
        seen.append(recomputation.Blocks(contextlib.nullcontext).look())
        return x * x

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [True, False]  # in the block, and in the run again


def test_without_a_number_of_the_backward_pass_there_is_one(monkeypatch):
    x, found = torch.ones(3, requires_grad=True), []
    for task in (arrivals._TASK, int):
        monkeypatch.setattr(arrivals, "_TASK", task)
        value = x.square().sum()
        with arrivals.arrivals([x], lambda _, g: found.append(g), [value]):
            torch.autograd.grad(value, x)
    assert torch.equal(*found)
