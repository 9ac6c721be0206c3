"""Trained penalties of models whose blocks are checkpointed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi

WIDTH = 8
KINDS = {
    "L1, gauss_newton": {"kind": "L1", "r1": "gauss_newton"},
    "L1, second_order": {"kind": "L1", "r1": "second_order"},
    "L4, gauss_newton": {"kind": "L4", "r1": "gauss_newton"},
    "L2": {"kind": "L2", "lr": 0.1},
    "L3": {"kind": "L3", "lr": 0.1},
    "regu": {"kind": "regu", "lr": 0.1},
}
WITH_DROPOUT = ("L3", "regu")


class _Attention(nn.Module):
    """Attention of the fused kernel, where torch chooses."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.into(x).chunk(3, -1))


class _Heads(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class _Images(nn.Sequential):
    """Channels are symbols: 2^15 numbers and more take derivatives of ours."""

    def __init__(self):
        layers = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)
        super().__init__(*layers, nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 1))

    def forward(self, x):
        return super().forward(x.mT).mT


class _Block(nn.Module):
    def __init__(self, inner, again):
        super().__init__()
        self.inner, self.again = inner, again

    def forward(self, x):
        if not self.again:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=False)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


BODIES = {
    "attention": _Attention,
    "heads": _Heads,
    "layer norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
    "images": _Images,
    "dropout": lambda: nn.Sequential(_Attention(), nn.Dropout(0.3)),
}


def _net(body, again, nested=False):
    torch.manual_seed(0)
    block = _Block(BODIES[body](), again)
    if nested:
        block = _Block(nn.Sequential(block, nn.Tanh()), again)
    layers = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), block, nn.Dropout(0.3)
    return nn.Sequential(*layers, _Mean(), nn.Linear(WIDTH, 3)).double()


def _gradients(model, batch, loss, **options):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = tdi.regularizers.modified_loss(model, batch, loss, **options)
    value.backward()
    return torch.cat([value.detach()[None], *(p.grad.flatten() for p in _own(model))])


def _own(model):
    return [p for p in model.parameters() if p.grad is not None]


def _cubed(outputs, targets):
    return (outputs - targets).abs().pow(3).mean()


def _alike(body, symbols, loss, nested=False, **options):
    batch = torch.randn(4, symbols, WIDTH).double(), torch.randn(4, 3).double()
    plain, again = (
        _gradients(_net(body, x, nested), batch, loss, **options) for x in (False, True)
    )
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("loss", ["mse", _cubed])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", ["attention", "heads", "layer norm"])
def test_checkpointed_blocks_have_the_gradient_of_the_same_without(body, kind, loss):
    _alike(body, 5, loss, **KINDS[kind])


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_sites_within_have_the_same_masks_again(kind):
    _alike("dropout", 5, "mse", **KINDS[kind])


def test_blocks_within_blocks():
    _alike("attention", 5, "mse", nested=True, **KINDS["regu"])


@pytest.mark.parametrize("max_bytes", [2**26, 0, None])
@pytest.mark.parametrize("kind", ["L1, gauss_newton", "L3"])
def test_large_blocks_with_derivatives_of_ours(kind, max_bytes):
    _alike("images", 1100, "mse", max_bytes=max_bytes, **KINDS[kind])


def test_attention_that_makes_its_weights_again():
    _alike("attention", 200, "mse", max_bytes=None, **KINDS["L1, gauss_newton"])


def test_backward_leaves_kernels_and_blocks_as_they_were():
    model = _net("attention", True)
    batch = torch.randn(4, 5, WIDTH).double(), torch.randn(4, 3).double()
    _gradients(model, batch, "mse", **KINDS["regu"])
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    F.mse_loss(model(batch[0]), batch[1]).backward()
