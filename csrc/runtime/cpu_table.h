// One table of kernels per ISA.
#pragma once
#include "ops/all.h"

namespace pykern::cpu {

struct Table {
  const char* isa;
  int panel_width;  // of ops/packed_weight.h
  bool pairs_bf16;
#define PYKERN_COLUMN(kernel, Op) Status (*kernel)(const Op&, int threads);
  PYKERN_OPS(PYKERN_COLUMN)
#undef PYKERN_COLUMN
};

}  // namespace pykern::cpu
