"""Floor 1: the ops' schemas, their kernels, and what torch must know beyond them.

The pure-Python kernels serve every device; the compiled ones, where they could be
built, take precedence on CPU and CUDA. What small estimates are made of in one
operation is of the compiled ones alone: several of torch's take its place elsewhere.
"""

from __future__ import annotations

import importlib
import warnings
import zlib
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir import kernels

_LIBRARY = torch.library.Library("torch_dropout_ir", "DEF")
_SCHEMAS = (
    "dropout_forward(Tensor x, Tensor? rng, float p) -> (Tensor, Tensor)",
    "dropout_counted(Tensor x, Tensor? rng, float p, Tensor(a!) counts)"
    " -> (Tensor, Tensor)",
    "mask_apply(Tensor x, Tensor packed, float scale) -> Tensor",
    "mask_draw(Tensor rng, Tensor p, SymInt numel) -> Tensor",
    "unit_counts(Tensor packed, int rows, int units) -> Tensor",
)
# By the compiled kernels of the CPU alone; what they return may depend on the values.
_OF_FEW = (
    "form_sums(Tensor[] inputs, Tensor[] gradients, float[] factors, int[] rows,"
    " int[] units, int[] sites) -> Tensor[]",
    "diagonal_roots(Tensor diagonal) -> Tensor[]",
    "softmax_roots(Tensor log_softmax, Tensor? slope, Tensor? bend, int classes)"
    " -> Tensor[]",
    "block_roots(Tensor columns) -> Tensor[]",
    "loss_blocks(Tensor outputs, int[] program, float[] numbers, Tensor[] values)"
    " -> Tensor",
)
for _schema in _OF_FEW:
    _LIBRARY.define(_schema)
for _schema in _SCHEMAS:
    _name = _schema[: _schema.index("(")]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, getattr(kernels, _name), "CompositeExplicitAutograd")


def _load_compiled_kernels() -> bool:
    try:
        compiled = importlib.import_module("torch_dropout_ir._C")
    except (ImportError, OSError) as err:
        warnings.warn(
            f"torch_dropout_ir: the compiled kernels could not be loaded ({err}); the "
            "pure-Python ones draw the same masks, 10 times slower and more. To build "
            "them: pip install --no-build-isolation -e . (a C++17 compiler is needed).",
            stacklevel=2,
        )
        return False
    # Kernels read their arguments by place: those of other schemas would crash.
    expected = zlib.crc32("\n".join((*_SCHEMAS, *_OF_FEW)).encode()) % 2**31
    built_for = getattr(compiled, "SCHEMAS", None)
    if built_for != expected:
        raise ImportError(
            f"torch_dropout_ir: expected compiled kernels for schemas {expected}, got "
            f"{built_for}: they were built from other sources. Build them again: pip "
            "install --no-build-isolation -e ."
        )
    return True


COMPILED = _load_compiled_kernels()

_ops = torch.ops.torch_dropout_ir
dropout_forward = _ops.dropout_forward.default
dropout_counted = _ops.dropout_counted.default
mask_apply = _ops.mask_apply.default
mask_draw = _ops.mask_draw.default
unit_counts = _ops.unit_counts.default
form_sums = _ops.form_sums.default
diagonal_roots = _ops.diagonal_roots.default
softmax_roots = _ops.softmax_roots.default
block_roots = _ops.block_roots.default
loss_blocks = _ops.loss_blocks.default


@torch.library.register_fake("torch_dropout_ir::dropout_forward")
@torch.library.register_fake("torch_dropout_ir::dropout_counted")
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(kernels.packed_size(x.numel()), dtype=torch.uint8)


@torch.library.register_fake("torch_dropout_ir::mask_apply")
def _(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("torch_dropout_ir::mask_draw")
def _(rng: Tensor, p: Tensor, numel: int) -> Tensor:
    return rng.new_empty(kernels.packed_size(numel), dtype=torch.uint8)


@torch.library.register_fake("torch_dropout_ir::unit_counts")
def _(packed: Tensor, rows: int, units: int) -> Tensor:
    return packed.new_empty(units, dtype=torch.int64)


@torch.library.register_vmap("torch_dropout_ir::mask_draw")
def _(
    info: Any, in_dims: tuple[int | None, ...], rng: Tensor, p: Tensor, numel: int
) -> tuple[Tensor, int]:
    def along(x: Tensor, dim: int | None) -> tuple[Tensor, ...]:
        return (x,) * info.batch_size if dim is None else x.unbind(dim)

    pairs = zip(along(rng, in_dims[0]), along(p, in_dims[1]), strict=True)
    return torch.stack([mask_draw(key, rate, numel) for key, rate in pairs]), 0
