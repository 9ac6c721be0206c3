r"""How lines go through attention, some samples and queries at a time.

Scores :math:`\alpha q k^\top` are a product, the weights their softmax, and the result
is a product of these with the values. Of a part of the queries each is there with its
line, never of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_dropout_ir.attention_again import Attention, Part, Parted
from torch_dropout_ir.regularizers.line_calls import Line
from torch_dropout_ir.regularizers.line_products import of_product
from torch_dropout_ir.regularizers.line_slabs import of_softmax


@torch.no_grad()  # of what the model was given, too
def along_queries(
    attention: Attention, line_of: Callable[[Tensor], Line]
) -> tuple[list[Tensor], list[Line]]:
    """Return what attention makes of what it is given, and how that moves."""
    lines = [(x, line_of(x)) for x in attention.given]
    given = [*attention.given, *(_order(*line, k) for k in range(2) for line in lines)]

    def call(part: Part, *own: Tensor) -> tuple[Tensor, ...]:
        q, k, v, q1, k1, v1, q2, k2, v2 = own
        p = attention.weigh(part, q, k)
        q, q1, q2 = (attention.factor * u for u in (q, q1, q2))
        scores = of_product((q, (q1, q2)), (k.mT, (k1.mT, k2.mT)))
        found = of_product((p, of_softmax(p, scores)), (v, (v1, v2)))
        return p @ v, *[u for u in found if u is not None]  # both are there

    parts = Parted(call, (True, False, False) * 3, (True,) * 3)
    y, first, second = parts.whole(attention.weights, given)
    return [y], [(first, second)]


def _order(x: Tensor, line: Line, k: int) -> Tensor:
    u = line[k]
    return x.new_zeros(()).expand_as(x) if u is None else u
