"""Whether the eigenvalues that converged are true, on spectra made to deceive.

Diagonal operators with 200 and 2000 known values: pairs 0.15 to 30 % apart, a cluster
of ten, ten equal ones, a power law, all negative, a negative one of three times the
size. Each is run from 15 random starts, by residual and by value, to a relative error
of 1e-3; then from starts near the first eigenvector, near the second one, and
orthogonal to the first. A claim is wrong if it converged and is off by more than that.

    python benchmarks/eigenvalue_claims.py
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from torch_dropout_ir import sharpness

TOL, SIZES = 1e-3, (200, 2000)
STARTS = ("random", "near the first", "near the second", "orthogonal to the first")


class Diagonal:
    """A diagonal matrix."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape = torch.Size((len(values), len(values)))
        self.dtype, self.device = values.dtype, values.device

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return self.values * v


def spectra(n: int) -> Iterator[torch.Tensor]:
    """Values of each matrix, the largest anywhere."""
    u = torch.rand(n, dtype=torch.float64)
    around = 2 * u - 1
    yield from (u, around, -u - 0.05, torch.linspace(-1, 1, n).double() ** 3)
    for gap in (0.3, 0.1, 0.03, 0.01, 3e-3, 1.5e-3):
        pair = 0.5 * around
        pair[:2] = torch.tensor([1.0, 1.0 - gap])
        yield pair
    cluster = 0.3 * around
    cluster[:10] = torch.linspace(0.9, 1.0, 10)
    negative = 0.3 * around
    negative[:2] = torch.tensor([1.0, -3.0])
    multiple = 0.1 * around
    multiple[:10] = 1.0
    yield from (cluster, negative, torch.arange(1, n + 1).double() ** -0.5, multiple)


def start(values: torch.Tensor, kind: str) -> torch.Tensor | None:
    """A start of that kind."""
    if kind == "random":
        return None
    second, first = (int(k) for k in values.argsort()[-2:])
    v = torch.randn(len(values), dtype=torch.float64)
    if kind == STARTS[3]:
        v[first] = 0.0
        return v
    v *= 0.3 / len(values) ** 0.5
    v[first if kind == STARTS[1] else second] += 1.0
    return v


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=15, help="starts of each kind")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    matrices = [Diagonal(values) for n in SIZES for values in spectra(n)]
    for stop in ("residual", "value"):
        for kind in STARTS:
            runs = [(op, seed) for op in matrices for seed in range(chosen.seeds)]
            wrong, claimed, products, largest = 0, 0, 0, 0.0
            for op, seed in tqdm(runs, desc=f"{stop}, {kind}", leave=False):
                torch.manual_seed(seed)
                given = start(op.values, kind)
                found = sharpness.top_eigenvalues(
                    op, 1, tol=TOL, max_matvecs=200, start=given, stop=stop
                )
                true = float(op.values.max())
                error = abs(float(found.values[0]) - true) / abs(true)
                products += found.num_matvecs
                claimed += found.converged
                if found.converged and error > TOL:
                    wrong, largest = wrong + 1, max(largest, error)
            print(
                f"{stop:8} {kind:24} {len(runs)} runs, {claimed} converged, "
                f"{wrong} wrong (by {largest:.1e} at most), "
                f"{products / len(runs):.1f} products"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
