// Small symmetric matrices taken apart, several side by side: what LAPACK takes for one
// of ten rows does for eight here.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace dropout {

// Squares below have lost digits; what they are of is nothing beside a one.
constexpr double kTiny = 0x1p-960;

// Reflects axes until all is on the diagonal `d` and beside it, in `e` (Householder
// 1958); the rows of `v` are the axes then.
inline void make_tridiagonal(Lanes* a, Lanes* v, Lanes* d, Lanes* e, size_t k) {
  std::vector<Lanes> both(2 * k);
  Lanes *u = both.data(), *p = u + k;
  for (size_t i = 0; i < k * k; ++i) v[i] = Lanes{} + (i % (k + 1) ? 0.0 : 1.0);
  for (size_t c = 0; c + 2 < k; ++c) {
    const size_t first = c + 1;
    Lanes squares{};
    for (size_t i = first; i < k; ++i) {
      u[i] = a[i * k + c];
      squares += u[i] * u[i];
    }
    Lanes turned;
    for (size_t r = 0; r < kRows; ++r) {
      turned[r] = std::copysign(std::sqrt(squares[r]), -u[first][r]);
    }
    const Lanes half = squares - turned * u[first];  // of the new square of `u`
    Lanes beta;
    for (size_t r = 0; r < kRows; ++r) beta[r] = half[r] > kTiny ? 1 / half[r] : 0;
    u[first] -= turned;
    e[c] = turned;
    Lanes both_ways{};
    for (size_t i = first; i < k; ++i) {
      Lanes sum{};
      for (size_t j = first; j < k; ++j) sum += a[i * k + j] * u[j];
      p[i] = beta * sum;
      both_ways += p[i] * u[i];
    }
    for (size_t i = first; i < k; ++i) p[i] -= beta * both_ways / 2 * u[i];
    for (size_t i = first; i < k; ++i) {
      for (size_t j = first; j < k; ++j) a[i * k + j] -= u[i] * p[j] + p[i] * u[j];
    }
    for (size_t j = 0; j < k; ++j) {
      Lanes sum{};
      for (size_t i = first; i < k; ++i) sum += u[i] * v[i * k + j];
      for (size_t i = first; i < k; ++i) v[i * k + j] -= beta * sum * u[i];
    }
  }
  for (size_t i = 0; i < k; ++i) d[i] = a[i * (k + 1)];
  if (k > 1) e[k - 2] = a[k * (k - 1) + k - 2];
  if (k > 0) e[k - 1] = Lanes{};
}

// Takes matrices `a` without a part below zero apart into the squares of rows of `v`, of
// length one, times `d` (Cholesky); whether they are, but for what is `rounding` of the
// outputs' own units. Before, `v` is zero.
inline bool factorize(const Lanes* a, Lanes* v, Lanes* d, size_t k, double rounding) {
  const double slack = 64 * rounding;
  for (size_t c = 0; c < k; ++c) {
    Lanes *row = v + c * k, squares{}, inverse;
    for (size_t j = c; j < k; ++j) {
      row[j] = a[c * k + j];
      for (size_t m = 0; m < c; ++m) row[j] -= d[m] * v[m * k + c] * v[m * k + j];
      squares += row[j] * row[j];
    }
    for (size_t r = 0; r < kRows; ++r) {
      const double pivot = row[c][r], own = a[c * (k + 1)][r];
      const bool there = pivot > rounding * own && squares[r] > kTiny;
      for (size_t j = c; j < k && !there; ++j) {
        const double bound = slack * slack * own * a[j * (k + 1)][r];
        if (!(row[j][r] * row[j][r] <= bound)) return false;
      }
      inverse[r] = there ? 1 / std::sqrt(squares[r]) : 0;
      d[c][r] = there ? squares[r] / pivot : 0;
    }
    for (size_t j = c; j < k; ++j) row[j] *= inverse;
  }
  return true;
}

// One matrix of several, while values are moved up its diagonal.
struct Chase {
  size_t end;  // where the part of it that hangs together has its last value
  double g, s = 1, c = 1, p = 0;
};

// Turns symmetric matrices `a` into their eigenvalues `d`, and `v` into eigenvectors,
// its rows. `e` has as many as `d`. Implicit shifts of the tridiagonal form (Dubrulle,
// Martin & Wilkinson 1968), of each matrix from where it falls apart. The largest entry
// of each is about one, lest squares overflow or vanish.
inline void diagonalize(Lanes* a, Lanes* v, Lanes* d, Lanes* e, size_t k) {
  constexpr int kTurns = 60;
  constexpr double kRounding = 0x1p-51;
  make_tridiagonal(a, v, d, e, k);
  double least[kRows] = {};
  for (size_t i = 0; i < k; ++i) {
    for (size_t r = 0; r < kRows; ++r) {
      const double size = std::abs(d[i][r]) + std::abs(e[i][r]);
      least[r] = std::max(least[r], kRounding * size);
    }
  }
  for (size_t l = 0; l + 1 < k; ++l) {
    for (int turn = 0; turn < kTurns; ++turn) {
      Chase each[kRows];
      size_t last = l;
      for (size_t r = 0; r < kRows; ++r) {
        Chase& own = each[r];
        own.end = l;
        while (own.end + 1 < k && std::abs(e[own.end][r]) > least[r]) ++own.end;
        if (own.end == l) continue;
        last = std::max(last, own.end);
        const double theta = (d[l + 1][r] - d[l][r]) / (2 * e[l][r]);
        const double t = theta + std::copysign(std::sqrt(theta * theta + 1), theta);
        own.g = d[own.end][r] - d[l][r] + e[l][r] / t;
      }
      if (last == l) break;
      for (size_t i = last; i-- > l;) {
        Lanes cos = Lanes{} + 1.0, sin{};
        for (size_t r = 0; r < kRows; ++r) {
          Chase& own = each[r];
          if (own.end <= i) continue;
          const double f = own.s * e[i][r], b = own.c * e[i][r];
          const double length = std::sqrt(f * f + own.g * own.g);
          const double part = length == 0 ? 0 : 1 / length;
          own.s = f * part;
          own.c = length == 0 ? 1 : own.g * part;  // any angle does then
          const double less = d[i + 1][r] - own.p;
          const double more = (d[i][r] - less) * own.s + 2 * own.c * b;
          own.p = own.s * more;
          own.g = own.c * more - b;
          d[i + 1][r] = less + own.p;
          e[i + 1][r] = length;
          cos[r] = own.c;
          sin[r] = own.s;
        }
        Lanes *x = v + i * k, *y = x + k;
        for (size_t j = 0; j < k; ++j) {
          const Lanes old = y[j];
          y[j] = sin * x[j] + cos * old;
          x[j] = cos * x[j] - sin * old;
        }
      }
      for (size_t r = 0; r < kRows; ++r) {
        if (each[r].end == l) continue;
        d[l][r] -= each[r].p;
        e[l][r] = each[r].g;
        e[each[r].end][r] = 0;
      }
    }
  }
}

}  // namespace dropout
