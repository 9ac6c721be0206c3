"""Hooks of a model's own, which make something else of what a module returns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, modified_loss, monte_carlo
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.testing import enumerate_masks, expected_dropout_loss


def bend(_, __, output):
    return output.sin()


def hooked(place):
    """A network with a hook on one module, and what it computes at a mask."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()
    net = nn.Sequential(inner, nn.Dropout(0.3), outer)
    net[place].register_forward_hook(bend)

    def at(x, mask):
        h = inner(x) * mask / 0.7
        return outer(h.sin()) if place == 1 else outer(h)

    return net, at


@pytest.mark.parametrize("place", [1, 2])
def test_noise_is_put_before_hooks(place):
    net, at = hooked(place)
    x, y = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    expected = sum(
        chance * F.mse_loss(at(x, mask), y) for mask, chance in enumerate_masks(3, 0.3)
    )
    found = expected_dropout_loss(net, (x, y), "mse")
    torch.testing.assert_close(found, expected.detach())
    r1 = expected - F.mse_loss(at(x, torch.full((3,), 0.7)), y)
    torch.manual_seed(1)
    drawn = monte_carlo(net, (x, y), "mse", num_masks=400)
    assert (drawn.value - r1).abs() < 4 * drawn.standard_error


@pytest.mark.parametrize("place", [1, 2])
def test_a_layer_whose_output_is_bent_is_not_the_last(place):
    net, _ = hooked(place)
    batch = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    assert not gauss_newton(net, batch, "mse", num_samples=None).exact
    assert not online(net, batch, resolve_loss("mse"))[0].exact
    with pytest.raises(ValueError, match="single site"):
        modified_loss(net, batch, "mse", kind="L1")
