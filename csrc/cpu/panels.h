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

// P panels side by side as the right operand of a tile. A source begins at a chunk: enter(u) makes
// it ready for unit u, of which run(u) more follow in one go.
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
  int64_t run(int64_t left) const { return left; }
  void enter(int64_t) {}
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

template <int P>
struct Int8Panels {
  static constexpr int W = kTileColumns<float>, L = VecF::lanes, NV = P * kTileVectors;
  const int8_t* data[P];
  const bf16* scales[P];
  int64_t group;
  VecF scale[NV];

  Int8Panels(const PackedWeight& w, int64_t panel) : group(w.group) {
    for (int p = 0; p < P; ++p) {
      data[p] = static_cast<const int8_t*>(w.panels.data) + (panel + p) * w.K * W;
      scales[p] =
          static_cast<const bf16*>(w.scales.data) + (panel + p) * ((w.K + group - 1) / group) * W;
    }
  }
  int64_t run(int64_t left) const { return left < group ? left : group; }
  [[gnu::always_inline]] void enter(int64_t unit) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j)
        scale[p * kTileVectors + j] = load(scales[p] + unit / group * W + j * L);
  }
  [[gnu::always_inline]] void load_next(VecF (&row)[NV]) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j)
        row[p * kTileVectors + j] = load(data[p] + j * L) * scale[p * kTileVectors + j];
      data[p] += W;
    }
  }
};

template <int P>
struct Int4Panels {
  static_assert(kTileVectors == 2, "a byte holds one number of either vector");
  static constexpr int W = kTileColumns<float>, L = VecF::lanes, NV = P * kTileVectors;
  const uint8_t* data[P];
  const bf16* scales[P];
  int64_t group;
  VecF scale[NV], low[NV];

  Int4Panels(const PackedWeight& w, int64_t panel) : group(w.group) {
    for (int p = 0; p < P; ++p) {
      data[p] = static_cast<const uint8_t*>(w.panels.data) + (panel + p) * w.K * L;
      scales[p] = static_cast<const bf16*>(w.scales.data) +
                  (panel + p) * ((w.K + group - 1) / group) * 2 * W;
    }
  }
  int64_t run(int64_t left) const { return left < group ? left : group; }
  [[gnu::always_inline]] void enter(int64_t unit) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) {
        const bf16* at = scales[p] + unit / group * 2 * W + j * L;
        scale[p * kTileVectors + j] = load(at), low[p * kTileVectors + j] = load(at + W);
      }
  }
  [[gnu::always_inline]] void load_next(VecF (&row)[NV]) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      VecF q[2];
      load_nibbles(data[p], q[0], q[1]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) {
        const int at = p * kTileVectors + j;
        row[at] = fma(q[j], scale[at], low[at]);  // the product is exact: 4 bits by 8
      }
      data[p] += L;
    }
  }
};

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
  using type = Int8Panels<P>;
};
template <int P>
struct PanelsOf<float, WeightKind::int4, P> {
  using type = Int4Panels<P>;
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
template <class T, int R, int P, class Source>
[[gnu::noinline]] static void multiply_panels(int64_t count, const Compute<T>* a, Source b,
                                              Compute<T>* out) {
  using V = Vec<Compute<T>>;
  constexpr int NV = P * kTileVectors;
  for (int64_t u = 0; u == 0 || u < count; u += kChunk<T>) {
    const int64_t end = count - u < kChunk<T> ? count : u + kChunk<T>;
    V sum[R][NV] = {};
    for (int64_t at = u; at < end;) {
      const int64_t n = b.run(end - at);
      b.enter(at);
      multiply_tile<T, R, NV>(n, a + at * R, 1, R, b, sum);
      at += n;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        Compute<T>* to = out + (i * NV + j) * V::lanes;
        store(to, u == 0 ? sum[i][j] : load(to) + sum[i][j]);
      }
  }
}

// Hands to the sink what R rows, from `row` on, are times panels first..last-1.
template <class T, WeightKind kind, int R>
static void multiply_rows(const PackedWeight& w, const Compute<T>* a, int64_t row, int64_t first,
                          int64_t last, Compute<T>* tile, const TileSink& sink) {
  constexpr int W = kTileColumns<T>, P = kPanels<R>;
  const int64_t count = units<T>(w.K);
  const auto take = [&](int64_t panel, int64_t panels) {
    const int64_t left = w.N - panel * W, columns = panels * W;
    sink.take(sink.context, row, R, panel * W, left < columns ? left : columns, tile, columns);
  };
  int64_t panel = first;
  if constexpr (P > 1)
    for (; panel + P <= last; panel += P) {
      using Panels = typename PanelsOf<T, kind, P>::type;
      multiply_panels<T, R, P>(count, a, Panels(w, panel), tile);
      take(panel, P);
    }
  for (; panel < last; ++panel) {
    using Panels = typename PanelsOf<T, kind, 1>::type;
    multiply_panels<T, R, 1>(count, a, Panels(w, panel), tile);
    take(panel, 1);
  }
}

// Memory of products with up to `rows` rows and K units along k: the packed rows of all threads,
// where they are more than a strip, else of each thread, and its tile.
template <class T>
struct ProductMemory {
  using C = Compute<T>;
  static constexpr int64_t kTile = kTileRows * 4 * kTileColumns<T>;
  Scratch strips, own, widened;
  int64_t strip;  // numbers of one packed strip

