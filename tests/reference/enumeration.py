"""Expected dropout losses and gradients by enumerating every mask."""

import itertools

import torch

from torch_dropout_ir.sites import find_sites


def every_mask(width, p):
    """All masks of ``width`` units with their probabilities."""
    for bits in itertools.product((0.0, 1.0), repeat=width):
        kept = sum(bits)
        yield (
            torch.tensor(bits, dtype=torch.float64),
            (1 - p) ** kept * p ** (width - kept),
        )


class Noise(torch.nn.Module):
    """Multiplies by noise that is set from outside."""

    noise = None

    def forward(self, x):
        return x * self.noise


def replace_sites(model):
    """Put a settable noise in the place of every dropout module."""
    placed = []
    for site in find_sites(model):
        parent = model.get_submodule(site.name.rpartition(".")[0])
        noise = Noise()
        setattr(parent, site.name.rpartition(".")[2], noise)
        placed.append((noise, site.p))
    return placed


def expected_risk(model, widths, batch, loss, *, gradients=False):
    """``E[R_drop]`` with one mask shared by the batch, which gives the same mean.

    With ``gradients`` also ``E||g||^2`` and ``||E g||^2`` of that shared mask.
    """
    placed = replace_sites(model)
    choices = [list(every_mask(w, p)) for w, (_, p) in zip(widths, placed, strict=True)]
    total, squares, mean = 0.0, 0.0, None
    for combination in itertools.product(*choices):
        weight = 1.0
        for (noise, p), (mask, chance) in zip(placed, combination, strict=True):
            noise.noise = mask / (1 - p)
            weight *= chance
        value = loss(model(batch[0]), batch[1])
        total += weight * float(value.detach())
        if gradients:
            found = torch.autograd.grad(value, list(model.parameters()))
            flat = torch.cat([g.flatten() for g in found])
            squares += weight * float(flat @ flat)
            mean = weight * flat if mean is None else mean + weight * flat
    return (total, squares, float(mean @ mean)) if gradients else total
