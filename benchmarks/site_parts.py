"""Parts of R_1 by site: do they add up to it, what is their error, what do they take?

Five networks with several sites, before training and after some steps of it. A column
is the sum of the parts over R_1 by many masks: by ``gauss_newton`` and ``second_order``
(eight draws), and along the path as in training (as many masks as R_1 has); with the
relative error of that quotient, by the errors of both. ``a part`` is the error of a
part in training (four masks) over the part, the median of sites; ``steps`` the time of
R_1 with its parts in training in forward-backward passes of the same batch, in turns,
median; ``memory`` its peak over theirs, by torch's profiler, on the CPU.

    python benchmarks/site_parts.py
"""

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F
from regularizers_models import in_turns, step
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, monte_carlo, second_order
from torch_dropout_ir.regularizers.online import online

BATCH = 32
LOSS = F.cross_entropy


class Texts(nn.Module):
    """A transformer of three layers, whose symbols sum up those before."""

    def __init__(self, norm_first: bool):
        super().__init__()
        self.symbols = nn.Embedding(20, 32)
        self.places = nn.Parameter(torch.randn(16, 32) / 10)
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.1, F.gelu, batch_first=True, norm_first=norm_first
        )
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 20)

    def forward(self, x):
        """Logits, ``[batch, symbols, places]``."""
        return self.head(self.body(self.symbols(x) + self.places)).transpose(1, 2)

    @staticmethod
    def batch(draw):
        """Symbols and their sums."""
        x = torch.randint(20, (BATCH, 16), generator=draw)
        return x, x.cumsum(1) % 20


class Vectors(nn.Sequential):
    """Four hidden layers, a site behind each."""

    def __init__(self, activation: type[nn.Module]):
        wide = [20, 64, 64, 64, 64]
        layers = [
            layer
            for a, b in pairwise(wide)
            for layer in (nn.Linear(a, b), activation(), nn.Dropout(0.1))
        ]
        super().__init__(*layers, nn.Linear(64, 5))

    @staticmethod
    def batch(draw):
        """Points, and which of five of their coordinates is largest."""
        x = torch.randn(BATCH, 20, generator=draw)
        return x, x[:, :5].argmax(1)


class Images(nn.Sequential):
    """Three convolutions with batch normalization, a site behind each."""

    def __init__(self):
        wide = [1, 16, 16, 32]
        layers = [
            layer
            for a, b in pairwise(wide)
            for layer in (
                nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                nn.Dropout(0.1),
            )
        ]  # fmt: skip
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
        )

    @staticmethod
    def batch(draw):
        """Noise, and which of two corners are brighter."""
        x = torch.randn(BATCH, 1, 12, 12, generator=draw)
        y = torch.randint(4, (BATCH,), generator=draw)
        x[:, 0, :6, :6] += (y % 2).view(-1, 1, 1)
        x[:, 0, 6:, 6:] += (y // 2).view(-1, 1, 1)
        return x, y


NETS = {
    "transformer, norm behind": lambda: Texts(False),
    "transformer, norm before": lambda: Texts(True),
    "four layers, ReLU": lambda: Vectors(nn.ReLU),
    "four layers, GELU": lambda: Vectors(nn.GELU),
    "convolutions, batch norm": Images,
}


def peak(run) -> float:
    """Bytes that a call holds at most, of those that it makes."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return float(most)


def sums(net, batch, masks: int) -> str:
    """Return the sums of parts over R_1, and the relative error of a part."""
    r1 = monte_carlo(net, batch, LOSS, num_masks=masks, per_site=True)
    error = r1.standard_error / r1.value.abs()
    row = f"{r1.value:>10.2g} +- {error:<5.0%}"
    for form in (gauss_newton, second_order):
        found = form(net, batch, LOSS, num_samples=8)
        row += f"{found.value / r1.value:>8.2f}"
    whole = sum(r1.per_site.values())
    # The errors of parts, as if they were one another's: no less than that of the sum.
    off = sum(r1.per_site_standard_error.values()) / r1.value.abs()
    row += f"{whole / r1.value:>8.2f} +- {(off**2 + error**2) ** 0.5:<5.0%}"
    few, *_ = online(net, batch, resolve_loss("cross_entropy"))
    shares = [
        few.per_site_standard_error[name] / x.abs() for name, x in r1.per_site.items()
    ]
    return f"{row}{torch.stack(shares).median():>8.0%}"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 30, 300])
    parser.add_argument("--masks", type=int, default=400, help="of R_1")
    parser.add_argument("--turns", type=int, default=15, help="of the times")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{'':26}step        R_1           GN    full    path          a part")
    for title, make in NETS.items():
        torch.manual_seed(0)
        net, draw = make(), torch.Generator().manual_seed(1)
        adam = torch.optim.Adam(net.parameters(), 2e-3)
        for k in range(max(chosen.steps) + 1):
            batch = net.batch(draw)
            if k in chosen.steps:
                print(f"{title:26}{k:>4}{sums(net, batch, chosen.masks)}", flush=True)
            adam.zero_grad()
            LOSS(net(batch[0]), batch[1]).backward()
            adam.step()
        loss, own = resolve_loss("cross_entropy"), step(net, batch, LOSS)
        runs = {"step": own, "R_1": lambda: online(net, batch, loss)}  # noqa: B023
        took = in_turns(runs, chosen.turns)
        held = peak(runs["R_1"]) / peak(own)
        share = took["R_1"] / took["step"]
        said = f"{share:.1f} steps of {1e3 * took['step']:.1f} ms, memory {held:.2f}"
        print(f"{'':30}{said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
