// What the kernels of decode share: where keys lie, which block takes what, and how sums over parts
// of the keys become rows.
//
// Parts begin at fixed keys, counted from a sequence's first: 64 of 256 keys, 64 of 512, and so on.
// What a row sees of a part, (m, l, out), starts from nothing and is folded into what it saw of the
// parts before, in order, whoever does it: no bit depends on the batch, the capacity or the pages.
#pragma once
#include "cuda/attention.cuh"
#include "ops/decode.h"

namespace pykern::cuda {

constexpr int kPartKeys = 256;  // of the first parts
constexpr int kPartsOfASize = 64;

__host__ __device__ inline int part_begin(int part) {
  const int level = part / kPartsOfASize;
  const int before = (kPartsOfASize << level) - kPartsOfASize;  // in units of kPartKeys
  return kPartKeys * (before + (part % kPartsOfASize << level));
}
__host__ __device__ inline int part_of(int key) {
  int level = 0;
  while (key >= part_begin(kPartsOfASize * (level + 1))) ++level;
  const int first = kPartsOfASize * level;
  return first + (key - part_begin(first)) / (kPartKeys << level);
}

// Where the slots of a sequence are: rows of its own, or of pages.
struct Slots {
  const int32_t* table = nullptr;  // null: no pages
  int64_t table_batch = 0, table_step = 0;
  int page = 0;

  struct At {
    int64_t batch;
    int row;
  };
  __device__ __forceinline__ At at(int b, int slot) const {
    if (!table) return {b, slot};
    const int i = static_cast<unsigned>(slot) / static_cast<unsigned>(page);
    return {table[b * table_batch + i * table_step], slot - i * page};
  }
  // Whether `count` slots from this one on are rows that follow each other.
  __device__ __forceinline__ bool together(const At& first, int count) const {
    return !table || first.row + count <= page;
  }
};
inline Slots slots_of(const DecodeForward& op) {
  const Tensor& t = op.block_table;
  if (!t.given) return {};
  return {static_cast<const int32_t*>(t.data), t.stride[0], t.stride[1],
          static_cast<int>(op.k_cache.size[2])};
}

struct Lengths {  // int32 [B]
  const int32_t* data = nullptr;
  int64_t step = 0;

  __device__ __forceinline__ int at(int b) const { return data ? data[b * step] : 0; }
};
inline Lengths lengths_of(const Tensor& t) {
  return {t.given ? static_cast<const int32_t*>(t.data) : nullptr, t.stride[0]};
}

// Of int8 caches: a float for each row, [pages, G, page]. The row is its numbers times that.
struct RowScales {
  float* data = nullptr;
  int64_t page = 0, head = 0, slot = 0;

  __device__ __forceinline__ float& at(int64_t batch, int g, int row) const {
    return data[batch * page + g * head + row * slot];
  }
};
inline RowScales row_scales(const Tensor& t) {
  if (!t.given) return {};
  return {static_cast<float*>(t.data), t.stride[0], t.stride[1], t.stride[2]};
}
// What is computed of int8 caches: the dtypes of a session
template <class T>
constexpr bool kTakesInt8 = std::is_same_v<T, float> || std::is_same_v<T, bf16>;
// A row of such a cache
template <class T>
__device__ __forceinline__ const int8_t* int8_row(const HeadRows<T>& rows, int64_t batch, int g,
                                                  int row) {
  return reinterpret_cast<const int8_t*>(rows.data) + (rows.at(batch, g, row) - rows.data);
}

// The kernel before the attention: new keys and values go to their slots, rotated queries to
// `rotated` [B, H, T, D], rows `rotated_row` apart. Each sequence is looked at first: keys[b] is
// how many it holds then, or -1 if a length, page or position is out of range; then nothing of it
// is written.
struct Appended {
  int* keys;
  int* tickets;  // become 0
  int64_t tickets_per_sequence;
  void* rotated;
  int64_t rotated_row;
};
void append(const DecodeForward& op, const Appended& to, Stream stream);

template <class T>
struct Decode {
  using C = Compute<T>;
  Scores<T> scores;
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  Stats lse;
  RowScales k_scale, v_scale;
  Slots slots;
  Lengths padding;
  const int* keys;        // of each sequence; -1: its rows are NaN
  int G, rows;            // key heads; rows of one: its query heads and their queries
  int row_blocks, tasks;  // a task: rows of one block of a sequence and key head
  int splits;             // blocks of a task, which share its parts; 1: it takes them in order
  int* tickets;           // [tasks], 0
  C* partial;             // [tasks][partials][rows, each of `width`, then m and l of each]
  int partials, width, partial_rows;
  bool k_vectors, v_vectors, out_vectors, q_pairs;