  ProductMemory(int64_t rows, int64_t K, bool widens, int threads)
      : strips(rows > kTileRows ? (rows + kTileRows - 1) / kTileRows * strip_of(K) * sizeof(C) : 0),
        own((strip_of(K) + kTile) * sizeof(C), threads),
        widened(widens && rows > kTileRows ? K * kTileColumns<T> * sizeof(C) : 0, threads),
        strip(strip_of(K)) {}
  bool ok() const { return strips.ok() && own.ok() && widened.ok(); }
  C* tile(int thread) const { return own.template at<C>(thread) + strip; }

 private:
  static int64_t strip_of(int64_t K) { return units<T>(K) * kTileRows + Vec<C>::lanes; }
};

// A panel of a quantised weight as numbers
template <class T, WeightKind kind>
static void widen_panel(const PackedWeight& w, int64_t panel, Compute<T>* out) {
  using V = Vec<Compute<T>>;
  typename PanelsOf<T, kind, 1>::type b(w, panel);
  for (int64_t u = 0; u < w.K;) {
    const int64_t n = b.run(w.K - u);
    b.enter(u);
    for (int64_t i = 0; i < n; ++i) {
      V row[kTileVectors];
      b.load_next(row);
      for (int j = 0; j < kTileVectors; ++j)
        store(out + (u + i) * 2 * V::lanes + j * V::lanes, row[j]);
    }
    u += n;
  }
}

template <class T, WeightKind kind>
static void product_of(Team& team, const PackedWeight& w, const T* x, int64_t x_row, int64_t rows,
                       const ProductMemory<T>& memory, const TileSink& sink) {
  using C = Compute<T>;
  constexpr int R = kTileRows, W = kTileColumns<T>;
  const int64_t panels = (w.N + W - 1) / W, tasks = 8 * team.size();
  C* const tile = memory.tile(team.thread());
  if (rows <= R) {  // each thread packs the rows for itself: cheaper than to wait for another
    C* const own = memory.own.template at<C>(team.thread());
    const C* a = own;
    if (rows == 1 && sizeof(T) == sizeof(C))
      a = reinterpret_cast<const C*>(x);  // a single row is packed as it is
    else
      pack<T>(own, static_cast<int>(rows), {x, x_row, 1}, static_cast<int>(rows), rows, w.K);
    const int64_t step = (panels + 4 * tasks - 1) / (4 * tasks) * 4;
    team.loop((panels + step - 1) / step, [&](int64_t i) {
      const int64_t last = (i + 1) * step < panels ? (i + 1) * step : panels;
      with_rows(static_cast<int>(rows), [&](auto n) {
        multiply_rows<T, kind, n.value>(w, a, 0, i * step, last, tile, sink);
      });
    });
    return;
  }
  const int64_t strips = (rows + R - 1) / R;
  C* const packed = memory.strips.template at<C>();
  team.loop(strips, [&](int64_t s) {
    const int64_t left = rows - s * R;
    const int height = left < R ? static_cast<int>(left) : R;
    pack<T>(packed + s * memory.strip, height, {x + s * R * x_row, x_row, 1}, height, left, w.K);
  });
  team.loop(panels, [&](int64_t panel) {
    PackedWeight numbers = w;
    int64_t at = panel;  // of numbers
    if constexpr (kWidened<T, kind>) {
      C* wide = memory.widened.template at<C>(team.thread());
      widen_panel<T, kind>(w, panel, wide);
      numbers.panels.data = wide, at = 0;
    }
    for (int64_t s = 0; s < strips; ++s) {
      const int height = rows - s * R < R ? static_cast<int>(rows - s * R) : R;
      with_rows(height, [&](auto n) {
        multiply_panels<T, n.value, 1>(units<T>(w.K), packed + s * memory.strip,
                                       PlainPanels<T, C, 1>(numbers, at), tile);
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
