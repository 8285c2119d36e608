// A block of rows of forward attention, whatever their number.
#pragma once
#include "cpu/attention_columns.h"
#include "cpu/attention_rows.h"

PYKERN_BEGIN_ISA
namespace {

template <class T>
static int64_t forward_bytes(int64_t D, int64_t E) {
  const int64_t rows = RowMemory<T>::bytes(D, E), columns = ColumnMemory<T>::bytes(D, E);
  return rows > columns ? rows : columns;
}

// Whoever attends for x probably does so for `next` afterwards.
template <class T>
static void expect(Group<T>& x, const Group<T>& next) {
  const int64_t size = next.k_scale ? 1 : sizeof(T);
  const auto first_row = [&](const T* base, int64_t row, int64_t page) {
    return reinterpret_cast<const char*>(base) + offset_of_key(next, row, page, 0) * size;
  };
  x.then_k = first_row(next.k, next.k_row, next.k_page);
  x.then_v = first_row(next.v, next.v_row, next.v_page);
}

// Rows r0 .. r1 - 1 of the group, at most kBlockRows; memory has forward_bytes.
template <class T>
static void forward_block(const Group<T>& x, int64_t r0, int64_t r1, const Results& results,
                          char* memory) {
  if (r1 - r0 <= kFewRows<T>) {
    RowMemory<T> rows(x.D, x.E, memory);
    forward_rows<T>(x, r0, r1, results, rows);
  } else {
    ColumnMemory<T> columns(x.D, x.E, memory);
    forward_columns<T>(x, r0, r1, results, columns);
  }
}

// ---- few rows with many keys, whose parts are dealt to threads

// Numbers in which one part leaves m, l and out of up to kFewRows rows.
template <class T>
static int64_t part_size(int64_t E) {
  return kFewRows<T> * (round_up(E, kTileColumns<T>) + 2);
}

static inline int64_t parts_of(int64_t keys) { return (keys + kPartKeys - 1) / kPartKeys; }

// Whether to deal parts: `tasks` groups of few rows would leave threads without work.
template <class T>
static bool deals_parts(int64_t tasks, int64_t rows, int64_t keys, int threads) {
  return threads > 1 && tasks < 2 * threads && rows <= kFewRows<T> && parts_of(keys) > 1;
}

template <class T>
static void sum_one_part(const Group<T>& x, int64_t part, Compute<T>* to, char* memory_) {
  using C = Compute<T>;
  const RowMemory<T> memory(x.D, x.E, memory_);
  const int n = static_cast<int>(x.rows());
  start_rows(x, 0, n, memory);
  sum_part(x, 0, n, part, keys_of_rows(x, 0, n), memory);
  for (int i = 0; i < n; ++i, to += memory.E_padded + 2) {
    to[0] = memory.m[i], to[1] = memory.l[i];
    memcpy(to + 2, memory.out + i * memory.E_padded, memory.E_padded * sizeof(C));
  }
}

// What forward_block makes of all rows of the group, from its parts.
template <class T>
static void join_parts(const Group<T>& x, const Compute<T>* parts, const Results& results,
                       char* memory_) {
  const RowMemory<T> memory(x.D, x.E, memory_);
  const int n = static_cast<int>(x.rows());
  start_rows(x, 0, n, memory);
  for (int64_t part = 0; part < parts_of(x.S); ++part, parts += part_size<T>(x.E))
    for (int i = 0; i < n; ++i) {
      const Compute<T>* from = parts + i * (memory.E_padded + 2);
      fold_row<T>(from[0], from[1], from + 2, i, memory);
    }
  write_rows(x, 0, n, results, memory);
}

}  // namespace
PYKERN_END_ISA
