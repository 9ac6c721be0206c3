"""The compiled ops as torch calls them: threads, strides, memory, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.csrc.harness import ISAS, RNG, ROOT, expected_bits, unpacked
from torch_dropout_ir import ops

pytestmark = pytest.mark.skipif(not ops.COMPILED, reason="the extension is not built")

RNG_TENSOR = torch.from_numpy(RNG)
DIGEST = """
import hashlib, sys, torch, torch_dropout_ir.ops as ops
digest = hashlib.sha256()
rng = torch.tensor([1234567890123, 987654321])
op = torch.ops.torch_dropout_ir
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.linspace(-5, 5, 70001, dtype=torch.float64).to(dtype)
    y, packed = op.dropout_forward(x, rng, 0.3)
    z = op.mask_apply(y, packed, 1.7)
    for part in (y.double(), z.double(), packed, op.unit_counts(packed, 70, 1000)):
        digest.update(part.numpy().tobytes())
    counts = torch.arange(1000)
    op.dropout_counted(x[:70000], rng, 0.3, counts)
    digest.update(counts.numpy().tobytes())
digest.update(op.mask_draw(rng, torch.tensor(0.7), 9999).numpy().tobytes())
print(ops.COMPILED, digest.hexdigest())
"""


def test_environment_variable_changes_nothing_but_speed() -> None:
    printed = set()
    for isa in ("", "portable", *(name.decode() for name in ISAS[1:])):
        environment = {**os.environ, "TORCH_DROPOUT_IR_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        printed.add(run.stdout.strip())
    assert len(printed) == 1
    assert printed.pop().startswith("True ")


def test_thread_counts_agree() -> None:
    op = torch.ops.torch_dropout_ir
    numel = 9 * 32768 + 77
    x = torch.linspace(-3, 3, numel)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, packed = op.dropout_forward(x, RNG_TENSOR, 0.2)
            counts = op.unit_counts(packed, numel // 37, 37)
            drawn = op.mask_draw(
                RNG_TENSOR, torch.tensor(0.2, dtype=torch.float64), numel
            )
            results.append((y, packed, op.mask_apply(x, packed, 2.0), counts, drawn))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)
    torch.testing.assert_close(results[0][1], results[0][4], rtol=0, atol=0)


def test_strides_do_not_move_the_mask() -> None:
    op = torch.ops.torch_dropout_ir
    x = torch.arange(1.0, 421.0).view(4, 5, 21)
    for view in (x.permute(2, 0, 1), x[:, ::2], x[0, 0].expand(3, 21), x[1, 1, 1]):
        y, packed = op.dropout_forward(view, RNG_TENSOR, 0.5)
        assert y.is_contiguous()
        assert y.shape == view.shape
        keep = torch.from_numpy(expected_bits(0, view.numel(), 0.5)).view(view.shape)
        expected = torch.where(keep, view * 2, torch.zeros_like(view))
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        again = op.mask_apply(view, packed, 2.0)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_large_results_do_not_share_memory() -> None:
    op = torch.ops.torch_dropout_ir
    x = torch.arange(1.0, 2**23 + 100)  # past 32 MiB, where results are recycled

    def check(y: torch.Tensor, packed: torch.Tensor) -> None:
        keep = torch.from_numpy(unpacked(packed.numpy(), x.numel()))
        assert torch.equal(y, torch.where(keep, x * 2, 0.0))

    first = op.dropout_forward(x, RNG_TENSOR, 0.5)
    address = first[0].data_ptr()
    view = first[0][5:]
    second = op.dropout_forward(x, RNG_TENSOR + 1, 0.5)
    check(*first)
    check(*second)
    del first
    third = op.dropout_forward(x, RNG_TENSOR + 2, 0.5)
    check(*third)
    assert third[0].data_ptr() != address, "a view still holds the first result"
    assert torch.equal(view[:3] != 0, view[:3] == 2 * x[5:8])
    del view, second
    check(*op.dropout_forward(x, RNG_TENSOR + 3, 0.5))


X = torch.ones(100)
COUNTS = torch.zeros(10, dtype=torch.int64)
PACKED = torch.zeros(16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("dropout_forward", (X, RNG_TENSOR, 1.5), "between 0 and 1, but got 1.5"),
        ("dropout_forward", (X, RNG_TENSOR, float("nan")), "between 0 and 1, but got"),
        ("dropout_forward", (X.int(), RNG_TENSOR, 0.5), "float16, got int32"),
        ("dropout_forward", (X, RNG_TENSOR.int(), 0.5), "int64, got int32"),
        ("dropout_forward", (X, RNG_TENSOR[:1], 0.5), r"shape \[2\], got"),
        ("dropout_counted", (X, RNG_TENSOR, 1.5, COUNTS), "between 0 and 1"),
        ("dropout_counted", (X, RNG_TENSOR, 0.5, COUNTS.int()), "int64, got int32"),
        (
            "dropout_counted",
            (X, RNG_TENSOR, 0.5, COUNTS[:7]),
            "as many units, got 1 .* 7",
        ),
        (
            "dropout_counted",
            (X, RNG_TENSOR, 0.5, COUNTS[:0]),
            "as many units, got 1 .* 0",
        ),
        ("dropout_counted", (X, RNG_TENSOR, 0.5, COUNTS[::2]), "contiguous `counts`"),
        ("mask_apply", (X.bool(), PACKED, 1.0), "float16, got bool"),
        ("mask_apply", (X, PACKED[:8], 1.0), "16 bytes for 100 elements, got 8"),
        ("mask_apply", (X, PACKED[:9], 1.0), "whole 8-byte words"),
        ("mask_apply", (X, PACKED.char(), 1.0), "uint8, got int8"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(-0.1), 8), "between 0 and 1"),
        ("mask_draw", (RNG_TENSOR, torch.tensor([0.1]), 8), "no dimension"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(1), 8), "float64, got int64"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(0.1), -1), ">= 0, got -1"),
        ("unit_counts", (PACKED, 13, 10), "16 bytes for 13 rows of 10 units"),
        ("unit_counts", (PACKED, 2**62, 4), "16 bytes for"),
        ("unit_counts", (PACKED, -1, 10), ">= 0, got -1 and 10"),
    ],
)
def test_errors_name_the_op_and_what_was_got(
    op: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(torch.ops.torch_dropout_ir, op)(*arguments)
