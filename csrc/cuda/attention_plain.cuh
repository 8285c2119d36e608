// A tile of queries by keys by FMA: 256 threads as 16 x 16. Thread (r, c) has the pairs of V
// neighbouring queries from r V on with the keys c, c + 16, c + 32, ..., those whose dropout one
// call of Philox decides; V is 4 for float, 2 for double. Products run through shared memory in
// chunks of their width, so head sizes are loops.
//
// Results of a block are V neighbouring rows a thread, by V neighbouring columns of each panel of
// 16 V. A row's sum is taken tile by tile, in the order of the keys (or queries) of a tile.
#pragma once
#include "cuda/attention_plain.h"

namespace pykern::cuda {

constexpr int kSide = 16, kTileThreads = kSide * kSide;

// Rows that a block owns, queries or keys.
template <class C>
constexpr int kOwned = kSide * kPack<C>;
// Panels of a result, each as wide. Those of up to 128 numbers leave room for a second block.
inline bool is_wide(int width) { return width > kMostHeadSize / 2; }
template <class C, bool wide>
constexpr int kPanels = kMostHeadSize / (wide ? 1 : 2) / kOwned<C>;
template <class C>
constexpr int kDepth = 8 * kPack<C>;  // numbers of each row in shared memory: 128 bytes

// owns_keys: the block's results are those of the tile's keys, else of its queries; the others are
// summed over.
template <class C, int keys, bool owns_keys>
struct PlainTile {
  static constexpr int V = kPack<C>, kQueries = kOwned<C>, kEach = keys / kSide;
  static constexpr int kOthers = owns_keys ? kQueries : keys;
  static_assert(!owns_keys || keys == kOwned<C>);
  union {
    struct {
      C query_rows[kQueries][kDepth<C> + V], key_rows[keys][kDepth<C> + V];
    } chunk;
    C panel[kOthers][kOwned<C>];  // of the others' rows
  };
  C weights[kOthers][kOwned<C> + V];
  alignas(8) uint16_t sight[kQueries][kEach];  // the keys that a query sees, a bit each
};

// Kept, as t0 in the kernels: what follows from them is computed again in each tile; held over the
// loop it would take fifty registers.
__device__ __forceinline__ int side_row() { return kept(threadIdx.x) / kSide; }
__device__ __forceinline__ int side_column() { return kept(threadIdx.x) % kSide; }

// Rows from `from` on, null from `behind` on.
template <class T>
__device__ __forceinline__ auto rows_at(const T* rows, int64_t stride, int from, int behind) {
  return [=](int i) { return from + i < behind ? rows + (from + i) * stride : nullptr; };
}

template <class C, int V>
__device__ __forceinline__ void put(C* to, const Pack<C, V>& pack) {
  typename Pack<C, V>::Word word;
  memcpy(&word, &pack, sizeof word);
  *reinterpret_cast<typename Pack<C, V>::Word*>(to) = word;
}

// Numbers [first, first + width) of the tile's rows as lines of shared memory, 0 from `end` on and
// where row_at(i) is null.
template <class T, int width, class C, int rows, int line, class RowAt>
__device__ __forceinline__ void stage(C (&to)[rows][line], const RowAt& row_at, int first, int end,
                                      bool words) {
  constexpr int V = kPack<C>, kPerLine = width / V;
  static_assert(rows * kPerLine % kTileThreads == 0);
#pragma unroll
  for (int i = 0; i < rows * kPerLine / kTileThreads; ++i) {
    const int row = (i * kTileThreads + threadIdx.x) / kPerLine;
    const int at = threadIdx.x % kPerLine * V;
    const T* from = row_at(row);
    Pack<C, V> pack;
    load<T>(from + first + at, from ? end - first - at : 0, words, pack.of);
    put(&to[row][at], pack);
  }
}

// s = products of this thread's queries with its keys, each `width` numbers
template <class T, class Tile, class C, int V, int m, class QueryAt, class KeyAt>
__device__ __forceinline__ void tile_products(Tile& shared, const QueryAt& query_at,
                                              const KeyAt& key_at, int width, bool words,
                                              C (&s)[V][m]) {
#pragma unroll
  for (int i = 0; i < V; ++i)
#pragma unroll
    for (int j = 0; j < m; ++j) s[i][j] = 0;
  const int row = side_row() * V, column = side_column();
  for (int first = 0; first < width; first += kDepth<C>) {
    __syncthreads();  // what was there has been read
    stage<T, kDepth<C>>(shared.chunk.query_rows, query_at, first, width, words);
    stage<T, kDepth<C>>(shared.chunk.key_rows, key_at, first, width, words);
    __syncthreads();
#pragma unroll 1  // 64 products each; two would not leave dk and dv their registers
    for (int d = 0; d < kDepth<C>; d += V) {
      Pack<C, V> a[V], b;
#pragma unroll
      for (int i = 0; i < V; ++i) read(&shared.chunk.query_rows[row + i][d], V, true, a[i]);
#pragma unroll
      for (int j = 0; j < m; ++j) {
        read(&shared.chunk.key_rows[column + j * kSide][d], V, true, b);
#pragma unroll
        for (int i = 0; i < V; ++i)
#pragma unroll
          for (int u = 0; u < V; ++u) s[i][j] = fma(a[i].of[u], b.of[u], s[i][j]);
      }
    }
  }
}

// ---- weights in shared memory, for the product with the others' rows

// Lines of the others, columns of the owned.
template <class C, int lines, int m>
__device__ __forceinline__ void put_by_key(C (&to)[lines][kOwned<C> + kPack<C>],
                                           const C (&w)[kPack<C>][m]) {
  constexpr int V = kPack<C>;
#pragma unroll
  for (int j = 0; j < m; ++j) {
    Pack<C, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.of[i] = w[i][j];
    put(&to[side_column() + j * kSide][side_row() * V], pack);
  }
}
template <class C, int m>
__device__ __forceinline__ void put_by_query(C (&to)[kOwned<C>][kOwned<C> + kPack<C>],
                                             const C (&w)[kPack<C>][m]) {
#pragma unroll
  for (int i = 0; i < kPack<C>; ++i)
#pragma unroll
    for (int j = 0; j < m; ++j) to[side_row() * kPack<C> + i][side_column() + j * kSide] = w[i][j];
}

// Bit j of seen[i]: query i of this thread sees its key j.
template <class Tile, int V>
__device__ __forceinline__ void put_sight(Tile& shared, const unsigned (&seen)[V]) {
  const int row = side_row() * V, half = threadIdx.x % kWarp / kSide * kSide;
#pragma unroll
  for (int i = 0; i < V; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kEach; ++j) {
      const unsigned all = __ballot_sync(kAllLanes, seen[i] >> j & 1);
      if (side_column() == 0) shared.sight[row + i][j] = static_cast<uint16_t>(all >> half);
    }
}

// acc += sum over lines [begin, end), in order, of weights times panel. partly: pairs that are not
// seen are left out, for 0 times infinity or NaN would be NaN.
template <bool partly, class C, int keys, bool owns_keys, int lines, int V>
__device__ __forceinline__ void panel_product(const PlainTile<C, keys, owns_keys>& shared,
                                              const C (&weights)[lines][kOwned<C> + kPack<C>],
                                              int begin, int end, C (&acc)[V][V]) {
  const int row = side_row() * V, column = side_column() * V;
  for (int first = begin; first < end; first += kSide) {
    unsigned seen[V] = {};
    if constexpr (partly && !owns_keys)
#pragma unroll
      for (int i = 0; i < V; ++i) seen[i] = shared.sight[row + i][first / kSide];
#pragma unroll 4
    for (int n = 0; n < kSide; ++n) {
      Pack<C, V> w, x;
      read(&weights[first + n][row], V, true, w);
      read(&shared.panel[first + n][column], V, true, x);
      unsigned piece = 0;
      if constexpr (partly && owns_keys)
        piece = shared.sight[first + n][row / kSide] >> row % kSide;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool sees = !partly || (owns_keys ? piece >> i & 1 : seen[i] >> n & 1);
#pragma unroll
        for (int u = 0; u < V; ++u)
          if (sees) acc[i][u] = fma(w.of[i], x.of[u], acc[i][u]);
      }
    }
  }
}

