"""Noise against curvature: variance and flatness, covariance and Hessian."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_real, check_symmetric
from torch_dropout_ir.sharpness.covariance import Covariance
from torch_dropout_ir.sharpness.flatness import interval_flatness
from torch_dropout_ir.sharpness.krylov import dtype_of, random_vector, working_dtype
from torch_dropout_ir.sharpness.ranks import unwrapped
from torch_dropout_ir.sharpness.trace import trace
from torch_dropout_ir.vectors import full_precision, to_params


@dataclasses.dataclass(frozen=True)
class VarianceFlatness:
    r"""Variance against flatness along the principal components of the noise.

    Attributes:
        variances: Variances, largest first, float64 ``[k]``; fewer where there are no
            more.
        widths: Interval flatness along each, float64 ``[k]``.
        slope: Slope of log variance over log width, by least squares; negative for the
            inverse relation, NaN with fewer than two finite widths.
        slope_standard_error: Its standard error; NaN with fewer than three.
    """

    variances: Tensor
    widths: Tensor
    slope: float
    slope_standard_error: float


def variance_flatness(
    model: nn.Module,
    loss: Any,
    batches: Any,
    covariance: Covariance,
    k: int = 10,
    *,
    factor: float = 2.0,
    floor: float = 1e-6,
) -> VarianceFlatness:
    r"""Return the relation of the noise's variance to the flatness along it.

    .. math:: \log \sigma_i^2 \approx a + s \log F_i

    Args:
        model: The model, of the parameters that the covariance is of.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch, or a list or loader of batches.
        covariance: Noise of the parameters or of the gradient.
        k: Number of principal components.
        factor: Level of the flatness, as in :func:`interval_flatness`.
        floor: Its floor.

    Returns:
        Variances, widths and the slope of their logarithms.

    Raises:
        ValueError: If ``k`` is below 1, ``factor`` not above 1, ``floor`` not
            positive, or the covariance of something that the model does not train.
        TypeError: If one of these is no number, or ``k`` no integer.

    References:
        Feng & Tu, *The inverse variance-flatness relation in stochastic gradient
        descent*, PNAS 118 (2021); Zhang et al., arXiv:2111.01022.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        >>> batch = torch.randn(9, 4), torch.randn(9, 2)
        >>> noise = tdi.sharpness.gradient_covariance(net, batch, "mse", num_masks=8)
        >>> variance_flatness(net, "mse", batch, noise, k=3).widths.shape
        torch.Size([3])
    """  # noqa: DOC502 (the checks raise)
    check_count("variance_flatness", "k", k, 1)
    check_real("variance_flatness", "factor", factor, above=1)
    check_real("variance_flatness", "floor", floor, above=0)
    _check_covariance("variance_flatness", covariance)
    variances, directions = covariance.principal(k)
    own = unwrapped(model, None)[0].named_parameters()
    trained = {n: x for n, x in own if x.requires_grad}
    if foreign := [n for n in covariance.params if n not in trained]:
        raise ValueError(
            "variance_flatness: expected the covariance of trained parameters of the "
            f"model, got that of {foreign} too. Snapshots of a trajectory are of "
            "`named_parameters()`: a state dictionary holds more."
        )
    widths = []
    for direction in directions:
        along = to_params(direction, covariance.params)
        whole = {n: along.get(n, torch.zeros_like(x)) for n, x in trained.items()}
        found = interval_flatness(
            model, loss, batches, whole, factor=factor, floor=floor
        )
        widths.append(found.width)
    seen = torch.tensor(widths, dtype=torch.float64, device="cpu")
    return VarianceFlatness(variances, seen, *_slope(seen, variances))


def _check_covariance(function: str, covariance: Any) -> None:
    if not isinstance(covariance, Covariance):
        raise TypeError(
            f"{function}: expected `covariance` as `gradient_covariance` returns it, "
            f"got {type(covariance).__name__}"
        )


def _slope(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of log y over log x, and its standard error."""
    usable = x.isfinite() & (x > 0) & (y > 0)
    x, y = x[usable].log(), y[usable].log().to(x)
    n = x.numel()
    spread = (x - x.mean()).square().sum() if n > 1 else x.new_zeros(())
    if not float(spread):
        return math.nan, math.nan
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    rest = y - y.mean() - slope * (x - x.mean())
    error = (
        (rest.square().sum() / (n - 2) / spread).sqrt()
        if n > 2
        else x.new_tensor(math.nan)
    )
    return float(slope), float(error)


@dataclasses.dataclass(frozen=True)
class Alignment:
    r"""How far the noise points where the loss is curved.

    Attributes:
        value: :math:`\mathrm{tr}(H \Sigma) / (\lVert H \rVert \lVert \Sigma \rVert)`,
            Frobenius norms; in [-1, 1].
        standard_error: Its standard error from the estimate of the norm of ``H``.
        null_mean: Mean of the value where ``Sigma`` has its eigenvalues and random
            eigenvectors.
        null_standard_error: Its standard error from the estimate of the trace of ``H``;
            over ``null_deviation`` that of the z-score, nearly.
        null_deviation: Standard deviation of the value there.
        z_score: ``(value - null_mean) / null_deviation``.
        variances: Eigenvalues of ``Sigma``, largest first, float64 ``[r]``.
        curvatures: :math:`v_i^\top H v_i` along its eigenvectors, float64 ``[r]``.
        num_matvecs: Products spent.
    """

    value: float
    standard_error: float
    null_mean: float
    null_standard_error: float
    null_deviation: float
    z_score: float
    variances: Tensor
    curvatures: Tensor
    num_matvecs: int


