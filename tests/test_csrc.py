"""The C++ core below the ops: headers, instruction sets, simulated CUDA grids.

``csrc/harness.cpp`` is compiled with g++ against the headers of ``csrc/`` and called
through ctypes, so the per-thread CUDA code runs here without a GPU. The oracle is
Philox in Python integers; nothing is compared with itself.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torch_dropout_ir import ops

ROOT = Path(__file__).resolve().parents[1]
RNG = np.array([0x0123_4567_89AB_CDEF, -0x0FED_CBA9_8765_4321], dtype=np.int64)
ISAS = [b"portable"]
ISAS += [b"avx2", b"avx512"] if platform.machine() == "x86_64" else [b"neon"]
SIZES = [0, 1, 63, 64, 65, 127, 128, 129, 1000, 4099]
GRIDS = [1, 7, 32, 96, 4096]
# The dtypes in the order of the C++ enum; 16-bit ones travel as their bits.
STORAGE = [np.float32, np.float64, np.uint16, np.uint16]
TORCH_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

needs_compiled = pytest.mark.skipif(
    not ops.COMPILED, reason="the extension is not built"
)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


def philox_word(rng: np.ndarray, index: int) -> int:
    """Word of one element in Python integers, straight from the paper."""
    low = 0xFFFFFFFF
    k0, k1 = int(rng[0]) & low, int(rng[0]) >> 32 & low
    block = index // 4
    c = [block & low, block >> 32, int(rng[1]) & low, int(rng[1]) >> 32 & low]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & low, p0 >> 32 ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c[index % 4]


def expected_bits(first: int, count: int, p: float) -> np.ndarray:
    threshold = int(p * 2**32 + 0.5)
    return np.array(
        [philox_word(RNG, first + i) >= threshold for i in range(count)], dtype=bool
    )


def unpacked(packed: np.ndarray, numel: int) -> np.ndarray:
    bits = np.unpackbits(packed, bitorder="little").astype(bool)
    assert not bits[numel:].any(), "padding bits have to be 0"
    return bits[:numel]


def packed_size(numel: int) -> int:
    return 8 * -(-numel // 64)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("csrc") / "harness.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "csrc" / "harness.cpp")]
    subprocess.run([*command, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    i64, i32, f64 = ctypes.c_int64, ctypes.c_int, ctypes.c_double
    ptr, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "philox": (None, [ptr, ptr, ptr]),
        "word_of_element": (ctypes.c_uint32, [ptr, ctypes.c_uint64]),
        "threshold": (ctypes.c_uint64, [f64]),
        "narrow": (ctypes.c_uint16, [i32, ctypes.c_uint32]),
        "chosen_isa": (text, [text]),
        "cpu_forward": (None, [text, i32, ptr, ptr, ptr, ptr, i64, f64, i64, i64]),
        "cpu_apply": (None, [text, i32, ptr, ptr, ptr, i64, f64]),
        "cpu_draw": (None, [text, ptr, ptr, i64, f64, i64, i64]),
        "cpu_count": (None, [text, ptr, i64, i64, i64, i64, ptr]),
        "cuda_forward": (None, [i64, i32, ptr, ptr, ptr, ptr, i64, f64]),
        "cuda_apply": (None, [i64, i32, ptr, ptr, ptr, i64, f64]),
        "cuda_draw": (None, [i64, ptr, ptr, i64, f64, i64]),
        "cuda_count": (i64, [ptr, i64, i64, i64, ptr]),
    }
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype = result
        getattr(library, name).argtypes = arguments
    return library


def available(lib: Any) -> list[bytes]:
    return [isa for isa in ISAS if lib.chosen_isa(isa) == isa]


def sample(dtype: int, numel: int, offset: int = 0) -> np.ndarray:
    """Values with every special case near the front; ``offset`` breaks alignment."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator, dtype=torch.float64)
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-7, -6.1e-5, 65519.0, 3e38, 1e-40]
    count = min(numel, 4 * len(special))
    x[:count] = torch.tensor(special, dtype=torch.float64).repeat(4)[:count]
    cast = x.to(TORCH_DTYPES[dtype])
    flat = cast.view(torch.uint16) if dtype >= 2 else cast
    out = np.empty(numel + offset, dtype=STORAGE[dtype])[offset:]
    out[:] = flat.numpy()
    return out


