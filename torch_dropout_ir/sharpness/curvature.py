"""The operator: products, blocks of them, their mean over masks, the dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar, cast

import torch
from torch import Tensor

from torch_dropout_ir.arguments import check_real, in_order
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.sharpness.linearization import Kind, Linearized, linearize
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.turns import in_turn
from torch_dropout_ir.vectors import Params, full_precision, to_params, to_vector

Vector = TypeVar("Vector", Tensor, Params)

_WORTH: Final = 2**20  # of a product's work: less is not worth a rehearsal
_BRIEF: Final = 2**22


class CurvatureOperator:
    """The Hessian, or its Gauss-Newton part, where the model was at construction.

    ``op @ v`` takes a dictionary with the names and shapes of the parameters, a flat
    vector ``[P]`` in the same order, or a block of columns ``[P, K]``, and returns the
    like, in the dtype of the parameters.

    Attributes:
        params: Copies of the parameters at which the curvature is taken.
        kind: ``"hessian"`` or ``"ggn"``.
        surface: The loss that it is the curvature of.
        num_matvecs: Products computed so far; a block counts its columns.
    """

    __array_ufunc__ = None  # NumPy's arrays leave ``array @ op`` to this class

    def __init__(self, kind: Kind, surface: Surface, block_bytes: int) -> None:
        check_real(kind, "block_bytes", block_bytes, least=0, finite=False)
        self.kind: Kind = kind
        self.surface = surface
        self.params = surface.params
        self.num_matvecs = 0
        self._block_bytes = block_bytes
        self._cached: Linearized | None = None
        self._checked = False
        self._work = 0  # of a product, where there is one batch
        if surface.single is not None:
            seed = surface.seeds[0]
            with surface.held(seed):
                found = self._linearized(surface.single, 0, seed, False)
            self._work = found.work
            self._check_used(set(found.used))

    def __repr__(self) -> str:
        of, seeds = type(self.surface.model).__name__, self.surface.seeds
        masks = "off" if seeds == (None,) else ", ".join(map(str, seeds))
        return (
            f"<{self.kind} of {of}, {list(self.shape)}, masks {masks}, "
            f"{self.num_matvecs} products>"
        )

    def _columns(self, columns: Tensor, seed: int | None) -> Tensor:
        """Products with rows ``[K, P]``, averaged over batches and ranks."""
        used: set[str] = set()

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            found = self._linearized(batch, place, seed, len(columns) == 1)
            used.update(found.used)
            return found.products(columns, self._block_bytes).reshape(-1)

        bare = self._cached is not None and self._cached.bare
        product = self.surface.average(one, seed, bare).view_as(columns)
        self._check_used(used)
        return product

    def _linearized(
        self, batch: Batch, place: int, seed: int | None, once: bool
    ) -> Linearized:
        """The graph of one batch, inside ``held``; kept where there is but one."""
        if self.surface.single is None:
            return linearize(self.kind, self.surface, batch, place, seed, once)
        if self._cached is None:
            self._cached = linearize(self.kind, self.surface, batch, place, seed)
        return self._cached

    @full_precision()
    def add_product(self, v: Tensor, total: Tensor) -> None:
        """Add ``op @ v`` to ``total`` in place, both ``[P]``.

        Nothing of their size is made besides, unless ranks, several masks or a loader
        are averaged over.
        """
        shares, seeds = self.surface.shares(), self.surface.seeds
        if shares is None or len(seeds) > 1:
            total.add_(self @ v)
            return
        used: set[str] = set()
        for place, (batch, share) in enumerate(shares):
            bare = self._cached is not None and self._cached.bare
            held = in_turn() if bare else self.surface.held(seeds[0])
            with held:
                found = self._linearized(batch, place, seeds[0], True)
                found.add(v, total, share)
            used.update(found.used)
        self.num_matvecs += 1
        self._check_used(used)

    def _check_used(self, used: set[str]) -> None:
        """Refuse parameters that no batch depends on."""
        if self._checked or self.surface.ranks.spread:
            return
        if unused := [n for n, x in self.params.items() if x.numel() and n not in used]:
            raise ValueError(
                f"{self.kind}: expected a loss that depends on every parameter, got "
                f"one that does not on {unused}, or by steps alone (round, floor, "
                "sign). Leave them out with `params=`."
            )
        self._checked = True

    def _products(self, columns: Tensor) -> Tensor:
        self.num_matvecs += columns.shape[0]
        columns = self.surface.ranks.broadcast(columns.detach().contiguous())
        seeds = self.surface.seeds
        total = self._columns(columns, seeds[0])
        for seed in seeds[1:]:
            total.add_(self._columns(columns, seed))
        return total / len(seeds) if len(seeds) > 1 else total

    @full_precision()
    def __matmul__(self, v: Vector) -> Vector:
        flat = self._flat(v)
        with in_turn():
            found = self._products(flat.T if flat.ndim == 2 else flat[None])
        if not isinstance(v, Tensor):
            return cast("Vector", to_params(found[0], self.params))
        return found.T if v.ndim == 2 else found[0]

    def _flat(self, v: Tensor | Params) -> Tensor:
        """Return what an operator can multiply as a vector, or columns."""
        if isinstance(v, Mapping):
            v = to_vector(self._in_order(v))
        if not isinstance(v, Tensor):
            raise TypeError(
                f"{self.kind}: expected a tensor, or a dictionary of tensors by the "
                f"names of the parameters, got {type(v).__name__}. Of an array or a "
                "list of numbers torch.as_tensor makes one; tensors in the order of "
                "the parameters go by name with dict(zip(op.params, tensors))."
            )
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self.kind}: expected a vector of shape [{self.shape[1]}] or columns "
                f"[{self.shape[1]}, K], got {list(v.shape)}"
            )
        if v.is_complex():
            raise TypeError(
                f"{self.kind}: expected real numbers, got {v.dtype}. Multiply the real "
                "and the imaginary part each by itself."
            )
        return v.to(self.device, self.dtype)

    def with_standard_error(self, v: Vector) -> tuple[Vector, Vector]:
        """Return ``op @ v`` and its standard error over the masks, entry by entry.

        Args:
            v: As for ``@``, a dictionary or a flat vector.

        Returns:
            The mean over the masks and its standard error.

        Raises:
            ValueError: If the operator has fewer than two masks, or ``v`` is no one
                vector.
        """
        count = len(self.surface.seeds)
        if count < 2:
            raise ValueError(
                "with_standard_error: expected an operator of several masks, got "
                f"{count}. Make it with `masks=range(8)`, say."
            )
        flat = self._flat(v)
        if flat.ndim != 1:
            raise ValueError(
                "with_standard_error: expected one vector, got columns of shape "
                f"{list(flat.shape)}. Take them one by one."
            )
        flat = self.surface.ranks.broadcast(flat[None])
        mean, squares = torch.zeros_like(flat), torch.zeros_like(flat)
        for k, seed in enumerate(self.surface.seeds, 1):
            with in_turn():
                change = self._columns(flat, seed) - mean
            mean += change / k
            squares += change.square() * ((k - 1) / k)
        self.num_matvecs += count
        error = (squares / (count * (count - 1))).sqrt()
        if isinstance(v, Tensor):
            return mean[0], error[0]
        as_given = (to_params(x[0], self.params) for x in (mean, error))
        return cast("tuple[Vector, Vector]", tuple(as_given))

    def _in_order(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if foreign := [n for n in v if n not in self.params]:
            raise ValueError(
                f"{self.kind}: expected the names of the parameters, got {foreign} "
                "besides. `op.params` holds those that it is the curvature in."
            )
        return in_order(self.kind, "v", v, self.params)

    def release(self) -> None:
        """Drop the cached linearization, which the next product makes anew."""
        self._cached = None

    @property
    def brief(self) -> bool:
        """Whether a product of few samples is mostly the calls of its operations."""
        return self._work < _BRIEF

    def thinned(self, every: int = 4) -> tuple[CurvatureOperator, float] | None:
        """Return the operator of a few of the samples, for a first impression.

        Args:
            every: Samples that one stands for.

        Returns:
            The operator and its share of the samples; None where a product is cheap, or
            the samples cannot be told apart.
        """
        few = self.surface.thinned(every) if self._work >= _WORTH else None
        if few is None:
            return None
        try:
            op = CurvatureOperator(self.kind, few[0], self._block_bytes)
        except Exception as err:
            raise_if_exhausted(err)
            return None  # a model that takes no other number of samples
        op._work = self._work  # what it is few of
        return op, few[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)`` with ``P`` the number of parameters."""
        size = sum(x.numel() for x in self.params.values())
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors."""
        return to_vector({n: x.new_empty(0) for n, x in self.params.items()}).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.params.values())).device

    def dense(self) -> Tensor:
        """Return the matrix ``[P, P]``, at the cost of ``P`` products.

        Returns:
            The matrix in the order of the parameters.
        """
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
