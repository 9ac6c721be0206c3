// NEON (AArch64): four Philox blocks a register, one word in each 32-bit lane.
#pragma once

namespace dropout::neon {

struct Draw {
  static constexpr int kStep = 1;
  Schedule s;

  Draw(uint64_t key, uint64_t stream, uint32_t block_high, uint32_t threshold)
      : s(key, stream, block_high, threshold) {}

  struct Product {
    uint32x4_t high, low;
  };

  static DROPOUT_INLINE Product multiply(uint32x4_t a, uint32_t b) {
    const uint32x4_t p0 =
        vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vdup_n_u32(b)));
    const uint32x4_t p1 = vreinterpretq_u32_u64(vmull_high_u32(a, vdupq_n_u32(b)));
    return {vuzp2q_u32(p0, p1), vuzp1q_u32(p0, p1)};
  }

  static DROPOUT_INLINE uint32x4_t xor3(uint32x4_t a, uint32x4_t b, uint32_t c) {
    return veorq_u32(veorq_u32(a, b), vdupq_n_u32(c));
  }

  // Keep bits of the 16 elements of blocks first .. first + 3.
  DROPOUT_INLINE uint32_t quarter_word(uint32_t first) const {
    static const uint32_t kOrder[4] = {0, 1, 2, 3};
    const uint32x4_t block = vaddq_u32(vdupq_n_u32(first), vld1q_u32(kOrder));
    Product p0 = multiply(block, kPhiloxM0);
    Product p1 = multiply(veorq_u32(p0.high, vdupq_n_u32(s.round1_c2)), kPhiloxM1);
    uint32x4_t c0 = veorq_u32(p1.high, vdupq_n_u32(s.round2_c0));
    uint32x4_t c1 = p1.low;
    uint32x4_t c2 = veorq_u32(p0.low, vdupq_n_u32(s.round2_c2));
    uint32x4_t c3 = vdupq_n_u32(s.round2_c3);
    for (int round = 2; round < kPhiloxRounds; ++round) {
      p0 = multiply(c0, kPhiloxM0);
      p1 = multiply(c2, kPhiloxM1);
      c0 = xor3(p1.high, c1, s.k0[round]);
      c1 = p1.low;
      c2 = xor3(p0.high, c3, s.k1[round]);
      c3 = p0.low;
    }
    return gather(c0, 0) | gather(c1, 1) | gather(c2, 2) | gather(c3, 3);
  }

  // Word `lane` of block j decides bit 4 j + lane.
  DROPOUT_INLINE uint32_t gather(uint32x4_t words, int lane) const {
    static const uint32_t kBits[4] = {1, 16, 256, 4096};
    const uint32x4_t keep = vcgeq_u32(words, vdupq_n_u32(s.threshold));
    return vaddvq_u32(vandq_u32(keep, vld1q_u32(kBits))) << lane;
  }

  DROPOUT_INLINE void words(uint32_t first, uint64_t* bits) const {
    bits[0] = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      bits[0] |= uint64_t{quarter_word(first + 4 * i)} << (16 * i);
    }
  }
};

DROPOUT_INLINE float32x4_t scaled4(float32x4_t x, uint64_t bits, double scale) {
  static const uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t keep =
      vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), vld1q_u32(kBits));
  const float32x4_t product = vmulq_n_f32(x, static_cast<float>(scale));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(product), keep));
}

DROPOUT_INLINE void apply64(const float* x, float* y, uint64_t bits, double scale) {
  for (int i = 0; i < 64; i += 4) {
    vst1q_f32(y + i, scaled4(vld1q_f32(x + i), bits >> i, scale));
  }
}

DROPOUT_INLINE void apply64(const double* x, double* y, uint64_t bits,
                            double scale) {
  static const uint64_t kBits[2] = {1, 2};
  for (int i = 0; i < 64; i += 2) {
    const uint64x2_t keep = vtstq_u64(vdupq_n_u64(bits >> i), vld1q_u64(kBits));
    const float64x2_t product = vmulq_n_f64(vld1q_f64(x + i), scale);
    vst1q_f64(y + i, vreinterpretq_f64_u64(
                         vandq_u64(vreinterpretq_u64_f64(product), keep)));
  }
}

DROPOUT_INLINE void apply64(const BFloat16* x, BFloat16* y, uint64_t bits,
                            double scale) {
  for (int i = 0; i < 64; i += 4) {
    const uint16x4_t narrow = vld1_u16(&x[i].bits);
    const float32x4_t wide = vreinterpretq_f32_u32(vshll_n_u16(narrow, 16));
    const float32x4_t product = scaled4(wide, bits >> i, scale);
    // To nearest even; the NaNs of such products end in 16 zeros, which rounding
    // leaves alone.
    const uint32x4_t raw = vreinterpretq_u32_f32(product);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
    const uint32x4_t rounded =
        vaddq_u32(raw, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    vst1_u16(&y[i].bits, vshrn_n_u32(rounded, 16));
  }
}

DROPOUT_INLINE void apply64(const Half* x, Half* y, uint64_t bits, double scale) {
  for (int i = 0; i < 64; i += 4) {
    const float16x4_t narrow = vreinterpret_f16_u16(vld1_u16(&x[i].bits));
    const float32x4_t product = scaled4(vcvt_f32_f16(narrow), bits >> i, scale);
    vst1_u16(&y[i].bits, vreinterpret_u16_f16(vcvt_f16_f32(product)));
  }
}

struct ByteCounter {
  uint8x16_t bytes[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};

  DROPOUT_INLINE void add(uint64_t bits) {
    static const uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128,
                                      1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t each =
          vcombine_u8(vdup_n_u8(static_cast<uint8_t>(bits >> (16 * i))),
                      vdup_n_u8(static_cast<uint8_t>(bits >> (16 * i + 8))));
      bytes[i] = vsubq_u8(bytes[i], vtstq_u8(each, vld1q_u8(kBits)));
    }
  }

  DROPOUT_INLINE void store(uint8_t* counts) const {
    for (int i = 0; i < 4; ++i) vst1q_u8(counts + 16 * i, bytes[i]);
  }
};

#include "dropout_loops.h"

}  // namespace dropout::neon
