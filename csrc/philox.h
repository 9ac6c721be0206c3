// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) as a pure function: no state, no torch, integers only.
//
// Randomness is addressed by element index, never by thread: the mask of a
// tensor is the same on every device, instruction set and launch geometry.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DROPOUT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DROPOUT_HOST_DEVICE inline
#endif

namespace dropout {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
// No statistical failure is known from 8 rounds up; 10 are the published default.
constexpr int kPhiloxRounds = 10;
constexpr int kLanes = 4;

struct Words {
  uint32_t lane[kLanes];
};

// Key words (lo, hi) of `key`, counter words (lo, hi) of `block`, (lo, hi) of
// `stream`.
DROPOUT_HOST_DEVICE Words philox4x32_10(uint64_t key, uint64_t stream,
                                        uint64_t block) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(block);
  uint32_t c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream);
  uint32_t c3 = static_cast<uint32_t>(stream >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The 32-bit word that decides element `index` (row-major).
DROPOUT_HOST_DEVICE uint32_t philox_word(uint64_t key, uint64_t stream,
                                         uint64_t index) {
  return philox4x32_10(key, stream, index / kLanes).lane[index % kLanes];
}

}  // namespace dropout
