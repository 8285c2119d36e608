// Elementwise work on a tensor: its rows in pieces of a few pages, shared among the threads.
#pragma once
#include "cpu/parallel.h"
#include "cpu/rows.h"

PYKERN_BEGIN_ISA
namespace {

// numbers: enough to hide the start of a task, little enough to share
constexpr int64_t kPiece = 4096;

// body(row, first, length) over all rows of x, each cut into pieces
template <class Body>
static void each_piece(const Tensor& x, int threads, const Body& body, int64_t piece = kPiece) {
  const int64_t length = row_length(x), pieces = (length + piece - 1) / piece;
  const int64_t rows = row_count(x);
  if (length == 0) return;
  const int64_t group = pieces > 1 ? 1 : (piece + length - 1) / length;  // short rows together
  parallel_rows(rows * pieces, group, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = i % pieces * piece;
      body(i / pieces, start, start + piece < length ? piece : length - start);
    }
  });
}

}  // namespace
PYKERN_END_ISA
