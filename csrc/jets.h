// What `loss_blocks` is told of a loss: the nodes of its graph, each after those that
// it is made of.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace dropout {

// As `torch_dropout_ir/jet_kernels.py` numbers them.
enum Kind : int64_t {
  kOutputs, kLinear, kTimes, kOver, kChosen, kSummed, kGathered,
  kLogSoftmax, kSoftmax, kLogSumExp,
  kExp, kExpm1, kLog, kLog1p, kSqrt, kRsqrt, kReciprocal, kSigmoid, kTanh, kCosh, kSinh,
  kSin, kCos, kAbs, kRelu, kClamp, kLogSigmoid, kSoftplus, kPower, kGiven, kKinds
};

constexpr const char* kOp = "loss_blocks";
constexpr int64_t kRows = 8;  // at a time: what is between stays in the cache
using Sizes = std::vector<int64_t>;
using Numbers = std::vector<double>;

constexpr int64_t kMost = int64_t{1} << 40;  // entries of a row, lest counts overflow

inline int64_t product(const Sizes& sizes) {
  int64_t found = 1;
  for (const int64_t size : sizes) {
    DROPOUT_CHECK(size >= 0 && size <= kMost / std::max<int64_t>(found, 1), kOp,
                  ": expected the shape of a row, got a size of ", size);
    found *= size;
  }
  return found;
}

struct Node {
  int64_t kind, a, b;  // inputs by number, -1 where they are constants
  int64_t dim, start, step;
  double alpha, beta;
  Sizes values;  // what it has saved, by number
  Sizes sizes;   // of a row of what it makes
  Sizes inside;  // of its first input
};

// Whether it is made of all entries along a dimension of its first input.
inline bool joins(const Node& node) {
  return node.kind >= kGathered && node.kind <= kLogSumExp;
}

// How many values it needs, of those that it may have saved.
inline size_t needed(const Node& node) {
  if (node.kind < kTimes || node.kind == kChosen || node.kind == kSummed) return 0;
  const bool both =
      node.kind == kTimes || node.kind == kLogSumExp || node.kind == kGiven;
  return both || (node.kind == kOver && node.b >= 0) ? 2 : 1;
}

// Where the entries of a tensor are in one that is repeated to `sizes`, aligned right.
inline Sizes repeated(const Sizes& own, const Sizes& sizes) {
  Sizes found(static_cast<size_t>(product(sizes)));
  DROPOUT_CHECK(own.size() <= sizes.size() || product(own) == product(sizes),
                kOp, ": expected no more than ", sizes.size(),
                " dimensions of a row, got ", own.size());
  for (size_t e = 0; e < found.size(); ++e) {
    if (product(own) == product(sizes)) {
      found[e] = static_cast<int64_t>(e);
      continue;
    }
    int64_t left = static_cast<int64_t>(e), stride = 1;
    for (size_t d = 0; d < own.size(); ++d) {
      const int64_t size = sizes[sizes.size() - 1 - d], there = own[own.size() - 1 - d];
      DROPOUT_CHECK(there == 1 || there == size, kOp, ": expected ", size,
                    " entries or one, got ", there);
      if (there != 1) found[e] += left % size * stride;
      stride *= there;
      left /= size;
    }
  }
  return found;
}

// By entry of a node that of its first input; of a sum the other way round.
inline Sizes entries_of(const Node& node, const Node& from) {
  if (node.kind == kSummed) {
    // `dim` has a bit for each dimension that goes.
    Sizes left = from.sizes;
    for (size_t d = 0; d < left.size(); ++d) {
      if (node.dim >> d & 1) left[d] = 1;
    }
    DROPOUT_CHECK(product(left) == product(node.sizes), kOp, ": expected ",
                  product(left), " sums, got ", product(node.sizes));
    return repeated(left, from.sizes);
  }
  if (node.kind != kChosen) return repeated(from.sizes, node.sizes);
  const size_t dim = static_cast<size_t>(node.dim);
  DROPOUT_CHECK(dim < from.sizes.size(), kOp, ": expected a dimension below ",
                from.sizes.size(), ", got ", node.dim);
  const int64_t inner = product({from.sizes.begin() + node.dim + 1, from.sizes.end()});
  const int64_t outer = product({from.sizes.begin(), from.sizes.begin() + node.dim});
  const int64_t length = from.sizes[dim];
  const int64_t count = outer * inner != 0 ? product(node.sizes) / (outer * inner) : 0;
  Sizes found;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t there = node.start + t * node.step;
      DROPOUT_CHECK(there >= 0 && there < length, kOp, ": expected an entry below ",
                    length, ", got ", there);
      for (int64_t i = 0; i < inner; ++i) {
        found.push_back((o * length + there) * inner + i);
      }
    }
  }
  DROPOUT_CHECK(static_cast<int64_t>(found.size()) == product(node.sizes), kOp,
                ": expected ", found.size(), " entries, got ", product(node.sizes));
  return found;
}

