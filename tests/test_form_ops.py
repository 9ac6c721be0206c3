"""The op of small passes against plain sums, and its kernels against each other."""

import math

import pytest
import torch

from tests.reference import forms
from torch_dropout_ir import registration

pytestmark = pytest.mark.skipif(
    not registration.COMPILED, reason="sums of small passes are of compiled kernels"
)
FORM_SUMS = (forms.form_sums, registration.form_sums)
DTYPES = (torch.float32, torch.float64)


def tensors(shapes, dtype):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def by_hand(inputs, gradients, factors, rows, units, sites):
    """Each element's product, in Python's own numbers."""
    samples, numbers = min(rows), range(max(sites) + 1)
    own = [[0.0] * samples for _ in numbers]
    for h, g, factor, n, k, site in zip(
        inputs, gradients, factors, rows, units, sites, strict=True
    ):
        products = (h.double() * g.double()).reshape(n, k, -1).tolist()
        forms = [factor * sum(sum(unit) ** 2 for unit in row) for row in products]
        for i, form in enumerate(forms):
            own[site][i * samples // n] += form

    def error(each):
        mean = sum(each) / samples
        spread = sum((x - mean) ** 2 for x in each)
        return math.sqrt(samples * spread / (samples - 1)) if samples > 1 else math.nan

    whole = [sum(parts) for parts in zip(*own, strict=True)]
    return [sum(whole), error(whole), *map(sum, own), *map(error, own)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "uses",
    [
        [((6, 37), 6, 37)],
        [((6, 16), 6, 16), ((6, 33), 6, 33), ((6, 2), 6, 2)],
        [((4, 3, 5, 2), 4, 3), ((4, 70), 4, 70)],  # positions that share a mask
        [((8, 5), 8, 5), ((2, 9), 2, 9)],  # four rows a sample
        [((3, 2, 2), 3, 1)],
        [((1, 4), 1, 4)],
        [((), 1, 1)],
    ],
)
@pytest.mark.parametrize("form_sums", FORM_SUMS)
@pytest.mark.parametrize("shared", [False, True])
def test_sums_are_those_of_plain_loops(form_sums, uses, shared, dtype):
    shapes, rows, units = zip(*uses, strict=True)
    h, g = tensors(shapes, dtype), tensors(shapes, dtype)[::-1]
    g = [x.flip(0) if x.ndim else x + 1 for x in g[::-1]]
    factors = [0.5 + i for i in range(len(uses))]
    sites = [0 if shared else i for i in range(len(uses))]
    expected = by_hand(h, g, factors, rows, units, sites)
    found = form_sums(h, g, factors, rows, units, sites)
    assert all(x.shape == () for x in found)
    expected = [torch.tensor(x, dtype=dtype) for x in expected]
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form_sums", FORM_SUMS)
def test_sums_do_not_depend_on_strides(form_sums, dtype):
    h, g = tensors([(5, 4, 6), (5, 1, 6)], dtype)
    turned = h.transpose(1, 2).contiguous().transpose(1, 2)
    plain = form_sums([h], [g.expand(5, 4, 6).contiguous()], [0.3], [5], [4], [0])
    torch.testing.assert_close(
        form_sums([turned], [g.expand(5, 4, 6)], [0.3], [5], [4], [0]), plain
    )


@pytest.mark.parametrize("form_sums", FORM_SUMS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (4, 3, 0)])
def test_nothing_adds_up_to_zero(form_sums, shape):
    one, rows = [torch.ones(shape)], [shape[0]]
    value, error, part, own = form_sums(one, one, [1.0], rows, [3], [0])
    assert value == part == 0 and (error == own == 0 or shape[0] < 2)


@pytest.mark.parametrize("form_sums", FORM_SUMS)
def test_rows_that_tell_no_samples_apart_have_no_error(form_sums):
    h = tensors([(3, 2), (2, 2)], torch.float32)
    value, error, *parts = form_sums(h, h, [1.0, 1.0], [3, 2], [2, 2], [0, 1])
    assert error.isnan() and value == parts[0] + parts[1]
    assert parts[2].isnan() and parts[3].isnan()
    bad = torch.tensor([[math.inf], [1.0]])
    assert form_sums([bad], [bad], [1.0], [2], [1], [0])[0] == math.inf


def test_what_the_compiled_sums_cannot_read_is_named():
    one = torch.ones(2, 2)
    for given, message in (
        (([one], [one, one], [1.0], [2], [2], [0]), "1 inputs, 2 gradients"),
        (([one], [one], [], [2], [2], [0]), "0 factors"),
        (([one], [one], [1.0], [], [2], [0]), "0 rows"),
        (([one], [one], [1.0], [2], [], [0]), "0 units"),
        (([one], [one], [1.0], [2], [2], []), "1 units and 0 sites"),
        (([], [one], [], [], [], []), "length above 0, got 0 inputs"),
        (([one], [one], [1.0], [2], [2], [1]), "sites below 1, got 1"),
        (([one], [one], [1.0], [2], [2], [-1]), "sites below 1, got -1"),
        (([one], [one.double()], [1.0], [2], [2], [0]), "of one dtype"),
        (
            ([one, one.double()], [one, one], [1.0, 1.0], [2, 2], [2, 2], [0, 0]),
            "of one dtype",
        ),
        (([one], [one], [1.0], [-2], [-2], [0]), "-2 rows of -2 units"),
        (([one], [one], [1.0], [0], [2], [0]), "0 rows of 2 units, got 4"),
        (([one.half()], [one.half()], [1.0], [2], [2], [0]), "float32 or float64, got"),
        (([one], [one[0]], [1.0], [2], [2], [0]), "2 rows of 2 units, got 4 and 2"),
        (([one], [one], [1.0], [3], [1], [0]), "3 rows of 1 units"),
    ):
        with pytest.raises(RuntimeError, match=message):
            registration.form_sums(*given)


def test_opcheck():
    h = tensors([(4, 6), (4, 2, 3)], torch.float32)
    given = h, h, [1.0, 2.0], [4, 4], [6, 2], [0, 1]
    torch.library.opcheck(registration.form_sums, given, test_utils=("test_schema",))
