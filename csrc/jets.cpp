// Second derivatives of a loss of few outputs, a block for each sample, on the CPU:
// each entry of what its graph makes has a jet, its first and second derivatives in
// the outputs of its row, made of those it is computed of by the chain rule. Torch's
// way, two passes of autograd, takes longer than a small network's own.
#include <algorithm>
#include <cmath>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "jets.h"

namespace dropout {
namespace {

// Of one entry, or of what is made of several.
struct Jet {
  Lanes* values;
  Span span;
};

Jet jet(Jets& of, size_t entry) { return {of.at(entry), of.span(entry)}; }

// f(u) with the first and second derivatives of f.
void bend(const Jets& of, const Jet& u, const Lanes& first, const Lanes& second,
          Lanes* made) {
  const Lanes* x = u.values;
  for (size_t i = u.span.first; i < u.span.last; ++i) {
    made[i] += first * x[i];
    const Lanes bent = second * x[i];
    for (size_t j = i, p = of.second(i); j < u.span.last; ++j, ++p) {
      made[p] += first * x[p] + bent * x[j];
    }
  }
}

void add(const Jets& of, const Jet& u, const Lanes& factor, Lanes* made) {
  for (size_t i = u.span.first; i < u.span.last; ++i) {
    made[i] += factor * u.values[i];
    const size_t start = of.second(i), end = start + u.span.last - i;
    for (size_t p = start; p < end; ++p) made[p] += factor * u.values[p];
  }
}

// Second derivatives of a product besides those of its factors.
void cross(const Jets& of, const Jet& u, const Jet& v, const Lanes& factor,
           Lanes* made) {
  for (size_t i = u.span.first; i < u.span.last; ++i) {
    const Lanes x = factor * u.values[i];
    for (size_t j = v.span.first; j < v.span.last; ++j) {
      const size_t low = std::min(i, j), high = std::max(i, j);
      made[of.second(low) + high - low] += i == j ? 2 * x * v.values[j] : x * v.values[j];
    }
  }
}

struct Step {
  const Node& node;
  std::vector<Saved> saved;
  Places a, b;  // by entry, that of the first and of the second input
};

// Log-softmax, softmax and its logarithm: the mean and the covariance, under the
// softmax, of the jets of a fibre.
void softmaxes(const Step& step, int64_t first, Jets& from, Jets& made) {
  const size_t size = made.size();
  const int64_t kind = step.node.kind;
  const Fibres of(step.node.inside, step.node.dim);
  std::vector<Lanes> both(2 * size);
  Lanes *mean = both.data(), *logs = mean + size, s, top;
  const Lanes one = Lanes{} + 1.0;
  for (int64_t fibre = 0; fibre < of.outer * of.inner; ++fibre) {
    const int64_t start = fibre / of.inner * of.length * of.inner + fibre % of.inner;
    const auto entry = [&](int64_t c) {
      return static_cast<size_t>(start + c * of.inner);
    };
    const auto softmax = [&](int64_t c) {
      step.saved[0].read(first, entry(c), s);
      if (kind == kSoftmax) return;
      if (kind == kLogSumExp) {
        step.saved[1].read(first, static_cast<size_t>(fibre), top);
        s -= top;
      }
      for (size_t r = 0; r < kRows; ++r) s[r] = std::exp(s[r]);
    };
    const bool alone = kind == kLogSumExp;
    const Span span = made.span(alone ? static_cast<size_t>(fibre) : entry(0));
    std::fill(mean, mean + size, Lanes{});
    for (int64_t c = 0; c < of.length; ++c) {
      softmax(c);
      bend(made, jet(from, entry(c)), s, s, mean);
    }
    for (size_t i = span.first; i < span.last; ++i) {
      Lanes* bent = mean + made.second(i) - i;
      for (size_t j = i; j < span.last; ++j) bent[j] -= mean[i] * mean[j];
    }
    if (alone) {
      std::copy(mean, mean + size, made.at(static_cast<size_t>(fibre)));
      continue;
    }
    for (int64_t c = 0; c < of.length; ++c) {
      Lanes *out = made.at(entry(c)), *less = kind == kSoftmax ? logs : out;
      for (size_t i = 0; i < size; ++i) less[i] = -mean[i];
      add(made, jet(from, entry(c)), one, less);
      if (kind == kLogSoftmax) continue;
      softmax(c);
      bend(made, {logs, span}, s, s, out);
    }
  }
}

void binary(const Step& step, int64_t first, size_t e, Jets* a, Jets* b, Jets& made) {
  Lanes* out = made.at(e);
  const Jet u = a ? jet(*a, step.a[e]) : Jet{}, v = b ? jet(*b, step.b[e]) : Jet{};
  const Lanes one = Lanes{} + 1.0;
  Lanes x{}, y{};
  switch (step.node.kind) {
    case kChosen:
      return add(made, u, one, out);
    case kLinear:
      if (a) add(made, u, step.node.alpha * one, out);
      if (b) add(made, v, step.node.beta * one, out);
      return;
    case kTimes: {
      step.saved[0].read(first, e, x);
      step.saved[1].read(first, e, y);
      if (a) add(made, u, y, out);
      if (b) add(made, v, x, out);
      if (a && b) cross(made, u, v, one, out);
      return;
    }
    default: {  // kOver
      step.saved[0].read(first, e, x);
      y = 1 / x;
      if (a) add(made, u, y, out);
      if (!b) return;
      step.saved[1].read(first, e, x);
      x = x * y * y;
      bend(made, v, -x, 2 * x * y, out);
      if (a) cross(made, u, v, -y * y, out);
    }
  }
}

// First and second derivative of a function of one number, at what it has saved.
std::pair<double, double> slopes(const Node& node, double x) {
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  switch (node.kind) {
    case kExp: return {x, x};
    case kExpm1: return {x + 1, x + 1};
    case kLog: return {1 / x, -1 / (x * x)};
    case kLog1p: return {1 / (1 + x), -1 / ((1 + x) * (1 + x))};
    case kSqrt: return {0.5 / x, -0.25 / (x * x * x)};
    case kRsqrt: return {-0.5 * x * x * x, 0.75 * std::pow(x, 5)};
    case kReciprocal: return {-x * x, 2 * x * x * x};
    case kSigmoid: return {x * (1 - x), x * (1 - x) * (1 - 2 * x)};
    case kTanh: return {1 - x * x, -2 * x * (1 - x * x)};
    case kCosh: return {std::sinh(x), std::cosh(x)};
    case kSinh: return {std::cosh(x), std::sinh(x)};
    case kSin: return {std::cos(x), -std::sin(x)};
    case kCos: return {-std::sin(x), -std::cos(x)};
    case kAbs: return {x > 0 ? 1 : x < 0 ? -1 : x, 0};  // what is not a number stays
    case kClamp: return {x >= node.alpha && x <= node.beta ? 1 : 0, 0};
    case kRelu: return {x > 0 ? 1 : x <= 0 ? 0 : x, 0};
    case kLogSigmoid: return {sigmoid(-x), -sigmoid(x) * sigmoid(-x)};
    case kSoftplus: {
      const double z = x * node.alpha, s = sigmoid(z);
      if (z > node.beta) return {1, 0};
      return {s, z == node.beta ? 0 : node.alpha * s * (1 - s)};  // as by torch
    }
    default: {  // kPower
      const double p = node.alpha;
      const double first = p == 0 ? 0 : p * std::pow(x, p - 1);
      return {first, p == 0 || p == 1 ? 0 : p * (p - 1) * std::pow(x, p - 2)};
    }
  }
}

// What is chosen in each row by indices of its own.
void gather(const Step& step, int64_t first, Jets& from, Jets& made) {
  const Node& node = step.node;
  const Fibres of(node.inside, node.dim), to(node.sizes, node.dim);
  for (int64_t e = 0; e < node.count; ++e) {
    const int64_t outer = e / (to.length * to.inner), i = e % to.inner;
    Lanes* out = made.at(static_cast<size_t>(e));
    for (size_t r = 0; r < kRows; ++r) {
      const int64_t row = first + static_cast<int64_t>(r);
      const int64_t index = step.saved[0].whole(row, static_cast<size_t>(e));
      if (node.step != 0 && index == node.start) continue;
      const int64_t at = (outer * of.length + index) * of.inner + i;
      const bool there = at >= 0 && at < static_cast<int64_t>(from.entries());
      DROPOUT_CHECK(index >= 0 && index < of.length && there, kOp,
                    ": expected an index below ", of.length, ", got ", index);
      const Lanes* u = from.at(static_cast<size_t>(at));
      for (size_t p = 0; p < made.size(); ++p) out[p][r] = u[p][r];
    }
  }
}

void unary(const Step& step, int64_t first, size_t e, Jets& a, Jets& made) {
  Lanes one, two;
  step.saved[0].read(first, e, one);
  if (step.node.kind == kGiven) {
    step.saved[1].read(first, e, two);
  } else {
    for (size_t r = 0; r < kRows; ++r) {
      const auto [x, y] = slopes(step.node, one[r]);
      one[r] = x;
      two[r] = y;
    }
  }
  bend(made, jet(a, step.a[e]), one, two, made.at(e));
}

// What each entry of a node depends on, of any row.
void span(const Step& step, std::vector<Jets>& jets, Jets& made) {
  const Node& node = step.node;
  Jets* a = node.a < 0 ? nullptr : &jets[static_cast<size_t>(node.a)];
  Jets* b = node.b < 0 ? nullptr : &jets[static_cast<size_t>(node.b)];
  Span all{};
  for (size_t e = 0; joins(node) && e < a->entries(); ++e) all.join(a->span(e));
  for (size_t e = 0; e < made.entries(); ++e) {
    const bool sums = node.kind == kSummed || node.kind == kPlaced;
    if (node.kind == kOutputs) all = {e, e + 1};
    if (node.kind == kOutputs || joins(node)) made.span(e) = all;
    else if (a && !sums) made.span(e).join(a->span(step.a[e]));
    if (b) made.span(e).join(b->span(step.b[e]));
  }
  if (node.kind != kSummed && node.kind != kPlaced) return;
  for (size_t e = 0; e < a->entries(); ++e) made.span(step.a[e]).join(a->span(e));
}

// Makes the jets of a node, of the rows from `first` on.
void run(const Step& step, int64_t first, std::vector<Jets>& jets, Jets& made) {
  const Node& node = step.node;
  made.clear();
  Jets* a = node.a < 0 ? nullptr : &jets[static_cast<size_t>(node.a)];
  Jets* b = node.b < 0 ? nullptr : &jets[static_cast<size_t>(node.b)];
  const Lanes one = Lanes{} + 1.0;
  if (node.kind == kOutputs) {
    for (size_t e = 0; e < made.entries(); ++e) made.at(e)[e] = one;
  } else if (node.kind == kSummed || node.kind == kPlaced) {
    const Lanes factor = node.kind == kSummed ? node.alpha * one : one;
    for (size_t e = 0; e < a->entries(); ++e) {
      add(made, jet(*a, e), factor, made.at(step.a[e]));
    }
    for (size_t e = 0; b && e < made.entries(); ++e) {
      add(made, jet(*b, step.b[e]), one, made.at(e));
    }
  } else if (node.kind >= kLogSoftmax && node.kind <= kLogSumExp) {
    softmaxes(step, first, *a, made);
  } else if (node.kind == kGathered) {
    gather(step, first, *a, made);
  } else {
    for (size_t e = 0; e < made.entries(); ++e) {
      if (node.kind >= kExp) unary(step, first, e, *a, made);
      else binary(step, first, e, a, b, made);
    }
  }
}

template <class T>
void write(Jets& found, int64_t first, int64_t n, T* blocks) {
  const int64_t k = static_cast<int64_t>(found.width());
  const Lanes* h = found.at(0) + k;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = i; j < k; ++j, ++h) {
      for (int64_t row = first; row < std::min<int64_t>(first + kRows, n); ++row) {
        const T value = static_cast<T>((*h)[row - first]);
        blocks[(i * n + row) * k + j] = blocks[(j * n + row) * k + i] = value;
      }
    }
  }
}

