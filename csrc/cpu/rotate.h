// The rotation of one row by rope, wherever it happens: the bits are the same.
#pragma once
#include "cpu/rows.h"
#include "cpu/transpose.h"

PYKERN_BEGIN_ISA
namespace {

// out = the D numbers of x, the pairs among the first 2 half turned by the angles of cos and sin
// (times sign = -1: turned back). out may be x. Table is Number or its compute type.
template <bool interleaved, class Number, class Table>
static inline void rotate_row(const Number* x, const Table* cos, const Table* sin, int sign,
                              int64_t half, int64_t D, Number* out) {
  using C = Compute<Number>;
  using V = Vec<C>;
  const V turn = V::splat(static_cast<C>(sign));
  each_vector<C>(half, [&](int64_t i, int n) {
    const V c = load_n(cos + i, n), s = turn * load_n(sin + i, n);
    if constexpr (interleaved) {
      const int low = 2 * n < V::lanes ? 2 * n : V::lanes, high = 2 * n - low;
      const V a = load_n(x + 2 * i, low), b = load_n(x + 2 * i + V::lanes, high);
      const V signed_low = zip_low(-s, s), signed_high = zip_high(-s, s);
      store_n(out + 2 * i, fma(a, zip_low(c, c), swap_pairs(a) * signed_low), low);
      store_n(out + 2 * i + V::lanes, fma(b, zip_high(c, c), swap_pairs(b) * signed_high), high);
    } else {
      const V a = load_n(x + i, n), b = load_n(x + half + i, n);
      store_n(out + i, fma(a, c, -(b * s)), n);
      store_n(out + half + i, fma(b, c, a * s), n);
    }
  });
  if (out != x) memcpy(out + 2 * half, x + 2 * half, (D - 2 * half) * sizeof(Number));
}

}  // namespace
PYKERN_END_ISA
