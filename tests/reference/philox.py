"""Philox4x32-10 and the dropout rule in NumPy, straight from Salmon et al. 2011."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32_10(counter, key):
    """Ten rounds on Python integers, one block."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(MULTIPLIERS[0] * c[0], 2**32)
        high1, low1 = divmod(MULTIPLIERS[1] * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + WEYL[0]) % 2**32, (k[1] + WEYL[1]) % 2**32]
    return c


def mask(rng, p, numel):
    """The mask of ``numel`` elements at key ``rng = (key, stream)``."""
    key, stream = (int(x) % 2**64 for x in rng)
    threshold = int(np.floor(p * 2.0**32 + 0.5))
    words = []
    for block in range((numel + 3) // 4):
        counter = (block % 2**32, block >> 32, stream % 2**32, stream >> 32)
        words += philox4x32_10(counter, (key % 2**32, key >> 32))
    return np.array([word >= threshold for word in words[:numel]], dtype=bool)
