"""Floor 1: attention computed in full, so that its weights can be acted on."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return ``softmax(q k' scale + mask)``; 0 in rows that attend to nothing."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # Before the product, or half precision overflows.
    scores = (query * factor) @ key.transpose(-2, -1)
    if mask is not None and type(mask) is not Tensor:
        # Dynamo comes with it, which takes as long to import as all else together.
        from torch.nn.attention.bias import CausalBias

        if isinstance(mask, CausalBias):
            mask = mask._materialize(query.device)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
