"""Whether a loss is much of what a step holds, and can be taken apart by rows."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.collectives import every
from torch_dropout_ir.output_products import WIDE, HessianProduct
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.graph_memory import Held
from torch_dropout_ir.regularizers.loss_graph import joins_rows
from torch_dropout_ir.regularizers.output_rows import least_of_part
from torch_dropout_ir.regularizers.outputs import OutputsRead

# Elements of the outputs below which the memory of their loss is no matter, and their
# share of what the network makes.
_FEWEST: Final = 2**18
_SHARE: Final = 1 / 16
_MOST_BLOCK_ELEMENTS: Final = 2**24


def apart(product: HessianProduct) -> bool:
    """Whether the graph of a loss shows that no two rows of the outputs meet."""
    terms = product.terms
    told = terms is not None and terms.by_row
    return told or joins_rows(product.at, product.nodes) is False


def parts_pay(
    clean: CleanPass,
    read: OutputsRead,
    product: HessianProduct | None,
    num_samples: int | None,
) -> bool:
    """Return whether roots need parts: the loss is much of a step, rows are apart."""
    fit = num_samples is not None or blocks_fit(read.tensors[0])
    pays = much(clean, read) and fit
    if pays and product is not None:
        pays = not one_root(product, num_samples) and apart(product)
    return every(pays, "parts of the loss")


def one_root(product: HessianProduct, num_samples: int | None) -> bool:
    """Return whether a step holds no less than roots: a softmax's, single outputs'."""
    terms = product.terms
    if terms is None:
        return False
    if terms.log_softmax is None:
        return product.entries is not None
    told = num_samples == 1 and apart(product)
    return told and (terms.linear or product.entries is not None)


def makes_much(
    clean: CleanPass, read: OutputsRead, product: HessianProduct | None
) -> bool:
    """Return whether a loss without a closed form makes much of what a step holds.

    A graph of its second derivatives holds several times that; along a line, no more
    than a step does.
    """
    # A number for each output, or for each pair of rows, or of outputs of a row.
    large = not read.closed and _FEWEST <= max([
        max(x.numel(), max(x.shape, default=0) ** 2) for x in read.tensors
    ])
    large = large and all([x.dtype in WIDE for x in read.tensors])
    return every(
        large and bool(clean.uses) and _made(read, product) >= _most(clean, read),
        "much of the loss",
    )


def _made(read: OutputsRead, product: HessianProduct | None) -> int:
    """Return the bytes of what the loss makes of the outputs, and of its gradient."""
    slopes = sum([x.nbytes for x in read.tensors])
    if product is not None:
        return slopes + Held.by([product.value.grad_fn]).made
    with torch.enable_grad():
        value = read.risk([x.detach().requires_grad_() for x in read.tensors])
    return slopes + Held.by([value.grad_fn]).made


def _most(clean: CleanPass, read: OutputsRead) -> float:
    """Return the bytes of which the memory of a loss is no matter.

    A pass without a graph tells of the inputs of sites: each takes a pass of its own.
    """
    held = Held.by([x.grad_fn for x in read.tensors])
    inputs = sum([h.nbytes for _, h, _ in clean.uses])
    learns = held.leaves + sum(clean.below.constants.values())
    share = _SHARE * max(held.made + learns, inputs)
    return max(_FEWEST * read.tensors[0].itemsize, share)


def much(clean: CleanPass, read: OutputsRead) -> bool:
    """Whether a loss of one tensor without closed form is much of what a step holds."""
    loss, f = read.loss, read.tensors[0]
    if loss is None or loss.kind not in ("general", "elementwise") or not clean.uses:
        return False
    if f.numel() < _FEWEST or f.dtype not in WIDE:
        return False
    held = Held.by([f.grad_fn])
    learns = held.leaves + sum(clean.below.constants.values())
    most = f.nbytes >= _SHARE * (held.made + learns)
    return most and least_of_part(clean, read) > 0


def blocks_fit(f: Tensor) -> bool:
    """Whether the blocks of samples are few enough to be held."""
    return bool(f.ndim) and f.numel() * f.shape[1:].numel() <= _MOST_BLOCK_ELEMENTS
