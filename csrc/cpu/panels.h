// x W^T for a packed weight: the panels stream through the registers once for up to kTileRows rows
// of x, quantised ones are widened on the way. Sums run along k as those of gemm.h do, so results
// have the bits of the same product there.
#pragma once
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/team.h"
#include "ops/packed_weight.h"

PYKERN_BEGIN_ISA
namespace {

// P panels side by side as the right operand of a tile. Their products with a row are summed in
// runs of units: run(u) is the length of the one that begins at u. fold() adds what one row has in
// vector j to what it had before, and next() goes on to the next run.
//
// Units as they are stored: operands or, in bfloat16 where it is no operand, numbers to widen.
template <class T, class Stored, int P>
struct PlainPanels {
  using V = Vec<Compute<T>>;
  static constexpr int W = kTileColumns<T>, NV = P * kTileVectors;
  const Stored* data[P];

  PlainPanels(const PackedWeight& w, int64_t panel) {
    for (int p = 0; p < P; ++p)
      data[p] = static_cast<const Stored*>(w.panels.data) + (panel + p) * units<T>(w.K) * W;
  }
  explicit PlainPanels(const Stored* panel) : data{panel} {}
  int64_t run(int64_t left) const { return left < kChunk<T> ? left : kChunk<T>; }
  void next() {}
  V fold(int, V before, V sum, Compute<T>) const { return before + sum; }
  [[gnu::always_inline]] void load_next(V (&row)[NV]) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j)
        row[p * kTileVectors + j] = load(data[p] + j * V::lanes);
      data[p] += W;
    }
  }
};

// Of quantised panels a run is a group: q, or of int4 q - 8, alone is multiplied, and the sum of a
// group is then worth scale sum or, with x the sum of the row's own numbers there,
// scale sum + (low + 8 scale) x.
template <WeightKind kind, int P>
struct Scales {
  static constexpr int W = kTileColumns<float>, L = VecF::lanes;
  static constexpr int step = kind == WeightKind::int4 ? 2 * W : W;
  const bf16* scales[P];
  int64_t group;

  Scales(const PackedWeight& w, int64_t panel) : group(w.group) {
    for (int p = 0; p < P; ++p)
      scales[p] = static_cast<const bf16*>(w.scales.data) +
                  (panel + p) * ((w.K + group - 1) / group) * step;
  }
  int64_t run(int64_t left) const { return left < group ? left : group; }
  void next() {
    for (int p = 0; p < P; ++p) scales[p] += step;
  }
  [[gnu::always_inline]] VecF fold(int j, VecF before, VecF sum, float x) const {
    const bf16* at = scales[j / kTileVectors] + j % kTileVectors * L;
    const VecF scale = load(at);
    if constexpr (kind == WeightKind::int4)
      before = fma(fma(VecF::splat(8), scale, load(at + W)), VecF::splat(x), before);
    return fma(scale, sum, before);
  }
};

template <WeightKind kind, int P>
struct QuantisedPanels : Scales<kind, P> {
  static_assert(kTileVectors == 2, "a byte of int4 holds one number of either vector");
  static constexpr int W = kTileColumns<float>, L = VecF::lanes, NV = P * kTileVectors;
  static constexpr int bytes = kind == WeightKind::int4 ? L : W;  // of a unit of a panel
  static constexpr int64_t kAhead = 2048;  // bytes: what is fetched meanwhile
  const uint8_t* data[P];

  QuantisedPanels(const PackedWeight& w, int64_t panel) : Scales<kind, P>(w, panel) {
    for (int p = 0; p < P; ++p)
      data[p] = static_cast<const uint8_t*>(w.panels.data) + (panel + p) * w.K * bytes;
  }
  [[gnu::always_inline]] void load_next(VecF (&row)[NV]) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      VecF* const to = row + p * kTileVectors;
      __builtin_prefetch(data[p] + kAhead, 0, 2);
      if constexpr (kind == WeightKind::int4) {
        load_nibbles(data[p], to[0], to[1]);
      } else {
        const int8_t* q = reinterpret_cast<const int8_t*>(data[p]);
        to[0] = load(q), to[1] = load(q + L);
      }
      data[p] += bytes;
    }
  }
};

