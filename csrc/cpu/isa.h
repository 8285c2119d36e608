// Everything under csrc/cpu is compiled once per ISA, inside this namespace.
#pragma once
#ifndef PYKERN_ISA
#error "compile csrc/cpu with -DPYKERN_ISA=<base|v3|v4|v4_bf16>"
#endif
#define PYKERN_BEGIN_ISA  \
  namespace pykern::cpu { \
  namespace PYKERN_ISA {
#define PYKERN_END_ISA \
  }                    \
  }
