// One number of each of several rows, for the vector units.
#pragma once

#include <cstddef>

namespace dropout {

constexpr size_t kRows = 8;
typedef double Lanes __attribute__((vector_size(kRows * sizeof(double))));

}  // namespace dropout
