"""Models and losses of other people's: errors and claims against plain torch."""

import pytest
import torch
from torch import nn

from torch_dropout_ir.regularizers import gauss_newton, second_order


class Folded(nn.Module):
    """Rows of all samples in one dimension at the site, put together for the outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.drop = nn.Linear(3, 4), nn.Dropout(0.3)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.drop(self.a(x.flatten(0, 1))))
        return self.out(h.view(len(x), -1))


def unbatched():
    """One image without a batch dimension: its first one counts channels."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Dropout(0.3), nn.Conv2d(3, 1, 2)
    )


def spread(form, net, batch, num_samples, repeats=300):
    """Mean square of the standard errors, over the variance of the values."""
    found = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        found.append(form(net, batch, "mse", num_samples=num_samples))
    values = torch.stack([e.value for e in found])
    errors = torch.stack([e.standard_error for e in found])
    return float(errors.square().mean() / values.var())


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_rows_of_one_sample_are_no_samples(form, num_samples):
    """They share what is drawn, or meet: taken apart, errors were a fifth too small."""
    torch.manual_seed(0)
    net = Folded().double()
    batch = torch.randn(6, 2, 3).double(), torch.randn(6, 2).double()
    ratio = spread(form, net, batch, num_samples)
    assert 0.8 < ratio < (1.3 if num_samples > 1 else 40)


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_channels_of_an_image_without_batch_are_no_samples(form):
    """A single sample has no spread: one draw of it has no error."""
    torch.manual_seed(0)
    net = unbatched().double()
    batch = torch.randn(1, 3, 3).double(), torch.randn(1, 1, 1).double()
    found = form(net, batch, "mse", num_samples=1)
    assert found.standard_error.isnan()
    assert all(x.isnan() for x in found.per_site_standard_error.values())
    assert 0.7 < spread(form, net, batch, 3) < 1.4
