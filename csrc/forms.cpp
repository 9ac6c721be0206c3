// The sums of small passes, on the CPU: there a dozen of torch's own operations, each
// on a few thousand numbers, take longer than the passes do.
#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace dropout {
namespace {

// `[rows, units, shared]`, one after the other; several lanes, for the vector units.
template <class T>
double sum_of_squares(const T* x, const T* g, int64_t units, int64_t shared) {
  constexpr int64_t kLanes = 16;
  T lanes[kLanes] = {};
  if (shared == 1) {
    int64_t i = 0;
    for (; i + kLanes <= units; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        const T product = x[i + k] * g[i + k];
        lanes[k] += product * product;
      }
    }
    for (; i < units; ++i) {
      const T product = x[i] * g[i];
      lanes[i % kLanes] += product * product;
    }
  } else {
    for (int64_t i = 0; i < units; ++i, x += shared, g += shared) {
      T sum = 0;
      for (int64_t k = 0; k < shared; ++k) sum += x[k] * g[k];
      lanes[i % kLanes] += sum * sum;
    }
  }
  double total = 0;
  for (const T lane : lanes) total += static_cast<double>(lane);
  return total;
}

std::vector<double> form_rows(const Tensor& x, const Tensor& g, double factor,
                              int64_t rows, int64_t units, bool wide) {
  std::vector<double> found(static_cast<size_t>(rows));
  const int64_t count = rows * units == 0 ? 0 : x.numel() / rows;
  const int64_t shared = count == 0 ? 0 : count / units;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * count;
    const double sum =
        wide ? sum_of_squares(static_cast<const double*>(x.data()) + at,
                              static_cast<const double*>(g.data()) + at, units, shared)
             : sum_of_squares(static_cast<const float*>(x.data()) + at,
                              static_cast<const float*>(g.data()) + at, units, shared);
    found[static_cast<size_t>(i)] = factor * sum;
  }
  return found;
}

// What a sample adds, site by site; nothing where rows do not tell two samples apart.
std::vector<std::vector<double>> by_sample(const std::vector<std::vector<double>>& forms,
                                           const std::vector<size_t>& sites,
                                           size_t count) {
  size_t samples = forms[0].size();
  for (const auto& rows : forms) samples = std::min(samples, rows.size());
  if (samples < 2) return {};
  std::vector<std::vector<double>> own(count, std::vector<double>(samples));
  for (size_t use = 0; use < forms.size(); ++use) {
    const std::vector<double>& rows = forms[use];
    if (rows.size() % samples != 0) return {};
    const size_t each = rows.size() / samples;
    for (size_t i = 0; i < rows.size(); ++i) own[sites[use]][i / each] += rows[i];
  }
  return own;
}

// The standard error of a sum over samples.
double standard_error(const std::vector<double>& own) {
  const double count = static_cast<double>(own.size());
  double mean = 0, squares = 0;
  for (const double x : own) mean += x / count;
  for (const double x : own) squares += (x - mean) * (x - mean);
  return std::sqrt(count * squares / (count - 1));
}

Tensor scalar(double value, bool wide) {
  Tensor found = Tensor::empty(
      0, nullptr, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      Device{aoti_torch_device_type_cpu(), 0});
  if (wide) {
    *static_cast<double*>(found.data()) = value;
  } else {
    *static_cast<float*>(found.data()) = static_cast<float>(value);
  }
  return found;
}

std::vector<size_t> site_numbers(const char* op, const List& given, size_t uses) {
  std::vector<size_t> sites(given.size());
  for (size_t i = 0; i < sites.size(); ++i) {
    const int64_t site = given.at<int64_t>(i);
    DROPOUT_CHECK(site >= 0 && site < static_cast<int64_t>(uses), op, ": expected the ",
                  uses, " uses to have sites below ", uses, ", got ", site);
    sites[i] = static_cast<size_t>(site);
  }
  return sites;
}

// Sum, standard error, the sum of each site, and the standard error of each.
std::vector<double> sums_of_sites(const std::vector<std::vector<double>>& forms,
                                  const std::vector<size_t>& sites) {
  const size_t count = *std::max_element(sites.begin(), sites.end()) + 1;
  std::vector<double> found(2 + 2 * count);
  for (size_t use = 0; use < forms.size(); ++use) {
    for (const double form : forms[use]) found[2 + sites[use]] += form;
  }
  for (size_t site = 0; site < count; ++site) found[0] += found[2 + site];
  const std::vector<std::vector<double>> own = by_sample(forms, sites, count);
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> all(own.empty() ? 0 : own[0].size());
  for (size_t site = 0; site < count; ++site) {
    found[2 + count + site] = own.empty() ? kNone : standard_error(own[site]);
    for (size_t i = 0; i < all.size(); ++i) all[i] += own[site][i];
  }
  found[1] = own.empty() ? kNone : standard_error(all);
  return found;
}

void form_sums(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "form_sums";
  const List inputs(stack[0]), gradients(stack[1]), factors(stack[2]);
  const List rows(stack[3]), units(stack[4]), numbers(stack[5]);
  const size_t uses = inputs.size();
  DROPOUT_CHECK(uses > 0 && gradients.size() == uses && factors.size() == uses &&
                    rows.size() == uses && units.size() == uses &&
                    numbers.size() == uses,
                op, ": expected lists of one length above 0, got ", uses, " inputs, ",
                gradients.size(), " gradients, ", factors.size(), " factors, ",
                rows.size(), " rows, ", units.size(), " units and ", numbers.size(),
                " sites");
  const std::vector<size_t> sites = site_numbers(op, numbers, uses);
  std::vector<std::vector<double>> forms;
  bool wide = false;
  for (size_t i = 0; i < uses; ++i) {
    Tensor x(inputs.at<AtenTensorHandle>(i)), g(gradients.at<AtenTensorHandle>(i));
    if (i == 0) wide = is_double(op, x);
    DROPOUT_CHECK(is_double(op, x) == wide && is_double(op, g) == wide, op,
                  ": expected inputs and gradients of one dtype");
    const int64_t n = rows.at<int64_t>(i), k = units.at<int64_t>(i);
    DROPOUT_CHECK(n >= 0 && k >= 0 && x.numel() == g.numel() &&
                      (n * k == 0 ? x.numel() == 0 : x.numel() % (n * k) == 0),
                  op, ": expected input ", i, " and its gradient to have ", n,
                  " rows of ", k, " units, got ", x.numel(), " and ", g.numel(),
                  " elements");
    x.make_contiguous();
    g.make_contiguous();
    forms.push_back(form_rows(x, g, factors.at<double>(i), n, k, wide));
  }
  const std::vector<double> found = sums_of_sites(forms, sites);
  StableListHandle sums;
  DROPOUT_TORCH(torch_new_list_reserve_size(found.size(), &sums));
  for (const double value : found) {
    DROPOUT_TORCH(torch_list_push_back(sums, to_stack(scalar(value, wide))));
  }
  stack[0] = bit_cast<StableIValue>(sums);
}

}  // namespace
}  // namespace dropout

STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CPU, library) {
  library.impl("form_sums", &dropout::form_sums);
}
