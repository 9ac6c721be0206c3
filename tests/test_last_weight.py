"""Which layer makes the outputs: what else is made of a site, against all masks."""

import numpy as np
import pytest
import torch
from torch import nn

from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton, modified_loss
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.online import online
from torch_dropout_ir.testing import expected_dropout_loss
from torch_dropout_ir.written_parameters import unwritten


class Branches(nn.Module):
    """Goes another way by what dropout has made, or writes on what it has used."""

    def __init__(self, way):
        super().__init__()
        self.way, self.drop = way, nn.Dropout(0.3)
        self.out, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = self.drop(x)
        y = self.out(h)
        if self.way(self, h, y):
            return y
        return self.other(h)


def written(net, _, __):
    net.out.weight.data.mul_(0.5)
    return True


def assigned(net, _, __):
    net.out.weight.data = net.out.weight.data * 0.5
    return True


WAYS = {
    "a comparison": lambda _, h, __: h.sum() > 0,
    "an item": lambda _, h, __: h.sum().item() > 0,
    "the outputs": lambda _, __, y: y[0, 0] > 0,
    "NumPy": lambda _, h, __: np.asarray(h.detach()).sum() > 0,
    "a count": lambda _, h, __: len(h.nonzero()) > 4,
    "those that pass": lambda _, h, __: h[h != 0].numel() > 4,
    "places": lambda _, h, __: len(torch.where(h)[0]) > 4,
    "each row": lambda _, h, __: any(row.sum() > 0 for row in h),
    "a text": lambda _, h, __: "-" in str(h),
    "few entries": lambda _, h, __: h.to_sparse()._nnz() > 4,
    "written": written,
    "assigned": assigned,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_branches_on_noise_or_writes_on_its_weight_is_not_exact(way):
    """Closed forms took the pass without noise for all, off by a factor of three."""
    torch.manual_seed(1)
    holds_without_claim(Branches(WAYS[way]).double())


def holds_without_claim(net):
    """Hold R_1 against all masks: right within its error, and not called exact."""
    batch = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    with unwritten(net), torch.no_grad():
        truth = expected_dropout_loss(net, batch, "mse", coupled=True)
        net.eval()
        truth = truth - nn.functional.mse_loss(net(batch[0]), batch[1])
        net.train()
    kinds = "mse", lambda f, y: (f - y).square().mean()
    for kind in kinds:
        with unwritten(net):
            found, how, _ = online(net, batch, resolve_loss(kind), num_masks=400)
        assert not found.exact and "closed form" not in how
        assert (found.value - truth).abs() < 5 * found.standard_error
        assert not gauss_newton(net, batch, kind, num_samples=None).exact
    with pytest.raises(ValueError, match="no number asked"):
        modified_loss(net, batch, "mse", kind="L1", r1="last_layer")


@pytest.mark.parametrize("kind", ["mse", lambda f, y: (f - y).square().mean()])
def test_what_asks_nothing_after_its_site_is_exact(kind):
    """Numbers asked before a site, of no noise, and written weights are as they are."""

    def before(net, _, __):
        net.other.weight.data.mul_(0.5)
        return True

    class Asks(Branches):
        def forward(self, x):
            self.out.weight.data.mul_(0.5 if x.sum() > 0 else 0.25)
            return super().forward(x)

    torch.manual_seed(1)
    net = Asks(before).double()
    batch = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    with unwritten(net):
        found, _, risk = online(net, batch, resolve_loss(kind))
    truth = expected_dropout_loss(net, batch, kind) - risk
    torch.testing.assert_close(found.value, truth)
    assert found.exact and gauss_newton(net, batch, kind, num_samples=None).exact


def noisy_bias(net, h):
    net.out.bias.data.add_(h.detach().mean())
    return net.out(h)


def features(net, h):
    h.data.mul_(2)
    return net.out(h)


def features_assigned(net, h):
    h.data = h.data * 2
    return net.out(h)


def outputs(net, h):
    y = net.out(h)
    y.data.mul_(1 + h.detach()[:, :1])
    return y


@pytest.mark.parametrize("way", [noisy_bias, features, features_assigned, outputs])
def test_what_is_written_on_behind_autograd_is_not_exact(way):
    """No version tells of writing on ``data``."""

    class Writes(Branches):
        def forward(self, x):
            return self.way(self, self.drop(1 * x))

    torch.manual_seed(1)
    holds_without_claim(Writes(way).double())


def test_a_layer_with_a_way_of_its_own_is_not_exact():
    """As adapters and kernels of other precision have: its weight is not all."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)).double()
    layer = net[1]
    layer.forward = lambda h: nn.functional.linear(h, 2 * layer.weight, layer.bias)
    holds_without_claim(net)


NUMBERS = {
    "allclose": lambda h: torch.allclose(h, h), "equal": lambda h: torch.equal(h, h),
    "argwhere": torch.argwhere, "unique": torch.unique,
    "unique_consecutive": torch.unique_consecutive, "is_nonzero": torch.is_nonzero,
    "masked_select": lambda h: torch.masked_select(h, h > 0),
    "bincount": lambda h: torch.bincount((h > 0).flatten().long()),
    "repeat_interleave": lambda h: torch.repeat_interleave((h > 0).flatten().long()),
    "numpy": lambda h: h.numpy(), "tolist": lambda h: h.tolist(),
    "__array__": np.asarray, "__dlpack__": np.from_dlpack,
    "__contains__": lambda h: 0.0 in h, "__format__": "{:.1f}".format,
    "__index__": lambda h: range(h.long()), "__repr__": repr,
    "__int__": int, "__float__": float, "__complex__": complex,
}  # fmt: skip
OF_ONE = "is_nonzero", "__format__", "__index__", "__int__", "__float__", "__complex__"


@pytest.mark.parametrize("name", [None, *NUMBERS])
def test_each_call_that_gives_numbers_is_seen(name):
    def way(_, h, __):
        h = h.detach().sum() if name in OF_ONE else h.detach()
        return (h.sum() if name is None else NUMBERS[name](h)) is not None

    with clean_pass(Branches(way), torch.randn(2, 3), find_last=True) as clean:
        assert (clean.last_weight is None) == (name is not None)
