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

// f(u) with the first and second derivatives of f.
void bend(const Jets& of, const double* u, double first, double second, double* made) {
  const size_t k = of.width();
  for (size_t i = 0; i < of.size(); ++i) made[i] += first * u[i];
  if (second == 0) return;
  for (size_t i = 0, p = k; i < k; ++i) {
    for (size_t j = i; j < k; ++j) made[p++] += second * u[i] * u[j];
  }
}

// Second derivatives of a product besides those of its factors.
void cross(const Jets& of, const double* u, const double* v, double factor,
           double* made) {
  const size_t k = of.width();
  for (size_t i = 0, p = k; i < k; ++i) {
    for (size_t j = i; j < k; ++j) made[p++] += factor * (u[i] * v[j] + u[j] * v[i]);
  }
}

struct Step {
  const Node& node;
  std::vector<Saved> saved;
  Sizes a, b;  // by entry, that of the first and of the second input
};

// Log-softmax, softmax and its logarithm: the mean and the covariance, under the
// softmax, of the jets of a fibre.
void softmaxes(const Step& step, const Fibres& of, int64_t row, size_t r, Jets& from,
               Jets& made) {
  const size_t size = made.size(), k = made.width();
  const int64_t kind = step.node.kind;
  Numbers mean(size);
  for (int64_t fibre = 0; fibre < of.outer * of.inner; ++fibre) {
    const int64_t first = fibre / of.inner * of.length * of.inner + fibre % of.inner;
    const auto entry = [&](int64_t c) {
      return static_cast<size_t>(first + c * of.inner);
    };
    const auto softmax = [&](int64_t c) {
      if (kind == kLogSumExp) {
        const double x = step.saved[0](row, entry(c));
        return std::exp(x - step.saved[1](row, static_cast<size_t>(fibre)));
      }
      const double x = step.saved[0](row, entry(c));
      return kind == kSoftmax ? x : std::exp(x);
    };
    std::fill(mean.begin(), mean.end(), 0.0);
    for (int64_t c = 0; c < of.length; ++c) {
      const double s = softmax(c);
      bend(made, from.at(r, entry(c)), s, s, mean.data());
    }
    for (size_t i = 0, p = k; i < k; ++i) {
      for (size_t j = i; j < k; ++j) mean[p++] -= mean[i] * mean[j];
    }
    if (kind == kLogSumExp) {
      std::copy(mean.begin(), mean.end(), made.at(r, static_cast<size_t>(fibre)));
      continue;
    }
    Numbers logs(size);
    for (int64_t c = 0; c < of.length; ++c) {
      const double* u = from.at(r, entry(c));
      for (size_t i = 0; i < size; ++i) logs[i] = u[i] - mean[i];
      const double s = kind == kSoftmax ? softmax(c) : 0;
      if (kind == kSoftmax) bend(made, logs.data(), s, s, made.at(r, entry(c)));
      else std::copy(logs.begin(), logs.end(), made.at(r, entry(c)));
    }
  }
}

void binary(const Step& step, int64_t row, size_t r, size_t e, Jets* a, Jets* b,
            Jets& made) {
  double* out = made.at(r, e);
  const double* u = a ? a->at(r, static_cast<size_t>(step.a[e])) : nullptr;
  const double* v = b ? b->at(r, static_cast<size_t>(step.b[e])) : nullptr;
  switch (step.node.kind) {
    case kChosen:
      return bend(made, u, 1, 0, out);
    case kLinear:
      if (u) bend(made, u, step.node.alpha, 0, out);
      if (v) bend(made, v, step.node.beta, 0, out);
      return;
    case kTimes: {
      if (u) bend(made, u, step.saved[1](row, e), 0, out);
      if (v) bend(made, v, step.saved[0](row, e), 0, out);
      if (u && v) cross(made, u, v, 1, out);
      return;
    }
    default: {  // kOver
      const double y = 1 / step.saved[0](row, e);
      if (u) bend(made, u, y, 0, out);
      if (!v) return;
      const double x = step.saved[1](row, e) * y * y;
      bend(made, v, -x, 2 * x * y, out);
      if (u) cross(made, u, v, -y * y, out);
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
      return {s, node.alpha * s * (1 - s)};
    }
    default: {  // kPower
      const double p = node.alpha;
      const double first = p == 0 ? 0 : p * std::pow(x, p - 1);
      return {first, p == 0 || p == 1 ? 0 : p * (p - 1) * std::pow(x, p - 2)};
    }
  }
}

