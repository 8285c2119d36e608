#include "ops/embedding.h"

#include "ops/check.h"

namespace pykern {

// table [V, D] and rows [..., D] of one dtype, ids [...] within the table
static void check_lookup(Arg table, Arg ids, Arg rows) {
  const Checker c{"embedding"};
  const Tensor& t = table.t;
  c.floating(table);
  c.rank(table, 2, "[V, D]");
  c.same_dtype(rows, table);
  PYKERN_CHECK(type, ids.t.dtype == DType::i64 || ids.t.dtype == DType::i32, c.op,
               ": ids has dtype ", name(ids.t.dtype), ", expected int64 or int32");
  c.same_device(ids, table);
  c.rows_of(ids, rows);
  c.size(rows, rows.t.rank - 1, t.size[1], "D");
  c.unit_last(table);
  c.unit_last(rows);
  c.indices(ids, t.size[0], table.name);
}

static void check_output(Arg output, Arg ids, Arg input) {
  const Checker c{"embedding"};
  c.output(output);
  c.disjoint({output}, {ids, input});
}

void check(const EmbeddingForward& op) {
  const Arg weight{"weight", op.weight}, ids{"ids", op.ids}, out{"out", op.out};
  check_lookup(weight, ids, out);
  check_output(out, ids, weight);
}

void check(const EmbeddingBackward& op) {
  const Arg ids{"ids", op.ids}, dout{"dout", op.dout}, dweight{"dweight", op.dweight};
  check_lookup(dweight, ids, dout);
  check_output(dweight, ids, dout);
}

}  // namespace pykern
