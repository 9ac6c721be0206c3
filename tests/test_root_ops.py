"""The ops that draw roots: against dense matrices, and their kernels alike."""

import itertools
import math

import pytest
import torch

from tests.reference import roots as reference
from torch_dropout_ir import registration
from torch_dropout_ir.output_products import SIGNS

pytestmark = pytest.mark.skipif(
    not registration.COMPILED, reason="roots of few outputs are of compiled kernels"
)
KERNELS = (reference, registration)
DTYPES = (torch.float32, torch.float64)
SIGNED = {
    "of both signs": lambda x: x,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "zero": torch.zeros_like,
}


def drawn(draw, *given):
    torch.manual_seed(3)
    return draw(*given)


def hessian_of(roots, like):
    """The sum of the roots' squares with their signs, ``[n, n]`` of what is like."""
    found = like.new_zeros(like.numel(), like.numel())
    for root, sign in zip(roots, SIGNS, strict=True):
        if root.numel():
            found += sign * torch.outer(root.flatten(), root.flatten())
    return found


def mean_of(draw, like, count=4000):
    """Mean and standard error of what roots multiply to."""
    each = torch.stack([hessian_of(draw(), like) for _ in range(count)])
    return each.mean(0), each.std(0) / count**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("shape", [(5, 3), (7,), (1,), (2, 3, 4)])