void loss_blocks(StableIValue* stack, uint64_t, uint64_t) {
  Tensor outputs(from_stack<AtenTensorHandle>(stack[0]));
  const List program(stack[1]), numbers(stack[2]), given(stack[3]);
  const bool wide = is_double(kOp, outputs);
  DROPOUT_CHECK(outputs.dim() > 0, kOp, ": expected `outputs` with rows, got a number");
  const int64_t n = outputs.sizes()[0];
  const int64_t k = n ? outputs.numel() / n : 0;
  const std::vector<Node> nodes = read_nodes(program, numbers);
  std::vector<Tensor> values;
  for (size_t i = 0; i < given.size(); ++i) {
    values.emplace_back(given.at<AtenTensorHandle>(i));
    values.back().make_contiguous();
  }
  DROPOUT_CHECK(nodes.front().count == k && nodes.back().count == 1,
                kOp, ": expected a loss of ", k, " outputs, got ",
                nodes.back().count, " of ", nodes.front().count);
  std::vector<Step> steps;
  std::vector<Jets> jets;
  for (const Node& node : nodes) {
    Step step{node, {}, {}, {}};
    for (size_t i = 0; i < node.values.size(); ++i) {
      const Sizes& sizes = node.kind == kLogSumExp && i == 0 ? node.inside : node.sizes;
      const size_t place = static_cast<size_t>(node.values[i]);
      DROPOUT_CHECK(place < values.size(), kOp, ": expected ", place + 1,
                    " values, got ", values.size());
      step.saved.emplace_back(values[place], n, sizes);
    }
    if (joins(node)) {
      check_joined(node);
    } else if (node.a >= 0) {
      step.a = entries_of(node, nodes[static_cast<size_t>(node.a)]);
    }
    if (node.b >= 0) {
      step.b = repeated(nodes[static_cast<size_t>(node.b)].sizes, node.sizes);
    }
    jets.emplace_back(static_cast<size_t>(node.count), static_cast<size_t>(k));
    span(step, jets, jets.back());
    steps.push_back(std::move(step));
  }
  const int64_t sizes[] = {k, n, k};
  Tensor blocks = Tensor::empty(3, sizes, outputs.dtype(), outputs.device());
  for (int64_t first = 0; first < n; first += kRows) {
    for (size_t i = 0; i < steps.size(); ++i) run(steps[i], first, jets, jets[i]);
    if (wide) write(jets.back(), first, n, static_cast<double*>(blocks.data()));
    else write(jets.back(), first, n, static_cast<float*>(blocks.data()));
  }
  stack[0] = to_stack(std::move(blocks));
}

}  // namespace
}  // namespace dropout

STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CPU, library) {
  library.impl("loss_blocks", &dropout::loss_blocks);
}
