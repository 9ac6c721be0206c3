"""Time of the estimators against a forward-backward pass, side by side."""

import functools
import statistics

import torch
import torch.nn.functional as F
from regularizers_models import models, passes, seconds, small_models, step
from torch import nn

from torch_dropout_ir.regularizers import gauss_newton, last_layer


def least(net, x):
    """The passes and sums of the Gauss-Newton form written out for one network."""

    def run():
        held, h = [], x
        for layer in net:
            if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
                h = h + torch.zeros((), requires_grad=True).expand(h.shape)
                held.append((layer, h))
            else:
                h = layer(h)
        softmax = h.detach().softmax(1)
        label = torch.multinomial(softmax, 1)
        root = softmax.scatter_add_(1, label, -torch.ones_like(label, dtype=h.dtype))
        found = torch.autograd.grad(h, [at for _, at in held], root / len(x) ** 0.5)
        total = 0.0
        for (layer, at), g in zip(held, found, strict=True):
            shared = (2, 3) if isinstance(layer, nn.Dropout2d) else ()
            form = at.detach() * g
            form = form.sum(shared) if shared else form
            total += layer.p / (2 - 2 * layer.p) * form.square().sum()
        return total

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
        times = {key: [] for key in runs}
        for _ in range(20 * turns):
            for key, run in runs.items():
                times[key].append(seconds(run))
        found = {key: statistics.median(times[key]) for key in times}
        base = found["pass"]
        lowest = f"{found['least'] / base:.2f}" if "least" in found else "-"
        print(
            f"  {name:34}pass {1e3 * base:>6.2f} ms{lowest:>8} least"
            f"{found['gauss_newton, 1'] / base:>8.2f} gauss_newton"
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
        times = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                times[name].append(seconds(run))
        base = statistics.median(times["forward-backward"])
        print(f"\n{model}: forward-backward pass {1e3 * base:.1f} ms")
        for name, found in times.items():
            ratio = statistics.median(found) / base
            print(f"  {name:20}{ratio:>8.2f} passes")


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
    times = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run))
    base = statistics.median(times["product"])
    print(f"\n[4096, 4096] x [4096, 1000]: product {1e3 * base:.1f} ms")
    for name, found in times.items():
        print(f"  {name:28}{statistics.median(found) / base:>8.3f} products")