// A node is `kind, a, b, dim, start, step, count of values, values, dimensions, sizes`.
inline std::vector<Node> read_nodes(const List& program, const List& numbers) {
  std::vector<Node> nodes;
  size_t at = 0;
  const auto next = [&] {
    DROPOUT_CHECK(at < program.size(), kOp, ": expected a longer program than ",
                  program.size(), " numbers");
    return program.at<int64_t>(at++);
  };
  const auto several = [&] {
    Sizes found(static_cast<size_t>(next()));
    for (int64_t& x : found) x = next();
    return found;
  };
  while (at < program.size()) {
    const size_t i = nodes.size();
    DROPOUT_CHECK(2 * i + 1 < numbers.size(), kOp,
                  ": expected two numbers a node, got ", numbers.size());
    Node node{};
    for (int64_t* x : {&node.kind, &node.a, &node.b}) *x = next();
    for (int64_t* x : {&node.dim, &node.start, &node.step}) *x = next();
    node.values = several();
    node.sizes = several();
    node.alpha = numbers.at<double>(2 * i);
    node.beta = numbers.at<double>(2 * i + 1);
    const int64_t before = static_cast<int64_t>(i);
    DROPOUT_CHECK(node.kind >= 0 && node.kind < kKinds && node.a < before &&
                      node.b < before && (node.kind == kOutputs) == (i == 0) &&
                      (node.a >= 0 || node.kind < kChosen),
                  kOp, ": expected a node of those before it, got kind ", node.kind,
                  " of ", node.a, " and ", node.b);
    DROPOUT_CHECK(node.values.size() >= needed(node), kOp, ": expected ", needed(node),
                  " values for kind ", node.kind, ", got ", node.values.size());
    if (node.a >= 0) node.inside = nodes[static_cast<size_t>(node.a)].sizes;
    const int64_t dims = static_cast<int64_t>(node.inside.size());
    DROPOUT_CHECK(!joins(node) || (node.dim >= 0 && node.dim < dims), kOp,
                  ": expected a dimension below ", dims, ", got ", node.dim);
    if (node.kind == kLogSoftmax || node.kind == kSoftmax) node.sizes = node.inside;
    nodes.push_back(std::move(node));
  }
  DROPOUT_CHECK(!nodes.empty(), kOp, ": expected a program, got none");
  return nodes;
}

// Entries that are joined: those of one fibre along a dimension.
struct Fibres {
  int64_t outer, length, inner;
  Fibres(const Sizes& sizes, int64_t dim)
      : outer(product({sizes.begin(), sizes.begin() + dim})),
        length(sizes[static_cast<size_t>(dim)]),
        inner(product({sizes.begin() + dim + 1, sizes.end()})) {}
};

// Whether what is made along fibres has as many as its node says.
inline void check_joined(const Node& node) {
  const Fibres of(node.inside, node.dim);
  const bool gathered = node.kind == kGathered;
  DROPOUT_CHECK(!gathered || node.sizes.size() == node.inside.size(), kOp,
                ": expected ", node.inside.size(), " dimensions of a row, got ",
                node.sizes.size());
  DROPOUT_CHECK(node.kind != kLogSumExp || product(node.sizes) == of.outer * of.inner,
                kOp, ": expected ", of.outer * of.inner, " entries, got ",
                product(node.sizes));
}

// A tensor that a node has saved, repeated to the node's shape.
class Saved {
 public:
  Saved(const Tensor& x, int64_t rows, const Sizes& sizes) : data_(x.data()) {
    const int32_t dtype = x.dtype();
    kind_ = dtype == aoti_torch_dtype_int64()  ? 2
            : dtype == aoti_torch_dtype_bool() ? 3
                                               : is_double(kOp, x);
    const int64_t dim = x.dim(), more = static_cast<int64_t>(sizes.size()) + 1 - dim;
    Sizes own(x.sizes(), x.sizes() + dim);
    const bool by_row = more == 0 && dim > 0 && own[0] != 1;
    DROPOUT_CHECK(more >= 0 && (!by_row || own[0] == rows), kOp,
                  ": expected a saved tensor of ", rows, " rows, got ",
                  dim ? own[0] : 0);
    if (more == 0 && dim > 0) own.erase(own.begin());
    step_ = by_row ? product(own) : 0;
    at_ = repeated(own, sizes);
  }
  double operator()(int64_t row, size_t entry) const {
    const int64_t i = row * step_ + at_[entry];
    if (kind_ == 2) return static_cast<double>(whole(row, entry));
    if (kind_ == 3) return static_cast<const bool*>(data_)[i];
    if (kind_ == 1) return static_cast<const double*>(data_)[i];
    return static_cast<double>(static_cast<const float*>(data_)[i]);
  }
  int64_t whole(int64_t row, size_t entry) const {
    DROPOUT_CHECK(kind_ == 2, kOp, ": expected indices of int64");
    return static_cast<const int64_t*>(data_)[row * step_ + at_[entry]];
  }

 private:
  const void* data_;
  int kind_;
  int64_t step_;
  Sizes at_;
};

// Of some rows: for each entry of a row its first derivatives, then the second ones,
// a triangle row by row.
class Jets {
 public:
  Jets(size_t entries, size_t width)
      : entries_(entries), width_(width), size_(width + width * (width + 1) / 2),
        values_(static_cast<size_t>(kRows) * entries * size_) {}
  double* at(size_t row, size_t entry) {
    return &values_[(row * entries_ + entry) * size_];
  }
  size_t entries() const { return entries_; }
  size_t width() const { return width_; }
  size_t size() const { return size_; }
  void clear() { std::fill(values_.begin(), values_.end(), 0.0); }

 private:
  size_t entries_, width_, size_;
  Numbers values_;
};

}  // namespace dropout
