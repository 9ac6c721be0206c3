// The loops in plain C++: the fallback, and what the other sets are tested
// against.
#pragma once

namespace dropout::portable {

struct Draw {
  static constexpr int kStep = 1;
  uint64_t key, stream, block_high;
  uint32_t threshold;

  Draw(uint64_t key, uint64_t stream, uint32_t block_high, uint32_t threshold)
      : key(key), stream(stream), block_high(block_high), threshold(threshold) {}

  void words(uint32_t block_low, uint64_t* bits) const {
    const uint64_t block = block_high << 32 | block_low;
    bits[0] = 0;
    for (int i = 0; i < 16; ++i) {
      const uint64_t four =
          keep_bits(key, stream, block + static_cast<uint64_t>(i), threshold);
      bits[0] |= four << (4 * i);
    }
  }
};

template <class T>
inline void apply64(const T* x, T* y, uint64_t bits, double scale) {
  for (int i = 0; i < 64; ++i) {
    y[i] = (bits >> i) & 1 ? scaled(x[i], scale) : T{};
  }
}

// Byte j of word i counts column 8 i + j.
struct ByteCounter {
  uint64_t bytes[8] = {};

  void add(uint64_t bits) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t eight = (bits >> (8 * i) & 0xff) * 0x0101010101010101u;
      const uint64_t one_bit = eight & 0x8040201008040201u;
      bytes[i] += (one_bit + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    }
  }

  void store(uint8_t* counts) const {
    for (int i = 0; i < 64; ++i) {
      counts[i] = static_cast<uint8_t>(bytes[i / 8] >> (8 * (i % 8)));
    }
  }
};

#include "dropout_loops.h"

}  // namespace dropout::portable
