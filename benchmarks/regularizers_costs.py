"""Time of the estimators against a forward-backward pass, side by side."""

import functools
import itertools
import statistics

import torch
import torch.nn.functional as F
from regularizers_models import (
    in_turns,
    models,
    passes,
    seconds,
    small_models,
    step,
)
from regularizers_named import named_losses
from torch import nn

from torch_dropout_ir.regularizers import gauss_newton, last_layer


def with_sites(net, x):
    """Run a network without noise; return each site with its input, and the outputs."""
    held, h = [], x
    for layer in net:
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            h = h + torch.zeros((), requires_grad=True).expand(h.shape)
            held.append((layer, h))
        else:
            h = layer(h)
    return held, h


def form(held, outputs, root):
    """The Gauss-Newton form of a root of the loss's Hessian."""
    found = torch.autograd.grad(outputs, [at for _, at in held], root)
    total = 0.0
    for (layer, at), g in zip(held, found, strict=True):
        shared = (2, 3) if isinstance(layer, nn.Dropout2d) else ()
        part = at.detach() * g
        part = part.sum(shared) if shared else part
        total += layer.p / (2 - 2 * layer.p) * part.square().sum()
    return total


def least(net, x):
    """The passes and sums of the Gauss-Newton form written out for one network."""

    def run():
        held, h = with_sites(net, x)
        softmax = h.detach().softmax(1)
        root = softmax.sqrt().copysign_(torch.randn_like(softmax))
        root = root.addcmul_(softmax, root.sum(1, keepdim=True), value=-1)
        return form(held, h, root / len(x) ** 0.5)

    return run


def least_of(net, x, y, loss):
    """The same with one product with the Hessian of any loss, sent back once."""

    def run():
        held, h = with_sites(net, x)
        f = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(f, y), f, create_graph=True)
        return form(held, h, torch.autograd.grad(slope, f, torch.randn_like(f))[0])

    return run


def small_costs(turns: int) -> None:
    """Print what one sample of the Gauss-Newton form costs on small networks."""
    print("\nsmall networks: gauss_newton, 1, and the least it could take, in passes")
    # A block that has been freed, as batches are in a script, keeps the allocator from
    # giving memory back to the system at the end of each pass.
    torch.empty(2**22)
    for name, (net, x, y) in small_models().items():
        runs = {
            "pass": step(net, (x, y), F.cross_entropy),
            "gauss_newton, 1": functools.partial(
                gauss_newton, net, (x, y), "cross_entropy"
            ),
        }
        if isinstance(net, nn.Sequential):
            runs["least"] = least(net, x)
        found = in_turns(runs, 20 * turns)
        base = found["pass"]
        lowest = f"{found['least'] / base:.2f}" if "least" in found else "-"
        print(
            f"  {name:34}pass {1e3 * base:>6.2f} ms{lowest:>8} least"
            f"{found['gauss_newton, 1'] / base:>8.2f} gauss_newton"
        )


def focal(f, y):
    """Return the focal loss of labels."""
    log = F.log_softmax(f, 1).gather(1, y[:, None]).squeeze(1)
    return -((1 - log.exp()) ** 2 * log).mean()


def focal_by_cross_entropy(f, y):
    """Return the same as it is often written, of two cross-entropies."""
    each = F.cross_entropy(f, y, reduction="none")
    return (
        (1 - torch.exp(-each)) ** 2 * F.cross_entropy(f, y, reduction="none")
    ).mean()


def divergence(f, _):
    """Return the mean divergence between the softmaxes of two halves of the outputs."""
    half = (f.shape[1] + 1) // 2
    p, q = f[:, :half].log_softmax(1), f[:, -half:].log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean()


def losses(n: int, k: int) -> dict:
    """Losses besides mean squares and cross-entropy, each with its targets.

    All but the first seven mix outputs for all that their graphs tell; of those the
    softplus and the distance have curvature of one sign. Cox's and Dice's couple rows.
    """
    real, labels = torch.randn(n, k), torch.randint(k, (n,))
    parts, inverse = real.softmax(1), torch.eye(k) + 0.5 / k
    kept = torch.arange(n) % 3 > 0
    return {
        "Huber": (nn.HuberLoss(), real),
        "Poisson": (nn.PoissonNLLLoss(), real.abs()),
        "log cosh": (lambda f, y: (f - y).cosh().log().mean(), real),
        "squares": (lambda f, y: ((f - y) ** 2).sum(1).mean(), real),
        "soft labels": (lambda f, y: -(y * f.log_softmax(1)).sum(1).mean(), parts),
        "focal": (focal, labels),
        "Student": (lambda f, y: (f - y).square().log1p().mean(), real),
        "focal of two": (focal_by_cross_entropy, labels),
        "distance": (lambda f, y: (f - y).norm(dim=1).mean(), real),
        "Gaussian": (
            lambda f, y: F.gaussian_nll_loss(f[:, :1], y[:, :1], f[:, 1:2].exp()), real
        ),
        "softplus": (lambda f, _: F.softplus(f[:, :1] - f[:, 1:]).mean(), real),
        "divergence": (divergence, real),
        "ranked": (
            lambda f, y: (f.softmax(1).cumsum(1) - y.cumsum(1)).square().sum(1).mean(),
            parts,
        ),
        "Mahalanobis": (
            lambda f, y: torch.einsum("bi,ij,bj->b", f - y, inverse, f - y)
            .log1p()
            .mean(),
            real,
        ),
        "listwise": (listwise, real.argsort(1)),
        "survival": (survival, labels),
        "at risk": (at_risk, real[:, 0]),
        "overlap": (overlap, (real > 0).to(real)),
        **by_operations(n, k, real, inverse),
        "some rows": (lambda f, y: F.cross_entropy(f[kept], y[kept]), labels),
    }  # fmt: skip


