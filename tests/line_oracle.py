"""What a line through a layer should give, by a double backward."""

import torch
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.line_pass import curvature_along
from torch_dropout_ir.regularizers.site_forms import signs


def noise_of(net, x):
    """Uses of sites, the input of the first, and a sign for each of its elements."""
    with clean_pass(net, x) as clean:
        uses = [(site, h.new_empty(()), h.shape) for site, h, _ in clean.uses]
        (site, h, _), *_ = clean.uses
        return uses, h.detach(), signs(site, h)


def line_and_graph(layer, x):
    """The second derivative of a loss behind a layer, along a line and by a graph."""
    net = nn.Sequential(nn.Dropout(0.3), layer).to(x.dtype)
    uses, h, z = noise_of(net, x)
    c = torch.rand_like(net(x)) + 0.5

    def loss(f, _):
        return (c * f * f).sum()

    found = curvature_along(net, (x, None), resolve_loss(loss), uses, 0, z.clone)
    t = torch.zeros((), dtype=x.dtype, requires_grad=True)
    risk = loss(layer(h + t * uses[0][0].variance ** 0.5 * z * h), None)
    (slope,) = torch.autograd.grad(risk, t, create_graph=True)
    (expected,) = torch.autograd.grad(slope, t)
    return found, expected


def linear_and_graph(layer, x):
    """The same with the layer linearized: what its first derivative makes of a line."""
    net = nn.Sequential(nn.Dropout(0.3), layer).to(x.dtype)
    uses, h, z = noise_of(net, x)
    c = torch.rand_like(net(x)) + 0.5
    loss = resolve_loss(lambda f, _: (c * f * f).sum())
    found = curvature_along(net, (x, None), loss, uses, 0, z.clone, linear=True)
    v = uses[0][0].variance ** 0.5 * z * h
    moved = torch.autograd.functional.jvp(layer, h, v)[1]
    return found, 2 * (c * moved * moved).sum()
