"""Peak memory of the estimators against that of a step; Linux only.

A step holds what is kept for going backward, what is made on the way, and the
parameters' gradients, which it allocates; parameters, batch and state of an optimizer
are there before, and so is what is loaded once, code and workspaces of the libraries:
each call is measured when it has run. The floor is the same quantity written out with
autograd alone on the same model, its second derivatives by ``create_graph=True``; of an
estimator, which nobody has to write that way, it is a step's.
"""

import multiprocessing
import os

import torch
import torch.nn.functional as F
from overhead_memory import forget, resident
from overhead_models import resnet18
from regularizers_losses import WORDS, large_model, large_outputs
from regularizers_meeting import OwnSwish, Recurrent, Shifted
from regularizers_models import in_turns, models, passes, step
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.regularizers import gauss_newton, second_order


def all_models() -> dict:
    """The models that are timed, and a language model whose outputs are flattened."""

    def layer():
        return nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)

    net = nn.Sequential(
        nn.Embedding(1000, 128), nn.Dropout(0.1), layer(), nn.Dropout(0.1), layer(),
        nn.Flatten(0, 1), nn.Dropout(0.5), nn.Linear(128, 1000),
    )  # fmt: skip
    x, y = torch.randint(1000, (32, 64)), torch.randint(1000, (32 * 64,))
    return {**models(), "language model, flattened outputs": (net, x, y)}


def calls(net, x, y) -> dict:
    """What is measured, by name, ours and by hand."""
    ours = passes(net, x, y)
    return {**ours, **{f"{k}, by hand": run for k, run in by_hand(net, x, y).items()}}


def memory() -> None:
    """Print what a call adds at its peak, and its ratio to what a step adds."""
    for model, batch in all_models().items():
        base = peak(model, "forward-backward")
        hands = by_hand(*batch)
        print(f"\n{model}: peak memory added; a step {base:.0f} MiB")
        print(f"  {'':20}{'MiB':>8}{'of a step':>12}{'floor':>8}")
        for name in passes(*batch):
            added = peak(model, name)
            floor = peak(model, f"{name}, by hand") if name in hands else base
            print(f"  {name:20}{added:>8.0f}{added / base:>12.2f}{floor / base:>8.2f}")
    against_a_step("batch normalization above a site at the input", meeting_models())
    against_a_step("few long texts", long_texts())
    many_outputs()


def meeting_models() -> dict:
    """Networks with batch normalization above a site at the input, by depth."""

    def convolutions(depth: int, act=nn.ReLU):
        layers = [nn.Dropout(0.1)]
        for i in range(depth):
            layers += [nn.Conv2d(32 if i else 3, 32, 3, padding=1), nn.BatchNorm2d(32),
                       act()]  # fmt: skip
        ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
        return nn.Sequential(*layers, *ends), x, y

    def recurrent(kind):
        return Recurrent(kind), torch.randn(64, 64, 64), torch.randint(10, (64,))

    net, x, y = resnet18()
    return {
        "one convolution": convolutions(1),
        "two convolutions": convolutions(2),
        "six convolutions": convolutions(6),
        "one convolution, in place": convolutions(1, lambda: nn.ReLU(inplace=True)),
        **{f"{words}, GELU": convolutions(depth, nn.GELU)
           for words, depth in (("one convolution", 1), ("six convolutions", 6))},
        "one convolution, PReLU": convolutions(1, nn.PReLU),
        "six convolutions, a derivative of its own": convolutions(6, OwnSwish),
        "six convolutions, written into views": convolutions(6, Shifted),
        "LSTM": recurrent(nn.LSTM),
        "GRU": recurrent(nn.GRU),
        "ResNet-18": (nn.Sequential(nn.Dropout(0.1), net), x[:16], y[:16]),
    }  # fmt: skip


def long_texts() -> dict:
    """Transformers of texts whose attention weights are more than all else."""

    def layer():
        return nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)

    def model(count: int, length: int):
        net = nn.Sequential(
            nn.Embedding(100, 64), nn.Dropout(0.1), layer(), nn.Dropout(0.1), layer(),
            nn.Linear(64, 100), nn.Flatten(0, 1),
        )  # fmt: skip
        size = count, length
        return net, torch.randint(100, size), torch.randint(100, (count * length,))

    sizes = (1, 1024), (2, 512), (4, 512), (8, 256), (8, 512), (16, 128), (32, 64)
    return {f"{n} texts of {length} symbols": model(n, length) for n, length in sizes}


def each_call(net, x, y) -> dict:
    """What is measured of these models; where samples meet, sums go root by root."""
    batch, loss = (x, y), "cross_entropy"
    return {
        "forward-backward": step(net, batch, F.cross_entropy),
        "gauss_newton, 3": lambda: gauss_newton(net, batch, loss, num_samples=3),
        "second_order, 1": lambda: second_order(net, batch, loss),
        "second_order, 3": lambda: second_order(net, batch, loss, num_samples=3),
    }


