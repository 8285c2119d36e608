// Where forward attention keeps its intermediate results and puts its final ones.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kBlockRows = 96;    // of a task; a tile of keys is looked up once for all of them
constexpr int kStripVectors = 3;  // of queries, side by side
constexpr int kKeyRows =
    kVectorBytes == 64 ? 8 : 4;  // times 3: 24 or 12 accumulators, as in tile.h

// Keys are taken in parts that begin at multiples of this. What a row sees of a part is summed by
// itself and then added to what it saw before, so parts may be summed by different threads.
constexpr int64_t kPartKeys = 1024;
static_assert(kPartKeys % kKeys == 0, "a tile is of one part");

// With no more rows than this, lanes of queries would be mostly empty: then keys are lanes.
template <class T>
constexpr int kFewRows = Vec<Compute<T>>::lanes / 2;

// Where a block of rows goes: row t of head h of a group is row `row + t` of head `head + h`.
struct Results {
  const Tensor &out, &lse;
  int64_t batch, head, row;

  template <class T>
  T* out_row(int64_t h, int64_t t) const {
    return row_at<T>(out, batch, head + h, row + t);
  }
  // m in base 2
  void write_lse(int64_t h, int64_t t, double m, double l) const {
    if (!lse.given) return;
    const double value = l == 0 ? -INFINITY : m * kLn2 + natural_log(l);
    if (lse.dtype == DType::f64)
      row_at<double>(lse, batch, head + h, row + t)[0] = value;
    else
      row_at<float>(lse, batch, head + h, row + t)[0] = static_cast<float>(value);
  }
};

// Cuts one block of memory into the arrays that M::layout(D, E, take) asks for.
template <class M>
struct Memory : M {
  using C = typename M::C;
  static int64_t bytes(int64_t D, int64_t E) {
    int64_t total = 0;
    M().layout(D, E, [&](int64_t n) {
      total += round_up(n * sizeof(C), 64);
      return static_cast<C*>(nullptr);
    });
    return total;
  }
  Memory(int64_t D, int64_t E, char* memory) {
    M::layout(D, E, [&](int64_t n) {
      C* array = reinterpret_cast<C*>(memory);
      memory += round_up(n * sizeof(C), 64);
      return array;
    });
  }
};

// Of few rows: keys are lanes.
template <class T>
struct RowArrays {
  using C = Compute<T>;
  static constexpr int W = kTileColumns<T>, R = kTileRows;
  C *q, *keys, *values, *page_k, *page_v, *hidden, *s, *p, *out, *m, *l;
  C *sum_out, *sum_m, *sum_l;  // of the parts before
  int64_t E_padded;
  T* gathered;

  template <class Take>
  void layout(int64_t D, int64_t E, const Take& take) {
    E_padded = round_up(E, W);
    q = take(units<T>(D) * R + Vec<C>::lanes);
    keys = take(units<T>(D) * kKeys + Vec<C>::lanes);
    values = take(units<T>(kKeys) * E_padded + Vec<C>::lanes);
    page_k = take(kKeys * D);
    page_v = take(kKeys * E);
    hidden = take(units<T>(kKeys) * W);
    s = take(R * kKeys);
    p = take(R * kKeys);
    out = take(R * E_padded);
    m = take(R);
    l = take(R);
    sum_out = take(R * E_padded);
    sum_m = take(R);
    sum_l = take(R);
    gathered = reinterpret_cast<T*>(take(R * D + Vec<C>::lanes));
  }
};
template <class T>
using RowMemory = Memory<RowArrays<T>>;

// Of many rows: queries are lanes, in strips of Q.
template <class T>
struct ColumnArrays {
  using C = Compute<T>;
  static constexpr int L = Vec<C>::lanes, Q = kStripVectors * L, strips = kBlockRows / Q;
  C *q, *keys, *values, *page_k, *page_v, *s, *p, *bias, *top, *rescale, *out, *ms, *ls;
  C *sum_outs, *sum_ms, *sum_ls;                             // of the parts before
  C *strip_q, *strip_out, *m, *l, *sum_out, *sum_m, *sum_l;  // of the strip that is selected
  int64_t q_size, out_size;
  T* gathered;

  template <class Take>
  void layout(int64_t D, int64_t E, const Take& take) {
    q_size = units<T>(D) * Q + L, out_size = round_up(E, L) * Q;
    q = take(strips * q_size);
    keys = take(kKeys * units<T>(D) + L);
    values = take(units<T>(kKeys) * E + L);
    page_k = take(kKeys * D);
    page_v = take(kKeys * E);
    s = take(kKeys * Q);
    p = kPaired<T> ? take(kKeys / 2 * Q) : s;  // weights replace scores
    bias = take(kKeys * Q);
    top = take(Q);
    rescale = take(Q);
    out = take(strips * out_size);
    ms = take(strips * Q);
    ls = take(strips * Q);
    sum_outs = take(strips * out_size);
    sum_ms = take(strips * Q);
    sum_ls = take(strips * Q);
    gathered = reinterpret_cast<T*>(take(Q * D + L));
  }
  void select(int strip) {
    strip_q = q + strip * q_size, strip_out = out + strip * out_size;
    m = ms + strip * Q, l = ls + strip * Q;
    sum_out = sum_outs + strip * out_size;
    sum_m = sum_ms + strip * Q, sum_l = sum_ls + strip * Q;
  }
};
template <class T>
using ColumnMemory = Memory<ColumnArrays<T>>;

}  // namespace
PYKERN_END_ISA
