// cross_entropy: one loss per row x of logits [..., V] with label y, e = label_smoothing, z =
// z_loss
//   lse = log sum exp(x)    loss = lse - (1 - e) x[y] - e mean(x) + z lse^2, 0 where y is ignored
//   dx[j] = dloss ((1 + 2 z lse) exp(x[j] - lse) - (1 - e) [j == y] - e / V)
// -inf excludes a class. A row of nothing else has loss inf, lse -inf and gradient 0.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
};

// lse is stat or float64; the gradient has its full accuracy with float64, see the kernel.
struct CrossEntropyForward {
  Tensor logits, target, loss, lse;
  CrossEntropyOptions options;
};

struct CrossEntropyBackward {
  Tensor logits, target, lse, dloss, dlogits;  // dlogits may be logits
  CrossEntropyOptions options;
};

// linear_cross_entropy: the same loss for the logits x weight^T + bias, which never exist as a
// whole
//   x [M, K]   weight [V, K]   bias [V]   target, loss, lse [M]
struct LinearCrossEntropyForward {
  Tensor x, weight, bias, target, loss, lse;
  CrossEntropyOptions options;
};

struct LinearCrossEntropyBackward {
  Tensor x, weight, bias, target, lse, dloss;
  Tensor dx, dweight, dbias;  // those not wanted are not given
  CrossEntropyOptions options;
};

void check(const CrossEntropyForward& op);
void check(const CrossEntropyBackward& op);
void check(const LinearCrossEntropyForward& op);
void check(const LinearCrossEntropyBackward& op);

// The options, and every label: 0 <= y < V or ignore_index. Labels on a GPU are left to the kernel.
void check_labels(const char* op, const Tensor& target, int64_t V,
                  const CrossEntropyOptions& options);

}  // namespace pykern
