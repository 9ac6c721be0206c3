"""Curvature of the loss as an operator on parameter dictionaries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.sharpness.frozen import Masks
from torch_dropout_ir.sharpness.linearization import Kind, Linearized, linearize
from torch_dropout_ir.sharpness.ranks import Group
from torch_dropout_ir.sharpness.surface import Subset, Surface
from torch_dropout_ir.vectors import Params, to_params, to_vector

Vector = TypeVar("Vector", Tensor, Params)

BLOCK_BYTES: Final = 2**26
_THINNED_FROM: Final = 4096


class CurvatureOperator:
    """The Hessian, or its Gauss-Newton part, where the model was at construction.

    ``op @ v`` takes a dictionary with the names and shapes of the parameters, a flat
    vector ``[P]`` in the same order, or a block of columns ``[P, K]``, and returns the
    like.

    Attributes:
        params: Copies of the parameters at which the curvature is taken.
        kind: ``"hessian"`` or ``"ggn"``.
        surface: The loss that it is the curvature of.
        num_matvecs: Products computed so far; a block counts its columns.
    """

    def __init__(self, kind: Kind, surface: Surface, block_bytes: int) -> None:
        self.kind: Kind = kind
        self.surface = surface
        self.params = surface.params
        self.num_matvecs = 0
        self._block_bytes = block_bytes
        self._cached: Linearized | None = None
        self._checked = False
        if surface.single is not None:
            self._cached = self._linearize(surface.single, 0, surface.seeds[0])
            self._check_used(set(self._cached.used))

    def _linearize(self, batch: Batch, place: int, seed: int | None) -> Linearized:
        with self.surface.held(seed):
            return linearize(self.kind, self.surface, batch, place, seed)

    def _columns(self, columns: Tensor, seed: int | None) -> Tensor:
        """Products with rows ``[K, P]``, averaged over batches and ranks."""
        used: set[str] = set()

        def one(batch: Batch, place: int, seed: int | None) -> Tensor:
            last = self.surface.single is not None
            if last and self._cached is None:
                self._cached = self._linearize(batch, place, seed)
            found = self._cached if last else None
            found = found or linearize(self.kind, self.surface, batch, place, seed)
            used.update(found.used)
            return found.products(columns, self._block_bytes).reshape(-1)

        product = self.surface.average(one, seed).view_as(columns)
        self._check_used(used)
        return product

    def _check_used(self, used: set[str]) -> None:
        """Refuse parameters that no batch depends on."""
        if self._checked or self.surface.ranks.spread:
            return
        if unused := [name for name in self.params if name not in used]:
            raise ValueError(
                f"{self.kind}: expected a loss that depends on every parameter, got "
                f"one that does not on {unused}. Leave them out with `params=`."
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

    def __matmul__(self, v: Vector) -> Vector:
        if not isinstance(v, Tensor):
            flat = to_vector(self._in_order(v))
            return cast("Vector", to_params(self @ flat, self.params))
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self.kind}: expected a vector of shape [{self.shape[1]}] or columns "
                f"[{self.shape[1]}, K], got {list(v.shape)}"
            )
        v = v.to(self.device, self.dtype)
        return self._products(v[None])[0] if v.ndim == 1 else self._products(v.T).T

    def with_standard_error(self, v: Vector) -> tuple[Vector, Vector]:
        """Return ``op @ v`` and its standard error over the masks, entry by entry.

        Args:
            v: As for ``@``, a dictionary or a flat vector.

        Returns:
            The mean over the masks and its standard error.

        Raises:
            ValueError: If the operator has fewer than two masks.
        """
        count = len(self.surface.seeds)
        if count < 2:
            raise ValueError(
                "with_standard_error: expected an operator of several masks, got "
                f"{count}. Make it with `masks=range(8)`, say."
            )
        flat = v if isinstance(v, Tensor) else to_vector(self._in_order(v))
        flat = self.surface.ranks.broadcast(flat.to(self.device, self.dtype)[None])
        mean, squares = torch.zeros_like(flat), torch.zeros_like(flat)
        for k, seed in enumerate(self.surface.seeds, 1):
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
        wrong = [
            name
            for name in {**self.params, **v}
            if name not in v
            or name not in self.params
            or v[name].shape != self.params[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{self.kind}: expected a dictionary with the names and shapes of the "
                f"parameters; these are missing, foreign or misshapen: {wrong}"
            )
        return {name: v[name] for name in self.params}

    @contextlib.contextmanager
    def released(self) -> Iterator[Surface]:
        """Drop the cached linearization, which the next product makes anew."""
        self._cached = None
        yield self.surface

    def thinned(self) -> tuple[CurvatureOperator, float] | None:
        """Return the operator of a few of the samples, for a first impression.

        Returns:
            The operator and its share of the samples; None where a product is cheap, or
            the samples cannot be told apart.
        """
        few = self.surface.thinned() if self.shape[0] >= _THINNED_FROM else None
        if few is None:
            return None
        try:
            return CurvatureOperator(self.kind, few[0], self._block_bytes), few[1]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # a model that takes no other number of samples

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


def hessian(
    model: nn.Module,
    loss: Any,
    batches: Any,
    *,
    masks: Masks = "off",
    params: Subset = None,
    block_bytes: int = BLOCK_BYTES,
    group: Group = "auto",
) -> CurvatureOperator:
    r"""Return the Hessian of the loss as an operator.

    .. math:: H = \frac{\partial^2}{\partial \theta^2} R(\theta), \qquad
        R(\theta) = \frac{1}{N} \sum_b n_b \, \ell_b(\theta)

    With dropout off ``R`` is ``R_S``. At frozen masks it is ``R_drop``: one symmetric
    matrix, as masks are the same in every product. With live dropout each product
    would be of another matrix.

    Batches are weighted by their number of samples, so ragged ones are exact for losses
    that are plain means (or sums) over samples; class weights and ignored targets are
    no such means. Batch normalization keeps the mode it has; its running statistics do
    not move. Attention and recurrent layers run in kernels that have a second
    derivative. One batch is linearized once, and each product costs about half of one
    from scratch; several batches, or several masks, are streamed, with the graph of one
    at a time in memory.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``, the mean (or sum) over samples.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches. A
            loader that shuffles is read in one order.
        masks: ``"off"``; a seed, for ``R_drop`` at the masks of
            ``frozen_masks(model, seed)`` (further batches have their own); or several
            seeds, for the mean over those masks.
        params: Names of the parameters to differentiate in, or a predicate on names;
            all that require a gradient if None.
        block_bytes: Memory for the intermediate results of the columns of one block
            that are multiplied at once; those of one column are needed anyway.
        group: Process group over which batches are spread; products are summed over
            its ranks, all of which must take part. ``"auto"``: that of a model in
            ``DistributedDataParallel``, else none.

    Returns:
        The operator, with ``@``, ``shape``, ``num_matvecs`` and ``dense()``.

    Raises:
        ValueError: If there is no batch, the loss is not finite or does not depend on
            a parameter, or ``masks`` or ``params`` are not as said.
        NotImplementedError: If an operation has no second derivative.

    References:
        Pearlmutter, *Fast exact multiplication by the Hessian*, 1994; Zhang & Xu,
        *Implicit regularization of dropout*, section VII.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> op = hessian(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
        >>> op.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """  # noqa: DOC502 (the surface and the linearization raise)
    surface = Surface(
        "hessian", model, loss, batches, masks=masks, params=params, group=group
    )
    return CurvatureOperator("hessian", surface, block_bytes)


def ggn(
    model: nn.Module,
    loss: Any,
    batches: Any,
    *,
    masks: Masks = "off",
    params: Subset = None,
    block_bytes: int = BLOCK_BYTES,
    group: Group = "auto",
) -> CurvatureOperator:
    r"""Return the generalized Gauss-Newton matrix of the loss as an operator.

    .. math:: G = J^\top \, \frac{\partial^2 \ell}{\partial f^2} \, J, \qquad
        J = \frac{\partial f}{\partial \theta}

    Positive semi-definite where the loss is convex in the outputs; equal to the Hessian
    where the residuals vanish or the outputs are linear in the parameters, and to its
    diagonal blocks where they are piecewise linear in each layer. Takes the arguments
    of :func:`hessian`; one forward pass serves both factors ``J``, so they share their
    masks, and a product costs about 0.4 of a Hessian product from scratch.

    Args:
        model: The model, whose output is one tensor; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch, or a list or loader of batches.
        masks: ``"off"``, a seed, or several seeds.
        params: Names of the parameters, or a predicate on names.
        block_bytes: Memory for the columns of a block that are multiplied at once.
        group: Process group over which batches are spread.

    Returns:
        The operator.

    Raises:
        ValueError: As for :func:`hessian`.
        TypeError: If the model's output is no tensor.

    References:
        Schraudolph, *Fast curvature matrix-vector products*, Neural Computation 14
        (2002).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> op = ggn(net, "mse", (torch.randn(5, 2), torch.randn(5, 1)))
        >>> bool((torch.linalg.eigvalsh(op.dense()) > -1e-6).all())
        True
    """  # noqa: DOC502 (the surface and the linearization raise)
    surface = Surface(
        "ggn", model, loss, batches, masks=masks, params=params, group=group
    )
    return CurvatureOperator("ggn", surface, block_bytes)
