// cross_entropy: rows are independent. Forward reads the logits once, backward reads them once and
// writes their gradient.
#include "ops/cross_entropy.h"

#include "cpu/cross_entropy_rows.h"
#include "cpu/parallel.h"

PYKERN_BEGIN_ISA

constexpr int64_t kTask = 32768;  // numbers: some 10 microseconds of exponentials

static int64_t rows_per_task(int64_t V) { return V < kTask ? kTask / (V + 1) + 1 : 1; }

// t [...] as [..., 1], so that its numbers are rows
static Tensor column(Tensor t) {
  t.size[t.rank] = 1;
  t.stride[t.rank] = 1;
  ++t.rank;
  return t;
}

static double number(const Tensor& t, int64_t row) {
  return t.dtype == DType::f64 ? *row_of<double>(t, row) : *row_of<float>(t, row);
}

static void set_number(const Tensor& t, int64_t row, double value) {
  if (t.dtype == DType::f64)
    *row_of<double>(t, row) = value;
  else
    *row_of<float>(t, row) = static_cast<float>(value);
}

Status cross_entropy_forward(const CrossEntropyForward& op, int threads) {
  const int64_t V = row_length(op.logits);
  const Tensor target = column(op.target), loss = column(op.loss), lse = column(op.lse);
  with_type(op.logits.dtype, [&]<class T>(T) {
    parallel_rows(row_count(op.logits), rows_per_task(V), threads,
                  [&](int64_t first, int64_t last, int) {
                    for (int64_t row = first; row < last; ++row) {
                      const int64_t y = *row_of<int64_t>(target, row);
                      RowLoss result = {0, 0};
                      if (y != op.options.ignore_index)
                        result = row_loss(row_of<T>(op.logits, row), V, y, op.options);
                      set_number(loss, row, result.loss);
                      set_number(lse, row, result.lse);
                    }
                  });
  });
  return Status::ok;
}

Status cross_entropy_backward(const CrossEntropyBackward& op, int threads) {
  const int64_t V = row_length(op.logits);
  const Tensor target = column(op.target), dloss = column(op.dloss), lse = column(op.lse);
  with_type(op.logits.dtype, [&]<class T>(T) {
    parallel_rows(row_count(op.logits), rows_per_task(V), threads,
                  [&](int64_t first, int64_t last, int) {
                    for (int64_t row = first; row < last; ++row) {
                      const int64_t y = *row_of<int64_t>(target, row);
                      T* dx = row_of<T>(op.dlogits, row);
                      if (y == op.options.ignore_index)
                        memset(dx, 0, V * sizeof(T));
                      else
                        row_gradient(row_of<T>(op.logits, row), V, V, y, number(lse, row),
                                     number(dloss, row), op.options, dx);
                    }
                  });
  });
  return Status::ok;
}

PYKERN_END_ISA
