// AVX-512 (F, BW, DQ, VL): eight Philox blocks a register, one in each 64-bit
// lane. A product's low half is the next multiplicand as it lies, its high half
// one shift away, and what the upper 32 bits hold is never looked at.
#pragma once

// GCC up to 12 takes the undefined operand inside its own intrinsics for a
// mistake (bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

DROPOUT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi2")

namespace dropout::avx512 {

struct Draw {
  // Words drawn at once: four chains of products side by side, since one alone
  // waits for its own multiplier.
  static constexpr int kStep = 2;
  static constexpr int kChains = 4;
  Schedule s;

  Draw(uint64_t key, uint64_t stream, uint32_t block_high, uint32_t threshold)
      : s(key, stream, block_high, threshold) {}

  static DROPOUT_INLINE __m512i all(uint32_t word) {
    return _mm512_set1_epi32(static_cast<int>(word));
  }
  static DROPOUT_INLINE __m512i swapped(__m512i product) {
    return _mm512_shuffle_epi32(product, static_cast<_MM_PERM_ENUM>(0xB1));
  }
  static DROPOUT_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
  }

  // Keep bits of the 128 elements of blocks first .. first + 31.
  DROPOUT_INLINE void words(uint32_t first, uint64_t* bits) const {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0);
    const __m512i m1 = _mm512_set1_epi64(kPhiloxM1);
    // In this order, interleaving the pairs of words at the end leaves the
    // elements in memory order.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    DROPOUT_EACH_CHAIN {
      const __m512i block = _mm512_add_epi32(all(first + 8 * i), order);
      c3[i] = _mm512_mul_epu32(m0, block);
      c2[i] = _mm512_xor_si512(swapped(c3[i]), all(s.round1_c2));
      c1[i] = _mm512_mul_epu32(m1, c2[i]);
      c2[i] = _mm512_xor_si512(c3[i], all(s.round2_c2));
      c0[i] = _mm512_xor_si512(swapped(c1[i]), all(s.round2_c0));
      c3[i] = all(s.round2_c3);
    }
#pragma GCC unroll 8
    for (int round = 2; round < kPhiloxRounds - 1; ++round) {
      __m512i p0[kChains], p1[kChains];
      DROPOUT_EACH_CHAIN p0[i] = _mm512_mul_epu32(m0, c0[i]);
      DROPOUT_EACH_CHAIN p1[i] = _mm512_mul_epu32(m1, c2[i]);
      DROPOUT_EACH_CHAIN c0[i] = xor3(swapped(p1[i]), c1[i], all(s.k0[round]));
      DROPOUT_EACH_CHAIN c2[i] = xor3(swapped(p0[i]), c3[i], all(s.k1[round]));
      DROPOUT_EACH_CHAIN c1[i] = p1[i];
      DROPOUT_EACH_CHAIN c3[i] = p0[i];
    }
    uint64_t half[kChains];
    DROPOUT_EACH_CHAIN {
      half[i] = keep_bits(last(_mm512_mul_epu32(m1, c2[i]), c1[i], s.k0[9]),
                          last(_mm512_mul_epu32(m0, c0[i]), c3[i], s.k1[9]));
    }
    bits[0] = half[0] | half[1] << 32;
    bits[1] = half[2] | half[3] << 32;
  }

  // Round 10 with both halves of the product in place: words 0 and 1, or 2 and 3,
  // side by side in each lane.
  static DROPOUT_INLINE __m512i last(__m512i product, __m512i c, uint32_t key) {
    constexpr __mmask16 kLow = 0x5555;
    return _mm512_xor_si512(swapped(product),
                            _mm512_maskz_xor_epi32(kLow, c, all(key)));
  }

  DROPOUT_INLINE uint32_t keep_bits(__m512i words01, __m512i words23) const {
    const __m512i low = _mm512_unpacklo_epi64(words01, words23);
    const __m512i high = _mm512_unpackhi_epi64(words01, words23);
    const __m512i threshold = all(s.threshold);
    return _mm512_kunpackw(_mm512_cmpge_epu32_mask(high, threshold),
                           _mm512_cmpge_epu32_mask(low, threshold));
  }
};

DROPOUT_INLINE void apply64(const float* x, float* y, uint64_t bits, double scale) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int i = 0; i < 64; i += 16) {
    const __mmask16 keep = static_cast<__mmask16>(bits >> i);
    _mm512_storeu_ps(y + i,
                     _mm512_maskz_mul_ps(keep, _mm512_loadu_ps(x + i), factor));
  }
}

DROPOUT_INLINE void apply64(const double* x, double* y, uint64_t bits,
                            double scale) {
  const __m512d factor = _mm512_set1_pd(scale);
  for (int i = 0; i < 64; i += 8) {
    const __mmask8 keep = static_cast<__mmask8>(bits >> i);
    _mm512_storeu_pd(y + i,
                     _mm512_maskz_mul_pd(keep, _mm512_loadu_pd(x + i), factor));
  }
}

// Rounds to the upper 16 bits, to nearest even. No test for NaN: the NaNs that
// products with a bfloat16 yield end in 16 zeros, which rounding leaves alone.
DROPOUT_INLINE __m512i rounded_to_bfloat16(__m512 product) {
  const __m512i raw = _mm512_castps_si512(product);
  const __mmask16 odd = _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
}

// Elements 2 i and 2 i + 1 are the low and the high half of lane i, so widening and
// narrowing are a shift and a mask, and nothing moves between lanes.
DROPOUT_INLINE void apply64(const BFloat16* x, BFloat16* y, uint64_t bits,
                            double scale) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 64; i += 32) {
    const __m512i both = _mm512_loadu_si512(x + i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
    const __m512i low =
        _mm512_srli_epi32(rounded_to_bfloat16(_mm512_mul_ps(even, factor)), 16);
    const __m512i high = rounded_to_bfloat16(_mm512_mul_ps(odd, factor));
    const __m512i narrow = _mm512_mask_mov_epi16(low, 0xAAAAAAAAu, high);
    _mm512_storeu_si512(
        y + i, _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits >> i), narrow));
  }
}

DROPOUT_INLINE void apply64(const Half* x, Half* y, uint64_t bits, double scale) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int i = 0; i < 64; i += 16) {
    const __mmask16 keep = static_cast<__mmask16>(bits >> i);
    const __m512 wide = _mm512_maskz_cvtph_ps(
        keep, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
    const __m256i product = _mm512_maskz_cvtps_ph(
        keep, _mm512_mul_ps(wide, factor),
        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), product);
  }
}

struct ByteCounter {
  __m512i bytes;

  // Spelt out: an implicit constructor would be compiled without the target.
  DROPOUT_INLINE ByteCounter() : bytes(_mm512_setzero_si512()) {}

  DROPOUT_INLINE void add(uint64_t bits) {
    bytes = _mm512_mask_sub_epi8(bytes, bits, bytes, _mm512_set1_epi8(-1));
  }

  DROPOUT_INLINE void store(uint8_t* counts) const {
    _mm512_storeu_si512(counts, bytes);
  }
};

#include "dropout_loops.h"

}  // namespace dropout::avx512

DROPOUT_TARGET_END

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