// One quantised panel whose q have been widened to float.
template <WeightKind kind>
struct WidenedPanel : Scales<kind, 1> {
  UnitRows<float> numbers;

  WidenedPanel(const PackedWeight& w, int64_t panel, const float* numbers)
      : Scales<kind, 1>(w, panel), numbers{numbers, kTileColumns<float>} {}
  [[gnu::always_inline]] void load_next(VecF (&row)[kTileVectors]) { numbers.load_next(row); }
};

// Of a weight.
template <class T, WeightKind kind>
constexpr int64_t kBits = kind == WeightKind::int4   ? 4
                          : kind == WeightKind::int8 ? 8
                                                     : 8 * sizeof(T);

// Whether a step in T widens the panels of a weight of this kind: many rows then share one that is
// widened once.
template <class T, WeightKind kind>
constexpr bool kWidened = true;
template <class T>
constexpr bool kWidened<T, WeightKind::numbers> = sizeof(T) < sizeof(Compute<T>) && !kPaired<T>;

// The panels that it reads.
template <class T, WeightKind kind, int P>
struct PanelsOf {
  using type = PlainPanels<T, Compute<T>, P>;
};
template <int P>
struct PanelsOf<float, WeightKind::int8, P> {
  using type = QuantisedPanels<WeightKind::int8, P>;
};
template <int P>
struct PanelsOf<float, WeightKind::int4, P> {
  using type = QuantisedPanels<WeightKind::int4, P>;
};
#if !defined(__AVX512BF16__)
template <int P>
struct PanelsOf<bf16, WeightKind::numbers, P> {
  using type = PlainPanels<bf16, bf16, P>;
};
#endif

// Panels that R rows take at a time: many sums in flight hide the latency of an addition, as long
// as they, the vectors of a unit and a number of a fit the registers. (For one row, vectors are
// operands from memory.)
constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
constexpr bool fits(int R, int P) { return R == 1 || (R + 1) * P * kTileVectors + 1 <= kRegisters; }
template <int R>
constexpr int kPanels = fits(R, 4)   ? 4
                        : fits(R, 2) ? 2
                                     : 1;

// out [R][P W] = the R rows of a, packed with their units side by side, times P panels from b on.
// sums [R] of each run, one after the other, are those of the numbers of a; null: b needs none.
template <class T, int R, int P, class Source>
[[gnu::noinline]] static void multiply_panels(int64_t count, const Compute<T>* a,
                                              const Compute<T>* sums, Source b, Compute<T>* out) {
  using V = Vec<Compute<T>>;
  constexpr int NV = P * kTileVectors;
  for (int64_t u = 0, n = 0; u == 0 || u < count; u += n) {
    n = b.run(count - u);
    V sum[R][NV] = {};
    multiply_tile<T, R, NV>(n, a + u * R, 1, R, b, sum);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        Compute<T>* to = out + (i * NV + j) * V::lanes;
        const V before = u == 0 ? V::splat(-0.0f) : load(to);
        store(to, b.fold(j, before, sum[i][j], sums ? sums[i] : 0));
      }
    b.next();
    if (sums) sums += R;
  }
}

// Hands to the sink what R rows are times panels first..last-1.
template <class T, WeightKind kind, int R>
static void multiply_rows(const PackedWeight& w, const Compute<T>* a, const Compute<T>* sums,
                          int64_t first, int64_t last, Compute<T>* tile, const TileSink& sink) {
  constexpr int W = kTileColumns<T>, P = kPanels<R>;
  const int64_t count = units<T>(w.K);
  const auto take = [&](int64_t panel, int64_t panels) {
    const int64_t left = w.N - panel * W, columns = panels * W;
    sink.take(sink.context, 0, R, panel * W, left < columns ? left : columns, tile, columns);
  };
  int64_t panel = first;
  const auto multiply = [&](auto p) {
    using Panels = typename PanelsOf<T, kind, p.value>::type;
    for (; panel + p.value <= last; panel += p.value) {
      multiply_panels<T, R, p.value>(count, a, sums, Panels(w, panel), tile);
      take(panel, p.value);
    }
  };
  if constexpr (P > 2) multiply(Count<P>{});
  if constexpr (P > 1) multiply(Count<2>{});
  multiply(Count<1>{});
}

