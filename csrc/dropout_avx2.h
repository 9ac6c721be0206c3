// AVX2 with F16C: four Philox blocks a register, one in each 64-bit lane; the
// scheme is that of dropout_avx512.h with vectors for masks.
#pragma once

DROPOUT_TARGET_BEGIN("avx2,f16c,bmi2")

namespace dropout::avx2 {

DROPOUT_INLINE __m256i all(uint32_t word) {
  return _mm256_set1_epi32(static_cast<int>(word));
}
DROPOUT_INLINE __m256i swapped(__m256i product) {
  return _mm256_shuffle_epi32(product, 0xB1);
}
DROPOUT_INLINE __m256i xor3(__m256i a, __m256i b, __m256i c) {
  return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
}

struct Draw {
  static constexpr int kStep = 1;
  static constexpr int kChains = 2;
  Schedule s;

  Draw(uint64_t key, uint64_t stream, uint32_t block_high, uint32_t threshold)
      : s(key, stream, block_high, threshold) {}

  DROPOUT_INLINE void words(uint32_t first, uint64_t* bits) const {
    bits[0] = 0;
    for (uint32_t i = 0; i < 16; i += 4 * kChains) {
      bits[0] |= uint64_t{part_of_word(first + i)} << (4 * i);
    }
  }

  // Keep bits of the 32 elements of blocks first .. first + 7.
  DROPOUT_INLINE uint64_t part_of_word(uint32_t first) const {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0);
    const __m256i m1 = _mm256_set1_epi64x(kPhiloxM1);
    const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
    __m256i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    DROPOUT_EACH_CHAIN {
      const __m256i block = _mm256_add_epi32(all(first + 4 * i), order);
      c3[i] = _mm256_mul_epu32(m0, block);
      c2[i] = _mm256_xor_si256(swapped(c3[i]), all(s.round1_c2));
      c1[i] = _mm256_mul_epu32(m1, c2[i]);
      c2[i] = _mm256_xor_si256(c3[i], all(s.round2_c2));
      c0[i] = _mm256_xor_si256(swapped(c1[i]), all(s.round2_c0));
      c3[i] = all(s.round2_c3);
    }
#pragma GCC unroll 8
    for (int round = 2; round < kPhiloxRounds - 1; ++round) {
      __m256i p0[kChains], p1[kChains];
      DROPOUT_EACH_CHAIN p0[i] = _mm256_mul_epu32(m0, c0[i]);
      DROPOUT_EACH_CHAIN p1[i] = _mm256_mul_epu32(m1, c2[i]);
      DROPOUT_EACH_CHAIN c0[i] = xor3(swapped(p1[i]), c1[i], all(s.k0[round]));
      DROPOUT_EACH_CHAIN c2[i] = xor3(swapped(p0[i]), c3[i], all(s.k1[round]));
      DROPOUT_EACH_CHAIN c1[i] = p1[i];
      DROPOUT_EACH_CHAIN c3[i] = p0[i];
    }
    uint64_t bits = 0;
    DROPOUT_EACH_CHAIN {
      bits |= keep_bits(last(_mm256_mul_epu32(m1, c2[i]), c1[i], s.k0[9]),
                        last(_mm256_mul_epu32(m0, c0[i]), c3[i], s.k1[9]))
              << (16 * i);
    }
    return bits;
  }

  static DROPOUT_INLINE __m256i last(__m256i product, __m256i c, uint32_t key) {
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    return _mm256_xor_si256(
        swapped(product), _mm256_and_si256(low, _mm256_xor_si256(c, all(key))));
  }

  DROPOUT_INLINE uint64_t keep_bits(__m256i words01, __m256i words23) const {
    return keep8(_mm256_unpacklo_epi64(words01, words23)) |
           keep8(_mm256_unpackhi_epi64(words01, words23)) << 8;
  }

  // AVX2 compares signed numbers only; the unsigned maximum does instead.
  DROPOUT_INLINE uint64_t keep8(__m256i words) const {
    const __m256i keep =
        _mm256_cmpeq_epi32(_mm256_max_epu32(words, all(s.threshold)), words);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(keep)));
  }
};

