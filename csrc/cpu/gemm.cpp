// The matrix product, its loops and its blocks.
//
// Along k, sums run over chunks of kChunk<T> units, which are then added in order: the order
// depends on K alone, so a row's bits depend on nothing but the row. How the work is cut is free:
//   blocked      a task packs a block of columns of B into its own cache and walks strips of
//                kTileRows rows of A, which are read where they lie or packed
//   transposed   not many rows of A: C^T = B^T A^T, the strips of B^T read where they lie
//   few rows     B^T streams through the registers once, transposed on the way
#include "cpu/gemm.h"

#include "cpu/gemm_few_rows.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kBlockBytes = 600 << 10;  // packed columns of one task: over half of a 1 MiB L2
constexpr int64_t kPackedBytes = 8 << 20;   // packed rows of A at a time: they stay in the L3
constexpr int64_t kPartialBytes = 64 << 20;
constexpr int64_t kPackedStrips = 4;      // of A, packed in one go
constexpr int64_t kTransposedRows = 192;  // at this many rows packing B costs 5 %

// Units of k at a time, half as many more where that saves a cut: a panel of B of that depth takes
// a fifth of a 1 MiB L2.
template <class T>
constexpr int64_t kDepth = kPaired<T> ? 3 * kChunk<T> : 12 * kChunk<T>;

// The rows of A as the tile reads them: unit u of row i is data[i * row + u * unit].
template <class C>
struct TileRows {
  const C* data;
  int64_t row, unit;
};

// out [R][kTileColumns], of which NV vectors, = or, to continue a sum, += the products of count
// units.
template <class T, int R, int NV = kTileVectors>
[[gnu::noinline]] static void gemm_tile(int64_t count, TileRows<Compute<T>> a, const Compute<T>* b,
                                        Compute<T>* out, bool add) {
  using V = Vec<Compute<T>>;
  constexpr int W = kTileColumns<T>;
  for (int64_t u = 0; u == 0 || u < count; u += kChunk<T>) {
    const int64_t n = count - u < kChunk<T> ? count - u : kChunk<T>;
    V sum[R][NV] = {};
    if (a.row == 1)
      multiply_tile<T, R, NV>(n, a.data + u * kTileRows, 1, kTileRows, b + u * W, W, sum);
    else
      multiply_tile<T, R, NV>(n, a.data + u, a.row, 1, b + u * W, W, sum);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        Compute<T>* to = out + i * W + j * V::lanes;
        store(to, add ? load(to) + sum[i][j] : sum[i][j]);
      }
    add = true;
  }
}

// Whether the tile can read rows of A where they lie: units side by side, in the type it
// multiplies.
template <class T>
static bool in_place(const Matrix<T>& A, int64_t K) {
  if (A.wide || A.column != 1 || A.row == 1) return false;
  if (kPaired<T>)
    return K % 2 == 0 && A.row % 2 == 0 && reinterpret_cast<uintptr_t>(A.data) % sizeof(float) == 0;
  return sizeof(T) == sizeof(Compute<T>);
}

// How the tile comes by the strips of A.
enum class Strips {
  in_place,  // read where they lie
  own,       // a task, which has all of B, packs those it needs
  shared,    // packed for all tasks before they start
};

// How the loops are cut.
template <class T>
struct Cut {
  int64_t count, depth;            // units of k, and of them at a time
  int64_t panels, block;           // panels of B, and of a task
  int64_t rows, strips;            // rows of A at a time, a multiple of kTileRows, and their strips
  int64_t strip_size, panel_size;  // packed, in numbers
  int64_t column_blocks, row_blocks;
  Strips source;