// The panels of a product as tasks of a team, in rounds of one task a thread. A round deals half of
// what is left, in whole groups of panels, so that the last tasks, which others wait for, are
// short; of a small weight it deals all.
struct Deal {
  static constexpr int64_t kGroup = 4;       // panels
  static constexpr int64_t kSmall = 262144;  // bytes a thread
  int64_t panels, size;
  bool small;

  Deal(int64_t panels, int64_t bytes, int size)
      : panels(panels), size(size), small(bytes < kSmall * size) {}
  int64_t share(int64_t left) const {
    if (small) return (left + size - 1) / size;
    const int64_t groups = left / (2 * size * kGroup);
    return (groups > 0 ? groups : 1) * kGroup;
  }
  int64_t tasks() const {
    int64_t rounds = 0;
    for (int64_t left = panels; left > 0; left -= size * share(left)) ++rounds;
    return rounds * size;
  }
  template <class Body>
  void task(int64_t i, const Body& body) const {
    int64_t begin = 0;
    for (; i >= size; i -= size) begin += size * share(panels - begin);
    const int64_t step = share(panels - begin), first = begin + i * step, last = first + step;
    if (first < panels) body(first, last < panels ? last : panels);
  }
};

// sums [groups][rows]: of the numbers of each row in each group along k
static void sum_groups(const float* x, int64_t x_row, int rows, int64_t K, int64_t group,
                       float* sums) {
  for (int64_t first = 0; first < K; first += group, sums += rows)
    for (int i = 0; i < rows; ++i) {
      VecF total = VecF::zero();
      each_vector<float>(K - first < group ? K - first : group, [&](int64_t j, int n) {
        total = total + load_n(x + i * x_row + first + j, n);
      });
      sums[i] = total.sum();
    }
}

constexpr int64_t kSmallestGroup = 16;

// Memory of products with up to `rows` rows and K units along k: the packed rows of all threads,
// where they are more than a strip, else of each thread, and its tile. Behind a strip are the sums
// of its groups.
template <class T>
struct ProductMemory {
  using C = Compute<T>;
  static constexpr int64_t kTile = kTileRows * 4 * kTileColumns<T>;
  const int64_t packed, strip;  // numbers of a packed strip, without and with its sums
  Scratch strips, own, widened;

  ProductMemory(int64_t rows, int64_t K, bool widens, int threads)
      : packed(units<T>(K) * kTileRows + Vec<C>::lanes),
        strip(packed + (K / kSmallestGroup + 1) * kTileRows),
        strips(rows > kTileRows ? (rows + kTileRows - 1) / kTileRows * strip * sizeof(C) : 0),
        own((strip + kTile) * sizeof(C), threads),
        widened(widens && rows > kTileRows ? K * kTileColumns<T> * sizeof(C) : 0, threads) {}
  bool ok() const { return strips.ok() && own.ok() && widened.ok(); }
  C* tile(int thread) const { return own.template at<C>(thread) + strip; }
};

// A panel as numbers: of a quantised one q.
template <class T, WeightKind kind>
static void widen_panel(const PackedWeight& w, int64_t panel, Compute<T>* out) {
  using V = Vec<Compute<T>>;
  typename PanelsOf<T, kind, 1>::type b(w, panel);
  for (int64_t u = 0; u < w.K; ++u) {
    V row[kTileVectors];
    b.load_next(row);
    for (int j = 0; j < kTileVectors; ++j) store(out + (u * kTileVectors + j) * V::lanes, row[j]);
  }
}

