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

}  // namespace
PYKERN_END_ISA
