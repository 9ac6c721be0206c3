// Random roots of the Hessian of a loss in its outputs, on the CPU: of a diagonal, of a
// softmax with a diagonal, and of a block for each sample. Of few outputs a dozen of
// torch's own operations take longer than a network's pass back.
#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "eigenvectors.h"

namespace dropout {
namespace {

using Numbers = std::vector<double>;

template <class T>
Numbers read(const Tensor& x) {
  const T* data = static_cast<const T*>(x.data());
  return Numbers(data, data + x.numel());
}

Numbers numbers(const char* op, Tensor& x) {
  const bool wide = is_double(op, x);
  x.make_contiguous();
  return wide ? read<double>(x) : read<float>(x);
}

Tensor tensor_of(const Numbers& values, int64_t dim, const int64_t* sizes,
                 int32_t dtype) {
  Tensor found =
      Tensor::empty(dim, sizes, dtype, Device{aoti_torch_device_type_cpu(), 0});
  if (dtype == aoti_torch_dtype_float64()) {
    std::copy(values.begin(), values.end(), static_cast<double*>(found.data()));
  } else {
    std::transform(values.begin(), values.end(), static_cast<float*>(found.data()),
                   [](double x) { return static_cast<float>(x); });
  }
  return found;
}

// What `torch.randn` draws, of which the signs count.
Numbers drawn(const char* op, int64_t dim, const int64_t* sizes, int32_t dtype) {
  int32_t kind = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  DROPOUT_TORCH(aoti_torch_cpu_randn(sizes, dim, &dtype, nullptr, &kind, 0, nullptr,
                                     &handle));
  Tensor found(handle);
  return numbers(op, found);
}

bool has_sign(const Numbers& values, double sign) {
  double least = std::numeric_limits<double>::infinity(), most = -least;
  for (const double x : values) {
    if (std::isnan(x)) return sign > 0;  // to be found in the result
    least = std::min(least, x);
    most = std::max(most, x);
  }
  if (sign > 0) return most > 0;
  return least < 0 && least <= -1e-6 * std::max(most, -least);  // else rounding
}

// Gives back the roots of the part of each sign, with nothing in the place of none:
// square roots of the values with random signs, which `turn` makes outputs of.
template <class Turn>
void give_roots(const char* op, StableIValue* stack, const Numbers& values, int64_t dim,
                const int64_t* sizes, int32_t dtype, const Turn& turn) {
  const Numbers signs = drawn(op, dim, sizes, dtype);
  const int64_t none = 0;
  StableListHandle roots;
  DROPOUT_TORCH(torch_new_list_reserve_size(2, &roots));
  for (const double sign : {1.0, -1.0}) {
    const bool there = has_sign(values, sign);
    Numbers root(there ? values.size() : 0);
    for (size_t i = 0; i < root.size(); ++i) {
      const double part = sign * values[i];
      root[i] = part <= 0 ? 0 : std::copysign(std::sqrt(part), signs[i]);
    }
    if (there) turn(root);
    Tensor found = tensor_of(root, there ? dim : 1, there ? sizes : &none, dtype);
    DROPOUT_TORCH(torch_list_push_back(roots, to_stack(std::move(found))));
  }
  stack[0] = bit_cast<StableIValue>(roots);
}

void diagonal_roots(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "diagonal_roots";
  Tensor diagonal(from_stack<AtenTensorHandle>(stack[0]));
  const Numbers values = numbers(op, diagonal);
  give_roots(op, stack, values, diagonal.dim(), diagonal.sizes(), diagonal.dtype(),
             [](Numbers&) {});
}

void softmax_roots(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "softmax_roots";
  Tensor logs(from_stack<AtenTensorHandle>(stack[0]));
  Tensor slope(from_optional(stack[1]));
  Tensor bend(from_optional(stack[2]));
  const int64_t classes = from_stack<int64_t>(stack[3]);
  const int64_t dim = logs.dim(), numel = logs.numel();
  DROPOUT_CHECK(classes >= 0 && classes < dim, op, ": expected a dimension below ", dim,
                ", got ", classes);
  const bool sloped = slope.get() != nullptr, bent = bend.get() != nullptr;
  const int64_t slopes = sloped ? slope.numel() : numel;
  DROPOUT_CHECK(slopes == numel && (!bent || bend.numel() == numel), op,
                ": expected as many slopes and bends as log-probabilities, ", numel,
                ", got ", slopes, bent ? " and " : "",
                bent ? std::to_string(bend.numel()) : "");
  Numbers s = numbers(op, logs), values = sloped ? numbers(op, slope) : Numbers();
  const Numbers more = bent ? numbers(op, bend) : Numbers();
  const size_t count = static_cast<size_t>(logs.sizes()[classes]);
  size_t inner = 1;
  for (int64_t d = classes + 1; d < dim; ++d) {
    inner *= static_cast<size_t>(logs.sizes()[d]);
  }
  // What each entry makes of the sum over its classes.
  const auto by_row = [&](Numbers& x, const auto& make) {
    for (size_t outer = 0; outer < x.size(); outer += count * inner) {
      for (size_t first = outer; first < outer + inner; ++first) {
        double sum = 0;
        for (size_t c = 0; c < count; ++c) sum += x[first + c * inner];
        for (size_t c = 0, i = first; c < count; ++c, i += inner) x[i] = make(i, sum);
      }
    }
  };
  for (double& x : s) x = std::exp(x);
  by_row(values, [&](size_t i, double sum) { return -sum * s[i]; });
  if (!sloped) values = s;  // of mass one
  for (size_t i = 0; i < more.size(); ++i) values[i] += more[i];
  give_roots(op, stack, values, dim, logs.sizes(), logs.dtype(), [&](Numbers& root) {
    by_row(root, [&](size_t i, double sum) { return root[i] - s[i] * sum; });
  });
}

void block_roots(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "block_roots";
  constexpr size_t kFew = 4;
  Tensor columns(from_stack<AtenTensorHandle>(stack[0]));
  DROPOUT_CHECK(columns.dim() == 3 && columns.sizes()[0] == columns.sizes()[2], op,
                ": expected `columns` of shape [K, n, K], got ", columns.dim(),
                " dimensions and ", columns.numel(), " elements");
  const Numbers given = numbers(op, columns);
  const int64_t* sizes = columns.sizes() + 1;
  const size_t n = static_cast<size_t>(sizes[0]), k = static_cast<size_t>(sizes[1]);
  const double rounding = is_double(op, columns) ? 0x1p-52 : 0x1p-23;
  Numbers values(n * k);
  std::vector<Lanes> vectors((n + kRows - 1) / kRows * k * k), block((k + 2) * k);
  Lanes *own = block.data() + k * k, *beside = own + k;
  for (size_t first = 0; first < n; first += kRows) {
    const size_t rows = std::min(kRows, n - first);
    Lanes whole{}, most{}, unit;  // `whole` is 0 where all is finite
    for (size_t p = 0; p < k; ++p) {
      for (size_t q = 0; q < k; ++q) {
        Lanes& entry = block[p * k + q] = Lanes{};
        for (size_t r = 0; r < rows; ++r) {
          const size_t i = first + r;
          entry[r] = (given[(p * n + i) * k + q] + given[(q * n + i) * k + p]) / 2;
          most[r] = std::max(most[r], std::abs(entry[r]));
        }
        whole += entry - entry;
      }
    }
    for (size_t r = 0; r < kRows; ++r) {
      unit[r] = std::exp2(std::clamp(std::ilogb(most[r]), -1000, 1000));
    }
    for (size_t i = 0; i < k * k; ++i) block[i] /= unit;
    Lanes* axes = &vectors[first / kRows * k * k];
    // Of few outputs eigenvectors spread less, and take no longer.
    const bool apart = k > kFew && factorize(block.data(), axes, own, k, rounding);
    if (!apart) {
      diagonalize(block.data(), axes, own, beside, k);
    }
    for (size_t c = 0; c < k; ++c) {
      const Lanes found = own[c] * unit + whole;
      for (size_t r = 0; r < rows; ++r) values[(first + r) * k + c] = found[r];
    }
  }
  give_roots(op, stack, values, 2, sizes, columns.dtype(), [&](Numbers& root) {
    Numbers turned(root.size());
    for (size_t e = 0; e < root.size(); ++e) {
      const size_t i = e / k;
      const Lanes* axis = &vectors[(i / kRows * k + e % k) * k];
      for (size_t c = 0; c < k; ++c) turned[i * k + c] += axis[c][i % kRows] * root[e];
    }
    root.swap(turned);
  });
}

}  // namespace
}  // namespace dropout

STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CPU, library) {
  library.impl("diagonal_roots", &dropout::diagonal_roots);
  library.impl("softmax_roots", &dropout::softmax_roots);
  library.impl("block_roots", &dropout::block_roots);
}
