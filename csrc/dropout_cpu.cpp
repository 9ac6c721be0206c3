// CPU: the vectorised loops on torch's threads.
#include <algorithm>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "dropout_backend.h"
#include "dropout_simd.h"

namespace dropout {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels(std::getenv("TORCH_DROPOUT_IR_ISA"));
  return chosen;
}

// torch's own grain of 32768 elements, in words. Threads get whole words, so no
// two write the same byte of the mask.
constexpr int64_t kGrainWords = 512;

template <class Body>
void for_words(int64_t numel, const Body& body) {
  const int64_t words = packed_bytes(numel) / 8;
  if (words <= kGrainWords) {
    body(0, words);
  } else {
    torch::stable::parallel_for(0, words, kGrainWords, body);
  }
}

void forward(const MaskArgs& args, int) {
  const auto range = kernels().forward[static_cast<int>(args.dtype)];
  for_words(args.numel,
            [&](int64_t begin, int64_t end) { range(args, begin, end); });
}

void apply(const MaskArgs& args, int) {
  const auto range = kernels().apply[static_cast<int>(args.dtype)];
  for_words(args.numel,
            [&](int64_t begin, int64_t end) { range(args, begin, end); });
}

void draw(const MaskArgs& args, ProbabilityArg arg, int) {
  const double p = arg.is_double ? *static_cast<const double*>(arg.p)
                                 : *static_cast<const float*>(arg.p);
  if (!is_probability(p)) {
    throw std::runtime_error(
        "mask_draw: dropout probability has to be between 0 and 1, but got " +
        std::to_string(p));
  }
  MaskArgs with_p = args;
  with_p.threshold = drop_threshold(p);
  const auto range = kernels().draw;
  for_words(args.numel,
            [&](int64_t begin, int64_t end) { range(with_p, begin, end); });
}

void count_columns(const Columns& columns) {
  const int64_t chunks = (columns.width + 63) / 64;
  const int64_t grain_bits = 64 * kGrainWords * 16;
  const int64_t grain = std::max<int64_t>(1, grain_bits / (columns.rows * 64));
  const auto range = kernels().count;
  if (chunks <= grain) {
    range(columns, 0, chunks);
  } else {
    torch::stable::parallel_for(
        0, chunks, grain,
        [&](int64_t begin, int64_t end) { range(columns, begin, end); });
  }
}

// Several short rows make one long row, whose windows are full and whose chunks give
// the threads something to share; its columns fold back modulo `units`. Not too long,
// or the rows under a byte counter leave the cache before the next chunk.
int64_t rows_in_one(const CountArgs& args) {
  constexpr int64_t kWideRow = 1024;
  return std::max<int64_t>(1, std::min(kWideRow / args.units, args.rows / 32));
}

void count_folded(const CountArgs& args, int64_t fold) {
  std::vector<int64_t> totals(static_cast<size_t>(fold * args.units));
  count_columns({args.packed, args.packed_bytes / 8, 0, args.rows / fold,
                 fold * args.units, totals.data()});
  const int64_t* from = totals.data();
  for (int64_t i = 0; i < fold; ++i, from += args.units) {
    std::transform(from, from + args.units, args.counts, args.counts,
                   std::plus<int64_t>());
  }
}

void add_counts(const CountArgs& args) {
  if (args.rows == 0 || args.units == 0) return;
  const int64_t fold = rows_in_one(args);
  const int64_t folded = fold > 1 ? args.rows / fold * fold : 0;
  if (folded > 0) count_folded(args, fold);
  if (folded < args.rows) {
    count_columns({args.packed, args.packed_bytes / 8, folded * args.units,
                   args.rows - folded, args.units, args.counts});
  }
}

void count(const CountArgs& args, int) {
  std::fill_n(args.counts, args.units, int64_t{0});
  add_counts(args);
}

// The mask is an eighth of a byte an element, so a second pass over it is cheap. Calls
// from several threads may add to the same counts.
void forward_counted(const MaskArgs& args, int64_t units, int64_t* counts, int device) {
  forward(args, device);
  static std::mutex adding;
  const std::lock_guard<std::mutex> lock(adding);
  add_counts({args.packed, packed_bytes(args.numel), args.numel / units, units, counts});
}

}  // namespace

const Backend cpu_backend = {forward, apply, draw, count, forward_counted};

}  // namespace dropout