def by_operations(n: int, k: int, real: torch.Tensor, inverse: torch.Tensor) -> dict:
    """Those whose operations are asked for derivatives, or made of others."""
    turns = torch.arange(k) % 2
    return {
        "determinant": (
            lambda f, _: torch.logdet(f[:, None] * f[:, :, None] + inverse).mean(), real
        ),
        "spectrum": (
            lambda f, y: torch.fft.fft(f - y).abs().square().log1p().mean(), real
        ),
        "convolved": (
            lambda f, y: F.conv1d((f - y)[:, None], real[:2, None, :2]).cosh().mean(),
            real,
        ),
        "by number": (
            lambda f, y: torch.zeros(n, 2).index_add(1, turns, f - y).cosh().mean(),
            real,
        ),
        "deviation": (lambda f, y: (f - y).std(1).mean(), real),
        "cubes": (lambda f, y: (f - y).norm(3, dim=1).mean(), real),
    }  # fmt: skip


def listwise(f, order):
    """Return minus the log-likelihood of an order by the Plackett-Luce model."""
    scores = f.gather(1, order).flip(1)
    return (scores.logcumsumexp(1) - scores).sum(1).mean()


def survival(f, y):
    """Return minus the log-likelihood of the interval in which each survival ends."""
    hazard = (f - 3).sigmoid()  # small ones: a hundred intervals are survived
    before = torch.cat((torch.ones_like(f[:, :1]), (1 - hazard).cumprod(1)[:, :-1]), 1)
    return -(hazard * before).gather(1, y[:, None]).log().mean()


def at_risk(f, times):
    """Return minus Cox's partial log-likelihood."""
    risk = f.mean(1)[times.argsort(descending=True)]
    return (risk.logcumsumexp(0) - risk).mean()


def overlap(f, y):
    """Return one minus the Dice coefficient of the batch."""
    p = f.sigmoid()
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


def dropped(*sizes: int) -> nn.Sequential:
    """Return a perceptron that drops half of the units of each hidden layer."""
    layers = [
        layer
        for a, b in itertools.pairwise(sizes)
        for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.5))
    ]
    return nn.Sequential(*layers[:-2])


def loss_costs(turns: int) -> None:
    """Print what one sample costs with other losses, and the least it could take.

    Its spread is the standard deviation of one sample over their mean.
    """
    print("\nother losses: gauss_newton, 1, and one product sent back once, in passes")
    torch.empty(2**22)  # as above
    for sizes, n in (
        ((20, 64, 64, 3), 32), ((64, 256, 256, 10), 64), ((64, 256, 256, 100), 64),
        ((256, 512, 512, 10), 128), ((784, 1000, 1000, 100), 64),
    ):  # fmt: skip
        net, x = dropped(*sizes), torch.randn(n, sizes[0])
        print("  " + "-".join(map(str, sizes)) + f", batch {n}")
        for name, (loss, y) in losses(n, sizes[-1]).items():
            print_cost(name, net, (x, y), loss, turns)
    for hidden, n in (((20, 64, 64), 32), ((64, 256, 256), 64)):
        x = torch.randn(n, hidden[0])
        print("  " + "-".join(map(str, hidden)) + f" and outputs of a loss, batch {n}")
        for name, (k, loss, y) in named_losses(n).items():
            print_cost(f"{name}, {k}", dropped(*hidden, k), (x, y), loss, turns)


def print_cost(name, net, batch, loss, turns: int) -> None:
    """Print what one sample of a loss costs, in turns with a pass and the least."""
    found = []
    runs = (
        step(net, batch, loss),
        least_of(net, *batch, loss),
        lambda: found.append(gauss_newton(net, batch, loss)),
    )
    times = [[seconds(run) for run in runs] for _ in range(20 * turns)]
    base, low, own = map(statistics.median, zip(*times, strict=True))
    values = [one.value.item() for one in found]
    spread = statistics.stdev(values) / abs(statistics.mean(values))
    print(
        f"    {name:22}pass {1e3 * base:>6.2f} ms{low / base:>8.2f} least"
        f"{own / base:>8.2f} gauss_newton, spread {spread:.3f}"
    )


def model_costs(turns: int) -> None:
    """Print what the estimators cost on models of practice, in passes."""
    for model, (net, x, y) in models().items():
        runs = passes(net, x, y)
        for name in list(runs):
            try:
                runs[name]()
            except RuntimeError as err:  # batch norm has no third derivative
                print(f"\n{model}: no {name}: {err}")
                del runs[name]
        times = in_turns(runs, turns)
        base = times["forward-backward"]
        print(f"\n{model}: forward-backward pass {1e3 * base:.1f} ms")
        for name, found in times.items():
            print(f"  {name:20}{found / base:>8.2f} passes")


def product_costs(turns: int) -> None:
    """Print what ``last_layer`` costs in products of features and weight."""
    h, w = torch.randn(4096, 4096), 0.02 * torch.randn(1000, 4096)
    f, y = h @ w.T, torch.randint(1000, (4096,))
    runs = {
        "product": lambda: h @ w.T,
        "last_layer, mse": lambda: last_layer(h, w, 0.5),
        "last_layer, cross_entropy": lambda: last_layer(
            h, w, 0.5, loss="cross_entropy", outputs=f, targets=y
        ),
    }
    times = in_turns(runs, turns)
    base = times["product"]
    print(f"\n[4096, 4096] x [4096, 1000]: product {1e3 * base:.1f} ms")
    for name, found in times.items():
        print(f"  {name:28}{found / base:>8.3f} products")