void run(const Step& step, int64_t first, size_t rows, std::vector<Jets>& jets,
         Jets& made) {
  const Node& node = step.node;
  made.clear();
  Jets* a = node.a < 0 ? nullptr : &jets[static_cast<size_t>(node.a)];
  Jets* b = node.b < 0 ? nullptr : &jets[static_cast<size_t>(node.b)];
  for (size_t r = 0; r < rows; ++r) {
    const int64_t row = first + static_cast<int64_t>(r);
    if (node.kind == kOutputs) {
      for (size_t e = 0; e < made.entries(); ++e) made.at(r, e)[e] = 1;
    } else if (node.kind == kSummed) {
      for (size_t e = 0; e < a->entries(); ++e) {
        const size_t to = static_cast<size_t>(step.a[e]);
        bend(made, a->at(r, e), node.alpha, 0, made.at(r, to));
      }
    } else if (node.kind >= kLogSoftmax && node.kind <= kLogSumExp) {
      softmaxes(step, Fibres(node.inside, node.dim), row, r, *a, made);
    } else if (node.kind == kGathered) {
      const Fibres from(node.inside, node.dim), to(node.sizes, node.dim);
      for (int64_t e = 0; e < static_cast<int64_t>(made.entries()); ++e) {
        const int64_t index = step.saved[0].whole(row, static_cast<size_t>(e));
        const int64_t outer = e / (to.length * to.inner), i = e % to.inner;
        const int64_t at = (outer * from.length + index) * from.inner + i;
        const bool there = at >= 0 && at < static_cast<int64_t>(a->entries());
        DROPOUT_CHECK(index >= 0 && index < from.length && there, kOp,
                      ": expected an index below ", from.length, ", got ", index);
        bend(made, a->at(r, static_cast<size_t>(at)), 1, 0,
             made.at(r, static_cast<size_t>(e)));
      }
    } else {
      for (size_t e = 0; e < made.entries(); ++e) {
        if (node.kind >= kExp) {
          const double x = step.saved[0](row, e);
          const auto [one, two] = node.kind == kGiven
                                      ? std::pair{x, step.saved[1](row, e)}
                                      : slopes(node, x);
          bend(made, a->at(r, static_cast<size_t>(step.a[e])), one, two, made.at(r, e));
        } else {
          binary(step, row, r, e, a, b, made);
        }
      }
    }
  }
}

template <class T>
void write(const Jets& like, Jets& found, int64_t first, size_t rows, int64_t count,
           T* blocks) {
  const size_t k = like.width();
  for (size_t r = 0; r < rows; ++r) {
    const double* h = found.at(r, 0) + k;
    const size_t row = static_cast<size_t>(first) + r, n = static_cast<size_t>(count);
    for (size_t i = 0; i < k; ++i) {
      for (size_t j = i; j < k; ++j, ++h) {
        blocks[(i * n + row) * k + j] = static_cast<T>(*h);
        blocks[(j * n + row) * k + i] = static_cast<T>(*h);
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
  DROPOUT_CHECK(product(nodes.front().sizes) == k && product(nodes.back().sizes) == 1,
                kOp, ": expected a loss of ", k, " outputs, got ",
                product(nodes.back().sizes), " of ", product(nodes.front().sizes));
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
    const int64_t entries = node.kind == kOutputs ? k : product(node.sizes);
    jets.emplace_back(static_cast<size_t>(entries), static_cast<size_t>(k));
    steps.push_back(std::move(step));
  }
  const int64_t sizes[] = {k, n, k};
  Tensor blocks = Tensor::empty(3, sizes, outputs.dtype(), outputs.device());
  for (int64_t first = 0; first < n; first += kRows) {
    const size_t rows = static_cast<size_t>(std::min(kRows, n - first));
    for (size_t i = 0; i < steps.size(); ++i) run(steps[i], first, rows, jets, jets[i]);
    Jets& last = jets.back();
    if (wide) write(last, last, first, rows, n, static_cast<double*>(blocks.data()));
    else write(last, last, first, rows, n, static_cast<float*>(blocks.data()));
  }
  stack[0] = to_stack(std::move(blocks));
}

}  // namespace
}  // namespace dropout

STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CPU, library) {
  library.impl("loss_blocks", &dropout::loss_blocks);
}
