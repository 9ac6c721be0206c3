// What `loss_blocks` is told of a loss: the nodes of its graph, each after those that
// it is made of.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "lanes.h"

namespace dropout {

// As `torch_dropout_ir/jet_kinds.py` numbers them.
enum Kind : int64_t {
  kOutputs, kLinear, kTimes, kOver, kChosen, kPlaced, kSummed, kGathered,
  kLogSoftmax, kSoftmax, kLogSumExp,
  kExp, kExpm1, kLog, kLog1p, kSqrt, kRsqrt, kReciprocal, kSigmoid, kTanh, kCosh, kSinh,
  kSin, kCos, kAbs, kRelu, kClamp, kLogSigmoid, kSoftplus, kPower, kGiven, kKinds
};

constexpr const char* kOp = "loss_blocks";
using Sizes = std::vector<int64_t>;

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
  Sizes values;   // what it has saved, by number
  Sizes sizes;    // of a row of what it makes
  int64_t count;  // of the entries of that
  Sizes inside;   // of its first input
};

// Whether it is made of all entries along a dimension of its first input.
inline bool joins(const Node& node) {
  return node.kind >= kGathered && node.kind <= kLogSumExp;
}

// How many values it needs, of those that it may have saved.
inline size_t needed(const Node& node) {
  if (node.kind < kTimes || (node.kind >= kChosen && node.kind <= kSummed)) return 0;
  const bool both =
      node.kind == kTimes || node.kind == kLogSumExp || node.kind == kGiven;
  return both || (node.kind == kOver && node.b >= 0) ? 2 : 1;
}

// Entries that are joined: those of one fibre along a dimension.
struct Fibres {
  int64_t outer, length, inner;
  Fibres(const Sizes& sizes, int64_t dim)
      : outer(product({sizes.begin(), sizes.begin() + dim})),
        length(sizes[static_cast<size_t>(dim)]),
        inner(product({sizes.begin() + dim + 1, sizes.end()})) {}
};

// By entry, where that is elsewhere; nothing where it is in the same place.
class Places {
 public:
  Places() = default;
  explicit Places(Sizes at) : at_(std::move(at)) {}
  size_t operator[](size_t entry) const {
    return at_.empty() ? entry : static_cast<size_t>(at_[entry]);
  }

 private:
  Sizes at_;
};

// Where the entries of a tensor are in one that is repeated to `sizes`, aligned right.
inline Places repeated(const Sizes& own, const Sizes& sizes) {
  const int64_t count = product(sizes);
  if (product(own) == count) return {};
  DROPOUT_CHECK(own.size() <= sizes.size(), kOp, ": expected no more than ",
                sizes.size(), " dimensions of a row, got ", own.size());
  Sizes found(static_cast<size_t>(count));
  int64_t stride = 1, inner = 1;
  for (size_t d = 1; d <= own.size(); ++d) {
    const int64_t size = sizes[sizes.size() - d], there = own[own.size() - d];
    DROPOUT_CHECK(there == 1 || there == size, kOp, ": expected ", size,
                  " entries or one, got ", there);
    for (int64_t e = 0; there != 1 && e < count; ++e) {
      found[static_cast<size_t>(e)] += e / inner % size * stride;
    }
    stride *= there;
    inner *= size;
  }
  return Places(std::move(found));
}

// Where the entries of a part of `whole` are, from `start` by `step` along a dimension.
inline Places part_of(const Node& node, const Sizes& whole, int64_t entries) {
  const int64_t dims = static_cast<int64_t>(whole.size());
  DROPOUT_CHECK(node.dim >= 0 && node.dim < dims, kOp,
                ": expected a dimension below ", dims, ", got ", node.dim);
  const Fibres of(whole, node.dim);
  const int64_t each = of.outer * of.inner, count = each != 0 ? entries / each : 0;
  DROPOUT_CHECK(count * each == entries, kOp, ": expected ", count * each,
                " entries, got ", entries);
  Sizes found;
  for (int64_t o = 0; o < of.outer; ++o) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t there = node.start + t * node.step;
      DROPOUT_CHECK(there >= 0 && there < of.length, kOp,
                    ": expected an entry below ", of.length, ", got ", there);
      for (int64_t i = 0; i < of.inner; ++i) {
        found.push_back((o * of.length + there) * of.inner + i);
      }
    }
  }
  return Places(std::move(found));
}