  Cut(int64_t M, int64_t N, int64_t K, bool in_place, int threads) {
    constexpr int R = kTileRows, W = kTileColumns<T>;
    constexpr int64_t size = sizeof(Compute<T>);
    count = units<T>(K);
    depth = count < kDepth<T> * 3 / 2 ? count : kDepth<T>;
    panels = (N + W - 1) / W;
    strip_size = depth * R + Vec<Compute<T>>::lanes;
    panel_size = depth * W + Vec<Compute<T>>::lanes;  // panels do not share cache sets
    rows = kPackedBytes / (strip_size * size);        // in strips
    if (count > depth) {
      const int64_t most = kPartialBytes / (panels * R * W * size);
      rows = rows < most ? rows : most;
    }
    rows = (rows < 16 ? 16 : rows) * R;
    rows = rows < M ? rows : M;
    strips = (rows + R - 1) / R;
    const int64_t most_row_blocks = (strips + 15) / 16;  // a packed panel serves 16 strips
    block = kBlockBytes / (panel_size * size + 1);
    const bool own = panels <= block && most_row_blocks >= threads;
    source = in_place ? Strips::in_place : own ? Strips::own : Strips::shared;
    const int64_t share = own && !in_place ? panels : (panels + 4 * threads - 1) / (4 * threads);
    block = block < 1 ? 1 : block > share ? share : block;
    column_blocks = (panels + block - 1) / block;
    row_blocks = threads == 1 ? 1 : (4 * threads + column_blocks - 1) / column_blocks;
    row_blocks = row_blocks > most_row_blocks ? most_row_blocks : row_blocks;
  }
};

template <class T>
static Status blocked(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, bool in_place,
                      int threads, const TileSink& sink) {
  using C = Compute<T>;
  constexpr int R = kTileRows, W = kTileColumns<T>;
  const Cut<T> cut(M, N, K, in_place, threads);
  const bool whole = cut.count == cut.depth;
  const int64_t strip_bytes = cut.strip_size * static_cast<int64_t>(sizeof(C));
  const Scratch packed_a(cut.source == Strips::shared ? cut.strips * strip_bytes : 0);
  const Scratch own_a(cut.source == Strips::own ? kPackedStrips * strip_bytes : 0, threads);
  const Scratch packed_b(cut.block * cut.panel_size * sizeof(C), threads);
  const Scratch partial(whole ? R * W * sizeof(C) : cut.strips * cut.panels * R * W * sizeof(C),
                        whole ? threads : 1);
  const Scratch last_block(64, threads);  // which column block a thread has packed
  if (!packed_a.ok() || !own_a.ok() || !packed_b.ok() || !partial.ok() || !last_block.ok())
    return Status::out_of_memory;

  for (int64_t row0 = 0; row0 < M; row0 += cut.rows) {
    const int64_t rows = M - row0 < cut.rows ? M - row0 : cut.rows, strips = (rows + R - 1) / R;
    const int64_t strips_per_task = (strips + cut.row_blocks - 1) / cut.row_blocks;
    for (int64_t u0 = 0, more = 1; more; u0 += cut.depth) {
      const int64_t depth = cut.count - u0 < cut.depth ? cut.count - u0 : cut.depth;
      const int64_t k0 = u0 * kUnit<T>;
      const int64_t k = K - k0 < depth * kUnit<T> ? K - k0 : depth * kUnit<T>;
      const bool last = u0 + depth >= cut.count;
      more = !last;
      for (int t = 0; t < threads; ++t) *last_block.template at<int64_t>(t) = -1;
      const auto pack_rows = [&](C* to, int64_t first, int64_t end) {  // strips first..end-1
        pack_strips<T>(to, R, end - first, cut.strip_size, A.from(row0 + first * R, k0),
                       rows - first * R, k);
      };
      if (cut.source == Strips::shared)
        parallel_rows(strips, kPackedStrips, threads, [&](int64_t first, int64_t end, int) {
          pack_rows(packed_a.template at<C>() + first * cut.strip_size, first, end);
        });
      parallel_for(cut.column_blocks * cut.row_blocks, threads, [&](int64_t task, int thread) {
        const int64_t column_block = task / cut.row_blocks;
        const int64_t first_panel = column_block * cut.block;
        const int64_t last_panel =
            first_panel + cut.block < cut.panels ? first_panel + cut.block : cut.panels;
        C* b = packed_b.template at<C>(thread);
        int64_t* packed = last_block.template at<int64_t>(thread);
        if (*packed != column_block)
          pack_strips<T>(b, W, last_panel - first_panel, cut.panel_size,
                         B.transposed().from(first_panel * W, k0), N - first_panel * W, k);
        *packed = column_block;
        const int64_t first_strip = task % cut.row_blocks * strips_per_task;
        const int64_t last_strip =
            first_strip + strips_per_task < strips ? first_strip + strips_per_task : strips;
        C* own = own_a.template at<C>(thread);
        for (int64_t s = first_strip; s < last_strip; ++s) {
          const int64_t row = row0 + s * R;
          const int height = M - row < R ? static_cast<int>(M - row) : R;
          TileRows<C> a = {nullptr, 1, R};
          if (cut.source == Strips::in_place) {
            a = {reinterpret_cast<const C*>(A.from(row, k0).data), A.row / kUnit<T>, 1};
          } else if (cut.source == Strips::shared) {
            a.data = packed_a.template at<C>() + s * cut.strip_size;
          } else {
            const int64_t i = (s - first_strip) % kPackedStrips;
            if (i == 0)
              pack_rows(own, s, s + kPackedStrips < last_strip ? s + kPackedStrips : last_strip);
            a.data = own + i * cut.strip_size;
          }
          for (int64_t p = first_panel; p < last_panel; ++p) {
            C* tile = whole ? partial.template at<C>(thread)
                            : partial.template at<C>() + (s * cut.panels + p) * R * W;
            const C* panel = b + (p - first_panel) * cut.panel_size;
            if (height == R && N - p * W <= Vec<C>::lanes)
              gemm_tile<T, R, 1>(depth, a, panel, tile, u0 > 0);
            else
              with_rows(height,
                        [&](auto n) { gemm_tile<T, n.value>(depth, a, panel, tile, u0 > 0); });
            if (last)
              sink.take(sink.context, row, height, p * W, N - p * W < W ? N - p * W : W, tile, W);
          }
        }
      });
    }
  }
  return Status::ok;
}

