// This ISA's row of the dispatch table.
#include "cpu/tile.h"
#include "runtime/cpu_table.h"

PYKERN_BEGIN_ISA

#define PYKERN_DECLARE(kernel, Op) Status kernel(const Op&, int threads);
PYKERN_OPS(PYKERN_DECLARE)
#undef PYKERN_DECLARE

#define PYKERN_STRING_(x) #x
#define PYKERN_STRING(x) PYKERN_STRING_(x)
#define PYKERN_ENTRY(kernel, Op) .kernel = kernel,
extern const Table kernels;
const Table kernels = {.isa = PYKERN_STRING(PYKERN_ISA),
                       .panel_width = kTileColumns<float>,
                       .pairs_bf16 = kPaired<bf16>,
                       PYKERN_OPS(PYKERN_ENTRY)};

PYKERN_END_ISA