  __device__ __forceinline__ C* partial_of(int task, int i) const {
    const int64_t size = int64_t(partial_rows) * (width + kPack<C>);
    return partial + (int64_t(task) * partials + i) * size;
  }
};

// A task, and which keys and parts some row of it sees.
struct Task {
  Place at;
  int index, b, g, first_row, rows;
  int begin, end;         // keys
  int first_part, parts;  // at least one, which may have no keys

  template <class T>
  __device__ __forceinline__ Task(const Decode<T>& a, int index, int most_rows) : index(index) {
    const int head = index / a.row_blocks;
    b = head / a.G, g = head % a.G;
    first_row = (index - head * a.row_blocks) * most_rows;
    rows = a.rows - first_row < most_rows ? a.rows - first_row : most_rows;
    at = {b, 0, 0, a.scores.queries, a.keys[b]};
    begin = end = first_part = 0, parts = 1;
    if (at.keys < 0) return;
    const int from = a.scores.first_key(at, t(a, 0)), to = a.scores.end_key(at, t(a, rows - 1));
    if (from >= to) return;
    begin = from, end = to;
    first_part = part_of(begin);
    parts = part_of(end - 1) - first_part + 1;
  }
  // Rows are the query heads of query 0, those of query 1, ...; rows behind the last are the last.
  template <class T>
  __device__ __forceinline__ int t(const Decode<T>& a, int row) const {
    return (first_row + (row < rows ? row : rows - 1)) / a.scores.group;
  }
  template <class T>
  __device__ __forceinline__ int h(const Decode<T>& a, int row) const {
    return (g + 1) * a.scores.group + first_row + (row < rows ? row : rows - 1) -
           (t(a, row) + 1) * a.scores.group;
  }
};

// ---- sums of rows

// What a warp saw of a part.
template <class C, int kRows, int kWidth>
struct WarpSums {
  static constexpr int kLine = kWidth + 32 / sizeof(C);  // lines begin in different banks
  alignas(16) C out[kRows][kLine];
  C m[kRows], l[kRows];
};

// A pack of a row's sum, with the row's maximum and sum of weights.
template <class C>
struct RowSum {
  static constexpr int W = kPack<C>;
  C m = -INFINITY, l = 0, out[W] = {};