def test_diagonals_have_the_roots_of_pythons_kernel(shape, signed, dtype):
    torch.manual_seed(0)
    diagonal = SIGNED[signed](torch.randn(shape, dtype=dtype))
    found = [drawn(kernels.diagonal_roots, diagonal) for kernels in KERNELS]
    torch.testing.assert_close(*found)
    for root, sign in zip(found[1], SIGNS, strict=True):
        part = (sign * diagonal).clamp(min=0)
        assert root.numel() == (part.numel() if part.any() else 0)
        if root.numel():
            torch.testing.assert_close(root.square(), part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bent", [None, *SIGNED])
@pytest.mark.parametrize("classes", [0, 1, 2])
def test_softmaxes_have_the_roots_of_pythons_kernel(classes, bent, dtype):
    torch.manual_seed(0)
    logs = torch.randn(2, 3, 4, dtype=dtype).log_softmax(classes)
    slope = -torch.rand(4, 3, 2, dtype=dtype).transpose(0, 2)  # of other strides
    bend = None if bent is None else SIGNED[bent](torch.randn_like(logs))
    found = [drawn(x.softmax_roots, logs, slope, bend, classes) for x in KERNELS]
    torch.testing.assert_close(*found)
    for root in found[1]:  # along what is alike in all logits there is no curvature
        if root.numel():
            torch.testing.assert_close(root.sum(classes), 0 * root.sum(classes))


@pytest.mark.parametrize("bent", [None, *SIGNED])
@pytest.mark.parametrize("kernels", KERNELS)
def test_without_a_slope_the_mass_is_one(kernels, bent):
    torch.manual_seed(0)
    logs = torch.randn(2, 3, 4).double().log_softmax(1)
    bend = None if bent is None else SIGNED[bent](torch.randn_like(logs))
    slope = torch.full_like(logs, -1 / 3)
    found = [drawn(kernels.softmax_roots, logs, x, bend, 1) for x in (None, slope)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bent", [None, "of both signs"])
def test_roots_of_a_softmax_multiply_to_its_hessian(bent, kernels):
    torch.manual_seed(0)
    logs, slope = torch.randn(2, 1, 3).double().log_softmax(2).unbind(0)
    bend = None if bent is None else torch.randn(1, 3).double()
    s = logs.exp()[0]
    centre = torch.eye(3, dtype=s.dtype) - s  # rows: what u takes of the logits
    diagonal = -slope.sum() * s + (0 if bend is None else bend[0])
    expected = centre.T @ diagonal.diag() @ centre
    found, error = mean_of(lambda: kernels.softmax_roots(logs, slope, bend, 1), s)
    assert ((found - expected).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_roots_of_a_block_multiply_to_it(size, kernels, dtype):
    """With every choice of signs: eigenvectors are theirs up to a sign."""
    torch.manual_seed(size)
    blocks = torch.randn(3, size, size, dtype=dtype)
    blocks = blocks + blocks.mT
    blocks[2] = torch.ones(size, size)  # of rank one
    columns = blocks.movedim(-1, 0)
    values = torch.linalg.eigvalsh(blocks.double())
    for _ in range(5):
        roots = kernels.block_roots(columns)
        for root, sign in zip(roots, SIGNS, strict=True):
            if not root.numel():
                continue
            # Along eigenvectors a root has their values, whatever its signs.
            root = root.double().unsqueeze(-1)
            length = root.square().sum((1, 2))
            torch.testing.assert_close(
                length, (sign * values).clamp(min=0).sum(1), rtol=1e-4, atol=1e-5
            )
            curved = (root.mT @ blocks.double() @ root).flatten()
            squares = sign * values.square() * (sign * values > 0)
            torch.testing.assert_close(curved, squares.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [5, 10, 16])
def test_roots_of_blocks_of_all_kinds(size, kernels, dtype):
    """Eight that are positive, some of low rank, of zeros; negative; of both signs."""
    torch.manual_seed(size)
    half = torch.randn(19, size, size, dtype=torch.float64)
    half[1, :, 2:], half[2, 1:], half[3] = 0, 0, 0
    half[4] = torch.eye(size) - 1 / size  # as of softmaxes
    half *= torch.logspace(-2, 2, len(half))[:, None, None]
    blocks = half @ half.mT
    blocks[8:11] *= -1
    blocks[11:16] = half[11:16] + half[11:16].mT
    columns = blocks.to(dtype).movedim(-1, 0)
    total, count = torch.zeros(2, *blocks.shape).double(), 600
    for _ in range(count):
        each = torch.zeros_like(blocks)
        roots = zip(kernels.block_roots(columns), SIGNS, strict=True)
        for root, sign in roots:
            if root.numel():
                each += sign * root.double()[:, :, None] * root.double()[:, None]
        total += torch.stack((each, each.square()))
    mean, square = total / count
    error = ((square - mean.square()).clamp(min=0) / count).sqrt()
    least = blocks.abs().amax((1, 2), keepdim=True) * torch.finfo(dtype).eps * 100
    assert ((mean - blocks).abs() <= 5 * error + least).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("width", [3, 6])
@pytest.mark.parametrize("scale", [1e-160, 1.0, 1e160])
def test_blocks_are_of_any_size_and_beside_it_there_may_be_almost_nothing(
    scale, width, kernels
):
    """Of a root ``r = A^(1/2) z`` of signs ``z`` it is known that ``r' A^-1 r = K``."""
    torch.manual_seed(0)
    x = torch.randn(9, width, width).double()
    given = x @ x.mT + torch.eye(width), torch.eye(width) + 1e-158 * (x + x.mT)
    for sign, blocks in itertools.product((1, -1), given):
        columns = sign * scale * blocks.movedim(1, 0)
        root = kernels.block_roots(columns)[sign < 0] / scale**0.5
        lengths = (root[:, None] @ blocks.inverse() @ root[:, :, None]).flatten()
        torch.testing.assert_close(lengths, torch.full((9,), float(width)).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_have_units_far_apart(dtype):
    torch.manual_seed(0)
    units = torch.logspace(0, -6, 7, dtype=dtype)
    x = torch.randn(9, 7, 7, dtype=dtype)
    whole = x @ x.mT + torch.eye(7)
    root, _ = registration.block_roots((whole * units * units[:, None]).movedim(1, 0))
    root /= units
    lengths = (root[:, None] @ whole.inverse() @ root[:, :, None]).flatten()
    expected = torch.full((9,), 7.0, dtype=dtype)
    torch.testing.assert_close(lengths, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_zero_on_the_diagonal_beside_which_there_is_more_is_of_both_signs(kernels):
    block = torch.eye(6)
    block[0, 0], block[0, 1], block[1, 0] = 0, 0.5, 0.5
    _, negative = kernels.block_roots(block[:, None])
    assert negative.numel()


@pytest.mark.parametrize("kernels", KERNELS)
def test_roots_of_a_block_are_it_on_average(kernels):
    torch.manual_seed(0)
    block = torch.randn(3, 3).double()
    block = block + block.T
    count = 4000
    roots = kernels.block_roots(block[:, None].expand(3, count, 3))
    each = sum(
        sign * root[:, :, None] * root[:, None]
        for root, sign in zip(roots, SIGNS, strict=True)
    )
    error = each.std(0) / count**0.5
    assert ((each.mean(0) - block).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_rounding_makes_of_zero_is_no_negative_part(kernels):
    ones = torch.ones(3, 4, 3)  # eigenvalues 3, 0, 0
    positive, negative = kernels.block_roots(ones)
    assert positive.shape == (4, 3) and not negative.numel()
    tiny = torch.tensor([1.0, -1e-7])
    assert not kernels.diagonal_roots(tiny)[1].numel()
    assert kernels.diagonal_roots(tiny * torch.tensor([1.0, 100.0]))[1].numel()


@pytest.mark.parametrize("most", [1.0, -1.0, 1e-3])
def test_kernels_take_the_same_for_rounding(most):
    """As a share of the largest entry, of whichever sign."""
    for share in torch.logspace(-8, -4, 33):
        diagonal = torch.tensor([most, -share * abs(most)])
        there = [
            [root.numel() for root in kernels.diagonal_roots(diagonal)]
            for kernels in KERNELS
        ]
        assert there[0] == there[1]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_found_in_the_root(value, kernels):
    for rest in ([1.0, -1.0], [-1.0], []):  # whatever is beside it
        positive, _ = kernels.diagonal_roots(torch.tensor([value, *rest]))
        assert positive.numel() and not positive.isfinite().all()


def test_a_block_that_is_not_finite_is_found_in_its_root():
    if not registration.COMPILED:
        pytest.skip("LAPACK takes none that is not")
    columns = torch.ones(2, 3, 2)
    columns[0, 1, 1] = math.inf
    root, _ = registration.block_roots(columns)
    assert root.isfinite().all(1).tolist() == [True, False, True]


def test_what_the_compiled_kernels_cannot_read_is_named():
    if not registration.COMPILED:
        pytest.skip("no compiled kernels")
    one = torch.ones(2, 3)
    for draw, given, message in (
        (registration.diagonal_roots, (one.half(),), "float32 or float64, got float16"),
        (registration.block_roots, (one,), r"shape \[K, n, K\], got 2 dimensions"),
        (registration.block_roots, (torch.ones(2, 2, 3),), "and 12 elements"),
        (registration.block_roots, (torch.ones(2, 1, 2, 1),), "got 4 dimensions"),
        (registration.softmax_roots, (one, one, None, 2), "below 2, got 2"),
        (registration.softmax_roots, (one, one, None, -1), "below 2, got -1"),
        (registration.softmax_roots, (one, one[0], None, 1), "6, got 3"),
        (registration.softmax_roots, (one, one, one[0], 1), "6, got 6 and 3"),
        (registration.softmax_roots, (one, None, one[0], 1), "6, got 6 and 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            draw(*given)


def test_opcheck():
    one = torch.rand(4, 3)
    for draw, given in (
        (registration.diagonal_roots, (one,)),
        (registration.softmax_roots, (one, one, one, 1)),
        (registration.softmax_roots, (one, None, None, 1)),
        (registration.block_roots, (torch.eye(3)[:, None].expand(3, 4, 3),)),
    ):
        torch.library.opcheck(draw, given, test_utils="test_schema")