def forward(
    lib: Any, how: bytes | int, dtype: int, x: np.ndarray, p: float, offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Run a CPU instruction set (bytes) or a simulated grid of that many threads."""
    y = np.full(len(x) + offset, 77, dtype=x.dtype)[offset:]
    packed = np.full(packed_size(len(x)), 0xEE, dtype=np.uint8)
    data = (dtype, pointer(x), pointer(y), pointer(packed), pointer(RNG), len(x), p)
    if isinstance(how, bytes):
        lib.cpu_forward(how, *data, 0, len(packed) // 8)
    else:
        lib.cuda_forward(how, *data)
    return y, packed


def as_bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


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


# ---- the registered ops

RNG_TENSOR = torch.from_numpy(RNG)
DIGEST = """
import hashlib, sys, torch, torch_dropout_ir.ops as ops
digest = hashlib.sha256()
rng = torch.tensor([1234567890123, 987654321])
op = torch.ops.torch_dropout_ir
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.linspace(-5, 5, 70001, dtype=torch.float64).to(dtype)
    y, packed = op.dropout_forward(x, rng, 0.3)
    z = op.mask_apply(y, packed, 1.7)
    for part in (y.double(), z.double(), packed, op.unit_counts(packed, 70, 1000)):
        digest.update(part.numpy().tobytes())
digest.update(op.mask_draw(rng, torch.tensor(0.7), 9999).numpy().tobytes())
print(ops.COMPILED, digest.hexdigest())
"""


@needs_compiled
def test_environment_variable_changes_nothing_but_speed() -> None:
    printed = set()
    for isa in ("", "portable", *(name.decode() for name in ISAS[1:])):
        environment = {**os.environ, "TORCH_DROPOUT_IR_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        printed.add(run.stdout.strip())
    assert len(printed) == 1
    assert printed.pop().startswith("True ")


@needs_compiled
def test_thread_counts_agree() -> None:
    op = torch.ops.torch_dropout_ir
    numel = 9 * 32768 + 77
    x = torch.linspace(-3, 3, numel)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, packed = op.dropout_forward(x, RNG_TENSOR, 0.2)
            counts = op.unit_counts(packed, numel // 37, 37)
            drawn = op.mask_draw(
                RNG_TENSOR, torch.tensor(0.2, dtype=torch.float64), numel
            )
            results.append((y, packed, op.mask_apply(x, packed, 2.0), counts, drawn))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)
    torch.testing.assert_close(results[0][1], results[0][4], rtol=0, atol=0)


@needs_compiled
def test_strides_do_not_move_the_mask() -> None:
    op = torch.ops.torch_dropout_ir
    x = torch.arange(1.0, 421.0).view(4, 5, 21)
    for view in (x.permute(2, 0, 1), x[:, ::2], x[0, 0].expand(3, 21), x[1, 1, 1]):
        y, packed = op.dropout_forward(view, RNG_TENSOR, 0.5)
        assert y.is_contiguous()
        assert y.shape == view.shape
        keep = torch.from_numpy(expected_bits(0, view.numel(), 0.5)).view(view.shape)
        expected = torch.where(keep, view * 2, torch.zeros_like(view))
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        again = op.mask_apply(view, packed, 2.0)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


@needs_compiled
def test_large_results_do_not_share_memory() -> None:
    op = torch.ops.torch_dropout_ir
    x = torch.arange(1.0, 2**23 + 100)  # past 32 MiB, where results are recycled

    def check(y: torch.Tensor, packed: torch.Tensor) -> None:
        keep = torch.from_numpy(unpacked(packed.numpy(), x.numel()))
        assert torch.equal(y, torch.where(keep, x * 2, 0.0))

    first = op.dropout_forward(x, RNG_TENSOR, 0.5)
    address = first[0].data_ptr()
    view = first[0][5:]
    second = op.dropout_forward(x, RNG_TENSOR + 1, 0.5)
    check(*first)
    check(*second)
    del first
    third = op.dropout_forward(x, RNG_TENSOR + 2, 0.5)
    check(*third)
    assert third[0].data_ptr() != address, "a view still holds the first result"
    assert torch.equal(view[:3] != 0, view[:3] == 2 * x[5:8])
    del view, second
    check(*op.dropout_forward(x, RNG_TENSOR + 3, 0.5))


X = torch.ones(100)
PACKED = torch.zeros(16, dtype=torch.uint8)


@needs_compiled
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("dropout_forward", (X, RNG_TENSOR, 1.5), "between 0 and 1, but got 1.5"),
        ("dropout_forward", (X, RNG_TENSOR, float("nan")), "between 0 and 1, but got"),
        ("dropout_forward", (X.int(), RNG_TENSOR, 0.5), "float16, got int32"),
        ("dropout_forward", (X, RNG_TENSOR.int(), 0.5), "int64, got int32"),
        ("dropout_forward", (X, RNG_TENSOR[:1], 0.5), r"shape \[2\], got"),
        ("mask_apply", (X.bool(), PACKED, 1.0), "float16, got bool"),
        ("mask_apply", (X, PACKED[:8], 1.0), "16 bytes for 100 elements, got 8"),
        ("mask_apply", (X, PACKED[:9], 1.0), "whole 8-byte words"),
        ("mask_apply", (X, PACKED.char(), 1.0), "uint8, got int8"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(-0.1), 8), "between 0 and 1"),
        ("mask_draw", (RNG_TENSOR, torch.tensor([0.1]), 8), "no dimension"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(1), 8), "float64, got int64"),
        ("mask_draw", (RNG_TENSOR, torch.tensor(0.1), -1), ">= 0, got -1"),
        ("unit_counts", (PACKED, 13, 10), "16 bytes for 13 rows of 10 units"),
        ("unit_counts", (PACKED, 2**62, 4), "16 bytes for"),
        ("unit_counts", (PACKED, -1, 10), ">= 0, got -1 and 10"),
    ],
)
def test_errors_name_the_op_and_what_was_got(
    op: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(torch.ops.torch_dropout_ir, op)(*arguments)