  // Adds what the row saw of a later part. One of which it saw nothing changes no bit, and the
  // first of which it saw something is taken as it is.
  __device__ __forceinline__ void fold(const RowSum& part) {
    if (part.l == 0) return;
    if (l == 0) {
      *this = part;
      return;
    }
    const C top = larger(m, part.m);
    const C before = power2(m - top), now = power2(part.m - top);
    m = top;
    l = fma(l, before, product(part.l, now));
#pragma unroll
    for (int j = 0; j < W; ++j) out[j] = fma(out[j], before, product(part.out[j], now));
  }
  template <class T>
  __device__ __forceinline__ void read(const Decode<T>& a, const C* partial, int row, int pack) {
    const C* stats = partial + a.partial_rows * a.width + row * W;
    load(partial + row * a.width + pack * W, W, true, out);
    m = stats[0], l = stats[1];
  }
  template <class T>
  __device__ __forceinline__ void write(const Decode<T>& a, C* partial, int row, int pack) const {
    C* stats = partial + a.partial_rows * a.width + row * W;
    store(partial + row * a.width + pack * W, W, true, out);
    if (pack == 0) stats[0] = m, stats[1] = l;
  }
};

// The sums of all warps, in their order.
template <int kWarps, class C, class SumsOf>
__device__ __forceinline__ RowSum<C> over_warps(const SumsOf& sums_of, int row, int pack, C) {
  RowSum<C> sum;
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (sums_of(w).l[row] != 0) sum.m = larger(sum.m, sums_of(w).m[row]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const auto& of = sums_of(w);
    if (of.l[row] == 0) continue;
    const C factor = power2(of.m[row] - (sum.m == C(-INFINITY) ? C(0) : sum.m));
    C out[RowSum<C>::W];
    load(&of.out[row][pack * RowSum<C>::W], RowSum<C>::W, true, out);
    sum.l = fma(of.l[row], factor, sum.l);
#pragma unroll
    for (int j = 0; j < RowSum<C>::W; ++j) sum.out[j] = fma(out[j], factor, sum.out[j]);
  }
  return sum;
}

// out = sum / l, lse = m + log l, after the sink: one more weight, with no value
template <class T>
__device__ __forceinline__ void finish(const Decode<T>& a, const Task& task, int row, int pack,
                                       RowSum<Compute<T>> sum) {
  using C = Compute<T>;
  constexpr int W = RowSum<C>::W;
  const int h = task.h(a, row), t = task.t(a, row);
  const C sink = a.scores.sink(h);
  if (sink != C(-INFINITY)) {
    RowSum<C> weight;
    weight.m = sink, weight.l = 1;
    sum.fold(weight);
  }
  const C inverse = sum.l == 0 ? C(0) : 1 / sum.l;  // a row that sees no key is all zeros
#pragma unroll
  for (int j = 0; j < W; ++j) sum.out[j] *= inverse;
  const int first = pack * W;
  store(a.out.at(task.b, h, t) + first, a.scores.E - first, a.out_vectors, sum.out);
  if (pack > 0 || !a.lse.data) return;
  const double bits = static_cast<double>(sum.m) + static_cast<double>(log2(sum.l));
  a.lse.set(task.b, h, t, sum.l == 0 ? -INFINITY : bits * kNatsPerBit);
}

// body(row, pack) for the packs of a task, over the block's threads: each has the same ones always
template <class T, class Body>
__device__ __forceinline__ void each_pack(const Decode<T>& a, const Task& task, const Body& body) {
  const int packs = a.width / kPack<Compute<T>>;
  for (int i = threadIdx.x; i < task.rows * packs; i += blockDim.x) body(i / packs, i % packs);
}

struct BlockShared {
  int last;
};

// A block takes its parts of a task: sum(begin, end) leaves what the warps saw of these keys where
// sums_of(warp) finds it.
template <int kWarps, class T, class Sum, class SumsOf>
__device__ __forceinline__ void take_parts(const Decode<T>& a, const Task& task, int split,
                                           BlockShared& shared, const Sum& sum,
                                           const SumsOf& sums_of) {
  using C = Compute<T>;
  if (split >= task.parts) return;
  if (task.at.keys < 0) {
    each_pack(a, task, [&](int row, int pack) {
      RowSum<C> none;
      none.l = NAN;
      for (C& x : none.out) x = NAN;
      finish(a, task, row, pack, none);
    });
    return;
  }
  const bool in_order = a.splits == 1;
  for (int i = split; i < task.parts; i += a.splits) {
    // those of many keys, which come last, are begun first
    const int part = in_order ? i : task.parts - 1 - i;
    const int begin = part_begin(task.first_part + part),
              end = part_begin(task.first_part + part + 1);
    sum(begin > task.begin ? begin : task.begin, end < task.end ? end : task.end);
    __syncthreads();  // all warps have left their sums
    each_pack(a, task, [&](int row, int pack) {
      RowSum<C> now = over_warps<kWarps>(sums_of, row, pack, C{});
      if (in_order && i > 0) {
        RowSum<C> before;
        before.read(a, a.partial_of(task.index, (i - 1) % 2), row, pack);
        before.fold(now);
        now = before;
      }
      if (task.parts == 1 || (in_order && i == task.parts - 1))
        finish(a, task, row, pack, now);
      else  // in order there are two sets, as a row's m and l are read by others than their writer
        now.write(a, a.partial_of(task.index, in_order ? i % 2 : part), row, pack);
    });
    __syncthreads();  // the sums have been read
  }
  if (in_order || task.parts == 1) return;

  // The block that comes last adds the parts of all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int blocks = task.parts < a.splits ? task.parts : a.splits;
    shared.last = atomicAdd(a.tickets + task.index, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  each_pack(a, task, [&](int row, int pack) {
    RowSum<C> all;
#pragma unroll 4
    for (int part = 0; part < task.parts; ++part) {
      RowSum<C> now;
      now.read(a, a.partial_of(task.index, part), row, pack);
      all.fold(now);
    }
    finish(a, task, row, pack, all);
  });
}

}  // namespace pykern::cuda
