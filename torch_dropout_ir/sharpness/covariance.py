"""Covariances of few vectors of many parameters, never as a matrix."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_choice, check_count, check_real, in_order
from torch_dropout_ir.batches import as_batches
from torch_dropout_ir.functional import Batch, batch_size
from torch_dropout_ir.sharpness.differentiability import Subset
from torch_dropout_ir.sharpness.ranks import Group
from torch_dropout_ir.sharpness.reading import Reading
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.vectors import Params, full_precision, to_params, to_vector

_MAX_BYTES: Final = 2**31
_WIDE: Final = 2**14  # columns that are squared at once in float64


@dataclasses.dataclass(frozen=True)
class Covariance:
    r"""A covariance :math:`\Sigma = A^\top A` of rank at most ``K - 1``.

    Takes ``K`` vectors of memory; ``covariance @ v`` takes a dictionary or a flat
    vector, as the curvature operators do.

    Attributes:
        rows: ``A``, the deviations from the mean over ``sqrt(K - 1)``, ``[K, P]``.
        mean: Their mean, ``[P]``.
        params: Tensors whose names and shapes the vectors have.
    """

    rows: Tensor
    mean: Tensor
    params: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.rows.shape[1], self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.rows.device

    @full_precision()
    def __matmul__(self, v: Any) -> Any:
        if isinstance(v, Tensor):
            if v.shape[:1] != self.shape[1:]:
                size, got = self.shape[1], list(v.shape)
                raise ValueError(f"Covariance: expected {size} numbers, got {got}")
            return self.rows.T @ (self.rows @ v.to(self.rows))
        flat = to_vector(in_order("Covariance", "v", v, self.params))
        return to_params(self @ flat, self.params)

    def _gram(self) -> Tensor:
        """Inner products of the rows, some columns at a time: no second set of them."""
        count = len(self.rows)
        found = self.rows.new_zeros(count, count, dtype=torch.float64)
        for piece in self.rows.split(_WIDE, dim=1):
            wide = piece.double()
            found.addmm_(wide, wide.T)
        if bool(found.isfinite().all()):
            return found
        raise ValueError(
            "Covariance: expected vectors whose squares are finite, got some that are "
            "not. Look for NaN, infinity and overflow in what varies."
        )

    def trace(self) -> Tensor:
        """Return the total variance, 0-d float64.

        Raises:
            ValueError: If it is not finite.
        """  # noqa: DOC502 (`_gram` raises)
        return self._gram().trace()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of squared entries, 0-d float64."""
        return self._gram().norm()

    @full_precision()
    def principal(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Return variances and directions of the principal components.

        Args:
            k: How many; all of them if None.

        Returns:
            Variances, largest first, float64 ``[k]``, and unit directions ``[k, P]``;
            components without variance are left out.

        Raises:
            ValueError: If the total variance is not finite.
        """  # noqa: DOC502 (`_gram` raises)
        if k is not None:
            check_count("Covariance.principal", "k", k, 1)
        values, vectors = torch.linalg.eigh(self._gram())
        values, vectors = values.flip(0), vectors.flip(1)
        least = 1e-12 if self.dtype == torch.float64 else 1e-6
        rank = int((values > least * values[:1].clamp(min=1e-300)).sum())
        keep = rank if k is None else min(k, rank)
        directions = vectors[:, :keep].T.to(self.rows) @ self.rows
        for order in (torch.inf, 2) if keep else ():  # small squares underflow
            directions /= directions.norm(order, dim=1, keepdim=True)
        return values[:keep], directions

    @full_precision()
    def dense(self) -> Tensor:
        """Return the matrix ``[P, P]``; for small models."""
        return self.rows.T @ self.rows


def _covariance(
    caller: str, vectors: Iterator[Tensor], expected: int, params: dict[str, Tensor]
) -> Covariance:
    """The covariance of so many vectors (0: unknown), each written as it comes."""
    rows = first = torch.empty(0, device="cpu")
    count = 0
    for count, vector in enumerate(vectors, 1):
        if count == 1:  # from which equal vectors deviate by exactly nothing
            rows, first = vector.new_empty(expected or 2, vector.numel()), vector
        if count > len(rows):
            rows = torch.cat((rows, torch.empty_like(rows)))
        torch.sub(vector, first, out=rows[count - 1])
        del vector  # before the next is made
    if count < 2:
        raise ValueError(
            f"{caller}: expected at least two vectors for a covariance, got {count}"
        )
    rows = rows[:count]
    apart = rows.mean(0)
    rows.sub_(apart).div_((count - 1) ** 0.5)
    return Covariance(rows, apart.add_(first), dict(params))


def gradient_covariance(
    model: nn.Module,
    batch: Any,
    loss: Any,
    num_masks: int = 64,
    *,
    over: Literal["masks", "batches"] = "masks",
    seed: int = 0,
    params: Subset = None,
    group: Group = "auto",
    max_bytes: int = _MAX_BYTES,
) -> Covariance:
    r"""Return the covariance of the gradient at fixed parameters.

    .. math:: \Sigma = \mathrm{Cov}_\eta[\nabla R_{drop}(\theta, \eta)]

    Over masks: the gradient of the whole of ``batch`` at independent masks, dropout of
    every kind. Over batches: that of ``R_S`` on each batch, in equal weight, which is
    the noise of mini-batches of that size. Costs a forward and a backward pass a mask
    or batch, and the memory of that many gradients, besides that of one pass; where a
    loader has no length, up to three times as much while it grows.

    Args:
        model: The model; left as it is.
        batch: One batch ``(inputs, targets)``, or a list or loader of batches.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_masks: Number of masks, at least 2.
        over: What is drawn: masks, or batches.
        seed: First seed of the masks.
        params: Names of the parameters, or a predicate on names.
        group: Process group over which batches are spread, for masks.
        max_bytes: Most memory for the gradients.

    Returns:
        The covariance in low-rank form.

    Raises:
        ValueError: If there are fewer than two draws, they need more than
            ``max_bytes``, or the loss is not finite.
        TypeError: If ``num_masks`` or ``seed`` is no integer.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, section VII ("random gradient
        data"); Feng & Tu, PNAS 118 (2021).

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        >>> batch = torch.ones(8, 3), torch.zeros(8, 1)
        >>> gradient_covariance(net, batch, "mse", num_masks=4).rows.shape
        torch.Size([4, 4])
    """  # noqa: DOC502 (the checks raise)
    check_choice("gradient_covariance", "over", over, ("masks", "batches"))
    check_real("gradient_covariance", "max_bytes", max_bytes, least=0, finite=False)
    if over == "batches":
        return _of_batches("gradient_covariance", model, batch, loss, params, max_bytes)
    check_count("gradient_covariance", "num_masks", num_masks, 2)
    check_count("gradient_covariance", "seed", seed, 0)
    surface = Surface(
        "gradient_covariance", model, loss, batch, params=params, group=group,
        masks=range(seed, seed + num_masks),
    )  # fmt: skip
    _check_bytes(surface, num_masks, max_bytes)
    found = map(surface.gradient, surface.seeds)
    return _covariance("gradient_covariance", found, num_masks, surface.params)


def _of_batches(
    caller: str, model: nn.Module, batches: Any, loss: Any, params: Subset, most: int
) -> Covariance:
    given = as_batches(batches)
    like: dict[str, Tensor] = {}

    def gradients(read: Iterable[Batch]) -> Iterator[Tensor]:
        for count, batch in enumerate(filter(batch_size, read), 1):
            surface = Surface(caller, model, loss, (batch[0], batch[1]), params=params)
            _check_bytes(surface, max(count, length_hint(given)), most)
            like.update(surface.params)
            yield surface.gradient()

    with contextlib.closing(Reading(given, model).__iter__()) as read:
        return _covariance(caller, gradients(read), length_hint(given), like)


def _check_bytes(surface: Surface, count: int, max_bytes: int) -> None:
    each = sum(x.numel() * x.element_size() for x in surface.params.values())
    if count * each > max_bytes:
        raise ValueError(
            f"gradient_covariance: expected at most `max_bytes` = {max_bytes} for "
            f"gradients, got {count} of {each} bytes. Take fewer, or choose `params=`."
        )


def trajectory_covariance(snapshots: Iterable[Mapping[str, Tensor]]) -> Covariance:
    r"""Return the covariance of the parameters along a trajectory.

    Takes the memory of the snapshots once, besides those that are given; of an iterator
    up to three times as much while it grows.

    Args:
        snapshots: Parameters (or state dictionaries, of which only floating-point
            tensors count) at several steps, of the same names and shapes.

    Returns:
        The covariance in low-rank form.

    Raises:
        ValueError: If there are fewer than two, they differ in names or shapes, or one
            has no such tensor.
        TypeError: If one is no dictionary.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, section VII ("random
        trajectory data"); Feng & Tu, PNAS 118 (2021).

    Example:
        >>> steps = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 1.0])}]
        >>> trajectory_covariance(steps).dense()
        tensor([[2., 0.],
                [0., 0.]])
    """  # noqa: DOC502 (the generator below raises)
    like: dict[str, Tensor] = {}

    def vectors() -> Iterator[Tensor]:
        for snapshot in snapshots:
            if not isinstance(snapshot, Mapping):
                raise TypeError(
                    "trajectory_covariance: expected snapshots to be dictionaries of "
                    "tensors, such as dict(model.named_parameters()), got "
                    f"{type(snapshot).__name__}"
                )
            params: Params = {
                n: x.detach()
                for n, x in snapshot.items()
                if isinstance(x, Tensor) and x.is_floating_point()
            }
            if not params:
                raise ValueError(
                    "trajectory_covariance: expected snapshots with floating-point "
                    f"tensors, got none in {list(snapshot)}"
                )
            if not like:
                like.update({n: torch.empty_like(x) for n, x in params.items()})
            shapes = {n: x.shape for n, x in params.items()}
            if shapes != {n: x.shape for n, x in like.items()}:
                raise ValueError(
                    "trajectory_covariance: expected snapshots of the same names and "
                    f"shapes, got {list(shapes)} after {list(like)}"
                )
            yield to_vector({n: params[n] for n in like})

    return _covariance("trajectory_covariance", vectors(), length_hint(snapshots), like)