def against_a_step(title: str, some: dict) -> None:
    """Print what the estimators take of some models."""
    print(f"\n{title}: memory and time of a step")
    for model, batch in some.items():
        runs = each_call(*batch)
        took = in_turns(runs, 3)
        added = {name: peak(model, name) for name in runs}
        base = added.pop("forward-backward"), took["forward-backward"]
        print(f"  {model}: a step {base[0]:.0f} MiB, {1e3 * base[1]:.0f} ms")
        for name, held in added.items():
            print(f"    {name:20}{held / base[0]:>8.2f}{took[name] / base[1]:>8.1f}")


def large_calls(net, x, y, name: str) -> dict:
    """What is measured of such a loss."""
    batch, loss = (x, y), large_outputs()[name]
    return {
        "forward-backward": step(net, batch, loss),
        "gauss_newton, 1": lambda: gauss_newton(net, batch, loss),
        "gauss_newton, 8": lambda: gauss_newton(net, batch, loss, num_samples=8),
        "second_order, 1": lambda: second_order(net, batch, loss),
    }


def many_outputs() -> None:
    """Print what losses without a closed form take of very many outputs."""
    print(f"\n1024 rows of {WORDS} words: memory and time of a step")
    for name in large_outputs():
        runs = large_calls(*large_model(name), name)
        took = in_turns(runs, 5)
        base, pace = peak(name, "forward-backward"), took.pop("forward-backward")
        print(f"  {name}: a step {base:.0f} MiB, {1e3 * pace:.0f} ms")
        for key, own in took.items():
            print(f"    {key:20}{peak(name, key) / base:>8.2f}{own / pace:>8.1f}")


def by_hand(net, x, y) -> dict:
    """The modified losses as one would write them for this model with autograd."""
    return {
        "L1, gauss_newton": lambda: rooted(net, x, y),
        "L1, monte_carlo": passes(net, x, y)["forward-backward"],
        "L2": lambda: penalized(net, x, y, 1, clean=True),
        "L3": lambda: penalized(net, x, y, -1, clean=False),
        "regu": lambda: penalized(net, x, y, 1, clean=False),
    }


def dropouts(net) -> list[nn.Module]:
    """The dropout layers of a sequence."""
    return [m for m in net if isinstance(m, (nn.Dropout, nn.Dropout2d))]


def penalized(net, x, y, sign: int, clean: bool) -> None:
    """A step on the loss, with dropout off if ``clean``, and the squared gradient."""
    net.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        risk = F.cross_entropy(net(x), y)
        slopes = torch.autograd.grad(risk, list(net.parameters()), create_graph=True)
        penalty = sign * 0.1 / 4 * sum(g.square().sum() for g in slopes)
        if clean:
            for m in dropouts(net):
                m.eval()
            risk = F.cross_entropy(net(x), y)
            for m in dropouts(net):
                m.train()
        (risk + penalty).backward()


def rooted(net, x, y) -> None:
    """A step on the loss with dropout off and R_1 by one root of its Hessian."""
    net.zero_grad()
    drops, held, h = dropouts(net), [], x
    if x.is_floating_point():  # for a site at the input
        h = x.detach().requires_grad_(isinstance(net[0], nn.Dropout))
    with sdpa_kernel(SDPBackend.MATH):
        for m in net:
            if m in drops:
                h = h.clone()
                held.append((m, h))
            else:
                h = m(h)
        s = h.softmax(1)
        label = torch.multinomial(s.detach(), 1)
        root = s - torch.zeros_like(s).scatter_(1, label, 1.0)
        inputs = [at for _, at in held]
        found = torch.autograd.grad(h, inputs, root / len(h) ** 0.5, create_graph=True)
        total = F.cross_entropy(h, y)
        for (m, at), g in zip(held, found, strict=True):
            form = at * g
            form = form.sum((2, 3)) if isinstance(m, nn.Dropout2d) else form
            total = total + m.p / (2 - 2 * m.p) * form.square().sum()
        total.backward()


def peak(model: str, name: str) -> float:
    """Peak memory that a call adds, MiB, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_dropout_ir", __name__])
    with context.Pool(1) as pool:
        return pool.apply(_added, (model, name))


def _added(model: str, name: str) -> float:
    if model in large_outputs():
        net, x, y = large_model(model)
        run = large_calls(net, x, y, model)[name]
    else:
        net, x, y = {**all_models(), **meeting_models(), **long_texts()}[model]
        run = {**each_call(net, x, y), **calls(net, x, y)}[name]
    run()  # what is loaded once
    net.zero_grad()
    forget()
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024
