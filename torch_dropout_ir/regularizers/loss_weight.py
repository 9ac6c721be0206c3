"""Whether a loss is much of what a step holds, and can be taken apart by rows."""

from __future__ import annotations

from typing import Final

import torch

from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.loss_graph import rows_apart
from torch_dropout_ir.regularizers.output_rows import has_rows
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.step_memory import Held

# Elements of the outputs below which the memory of their loss is no matter, and their
# share of what the network makes.
_FEWEST: Final = 2**18
_SHARE: Final = 1 / 16


def apart(product: HessianProduct) -> bool:
    """Whether the graph of a loss shows that no two rows of the outputs meet."""
    terms = product.terms
    told = terms is not None and terms.by_row
    return told or rows_apart(product.value, product.at)


def parts_pay(
    clean: CleanPass,
    read: OutputsRead,
    product: HessianProduct | None,
    num_samples: int | None,
) -> bool:
    """Whether roots of a loss need parts: it is much of what a step holds otherwise.

    Args:
        clean: The pass.
        read: What the loss reads of it.
        product: Products with its Hessian; None where that is known.
        num_samples: Random roots; an exact sum goes without parts.

    Returns:
        Whether they do, and the graph keeps rows apart.
    """
    if not num_samples or not much(clean, read):
        return False
    if product is None:  # of single outputs
        return True
    terms = product.terms
    softmax = terms is not None and terms.log_softmax is not None and terms.linear
    # One root of that takes no more than a step.
    return not (softmax and num_samples == 1) and apart(product)


def much(clean: CleanPass, read: OutputsRead) -> bool:
    """Whether a loss of one tensor without closed form is much of what a step holds."""
    loss, f = read.loss, read.tensors[0]
    if loss is None or loss.kind not in ("general", "elementwise") or not clean.uses:
        return False
    if f.numel() < _FEWEST or f.dtype not in (torch.float32, torch.float64):
        return False
    held = Held.by([f.grad_fn])
    most = f.nbytes >= _SHARE * (held.made + held.leaves)
    return most and has_rows(clean, read)
