"""Curvature against PyHessian, curvlinops and hessian-eigenthings.

    python benchmarks/sharpness.py [--tasks mlp conv attention] [--data-root DIR]
        [--race top trace density] [--no-numbers] [--no-memory]

Cross-entropy on one batch, one thread. Times are in one run and in units of one
product by jvp(grad), which is what one would write by hand; errors are against float64:
a tight Lanczos run, and the exact trace (by columns where the network is smooth).
Libraries that are not there are skipped with a line; `pip install '.[bench]'` brings
them.

A density's error is the Wasserstein distance of its nodes and weights to those of many
probes in float64, over the root mean square of the eigenvalues.

Lanczos, not LOBPCG: at initialization, from one random start, the MLP's top eigenvalue
is true to 1e-3 after 21 products, LOBPCG's after 24 (56 with four vectors).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir import sharpness, vectors

BUDGETS = {
    "top": (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64),
    "trace": (8, 16, 32, 64),
    "density": (4, 6, 8, 10, 12, 14, 16, 18, 20, 40, 80),
}
STEPS = 20  # of a density: beyond that, more probes
TARGETS = {"top": 1e-3, "trace": 1e-2, "density": 0.25}
SEEDS = 3
Measure = tuple[torch.Tensor, torch.Tensor]  # nodes and weights
LIBRARIES = ("pyhessian", "curvlinops", "hessian_eigenthings")


class Attention(nn.Module):
    """One block over eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.up, self.down = (
            nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify ``[n, 8, 8]``."""
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1))


def mlp() -> nn.Module:
    """The common task's network."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def tanh() -> nn.Module:
    """A smooth one."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(),
        nn.Linear(256, 10),
    )  # fmt: skip


def conv() -> nn.Module:
    """A small convolutional one."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


TASKS = {
    "mlp": (mlp, (784,), 512),
    "tanh": (tanh, (784,), 512),
    "conv": (conv, (1, 28, 28), 128),
    "attention": (Attention, (8, 8), 256),
}


def images(root: Path | None, shape: tuple[int, ...], n: int):
    """MNIST where it is given and fits, else ten clouds of points."""
    size = torch.Size(shape).numel()
    if root is not None and size == 784:
        from torchvision import datasets

        found = datasets.MNIST(root, train=True)
        return found.data[:n].float().view(n, *shape) / 255, found.targets[:n]
    y = torch.randint(10, (n,))
    return (torch.randn(10, size)[y] + torch.randn(n, size)).view(n, *shape), y


def trained(model: nn.Module, batch, steps: int) -> nn.Module:
    """Some steps of gradient descent on the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model


def seconds(run: Callable, turns: int = 5) -> float:
    """Median wall time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(turns):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def resident(field: str) -> float:
    """Megabytes of this process, as Linux counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def peak(run: Callable) -> float:
    """Megabytes that a call adds at its peak, in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the parent's peak
        before = resident("VmRSS")
        run()
        queue.put(resident("VmHWM") - before)

    process = context.Process(target=child)
    process.start()
    used = queue.get()
    process.join()
    return used


def plain_product(model: nn.Module, batch) -> Callable:
    """One product by jvp(grad), from scratch each time."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    v = vectors.random_like(params)

    def loss(p):
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(
                torch.func.functional_call(model, p, (batch[0],)), batch[1]
            )

    return lambda: torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]


def ours(model: nn.Module, batch) -> dict[str, Callable]:
    """Top eigenvalue and trace within a budget of products."""

    def op():
        return sharpness.hessian(model, "cross_entropy", batch)

    return {
        "top": lambda k: float(
            sharpness.top_eigenvalues(op(), max_matvecs=k, stop="value").values[0]
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


def distance(found: Measure, true: Measure) -> float:
    """Wasserstein distance of two measures, over the second's root mean square."""
    nodes = torch.cat([x.double() for x, _ in (found, true)])
    weights = torch.cat((found[1].double(), -true[1].double()))
    nodes, order = nodes.sort()
    apart = weights[order].cumsum(0)[:-1].abs() * nodes.diff()
    return float(apart.sum() / (true[1] * true[0].square()).sum().sqrt())


def error_of(what: str, found, true) -> float:
    """Relative error of what a contender returned."""
    if what == "density":
        return distance(found, true)
    return abs(found - true) / abs(true)


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


def truth(make: Callable, state: dict, batch, wanted: set[str]) -> dict:
    """What is wanted, in float64."""
    model = make().double()
    model.load_state_dict(state)
    op = sharpness.hessian(model, "cross_entropy", (batch[0].double(), batch[1]))
    true, said = {}, []
    if "top" in wanted:
        top = sharpness.top_eigenvalues(op, tol=1e-7, stop="value", max_matvecs=400)
        true["top"] = float(top.values[0])
        residual = float(top.residuals[0])
        said.append(f"top {true['top']:.8g} (residual {residual:.0e})")
    if "trace" in wanted:
        found = sharpness.trace(op, 100)
        if found.method != "exact":
            size = op.shape[0]
            found = sharpness.trace(op, size if size < 4000 else 2000)
        true["trace"], error = float(found.value), float(found.standard_error)
        how = "exact" if found.method == "exact" else f"+- {error:.1e}"
        said.append(f"trace {true['trace']:.8g} ({how})")
    if "density" in wanted:
        torch.manual_seed(100)
        probes = 128 if op.shape[0] < 1e5 else 2
        true["density"] = quadrature(sharpness.spectral_density(op, 40, probes))
    print(f"  float64: {', '.join(said)}")
    return true


def race(
    name: str, contender: dict[str, Callable], true: dict, unit: float, wanted
) -> None:
    """Smallest budget that reaches the true value from every seed, and what it cost."""
    for what in wanted:
        line, first, failed = [], None, False
        for budget in BUDGETS[what]:
            errors = []
            try:
                for seed in range(SEEDS):
                    torch.manual_seed(seed)
                    # The fused kernel has no second derivative: it stops the others.
                    with sdpa_kernel(SDPBackend.MATH):
                        value = contender[what](budget)
                    errors.append(error_of(what, value, true[what]))
            except Exception as err:
                if failed:
                    break
                failed = True
                line.append(f"{budget}: {type(err).__name__}")
                continue
            line.append(f"{budget}: {max(errors):.1e}")
            if max(errors) <= TARGETS[what]:
                with sdpa_kernel(SDPBackend.MATH):
                    took = seconds(lambda k=budget, w=what: contender[w](k), 3)
                first = took / unit
                break
        reached = "not reached" if first is None else f"{first:6.1f} units"
        print(f"  {name:20} {what:7} to {TARGETS[what]:g}: {reached:>12}   "
              f"worst true error by budget {', '.join(line)}", flush=True)  # fmt: skip


def lanczos_to(op, true: float, start: torch.Tensor | None) -> Callable:
    """Lanczos until its value is true to 1e-3, to be run again."""
    torch.manual_seed(0)
    found = sharpness.top_eigenvalues(op, 1, 1e-9, 8, start)
    while abs(float(found.values[0]) - true) > 1e-3 * true and found.num_matvecs < 128:
        found = sharpness.top_eigenvalues(op, 1, 1e-9, 1, state=found.state)
    return lambda: sharpness.top_eigenvalues(op, 1, 1e-9, found.num_matvecs, start)


def floor(op, true: float) -> str:
    """Products after which the best vector of a Krylov space is true to 1e-3.

    The Ritz value is the largest quotient over the space, so no method that multiplies
    one random vector (power iteration, Chebyshev, LOBPCG, restarts) can be sooner.
    """
    counts = []
    for seed in range(12):
        torch.manual_seed(seed)
        start = torch.randn(op.shape[0])
        found = sharpness.top_eigenvalues(op, 1, 1e-9, 4, start)
        while true - float(found.values[0]) > 1e-3 * true and found.num_matvecs < 64:
            found = sharpness.top_eigenvalues(op, 1, 1e-9, 1, state=found.state)
        counts.append(found.num_matvecs)
    mean = statistics.fmean(counts)
    return f"{min(counts)} to {max(counts)}, {mean:.1f} on average"


def lobpcg_to(op, true: float, start: torch.Tensor) -> Callable:
    """SciPy's LOBPCG, likewise, from as many columns as it works with."""
    from scipy.sparse.linalg import LinearOperator, lobpcg

    matrix = LinearOperator(
        op.shape,
        matvec=lambda v: (op @ torch.from_numpy(v).flatten()).numpy(),
        matmat=lambda v: (op @ torch.from_numpy(v)).numpy(),
        dtype="float32",
    )

    def run(most: int):
        return lobpcg(matrix, start.numpy().copy(), tol=1e-9, maxiter=most,
                      retLambdaHistory=True)  # fmt: skip

    history = run(128 // start.shape[1])[2]
    errors = [abs(float(x.max()) - true) / true for x in history]
    first = next((i for i, e in enumerate(errors) if e <= 1e-3), len(errors))
    return lambda: run(first)


def lanczos_or_lobpcg(model: nn.Module, batch, true: float, unit: float) -> None:
    """Products and time of either method to a true error of 1e-3, from one start."""
    op = sharpness.hessian(model, "cross_entropy", batch)
    torch.manual_seed(1)
    columns = torch.randn(op.shape[0], 4)
    one = columns[:, 0].clone()
    for name, run in (
        ("Lanczos", lanczos_to(op, true, one)),
        ("Lanczos, rehearsed", lanczos_to(op, true, None)),
        ("LOBPCG, one vector", lobpcg_to(op, true, columns[:, :1])),
        ("LOBPCG, four", lobpcg_to(op, true, columns)),
    ):
        before = op.num_matvecs
        torch.manual_seed(0)
        took = seconds(run, 3) / unit
        products = (op.num_matvecs - before) / 4
        print(f"  {name:20} top to 1e-3: {products:.0f} products, {took:.1f} units")


def memory(model: nn.Module, batch) -> None:
    """Peaks of a product and of what is made of products."""

    def op():
        return sharpness.hessian(model, "cross_entropy", batch)

    def product() -> None:
        o = op()
        v = torch.ones(o.shape[0])
        o @ v, o @ v

    size = 4e-6 * sum(p.numel() for p in model.parameters())
    one = peak(product)
    for name, run, kept in (
        ("trace", lambda: sharpness.trace(op(), 100), 0),
        ("density, 20 steps", lambda: sharpness.spectral_density(op()), 20),
        (
            "top, 16 products",
            lambda: sharpness.top_eigenvalues(op(), max_matvecs=16),
            32,
        ),
    ):
        used = peak(run)
        print(f"  peak of {name:18} {used:6.0f} MB, of a product {one:.0f} MB; vectors "
              f"it keeps {kept * size:.0f} MB")  # fmt: skip


def numbers(model: nn.Module, batch, true: dict, unit: float) -> None:
    """Ours at its own stopping rules."""
    op = sharpness.hessian(model, "cross_entropy", batch)
    v = vectors.to_vector(vectors.random_like(op.params))
    plain = plain_product(model, batch)
    times = {"jvp(grad)": [], "hessian": [], "ggn": []}
    gn = sharpness.ggn(model, "cross_entropy", batch)
    for _ in range(15):
        for name, run in zip(
            times, (plain, lambda: op @ v, lambda: gn @ v), strict=True
        ):
            times[name].append(seconds(run, 1))
    best = {name: statistics.median(found) for name, found in times.items()}
    print("  repeated product, ratio to jvp(grad): "
          f"hessian {best['hessian'] / best['jvp(grad)']:.2f}, "
          f"ggn {best['ggn'] / best['jvp(grad)']:.2f}")  # fmt: skip
    for stop in ("value", "residual"):
        torch.manual_seed(1)
        cold = sharpness.top_eigenvalues(op, stop=stop)
        warm = sharpness.top_eigenvalues(op, stop=stop, start=cold.vectors[0])
        for name, found in (("cold", cold), ("warm", warm)):
            error = abs(float(found.values[0]) - true["top"]) / true["top"]
            print(f"  top-1 {name}, stop on {stop:8}: {found.num_matvecs:3} products, "
                  f"true error {error:.1e}")  # fmt: skip
    print(f"  products that any method needs, from 12 random starts: "
          f"{floor(op, true['top'])}")  # fmt: skip
    started = time.perf_counter()
    found = sharpness.trace(op, 100)
    took = time.perf_counter() - started
    error = abs(float(found.value) - true["trace"]) / abs(true["trace"])
    print(f"  trace ({found.method}): {took / unit:.1f} units, true error {error:.1e}, "
          f"standard error {float(found.standard_error):.2e}")  # fmt: skip
    if found.method != "exact":
        each = seconds(lambda: op @ v, 3)
        count = max(2, round(took / each))
        signs = sharpness.trace(op, count, method="hutchinson")
        ratio = float(signs.standard_error / found.standard_error)
        print(f"  Hutchinson in equal time ({count} products): standard error "
              f"{float(signs.standard_error):.2e}, {ratio:.1f} times")  # fmt: skip
    before = op.num_matvecs
    sharpness.spectral_density(op)
    print(f"  density of 20 steps: {op.num_matvecs - before} products")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100],
                        help="steps of training before")  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--race", nargs="*", default=list(TARGETS), choices=TARGETS,
                        help="what to race for; nothing: ours alone")  # fmt: skip
    parser.add_argument("--no-numbers", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    others = {}
    for name in LIBRARIES if chosen.race else ():
        try:
            importlib.import_module(name)
            others[name] = globals()[name]
        except ImportError as err:
            print(f"skipped: {name} ({err})")
    wanted = {*chosen.race, *(() if chosen.no_numbers else ("top", "trace"))}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    for task in chosen.tasks:
        make, shape, n = TASKS[task]
        torch.manual_seed(0)
        batch = images(chosen.data_root, shape, n)
        model = make()
        done = 0
        for steps in chosen.steps:
            trained(model, batch, steps - done)
            done = steps
            model.eval()
            print(f"\n{task}, batch {n}, after {steps} steps", flush=True)
            true = truth(make, copy.deepcopy(model.state_dict()), batch, wanted)
            unit = seconds(plain_product(model, batch), 3)
            print(f"  unit: one product by jvp(grad), {1e3 * unit:.1f} ms")
            if not chosen.no_numbers:
                numbers(model, batch, true, unit)
                if task == "mlp":
                    lanczos_or_lobpcg(model, batch, true["top"], unit)
            for name, contender in {"ours": ours, **others}.items():
                race(name, contender(model, batch), true, unit, chosen.race)
        if not chosen.no_memory:
            memory(model, batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