@full_precision()
def hessian_variance_alignment(
    op: Any, covariance: Any, *, num_probes: int = 16, trace_matvecs: int = 100
) -> Alignment:
    r"""Return the alignment of curvature and noise, and what chance would give.

    .. math:: E[\mathrm{tr}(H Q \Sigma Q^\top)] = \frac{\mathrm{tr} H \,
        \mathrm{tr} \Sigma}{P}, \qquad \mathrm{Var} = \frac{2 \,
        \lVert H_0 \rVert^2 \lVert \Sigma_0 \rVert^2}{(P - 1)(P + 2)}

    with random orthogonal ``Q`` and ``A_0 = A - (tr A / P) I``. That is the right
    null: a random matrix would have other eigenvalues too. Costs one product for each
    eigenvector of the covariance, ``num_probes`` for the norm of ``H`` and those of its
    trace; an operator of at most that many dimensions is taken exactly.

    Args:
        op: Operator of :func:`hessian` or a symmetric matrix ``[P, P]``.
        covariance: Covariance of the same parameters, or a matrix ``[P, P]``.
        num_probes: Random products for the norm of ``H``, at least 2.
        trace_matvecs: Most products for its trace.

    Returns:
        The alignment with its null and the curvature along each component.

    Raises:
        ValueError: If sizes or names differ, ``num_probes`` is below 2, a matrix is not
            symmetric, or one of the two is zero.
        TypeError: If a number of products is no integer, or one of the two no operator.

    References:
        arXiv:2305.15850; Feng & Tu, PNAS 118 (2021).

    Example:
        >>> matrix = torch.diag(torch.tensor([4.0, 3.0, 0.0])).double()
        >>> round(hessian_variance_alignment(matrix, matrix).value, 6)
        1.0
    """  # noqa: DOC502 (the checks raise)
    for given in (op, covariance):
        check_symmetric("hessian_variance_alignment", given)
    noise = _as_covariance(op, covariance)
    check_count("hessian_variance_alignment", "num_probes", num_probes, 2)
    check_count("hessian_variance_alignment", "trace_matvecs", trace_matvecs, 2)
    size = op.shape[0]
    sigma, other = float(noise.frobenius_norm()), float(noise.trace())
    variances, directions = noise.principal()
    given = directions.to(dtype_of(op))
    seen = [float((op @ v).double() @ v.double()) for v in given]
    curvatures = torch.tensor(seen, dtype=torch.float64, device="cpu")
    squares, error, spent = _squared_norm(op, num_probes)
    if not squares or not sigma:
        raise ValueError(
            "hessian_variance_alignment: expected a curvature and a covariance that "
            "are not zero. Is there no noise at these parameters?"
        )
    total = trace(op, trace_matvecs)
    both = squares**0.5 * sigma
    value = float((variances.cpu() * curvatures).sum()) / both
    own = float(total.value)
    mean = own * other / size / both
    apart = max(0.0, squares - own**2 / size) * max(0.0, sigma**2 - other**2 / size)
    deviation = (2 * apart / max(1, (size - 1) * (size + 2))) ** 0.5 / both
    return Alignment(
        value,
        abs(value) * error / (2 * squares),
        mean,
        float(total.standard_error) * other / size / both,
        deviation,
        (value - mean) / deviation if deviation else math.nan,
        variances.cpu(),
        curvatures,
        len(seen) + spent + total.num_matvecs,
    )


def _as_covariance(op: Any, covariance: Any) -> Covariance:
    if isinstance(covariance, Tensor):
        wide = covariance.to(working_dtype(covariance.dtype))
        values, vectors = torch.linalg.eigh(wide)
        if float(values[0]) < -0.01 * float(values.abs().max()):
            raise ValueError(
                "hessian_variance_alignment: expected a covariance without negative "
                f"eigenvalues, got one of {float(values[0]):.3g}. The curvature goes "
                "first, the covariance second."
            )
        rows = (vectors * values.clamp(min=0).sqrt()).T
        covariance = Covariance(rows, rows.new_zeros(rows.shape[1]), {})
    _check_covariance("hessian_variance_alignment", covariance)
    names = getattr(op, "params", None)
    named = (
        not covariance.params or names is None or list(names) == list(covariance.params)
    )
    if tuple(covariance.shape) != tuple(op.shape) or not named:
        raise ValueError(
            "hessian_variance_alignment: expected curvature and covariance of the same "
            f"parameters, got shapes {list(op.shape)} and {list(covariance.shape)}. "
            "Give both the same `params=`."
        )
    return covariance


def _squared_norm(op: Any, num_probes: int) -> tuple[float, float, int]:
    """Squared Frobenius norm of an operator, its standard error, products spent."""
    size = op.shape[0]
    if size <= num_probes or isinstance(op, Tensor):
        eye = torch.eye(size, dtype=op.dtype, device=op.device)
        return float((op @ eye).double().square().sum()), 0.0, size
    found = torch.tensor(
        [float((op @ random_vector(op, "rademacher")).double().square().sum())
         for _ in range(num_probes)], dtype=torch.float64, device="cpu"
    )  # fmt: skip
    return float(found.mean()), float(found.std()) / num_probes**0.5, num_probes