// sum[panel] = sum[panel] rescale + weights times the others' rows, which are `width` wide. `run`
// of them are summed at a time; with fewer than all, rescale is 1.
template <class T, int run, class Tile, class C, int lines, int V, int panels, class RowAt>
__device__ __forceinline__ void add_rows(Tile& shared,
                                         const C (&weights)[lines][kOwned<C> + kPack<C>],
                                         const RowAt& row_at, int width, bool words, bool partly,
                                         const C (&rescale)[V], C (&sum)[panels][V][V]) {
#pragma unroll
  for (int panel = 0; panel < panels; ++panel) {
    if (panel * kOwned<C> >= width) continue;
    __syncthreads();  // what was there has been read, and the weights are written
    stage<T, kOwned<C>>(shared.panel, row_at, panel * kOwned<C>, width, words);
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < lines; first += run) {
      C acc[V][V] = {};
      if (partly)
        panel_product<true>(shared, weights, first, first + run, acc);
      else
        panel_product<false>(shared, weights, first, first + run, acc);
#pragma unroll
      for (int i = 0; i < V; ++i)
#pragma unroll
        for (int u = 0; u < V; ++u) sum[panel][i][u] = fma(sum[panel][i][u], rescale[i], acc[i][u]);
    }
  }
}

// Rows of a thread's results, those of the block that there are.
template <class T, class C, int V, int panels, class Scale>
__device__ __forceinline__ void store_rows(T* first, int64_t stride, int count, int width,
                                           bool words, const Scale& scale,
                                           const C (&sum)[panels][V][V]) {
  const int row = side_row() * V, column = side_column() * V;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (row + i >= count) break;
    T* to = first + (row + i) * stride + column;
#pragma unroll
    for (int panel = 0; panel < panels; ++panel) {
      C scaled[V];
#pragma unroll
      for (int u = 0; u < V; ++u) scaled[u] = sum[panel][i][u] * scale(i);
      store(to + panel * kOwned<C>, width - panel * kOwned<C> - column, words, scaled);
    }
  }
}

