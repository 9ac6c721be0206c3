"""Ours and the field's libraries, each by what it is asked for and its products."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import nn

from torch_dropout_ir import sharpness

STEPS = 20  # of a density: beyond that, more probes
Measure = tuple[torch.Tensor, torch.Tensor]  # nodes and weights


def ours(model: nn.Module, batch) -> dict[str, Callable]:
    """Top eigenvalue and trace within a budget of products."""

    def op():
        return sharpness.hessian(model, "cross_entropy", batch)

    return {
        "top": lambda k: float(
            sharpness.top_eigenvalues(op(), max_matvecs=k).values[0]
        ),
        "trace": lambda k: float(sharpness.trace(op(), k).value),
        "density": lambda k: quadrature(sharpness.spectral_density(op(), *steps(k))),
    }


def steps(budget: int) -> tuple[int, int]:
    """Steps of Lanczos and probes of a density."""
    return min(budget, STEPS), max(1, budget // STEPS)


def quadrature(found: sharpness.Density) -> Measure:
    """Nodes and weights of all probes of a density of ours."""
    return averaged(zip(found.nodes, found.weights, strict=True))


def averaged(probes: Iterable) -> Measure:
    """One measure of the nodes and weights of several probes."""
    nodes, weights = zip(*probes, strict=True)
    weights = [torch.as_tensor(x) / len(weights) for x in weights]
    return torch.cat([torch.as_tensor(x) for x in nodes]), torch.cat(weights)


def pyhessian(model: nn.Module, batch) -> dict[str, Callable]:
    """PyHessian, with its stopping on small change switched off."""
    library = importlib.import_module("pyhessian")

    def op():
        return library.hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)

    return {
        "top": lambda k: float(op().eigenvalues(maxIter=k, tol=0.0)[0][0]),
        "trace": lambda k: statistics.fmean(op().trace(maxIter=k, tol=0.0)),
        "density": lambda k: averaged(zip(*op().density(*steps(k)), strict=True)),
    }


def curvlinops(model: nn.Module, batch) -> dict[str, Callable]:
    """Curvlinops, with SciPy's Lanczos as its documentation has it."""
    library = importlib.import_module("curvlinops")
    spectrum = importlib.import_module("curvlinops.papyan2020traces.spectrum")
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    def op():
        return library.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [batch],
            check_deterministic=False,
        )  # fmt: skip

    def top(k: int) -> float:
        try:
            return float(
                eigsh(op().to_scipy(), 1, which="LA", ncv=k, maxiter=1, tol=1e-3,
                      return_eigenvectors=False)[0]
            )  # fmt: skip
        except ArpackNoConvergence:
            return float("nan")

    def density(k: int) -> Measure:
        """Its Lanczos alone: bounds for its grid would take more products."""
        each, probes = steps(k)
        matrix = op()
        found = [spectrum.fast_lanczos(matrix, each) for _ in range(probes)]
        return averaged((nodes, vectors[0].square()) for nodes, vectors in found)

    return {
        "top": top,
        "trace": lambda k: float(library.hutchpp_trace(op(), k - k % 3)),
        "density": density,
    }


def hessian_eigenthings(model: nn.Module, batch) -> dict[str, Callable]:
    """Its Lanczos and its Hutch++, which start alike every time if no seed is given."""
    library = importlib.import_module("hessian_eigenthings")

    def op():
        loss = library.supervised_loss(nn.CrossEntropyLoss())
        return library.HessianOperator(model, [batch], loss)

    def top(k: int) -> float:
        found = library.lanczos(
            op(), k=1, max_iter=k, which="LA", tol=1e-3, seed=torch.initial_seed()
        )
        return float(found.eigenvalues[0])

    def trace(k: int) -> float:
        seed = torch.initial_seed()
        found = library.trace(op(), num_matvecs=k, method="hutch++", seed=seed)
        return float(found.estimate)

    def density(k: int) -> Measure:
        each, probes = steps(k)
        seed = 1000 * torch.initial_seed()  # it adds the number of the probe
        found = library.spectral_density(
            op(), num_runs=probes, lanczos_steps=each, seed=seed
        )
        return averaged(zip(found.raw_eigenvalues, found.raw_weights, strict=True))

    return {"top": top, "trace": trace, "density": density}


CONTENDERS = {
    "ours": ours,
    "pyhessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian_eigenthings": hessian_eigenthings,
}
