"""Floor 0 in Python: the kernels of ``csrc/``, bit for bit, out of torch operations.

They serve every device that has no compiled kernel, stand in where the extension
could not be built, and are the oracle that the compiled kernels are tested against.

* The word of element ``i`` is lane ``i % 4`` of Philox4x32-10 (Salmon et al. 2011)
  with key ``rng[0]`` and counter ``(i // 4, rng[1])``: it depends on the element's
  index alone, never on threads, strides or chunks.
* Element ``i`` is kept iff its 32-bit word is at least ``floor(p * 2**32 + 1/2)``.
* Packed masks: bit ``i % 8`` of byte ``i // 8``, padded with zeros to 8-byte words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_KEY_RANGE = 2**63 - 1


def _low(x: Tensor) -> Tensor:
    return x & _LOW


def _high(x: Tensor) -> Tensor:
    # The shift is arithmetic; the mask makes it the logical one of a uint64.
    return (x >> 32) & _LOW


def philox4x32_10(rng: Tensor, blocks: Tensor) -> Tensor:
    """Return the four words of each block, in ``[0, 2**32)`` as int64 ``[B, 4]``.

    ``rng`` is key and stream, int64 ``[2]``; ``blocks`` are numbers, int64 ``[B]``.
    """
    k0, k1 = _low(rng[0]), _high(rng[0])
    c0, c1 = _low(blocks), _high(blocks)
    c2 = _low(rng[1]).expand_as(blocks)
    c3 = _high(rng[1]).expand_as(blocks)
    for _ in range(_ROUNDS):
        first, second = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            _high(second) ^ c1 ^ k0,
            _low(second),
            _high(first) ^ c3 ^ k1,
            _low(first),
        )
        k0, k1 = _low(k0 + _W0), _low(k1 + _W1)
    return torch.stack((c0, c1, c2, c3), -1)


def draw_key(device: torch.device | str = "cpu") -> Tensor:
    """Return key and stream, int64 ``[2]``, drawn from torch's generator of ``device``.

    Passed as ``rng=`` they repeat a mask.
    """
    return torch.randint(_KEY_RANGE, (2,), device=device)


def packed_size(numel: int) -> int:
    """Return the bytes of a packed mask of ``numel`` bits, in whole 8-byte words."""
    return (numel + 63) // 64 * 8


def pack(bits: Tensor) -> Tensor:
    """Pack a boolean vector ``[n]`` into uint8 ``[packed_size(n)]``."""
    padding = 8 * packed_size(bits.numel()) - bits.numel()
    octets = torch.nn.functional.pad(bits.to(torch.uint8), (0, padding)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (octets << places).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the packed mask as booleans of shape ``size`` (True = kept)."""
    numel = 1
    for length in size:
        numel = numel * length
    if torch.compiler.is_exporting():
        # Slicing would bound sizes that were declared free.
        index = torch.arange(numel, device=packed.device)
        bits = packed[index >> 3] >> (index & 7).to(torch.uint8)
        return (bits & 1).to(torch.bool).view(size)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed.unsqueeze(-1) >> places) & 1).to(torch.bool).flatten()
    return bits[:numel].view(size)


def mask_draw(rng: Tensor, p: Tensor, numel: int) -> Tensor:
    """Draw ``numel`` bits and pack them; ``p`` is a 0-d tensor."""
    blocks = torch.arange((numel + 3) // 4, device=rng.device)
    words = philox4x32_10(rng, blocks).flatten()[:numel]
    threshold = torch.floor(p.double() * 2.0**32 + 0.5).to(torch.int64)
    return pack(words >= threshold)


def mask_apply(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Return ``where(kept, x * scale, 0)``, contiguous."""
    kept = unpack(packed, x.shape)
    return torch.where(kept, x * scale, x.new_zeros(())).contiguous()


def dropout_forward(x: Tensor, rng: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Draw a mask for ``x``, and a key if ``rng`` is None; return output and mask."""
    rng = draw_key(x.device) if rng is None else rng
    packed = mask_draw(
        rng, torch.tensor(p, dtype=torch.float64, device="cpu"), x.numel()
    )
    return mask_apply(x, packed, keep_scale(p)), packed


def dropout_counted(
    x: Tensor, rng: Tensor | None, p: float, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`dropout_forward` that adds to ``counts``, int64 ``[units]``."""
    y, packed = dropout_forward(x, rng, p)
    counts.add_(unit_counts(packed, x.numel() // counts.numel(), counts.numel()))
    return y, packed


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return contiguous ``y`` with its dimensions in memory in the order of ``x``'s.

    As torch's dropout does: what could be viewed before it can be viewed behind it.
    """
    strides = x.stride()
    if 0 in strides:  # expanded: no order of its own
        return y
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    back = sorted(range(x.ndim), key=order.__getitem__)
    return y.permute(order).contiguous().permute(back)


def unit_counts(packed: Tensor, rows: int, units: int) -> Tensor:
    """Return how often each unit was kept: column sums of a ``[rows, units]`` mask."""
    return unpack(packed, (rows, units)).sum(0)


def keep_scale(p: float) -> float:
    """Return ``1 / (1 - p)``, the factor of what is kept; 0 at ``p = 1``."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