// ---- scores and weights of a thread's pairs

// This thread's pairs: V queries from t on by every kSide-th key of a tile.
template <class T>
struct PairsOf {
  const Scores<T>& x;
  const Place& at;
  int b, h, t, tile;
  int key;      // the first, within the tile
  bool partly;  // window, mask or the end of the rows hide some pair

  __device__ __forceinline__ int position(int j) const { return tile * kKeys + key + j * kSide; }
  __device__ __forceinline__ uint64_t visible(int i) const {
    return (partly ? x.visible(at, b, h, t + i, tile) : ~uint64_t{0}) >> key;
  }
  __device__ __forceinline__ uint32_t kept(int i) const {
    return keep_bits(x.dropout, *x.dropout.seed, b, h, t + i, tile, key % kSide) >> key / kSide;
  }
  // Whether some pair of the tile may be hidden, a bias of -infinity included.
  __device__ __forceinline__ bool hides() const { return partly || x.bias.data; }

  // Products become scores, -infinity where the query does not see the key.
  template <class C, int V, int m>
  __device__ __forceinline__ void score(C (&s)[V][m], unsigned (&seen)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const RowOptions<T> row(x, at, b, h, t + i);
      const uint64_t word = visible(i);
      seen[i] = 0;
#pragma unroll
      for (int j = 0; j < m; ++j) {
        const bool sees = word >> j * kSide & 1;
        s[i][j] = sees ? row.score(x, s[i][j], position(j)) : C(-INFINITY);
        if (sees && !(row.bias && s[i][j] == C(-INFINITY))) seen[i] |= 1u << j;
      }
    }
  }

  // s = q k^T becomes Z P, and dp = dout v^T becomes dS; with through_cap that of scale q k^T.
  // facts are those of query 0.
  template <bool through_cap, class C, int V, int m>
  __device__ __forceinline__ void weigh(const RowFacts<C>* facts, C (&s)[V][m], C (&dp)[V][m],
                                        unsigned (&seen)[V]) const {
    const bool drops = x.dropout.threshold != 0;
    const C rest = static_cast<C>(x.dropout.factor);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const RowOptions<T> row(x, at, b, h, t + i);
      const uint64_t word = visible(i);
      RowFacts<C> f{C(INFINITY), C(1), C(0)};
      if (t + i < at.queries) f = facts[t + i];
      const uint32_t keep = drops ? kept(i) : ~0u;
      seen[i] = 0;
#pragma unroll
      for (int j = 0; j < m; ++j) {
        bool sees = word >> j * kSide & 1;
        const C dot = s[i][j];
        const C y = sees ? row.score(x, dot, position(j)) : C(-INFINITY);
        sees = sees && !(row.bias && y == C(-INFINITY));
        const C p = power2(y - f.shift) * f.factor;
        C z = p, gradient = dp[i][j];
        if (drops) {
          const bool stays = keep >> j & 1;
          gradient = stays ? product(gradient, rest) : C(0);
          z = stays ? p * rest : C(0);
        }
        C ds = p * (gradient - f.delta);
        if (through_cap && x.cap != 0) {
          const C tangent = hyperbolic_tangent_for<T>(product(dot, x.scale));
          ds *= fma(-tangent, tangent, C(1));
        }
        s[i][j] = sees ? z : C(0);
        dp[i][j] = sees ? ds : C(0);
        if (sees) seen[i] |= 1u << j;
      }
    }
  }
};

// ---- which block has what

struct BlockRows {
  int b, head, first;  // b < 0: there is no such block
};

// Block `block` of those of all sequences, whose rows are the queries or the keys.
template <int rows>
__device__ __forceinline__ BlockRows block_rows(const int32_t* offsets, int64_t step, int sequences,
                                                int total, int heads, int block) {
  const int head = blockIdx.x % heads;
  if (!offsets) return {block % sequences, head, block / sequences * rows};
  const BlockPlace found = ragged_block<rows>(offsets, step, sequences, total, block);
  return {found.sequence, head, found.first};
}

}  // namespace pykern::cuda