template <class T, WeightKind kind>
static void product_of(Team& team, const PackedWeight& w, const T* x, int64_t x_row, int64_t rows,
                       const ProductMemory<T>& memory, const TileSink& sink) {
  using C = Compute<T>;
  constexpr int R = kTileRows, W = kTileColumns<T>;
  constexpr bool wants_sums = kind == WeightKind::int4;
  const int64_t panels = (w.N + W - 1) / W;
  C* const tile = memory.tile(team.thread());
  const auto sum_rows = [&](const T* from, int n, C* strip) {
    if constexpr (wants_sums) sum_groups(from, x_row, n, w.K, w.group, strip + memory.packed);
  };
  const auto sums_of = [&](const C* strip) { return wants_sums ? strip + memory.packed : nullptr; };
  if (rows <= R) {  // each thread packs the rows for itself: cheaper than to wait for another
    C* const own = memory.own.template at<C>(team.thread());
    const C* a = own;
    if (rows == 1 && sizeof(T) == sizeof(C))
      a = reinterpret_cast<const C*>(x);  // a single row is packed as it is
    else
      pack<T>(own, static_cast<int>(rows), {x, x_row, 1}, static_cast<int>(rows), rows, w.K);
    sum_rows(x, static_cast<int>(rows), own);
    const Deal deal(panels, w.N * w.K * kBits<T, kind> / 8, team.size());
    team.loop(deal.tasks(), [&](int64_t i) {
      deal.task(i, [&](int64_t first, int64_t last) {
        with_rows(static_cast<int>(rows), [&](auto n) {
          multiply_rows<T, kind, n.value>(w, a, sums_of(own), first, last, tile, sink);
        });
      });
    });
    return;
  }
  const int64_t strips = (rows + R - 1) / R;
  C* const packed = memory.strips.template at<C>();
  team.loop(strips, [&](int64_t s) {
    const int64_t left = rows - s * R;
    const int height = left < R ? static_cast<int>(left) : R;
    const T* from = x + s * R * x_row;
    pack<T>(packed + s * memory.strip, height, {from, x_row, 1}, height, left, w.K);
    sum_rows(from, height, packed + s * memory.strip);
  });
  team.loop(panels, [&](int64_t panel) {
    C* const wide = memory.widened.template at<C>(team.thread());
    if constexpr (kWidened<T, kind>) widen_panel<T, kind>(w, panel, wide);
    const auto source = [&] {
      if constexpr (kind != WeightKind::numbers)
        return WidenedPanel<kind>(w, panel, wide);
      else
        return kWidened<T, kind> ? PlainPanels<T, C, 1>(wide) : PlainPanels<T, C, 1>(w, panel);
    };
    for (int64_t s = 0; s < strips; ++s) {
      const int height = rows - s * R < R ? static_cast<int>(rows - s * R) : R;
      const C* a = packed + s * memory.strip;
      with_rows(height, [&](auto n) {
        multiply_panels<T, n.value, 1>(units<T>(w.K), a, sums_of(a), source(), tile);
      });
      const int64_t left = w.N - panel * W;
      sink.take(sink.context, s * R, height, panel * W, left < W ? left : W, tile, W);
    }
  });
}

// epilogue(row, column, y, n) gets n numbers y of x w^T at once, x [rows, K] with rows x_row apart.
template <class T, class Epilogue>
static void product(Team& team, const PackedWeight& w, const T* x, int64_t x_row, int64_t rows,
                    const ProductMemory<T>& memory, const Epilogue& epilogue) {
  const TileSink sink = sink_of<T>(epilogue);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (w.kind == WeightKind::int8)
      return product_of<T, WeightKind::int8>(team, w, x, x_row, rows, memory, sink);
    if (w.kind == WeightKind::int4)
      return product_of<T, WeightKind::int4>(team, w, x, x_row, rows, memory, sink);
  }
  product_of<T, WeightKind::numbers>(team, w, x, x_row, rows, memory, sink);
}

}  // namespace
PYKERN_END_ISA
