"""Along a line through what is written into views, in programs of no plan."""

import random

import pytest
import torch
from torch import nn

from tests.line_functions import Applied
from tests.line_oracle import line_and_graph, noise_of
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.line_calls import NoRuleError
from torch_dropout_ir.regularizers.line_pass import curvature_along

VIEWS = {
    "part": lambda x: x[:, :2], "row": lambda x: x[1:2], "turned": lambda x: x.mT,
    "flat": lambda x: x.reshape(-1, 1), "step": lambda x: x[::2], "as is": lambda x: x,
    "spread": lambda x: x[:1].expand(3, -1), "diagonal": lambda x: x.diagonal()[None],
    "last": lambda x: x.unbind(0)[-1][None], "cut": lambda x: x.chunk(2, 0)[0],
    "strided": lambda x: x.as_strided((1, 2), (1, 1), x.storage_offset()),
    "constant": lambda x: x.detach(),
}  # fmt: skip
MAKES = {
    "sin": lambda x, y: x.sin(), "product": lambda x, y: x * y.mean(),
    "copy": lambda x, y: x.clone(), "sum": lambda x, y: x + 0.5 * y.sum(),
    "zeros": lambda x, y: torch.zeros_like(x), "same": lambda x, y: x * 1.0,
    "softmax": lambda x, y: x.softmax(0), "exp": lambda x, y: (x.tanh() / 2).exp(),
}  # fmt: skip
WRITES = {
    "fill": lambda x, y: x.fill_(0.3), "tanh": lambda x, y: x.tanh_(),
    "add": lambda x, y: x.add_(y.mean()), "times": lambda x, y: x.mul_(y.sum().sin()),
    "set": lambda x, y: x.copy_(y.flatten()[:1]), "zero": lambda x, y: x.zero_(),
    "from": lambda x, y: x.__setitem__((slice(None), 0), y.mean() ** 2),
    "masked": lambda x, y: x.masked_fill_(x > 0.2, 0.1), "relu": lambda x, y: x.relu_(),
    "own": lambda x, y: x.mul_(x.clone()), "put": lambda x, y: x.__setitem__(
        torch.arange(x.shape[0]) == 0, y.sum().cos()
    ),
    "sigmoid": lambda x, y: x.sigmoid_(), "less": lambda x, y: x.sub_(y[:1, :1]),
    "divided": lambda x, y: x.div_(y.mean().square() + 1),
}  # fmt: skip


# Views of other numbers than their base.
PAIRS = {
    "real": lambda x: x.real, "imag": lambda x: x.imag if x.is_complex() else x[1:],
    "conj": lambda x: x.conj(), "negative": lambda x: torch._neg_view(x),
    "pairs": lambda x: (
        torch.view_as_real(x).flatten(1) if x.is_complex()
        else torch.view_as_complex(x.unflatten(1, (-1, 2)))
    ),
}  # fmt: skip


def program(seed, pairs=False):
    """A function of a matrix in some steps that are drawn."""

    def run(x):
        draw = random.Random(seed)
        held = [x.sin(), torch.complex(x, x.cos()) if pairs else 0.5 * x]
        for _ in range(draw.randint(3, 12)):
            x, y = draw.choice(held), draw.choice(held)
            kind = draw.choice([VIEWS, MAKES, WRITES, PAIRS if pairs else WRITES])
            step = kind[draw.choice(sorted(kind))]
            if kind is WRITES:
                step(x, y)
            else:
                held.append(step(x, y) if kind is MAKES else step(x))
            if len(held) > 2 and draw.random() < 0.2:
                held.pop(draw.randrange(len(held)))
        found = [(x.sin() + x * x).flatten() for x in held]
        return torch.cat([x.abs() if x.is_complex() else x for x in found])

    return run


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated")
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("first", range(0, 400, 50))
def test_programs_that_write_into_views(first, pairs):
    compared = refused = 0
    for seed in range(first, first + 50):
        torch.manual_seed(seed)
        x = torch.randn(4, 4).double()
        try:
            found, expected = line_and_graph(Applied(program(seed, pairs)), x)
        except NoRuleError:  # seen through a base that is part of another
            refused += 1
            continue
        except RuntimeError:  # torch refuses the program too
            continue
        found = torch.zeros_like(expected) if found is None else found
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        compared += 1
    assert compared > 12 and refused < (6 if pairs else 2)


def followed(x):
    y = x * 1.5
    part = y[:2]
    part += x[2:]  # y, part and what is made of them have one memory from here on
    copy, own = y.clone(), part.exp()
    y.mul_(x.sin())
    return copy * y + own.sum() * part.mean()


def test_a_copy_does_not_follow_what_is_written_later():
    torch.manual_seed(0)
    found, expected = line_and_graph(Applied(followed), torch.randn(4, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def real_part(x):
    y = torch.complex(x, x.sin())
    torch.view_as_real(y)[0, 0, :1].mul_(2)
    return y.abs()


def conjugated(x):
    y = torch.complex(x, x.sin())
    other = y.conj()
    y[:1].mul_(2)
    return (other * y * (1 + 1j)).real


def negative(x):
    y = x * 1.5
    other = torch._neg_view(y)
    y[:1].mul_(x[:1])
    return other * x


@pytest.mark.parametrize("function", [real_part, conjugated, negative])
def test_views_of_other_numbers(function):
    torch.manual_seed(0)
    found, expected = line_and_graph(Applied(function), torch.randn(4, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


def seen_beyond(x):
    y = torch.zeros(6, 4)[1:5].detach().copy_(x)  # it begins within its memory
    other = y.as_strided((4, 4), (4, 1), 0)
    y[:1].mul_(2)
    return other * x


def test_what_shows_more_than_is_written_on_has_no_line():
    net = nn.Sequential(nn.Dropout(0.3), Applied(seen_beyond))
    x = torch.randn(4, 4)
    uses, _, z = noise_of(net, x)
    loss = resolve_loss(lambda f, _: f.square().sum())
    with pytest.raises(NoRuleError, match="of other numbers"):
        curvature_along(net, (x, None), loss, uses, 0, z.clone)
