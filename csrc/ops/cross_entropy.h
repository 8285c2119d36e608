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
// whole. Gradients, those that are given, need dloss, the gradient of each row's loss.
//   x, dx [M, K]   weight, dweight [V, K]   bias, dbias [V]   target, loss, dloss [M]
// A bfloat16 or float16 x may have a float32 weight and bias, and then float32 gradients of them.
struct LinearCrossEntropy {
  Tensor x, weight, bias, target;
  Tensor loss, dloss, dx, dweight, dbias;
  CrossEntropyOptions options;
  bool tf32 = false;
};

void check(const CrossEntropyForward& op);
void check(const CrossEntropyBackward& op);
void check(const LinearCrossEntropy& op);

// The options, and every label: 0 <= y < V or ignore_index. Labels on a GPU are left to the kernel.
void check_labels(const char* op, const Tensor& target, int64_t V,
                  const CrossEntropyOptions& options);

}  // namespace pykern