// By entry of a node that of its first input; of a sum, and of what is put into a larger
// one, the other way round.
inline Places entries_of(const Node& node, const Node& from) {
  if (node.kind == kChosen) return part_of(node, from.sizes, node.count);
  if (node.kind == kPlaced) return part_of(node, node.sizes, from.count);
  if (node.kind != kSummed) return repeated(from.sizes, node.sizes);
  // `dim` has a bit for each dimension that goes.
  Sizes left = from.sizes;
  for (size_t d = 0; d < left.size(); ++d) {
    if (node.dim >> d & 1) left[d] = 1;
  }
  DROPOUT_CHECK(product(left) == node.count, kOp, ": expected ", product(left),
                " sums, got ", node.count);
  return repeated(left, from.sizes);
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
    const int64_t count = next(), left = static_cast<int64_t>(program.size() - at);
    DROPOUT_CHECK(count >= 0 && count <= left, kOp, ": expected a longer program than ",
                  program.size(), " numbers, for ", count, " more");
    Sizes found(static_cast<size_t>(count));
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
    node.count = product(node.sizes);
    nodes.push_back(std::move(node));
  }
  DROPOUT_CHECK(!nodes.empty(), kOp, ": expected a program, got none");
  return nodes;
}

// Whether what is made along fibres has as many as its node says.
inline void check_joined(const Node& node) {
  const Fibres of(node.inside, node.dim);
  const bool gathered = node.kind == kGathered;
  DROPOUT_CHECK(!gathered || node.sizes.size() == node.inside.size(), kOp,
                ": expected ", node.inside.size(), " dimensions of a row, got ",
                node.sizes.size());
  DROPOUT_CHECK(node.kind != kLogSumExp || node.count == of.outer * of.inner,
                kOp, ": expected ", of.outer * of.inner, " entries, got ",
                node.count);
}

// A tensor that a node has saved, repeated to the node's shape.
class Saved {
 public:
  Saved(const Tensor& x, int64_t rows, const Sizes& sizes)
      : data_(x.data()), last_(rows - 1) {
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
  // An entry of the rows from `first` on; past the last one that again.
  void read(int64_t first, size_t entry, Lanes& found) const {
    if (kind_ == 0) return read<float>(first, entry, found);
    if (kind_ == 1) return read<double>(first, entry, found);
    if (kind_ == 2) return read<int64_t>(first, entry, found);
    read<bool>(first, entry, found);
  }
  int64_t whole(int64_t row, size_t entry) const {
    DROPOUT_CHECK(kind_ == 2, kOp, ": expected indices of int64");
    return at<int64_t>(row, entry);
  }

 private:
  template <class T>
  T at(int64_t row, size_t entry) const {
    const int64_t i = std::min(row, last_) * step_ + static_cast<int64_t>(at_[entry]);
    return static_cast<const T*>(data_)[i];
  }
  template <class T>
  void read(int64_t first, size_t entry, Lanes& found) const {
    for (size_t r = 0; r < kRows; ++r) {
      const int64_t row = first + static_cast<int64_t>(r);
      found[r] = static_cast<double>(at<T>(row, entry));
    }
  }

  const void* data_;
  int64_t last_, step_;
  int kind_;
  Places at_;
};

// Outputs that an entry depends on, from the first to behind the last.
struct Span {
  size_t first, last;
  void join(const Span& other) {
    if (other.first >= other.last) return;
    *this = first >= last ? other
                          : Span{std::min(first, other.first), std::max(last, other.last)};
  }
};

// Of some rows, so that what is between stays in the cache: for each entry of a row its
// first derivatives, then the second ones, a triangle row by row. Outside an entry's
// span they are 0.
class Jets {
 public:
  Jets(size_t entries, size_t width)
      : width_(width), size_(width + width * (width + 1) / 2), spans_(entries),
        values_(entries * size_) {}
  Lanes* at(size_t entry) { return &values_[entry * size_]; }
  Span& span(size_t entry) { return spans_[entry]; }
  // Where the second derivatives in output `i` begin, first that in itself.
  size_t second(size_t i) const { return width_ + i * (2 * width_ + 1 - i) / 2; }
  size_t entries() const { return spans_.size(); }
  size_t width() const { return width_; }
  size_t size() const { return size_; }
  void clear() { std::fill(values_.begin(), values_.end(), Lanes{}); }

 private:
  size_t width_, size_;
  std::vector<Span> spans_;
  std::vector<Lanes> values_;
};

}  // namespace dropout
