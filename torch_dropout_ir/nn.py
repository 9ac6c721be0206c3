"""Floor 2: dropout layers that show their masks.

Semantics:

* The layers are subclasses of torch's own and can stand wherever those stand.
* What a layer remembers (the last packed mask and the statistics) is no parameter and
  no buffer: ``state_dict`` is that of torch's layer. Copies and pickles start afresh.
* Inside ``torch.func`` transforms the layers drop as everywhere, but remember nothing:
  a mask in there may stand for many. Compiled graphs and captured CUDA graphs show the
  last mask (but for a checkpoint that is compiled with them) and are not counted: what
  writes counts cannot be a CUDA graph, nor tell a call from its recomputation.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from torch_dropout_ir import ops, tracing
from torch_dropout_ir.arguments import check_module
from torch_dropout_ir.masks import MaskStatistics, MaskTally
from torch_dropout_ir.sites import mask_shape, num_units

_MEMORY: Final = ("_last", "_tally")


class _Remembers(nn.modules.dropout._DropoutNd):
    """What the four layers share: the forward pass and what it leaves to be read."""

    track: bool = True
    _last: tuple[Tensor, tuple[int, ...]] | None = None
    _tally: MaskTally | None = None

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        ops.check_rate(p, tracing.eager())

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of ``input`` in training mode; return it untouched else.

        Args:
            input: Floating-point tensor.

        Returns:
            Tensor of the same shape and dtype.
        """
        if not self.training:
            ops.check_rate(self.p, tracing.eager())
            return input
        if not isinstance(input, Tensor):
            ops.refuse(input)
        if input.is_nested:  # its mask has no shape to show
            self.__dict__.pop("_last", None)
            return super().forward(input)
        output = self._drop(input)
        return input.copy_(output) if self.inplace else output

    forward.draws_as_torch = True  # type: ignore[attr-defined]

    def _drop(self, x: Tensor, units: int | None = None) -> Tensor:
        """Drop elements of ``x``; keep the mask, and count it where it is a new one."""
        if not tracing.eager():
            output, packed = ops.draw(x, self.p, None, fused=False)
            if tracing.leaves_graph():
                self._last = packed, x.shape
            return output
        p, numel, shape, counts, tally = self.p, x.numel(), x.shape, None, None
        if self.track and numel and tracing.makes_new(x):
            # Threads that start one at the same time all take the first.
            tally = self._tally or self.__dict__.setdefault("_tally", MaskTally())
            units = units or (shape[-1] if shape else 1)
            if type(x) is Tensor and not isinstance(p, Tensor):
                counts = tally.counts_for(units, x.device)
                counts = None if numel % counts.numel() else counts
        output, packed = ops.draw(x, p, None, counts, fused=True)
        if (mask := tracing.plain(packed)) is not None:
            # `nn.Module.__setattr__` costs as much as all of this.
            self.__dict__["_last"] = mask, shape
            if tally is not None and counts is not None:
                tally.add_counted(numel, p)
            elif tally is not None:
                tally.add(mask, numel, units or 1, float(p))
        return output

    @property
    def last_mask(self) -> Tensor | None:
        """The mask of the last training call (True = kept); None before the first.

        Shaped as the input, or ``[N, C, 1, ...]`` for channel dropout.
        """
        return None if self._last is None else ops.mask_unpack(*self._last)

    @property
    def statistics(self) -> MaskStatistics:
        """Mask statistics since the start or the last :meth:`reset_statistics`."""
        return MaskStatistics() if self._tally is None else self._tally.statistics()

    @property
    def fingerprint(self) -> int | None:
        """64-bit hash of the last mask; None before the first.

        Equal masks have equal fingerprints: a forward pass, its recomputation under
        checkpointing, and the same key on another device can be compared by it.
        """
        return None if self._last is None else ops.fingerprint(self._last[0])

    def reset_statistics(self) -> None:
        """Forget the statistics; the last mask stays."""
        self.__dict__.pop("_tally", None)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _MEMORY}