DROPOUT_INLINE __m256 keep8(uint64_t bits) {
  const __m256i one_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i byte = all(static_cast<uint32_t>(bits));
  return _mm256_castsi256_ps(
      _mm256_cmpeq_epi32(_mm256_and_si256(byte, one_bit), one_bit));
}

DROPOUT_INLINE __m256 scaled8(__m256 x, uint64_t bits, double scale) {
  const __m256 factor = _mm256_set1_ps(static_cast<float>(scale));
  return _mm256_and_ps(_mm256_mul_ps(x, factor), keep8(bits));
}

DROPOUT_INLINE void apply64(const float* x, float* y, uint64_t bits, double scale) {
  for (int i = 0; i < 64; i += 8) {
    _mm256_storeu_ps(y + i, scaled8(_mm256_loadu_ps(x + i), bits >> i, scale));
  }
}

DROPOUT_INLINE void apply64(const double* x, double* y, uint64_t bits,
                            double scale) {
  const __m256d factor = _mm256_set1_pd(scale);
  const __m256i one_bit = _mm256_setr_epi64x(1, 2, 4, 8);
  for (int i = 0; i < 64; i += 4) {
    const __m256i four = _mm256_set1_epi64x(static_cast<int64_t>(bits >> i));
    const __m256i keep =
        _mm256_cmpeq_epi64(_mm256_and_si256(four, one_bit), one_bit);
    const __m256d product = _mm256_mul_pd(_mm256_loadu_pd(x + i), factor);
    _mm256_storeu_pd(y + i, _mm256_and_pd(product, _mm256_castsi256_pd(keep)));
  }
}

// Rounds to the upper 16 bits, to nearest even. No test for NaN: the NaNs that
// products with a bfloat16 yield end in 16 zeros, which rounding leaves alone.
DROPOUT_INLINE __m256i rounded_to_bfloat16(__m256 product) {
  const __m256i raw = _mm256_castps_si256(product);
  const __m256i odd =
      _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// Elements 2 i and 2 i + 1 are the low and the high half of lane i, so widening and
// narrowing are a shift and a mask, and nothing moves between lanes.
DROPOUT_INLINE void apply64(const BFloat16* x, BFloat16* y, uint64_t bits,
                            double scale) {
  const __m256 factor = _mm256_set1_ps(static_cast<float>(scale));
  const __m256i upper = all(0xffff0000u);
  const __m256i one_bit =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                        16384, static_cast<int16_t>(0x8000));
  for (int i = 0; i < 64; i += 16) {
    const __m256i both =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
    const __m256i low =
        _mm256_srli_epi32(rounded_to_bfloat16(_mm256_mul_ps(even, factor)), 16);
    const __m256i high = rounded_to_bfloat16(_mm256_mul_ps(odd, factor));
    const __m256i sixteen = _mm256_set1_epi16(static_cast<int16_t>(bits >> i));
    const __m256i keep =
        _mm256_cmpeq_epi16(_mm256_and_si256(sixteen, one_bit), one_bit);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(y + i),
        _mm256_and_si256(keep, _mm256_blend_epi16(low, high, 0xAA)));
  }
}

DROPOUT_INLINE void apply64(const Half* x, Half* y, uint64_t bits, double scale) {
  for (int i = 0; i < 64; i += 8) {
    const __m256 value = _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    const __m256 product = scaled8(value, bits >> i, scale);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(y + i),
        _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

struct ByteCounter {
  __m256i bytes[2];

  DROPOUT_INLINE ByteCounter() {
    bytes[0] = bytes[1] = _mm256_setzero_si256();
  }

  DROPOUT_INLINE void add(uint64_t bits) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101,
                                              0x0202020202020202,
                                              0x0303030303030303);
    const __m256i one_bit =
        _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    for (int i = 0; i < 2; ++i) {
      const __m256i each = _mm256_shuffle_epi8(
          all(static_cast<uint32_t>(bits >> (32 * i))), spread);
      const __m256i set =
          _mm256_cmpeq_epi8(_mm256_and_si256(each, one_bit), one_bit);
      bytes[i] = _mm256_sub_epi8(bytes[i], set);
    }
  }

  DROPOUT_INLINE void store(uint8_t* counts) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), bytes[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts + 32), bytes[1]);
  }
};

#include "dropout_loops.h"

}  // namespace dropout::avx2

DROPOUT_TARGET_END
