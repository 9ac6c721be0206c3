"""Input weights of recurrent layers, gate by gate."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

RECURRENT: Final = (nn.RNNBase, nn.RNNCellBase)
_LSTM: Final = (nn.LSTM, nn.LSTMCell)
_GRU: Final = (nn.GRU, nn.GRUCell)


def recurrent_parts(module: nn.Module) -> dict[str, Tensor]:
    """Return the units' input weights by gate, and ``"filter"``: all gates.

    A row is ``[w_ih, w_hh, b]``; the biases of input and hidden state act as their sum
    and are one column, except in a GRU's ``new`` gate, which resets one of them: a GRU
    has two columns, and the second is 0 in its other gates.

    The first layer's are under the names of the gates, further ones' as
    ``"l1.forget"``, ``"l0_reverse.forget"``; ``"filter"`` is there if there is one
    layer of one direction. Of cells likewise.
    """
    suffixes = [""]
    if isinstance(module, nn.RNNBase):
        sides = ("", "_reverse") if module.bidirectional else ("",)
        suffixes = [f"_l{k}{side}" for k in range(module.num_layers) for side in sides]
    found: dict[str, Tensor] = {}
    for suffix in suffixes:
        prefix = f"{suffix.removeprefix('_')}." if suffix not in ("", "_l0") else ""
        found |= {prefix + gate: w for gate, w in _gates(module, suffix).items()}
    if len(suffixes) == 1:
        gates = [w for gate, w in found.items() if not gate.endswith("projection")]
        found["filter"] = torch.cat(gates)
    return found


def _gates(module: nn.Module, suffix: str) -> dict[str, Tensor]:
    """The gates of one layer in one direction."""
    incoming, hidden = (getattr(module, f"weight_{k}{suffix}") for k in ("ih", "hh"))
    rows = torch.cat((incoming, hidden), 1)
    gates: tuple[str, ...] = ("unit",)
    if isinstance(module, _LSTM):
        gates = ("input", "forget", "cell", "output")
    elif isinstance(module, _GRU):
        gates = ("reset", "update", "new")
    split = dict(zip(gates, rows.chunk(len(gates)), strict=True))
    if module.bias:
        pair = [getattr(module, f"bias_{k}{suffix}") for k in ("ih", "hh")]
        columns = zip(*(b.chunk(len(gates)) for b in pair), strict=True)
        for gate, (first, second) in zip(gates, columns, strict=True):
            if not isinstance(module, _GRU):
                bias = (first + second)[:, None]
            elif gate == "new":
                bias = torch.stack((first, second), 1)
            else:
                bias = torch.stack((first + second, torch.zeros_like(first)), 1)
            split[gate] = torch.cat((split[gate], bias), 1)
    if getattr(module, "proj_size", 0):
        split["projection"] = getattr(module, f"weight_hr{suffix}")
    return split
