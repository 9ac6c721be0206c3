// What tests/test_csrc.py calls through ctypes: the header functions, each CPU
// instruction set by name, and the CUDA per-thread code walked over a whole grid.
#include "dropout_simd.h"

using namespace dropout;

namespace {

constexpr void (*kForwardThread[kNumDtypes])(const MaskArgs&, int64_t, int64_t) = {
    forward_thread<float>, forward_thread<double>, forward_thread<BFloat16>,
    forward_thread<Half>};
constexpr KeptOfEight (*kCountedThread[kNumDtypes])(const MaskArgs&, int64_t,
                                                    int64_t) = {
    counted_thread<float>, counted_thread<double>, counted_thread<BFloat16>,
    counted_thread<Half>};
constexpr void (*kApplyThread[kNumDtypes])(const MaskArgs&, int64_t, int64_t) = {
    apply_thread<float>, apply_thread<double>, apply_thread<BFloat16>,
    apply_thread<Half>};

MaskArgs mask_args(int dtype, const void* x, void* y, uint8_t* packed,
                   const int64_t* rng, int64_t numel, double p, double scale) {
  return {x, y, packed, rng, numel, drop_threshold(p), scale,
          static_cast<Dtype>(dtype)};
}

}  // namespace

extern "C" {

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const auto join = [](const uint32_t* two) {
    return two[0] | static_cast<uint64_t>(two[1]) << 32;
  };
  const Words words = philox4x32_10(join(key), join(counter + 2), join(counter));
  memcpy(out, words.lane, sizeof(words.lane));
}

uint32_t word_of_element(const int64_t* rng, uint64_t index) {
  return philox_word(static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1]),
                     index);
}

uint64_t threshold(double p) { return drop_threshold(p); }

// A float, given by its bits, as bfloat16 (dtype 2) or half (dtype 3).
uint16_t narrow(int dtype, uint32_t bits) {
  const float x = bit_cast<float>(bits);
  return dtype == 2 ? to_bfloat16(x).bits : to_half(x).bits;
}

const char* chosen_isa(const char* wanted) {
  const Kernels* chosen = &choose_kernels(wanted);
#if defined(__x86_64__)
  if (chosen == &avx512::kernels) return "avx512";
  if (chosen == &avx2::kernels) return "avx2";
#elif defined(__aarch64__)
  if (chosen == &neon::kernels) return "neon";
#endif
  return chosen == &portable::kernels ? "portable" : "unknown";
}

void cpu_forward(const char* isa, int dtype, const void* x, void* y, uint8_t* packed,
                 const int64_t* rng, int64_t numel, double p, int64_t begin,
                 int64_t end) {
  const MaskArgs args = mask_args(dtype, x, y, packed, rng, numel, p, keep_scale(p));
  choose_kernels(isa).forward[dtype](args, begin, end);
}

void cpu_apply(const char* isa, int dtype, const void* x, void* y, uint8_t* packed,
               int64_t numel, double scale) {
  const MaskArgs args = mask_args(dtype, x, y, packed, nullptr, numel, 0, scale);
  choose_kernels(isa).apply[dtype](args, 0, packed_bytes(numel) / 8);
}

// `packed` receives words [begin, end) only, wherever in the tensor they lie.
void cpu_draw(const char* isa, uint8_t* packed, const int64_t* rng, int64_t numel,
              double p, int64_t begin, int64_t end) {
  const MaskArgs args = mask_args(0, nullptr, packed, packed - begin * 8, rng, numel,
                                  p, 0);
  choose_kernels(isa).draw(args, begin, end);
}

void cpu_count(const char* isa, const uint8_t* packed, int64_t num_words,
               int64_t first_bit, int64_t rows, int64_t width, int64_t* totals) {
  const Columns columns = {packed, num_words, first_bit, rows, width, totals};
  choose_kernels(isa).count(columns, 0, (width + 63) / 64);
}

void cuda_forward(int64_t threads, int dtype, const void* x, void* y, uint8_t* packed,
                  const int64_t* rng, int64_t numel, double p) {
  const MaskArgs args = mask_args(dtype, x, y, packed, rng, numel, p, keep_scale(p));
  for (int64_t t = 0; t < threads; ++t) kForwardThread[dtype](args, t, threads);
}

// As many threads as the kernel would have; 0 where it leaves counting to another.
int64_t cuda_counted(int dtype, const void* x, void* y, uint8_t* packed,
                     const int64_t* rng, int64_t numel, double p, int64_t units,
                     int64_t* counts) {
  const MaskArgs args = mask_args(dtype, x, y, packed, rng, numel, p, keep_scale(p));
  const int64_t threads = counted_threads(numel, units);
  for (int64_t t = 0; t < threads; ++t) {
    const KeptOfEight count = kCountedThread[dtype](args, t, threads);
    for (int i = 0; i < 8; ++i) counts[unit_of(t, i, units)] += count.kept[i];
  }
  return threads;
}

int64_t counting_threads(int64_t numel, int64_t units) {
  return counted_threads(numel, units);
}

void cuda_apply(int64_t threads, int dtype, const void* x, void* y, uint8_t* packed,
                int64_t numel, double scale) {
  const MaskArgs args = mask_args(dtype, x, y, packed, nullptr, numel, 0, scale);
  for (int64_t t = 0; t < threads; ++t) kApplyThread[dtype](args, t, threads);
}

// Bytes [first, packed_bytes(numel)) of the mask, into the start of `packed`.
void cuda_draw(int64_t threads, uint8_t* packed, const int64_t* rng, int64_t numel,
               double p, int64_t first) {
  const MaskArgs args =
      mask_args(0, nullptr, nullptr, packed - first, rng, numel, p, 0);
  for (int64_t t = 0; t < threads; ++t) {
    draw_thread(args, args.threshold, first + t, threads);
  }
}

int64_t cuda_count(const uint8_t* packed, int64_t bytes, int64_t rows, int64_t units,
                   int64_t* counts) {
  const CountArgs args = {packed, bytes, rows, units, counts};
  const int64_t threads = count_threads(args);
  for (int64_t t = 0; t < threads; ++t) {
    counts[t % units] += count_thread(args, t, threads);
  }
  return threads;
}

}  // extern "C"
