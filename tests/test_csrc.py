"""The C++ core below the ops: headers, instruction sets, simulated CUDA grids."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.csrc.harness import (
    RNG,
    TORCH_DTYPES,
    as_bits,
    available,
    build_library,
    expected_bits,
    forward,
    packed_size,
    philox_word,
    pointer,
    sample,
    unpacked,
)

SIZES = [0, 1, 63, 64, 65, 127, 128, 129, 1000, 4099]
GRIDS = [1, 7, 32, 96, 4096]
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_library(tmp_path_factory.mktemp("csrc"))


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


# ---- Philox and the threshold


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_random123_known_answers(lib: Any, counter: str, key: str, answer: str) -> None:
    out = np.zeros(4, dtype=np.uint32)
    lib.philox(pointer(words(counter)), pointer(words(key)), pointer(out))
    assert out.tolist() == words(answer).tolist()


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**32 + 5, 2**34 - 3, 2**62 + 9])
def test_index_function_is_64_bit(lib: Any, first: int) -> None:
    got = [lib.word_of_element(pointer(RNG), first + i) for i in range(7)]
    assert got == [philox_word(RNG, first + i) for i in range(7)]


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        (0.0, 0),
        (0.5, 2**31),
        (1.0, 2**32),
        (2.0**-33, 1),  # the half rounds up, not to even
        (3 * 2.0**-33, 2),
        (0.1, 429496730),
        (2.0, 2**32),
        (float("nan"), 0),
    ],
)
def test_threshold(lib: Any, p: float, threshold: int) -> None:
    assert lib.threshold(p) == threshold


@pytest.mark.parametrize(
    ("bits", "bfloat16", "half"),
    [
        (0x3F800000, 0x3F80, 0x3C00),
        (0xC77FE000, 0xC780, 0xFBFF),  # -65504, the last half
        (0x477FEFFF, 0x4780, 0x7BFF),  # below 65520: down to 65504
        (0x477FF000, 0x4780, 0x7C00),  # 65520: up to infinity
        (0x3F808000, 0x3F80, 0x3C04),  # half way between two bfloat16s: to even
        (0x3F818000, 0x3F82, 0x3C0C),
        (0x3F801000, 0x3F80, 0x3C00),  # half way between two halves: to even
        (0x3F803000, 0x3F80, 0x3C02),
        (0x33000000, 0x3300, 0x0000),  # 2^-25: half the smallest half, to even
        (0x33000001, 0x3300, 0x0001),
        (0x387FC000, 0x3880, 0x03FF),  # the last subnormal half
        (0xFF800000, 0xFF80, 0xFC00),
        (0x7F800001, 0x7FC0, 0x7E00),  # a signalling NaN becomes quiet
        (0xFFFFFFFF, 0xFFFF, 0xFFFF),
    ],
)
def test_rounding_to_16_bits(lib: Any, bits: int, bfloat16: int, half: int) -> None:
    assert (lib.narrow(2, bits), lib.narrow(3, bits)) == (bfloat16, half)


# ---- CPU instruction sets


def test_a_path_can_be_forced(lib: Any) -> None:
    assert lib.chosen_isa(b"portable") == b"portable"
    assert lib.chosen_isa(None) == available(lib)[-1]
    assert lib.chosen_isa(b"") == lib.chosen_isa(None)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("numel", SIZES)
def test_masks_are_philox_words_in_row_major_order(
    lib: Any, numel: int, p: float
) -> None:
    expected = expected_bits(0, numel, p)
    for isa in available(lib):
        packed = np.full(packed_size(numel), 0xEE, dtype=np.uint8)
        lib.cpu_draw(isa, pointer(packed), pointer(RNG), numel, p, 0, len(packed) // 8)
        np.testing.assert_array_equal(unpacked(packed, numel), expected, str(isa))


@pytest.mark.parametrize("word", [2**26 - 1, 2**28 - 3, 2**28 - 2, 2**28, 2**40])
def test_words_beyond_32_bits(lib: Any, word: int) -> None:
    count = 4
    numel = (word + count) * 64 - 5
    expected = expected_bits(word * 64, count * 64 - 5, 0.3)
    for isa in available(lib):
        packed = np.zeros(count * 8, dtype=np.uint8)
        lib.cpu_draw(isa, pointer(packed), pointer(RNG), numel, 0.3, word, word + count)
        np.testing.assert_array_equal(
            unpacked(packed, count * 64 - 5), expected, str(isa)
        )
    packed = np.zeros(count * 8, dtype=np.uint8)
    lib.cuda_draw(3, pointer(packed), pointer(RNG), numel, 0.3, word * 8)
    np.testing.assert_array_equal(unpacked(packed, count * 64 - 5), expected)


@pytest.mark.parametrize("p", [0.25, 1 / 3])
@pytest.mark.parametrize("dtype", range(4))
def test_forward_is_where_keep_then_scaled(lib: Any, dtype: int, p: float) -> None:
    numel = 1000
    x = sample(dtype, numel)
    keep = torch.from_numpy(expected_bits(0, numel, p))
    value = torch.from_numpy(x).view(TORCH_DTYPES[dtype])
    wide = value if dtype == 1 else value.float()
    scaled = (wide * (1 / (1 - p))).to(TORCH_DTYPES[dtype])
    expected = torch.where(keep, scaled, torch.zeros_like(scaled))
    for isa in available(lib):
        y, packed = forward(lib, isa, dtype, x, p)
        got = torch.from_numpy(y).view(TORCH_DTYPES[dtype])
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        np.testing.assert_array_equal(unpacked(packed, numel), keep.numpy())


@pytest.mark.parametrize("dtype", range(4))
@pytest.mark.parametrize("numel", SIZES)
def test_instruction_sets_agree_to_the_last_bit(
    lib: Any, numel: int, dtype: int
) -> None:
    sets = available(lib)
    if len(sets) == 1:
        pytest.skip("this machine has the portable path only")
    x = sample(dtype, numel, offset=1)
    y, packed = forward(lib, b"portable", dtype, x, 0.4)
    z = np.empty_like(x)
    lib.cpu_apply(
        b"portable", dtype, pointer(x), pointer(z), pointer(packed), numel, 3.7
    )
    for isa in sets[1:]:
        y_isa, packed_isa = forward(lib, isa, dtype, x, 0.4, offset=3)
        z_isa = np.full_like(x, 77)
        lib.cpu_apply(
            isa, dtype, pointer(x), pointer(z_isa), pointer(packed), numel, 3.7
        )
        np.testing.assert_array_equal(packed_isa, packed, str(isa))
        np.testing.assert_array_equal(as_bits(y_isa), as_bits(y), str(isa))
        np.testing.assert_array_equal(as_bits(z_isa), as_bits(z), str(isa))


def test_all_16_bit_inputs_agree(lib: Any) -> None:
    x = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    for dtype, isa in itertools.product((2, 3), available(lib)[1:]):
        y, _ = forward(lib, b"portable", dtype, x, 0.3)
        y_isa, _ = forward(lib, isa, dtype, x, 0.3)
        np.testing.assert_array_equal(y_isa, y, f"{isa!r} {TORCH_DTYPES[dtype]}")


@pytest.mark.parametrize(
    ("rows", "width", "first_bit"),
    [
        (1, 1, 0),
        (3, 64, 0),
        (600, 64, 64),
        (5, 128, 3),
        (7, 65, 3),
        (600, 10, 1),
        (2, 1000, 63),
    ],
)
def test_column_counts(lib: Any, rows: int, width: int, first_bit: int) -> None:
    numel = first_bit + rows * width
    bits = np.zeros(packed_size(numel) * 8, dtype=bool)
    bits[:numel] = np.random.default_rng(width).random(numel) < 0.7
    bits[first_bit:numel:width] = True  # one full column: bytes must not overflow
    packed = np.packbits(bits, bitorder="little")
    matrix = bits[first_bit:numel].reshape(rows, width)
    for isa in available(lib):
        totals = np.full(width + 1, 5, dtype=np.int64)
        lib.cpu_count(
            isa,
            pointer(packed),
            len(packed) // 8,
            first_bit,
            rows,
            width,
            pointer(totals),
        )
        np.testing.assert_array_equal(totals[:width], 5 + matrix.sum(0), str(isa))
        assert totals[width] == 5, "counts were written past the last column"


# ---- the CUDA per-thread code


@pytest.mark.parametrize("threads", GRIDS)
@pytest.mark.parametrize("dtype", range(4))
def test_simulated_grid_equals_cpu(lib: Any, dtype: int, threads: int) -> None:
    isa = available(lib)[-1]
    for numel, offset in itertools.product(SIZES, (0, 1)):
        x = sample(dtype, numel, offset)
        y, packed = forward(lib, isa, dtype, x, 0.37)
        y_grid, packed_grid = forward(lib, threads, dtype, x, 0.37, offset)
        np.testing.assert_array_equal(packed_grid, packed)
        np.testing.assert_array_equal(as_bits(y_grid), as_bits(y))
        z = np.full_like(x, 77)
        z_grid = np.full_like(x, 78)
        lib.cpu_apply(isa, dtype, pointer(x), pointer(z), pointer(packed), numel, 2.3)
        lib.cuda_apply(
            threads, dtype, pointer(x), pointer(z_grid), pointer(packed), numel, 2.3
        )
        np.testing.assert_array_equal(as_bits(z_grid), as_bits(z))


@pytest.mark.parametrize("threads", GRIDS)
@pytest.mark.parametrize("numel", SIZES)
def test_simulated_draw(lib: Any, numel: int, threads: int) -> None:
    packed = np.full(packed_size(numel), 0xEE, dtype=np.uint8)
    lib.cuda_draw(threads, pointer(packed), pointer(RNG), numel, 0.6, 0)
    np.testing.assert_array_equal(unpacked(packed, numel), expected_bits(0, numel, 0.6))


@pytest.mark.parametrize(
    ("rows", "units"), [(1, 1), (40000, 10), (3, 1000), (1, 300000), (2, 150000)]
)
def test_simulated_counts(lib: Any, rows: int, units: int) -> None:
    bits = np.zeros(packed_size(rows * units) * 8, dtype=bool)
    bits[: rows * units] = np.random.default_rng(rows).random(rows * units) < 0.3
    packed = np.packbits(bits, bitorder="little")
    counts = np.zeros(units, dtype=np.int64)
    threads = lib.cuda_count(pointer(packed), len(packed), rows, units, pointer(counts))
    assert threads % units == 0
    np.testing.assert_array_equal(
        counts, bits[: rows * units].reshape(rows, units).sum(0)
    )


@pytest.mark.parametrize("dtype", range(4))
@pytest.mark.parametrize(
    ("rows", "units"),
    [(1, 1), (999, 1), (40, 8), (33, 12), (700, 10), (1, 3000), (64, 7), (100, 2049)],
)
def test_simulated_counting_forward(
    lib: Any, rows: int, units: int, dtype: int
) -> None:
    numel = rows * units
    x = sample(dtype, numel)
    y, packed = forward(lib, available(lib)[-1], dtype, x, 0.37)
    y_grid, packed_grid = np.full_like(x, 77), np.full_like(packed, 0xEE)
    counts = np.full(units, 5, dtype=np.int64)
    data = (dtype, pointer(x), pointer(y_grid), pointer(packed_grid), pointer(RNG))
    threads = lib.cuda_counted(*data, numel, 0.37, units, pointer(counts))
    assert threads > 0
    np.testing.assert_array_equal(packed_grid, packed)
    np.testing.assert_array_equal(as_bits(y_grid), as_bits(y))
    kept = unpacked(packed, numel).reshape(rows, units).sum(0)
    np.testing.assert_array_equal(counts, 5 + kept)


def test_counting_threads_keep_their_columns(lib: Any) -> None:
    units = [*range(1, 40), 1000, 1001, 2048, 4096, 50257, 65536]
    numels = [2**k * u for k in (0, 3, 7, 10, 14) for u in units]
    for numel, unit in itertools.product(numels, units):
        threads = lib.counting_threads(numel, unit)
        assert 8 * threads % unit == 0
        assert 0 <= threads <= min(packed_size(numel), 2**18)
    assert lib.counting_threads(1024 * 100, 1024) == 8192 // 128 * 128
    assert lib.counting_threads(2**24, 1024) == 2**18
    assert lib.counting_threads(2**20, 2**20) == 0, "a period beyond what pays"
    assert lib.counting_threads(1001, 1001) == 0, "odd rows: eight of them a period"