class Dropout(_Remembers, nn.Dropout):
    r"""Drop each element with probability ``p`` and remember the mask.

    .. math:: y_i = x_i \, m_i / (1 - p), \qquad m_i \sim \mathrm{Bernoulli}(1 - p)

    Args:
        p: Probability of dropping an element, in ``[0, 1]``.
        inplace: If True, the input is overwritten with the output.

    Attributes:
        track: Set to False to stop gathering statistics.

    References:
        Srivastava et al., *Dropout*, JMLR 2014.

    Example:
        >>> layer = Dropout(p=0.25)
        >>> y = layer(torch.ones(1000, 10))
        >>> torch.equal(layer.last_mask, y != 0)
        True
        >>> layer.statistics.num_elements, abs(layer.statistics.z_score) < 5
        (10000, True)
    """


class _ChannelDropout(_Remembers):
    def _drop(self, x: Tensor, units: int | None = None) -> Tensor:
        few = x.ndim < (1 if isinstance(self, nn.Dropout3d) else 2)  # as torch has it
        if few or (isinstance(self, nn.Dropout1d) and x.ndim > 3):
            raise RuntimeError(
                f"{type(self).__name__}: expected a tensor with channels, [N, C, ...] "
                f"(Dropout1d: of at most 3 dimensions), got shape {list(x.shape)}"
            )
        shape = mask_shape(self, x.shape)
        noise = super()._drop(x.new_ones(shape), num_units(self, x.shape))
        return (x * noise).masked_fill_(noise == 0, 0)  # 0 for a dropped inf or nan


class Dropout1d(_ChannelDropout, nn.Dropout1d):
    """Drop whole channels of ``[N, C, L]`` or ``[C, L]`` and remember the mask.

    Args:
        p: Probability of dropping a channel, in ``[0, 1]``.
        inplace: If True, the input is overwritten with the output.

    Example:
        >>> layer = Dropout1d(0.5)
        >>> y = layer(torch.ones(2, 3, 4))
        >>> layer.last_mask.shape
        torch.Size([2, 3, 1])
    """


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """Drop whole channels of ``[N, C, H, W]`` and remember the mask.

    Args:
        p: Probability of dropping a channel, in ``[0, 1]``.
        inplace: If True, the input is overwritten with the output.

    Example:
        >>> layer = Dropout2d(0.5)
        >>> y = layer(torch.ones(2, 3, 4, 4))
        >>> layer.last_mask.shape
        torch.Size([2, 3, 1, 1])
    """


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """Drop whole channels of ``[N, C, D, H, W]`` or ``[C, D, H, W]``.

    Args:
        p: Probability of dropping a channel, in ``[0, 1]``.
        inplace: If True, the input is overwritten with the output.

    Example:
        >>> layer = Dropout3d(0.5)
        >>> y = layer(torch.ones(2, 3, 4, 4, 4))
        >>> layer.last_mask.shape
        torch.Size([2, 3, 1, 1, 1])
    """


_OURS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
}
_TORCHS: Final = {ours: torchs for torchs, ours in _OURS.items()}


def is_convertible(module: nn.Module) -> bool:
    """Whether :func:`convert_dropout_` would change the class of ``module``."""
    return type(module) in _OURS


def convert_dropout_(model: nn.Module) -> nn.Module:
    """Make every dropout module of torch's own one of ours, in place.

    Only the class of the modules changes: references, names, hooks, modes and
    ``state_dict`` stay. User-defined subclasses are left alone.

    Args:
        model: The model, or a dropout module itself.

    Returns:
        ``model``.

    Raises:
        TypeError: If it is no module.

    Example:
        >>> model = convert_dropout_(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        >>> type(model[1]) is Dropout
        True
    """  # noqa: DOC502 (`check_module` raises)
    check_module("convert_dropout_", model)
    for module in model.modules():
        if is_convertible(module):
            module.__class__ = _OURS[type(module)]
    return model


def restore_dropout_(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_dropout_`, in place; what was remembered is dropped.

    Args:
        model: The model, or a dropout module itself.

    Returns:
        ``model``.

    Raises:
        TypeError: If it is no module.

    Example:
        >>> model = restore_dropout_(nn.Sequential(Dropout(0.1)))
        >>> type(model[0]) is nn.Dropout
        True
    """  # noqa: DOC502 (`check_module` raises)
    check_module("restore_dropout_", model)
    for module in model.modules():
        if type(module) in _TORCHS:
            module.__class__ = _TORCHS[type(module)]
            for name in (*_MEMORY, "track"):
                module.__dict__.pop(name, None)
    return model