// Takes tiles of C^T and hands on those of C.
template <class C>
struct Transposing {
  TileSink sink;

  static void take(const void* context, int64_t column, int64_t columns, int64_t row, int64_t rows,
                   const void* tile, int64_t step) {
    using V = Vec<C>;
    constexpr int L = V::lanes;
    const C* numbers = static_cast<const C*>(tile);
    const TileSink& sink = static_cast<const Transposing*>(context)->sink;
    for (int64_t j = 0; j < columns; j += L)
      for (int64_t i = 0; i < rows; i += L) {
        V square[L];
        for (int c = 0; c < L; ++c)
          square[c] = j + c < columns ? load(numbers + (j + c) * step + i) : V::zero();
        transpose(square);
        sink.take(sink.context, row + i, rows - i < L ? rows - i : L, column + j,
                  columns - j < L ? columns - j : L, square, L);
      }
  }
};

template <class T>
static Status multiply_as(int64_t M, int64_t N, int64_t K, AnyMatrix a, AnyMatrix b, int threads,
                          TileSink sink) {
  const Matrix<T> A(a.data, a.row, a.column, a.wide), B(b.data, b.row, b.column, b.wide);
  if (M == 0 || N == 0) return Status::ok;
  if (M <= kFewRows && B.row == 1 && B.column != 1)
    return few_rows<T>(M, N, K, A, B.transposed(), threads, sink);
  if (M < kTransposedRows && M < N && in_place(B.transposed(), K)) {
    using Sink = Transposing<Compute<T>>;
    const Sink transposing{sink};
    return blocked<T>(N, M, K, B.transposed(), A.transposed(), true, threads,
                      {Sink::take, &transposing});
  }
  // Measured: rows of a low tile are best read where they lie, those of a high one packed.
  constexpr bool low = kTileRows <= 8;
  return blocked<T>(M, N, K, A, B, low && in_place(A, K), threads, sink);
}

}  // namespace

Status multiply(DType dtype, int64_t M, int64_t N, int64_t K, AnyMatrix A, AnyMatrix B, int threads,
                TileSink sink) {
  Status status = Status::ok;
  with_type(dtype, [&]<class T>(T) { status = multiply_as<T>(M, N, K, A, B, threads, sink); });
  return status;
}

PYKERN_END_ISA
