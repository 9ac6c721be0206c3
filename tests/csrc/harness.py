"""Calls the headers of ``csrc/`` through ctypes, and says what they ought to give.

``harness.cpp`` is compiled with the machine's C++ compiler, so the per-thread CUDA code
runs here without a GPU.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.philox import philox4x32_10

ROOT = Path(__file__).resolve().parents[2]
RNG = np.array([0x0123_4567_89AB_CDEF, -0x0FED_CBA9_8765_4321], dtype=np.int64)
ISAS = [b"portable"]
ISAS += [b"avx2", b"avx512"] if platform.machine() == "x86_64" else [b"neon"]
# The dtypes in the order of the C++ enum; 16-bit ones travel as their bits.
STORAGE = [np.float32, np.float64, np.uint16, np.uint16]
TORCH_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def philox_word(rng: np.ndarray, index: int) -> int:
    """Word of one element, at any 64-bit index."""
    key, stream, block = int(rng[0]) % 2**64, int(rng[1]) % 2**64, index // 4
    counter = (block % 2**32, block >> 32, stream % 2**32, stream >> 32)
    return philox4x32_10(counter, (key % 2**32, key >> 32))[index % 4]


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


def build_library(folder: Path) -> Any:
    """Compile the harness into ``folder`` and declare its functions."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "harness.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{ROOT / 'csrc'}", str(Path(__file__).with_name("harness.cpp"))]
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
        "cuda_counted": (i64, [i32, ptr, ptr, ptr, ptr, i64, f64, i64, ptr]),
        "counting_threads": (i64, [i64, i64]),
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
