// What the process chose: the ISA and the thread count.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace pykern::runtime {

const char* isa();  // the one in use: $PYKERN_ISA, or the best that this processor runs
int panel_width();  // rows of a panel of ops/packed_weight.h, on the ISA in use
bool pairs_bf16();  // whether it multiplies pairs of bfloat16
std::vector<std::pair<std::string, bool>> isas();  // built in, best first; does it run here?

int threads();                // of the next kernel; 1 in a forked child
void set_threads(int count);  // 0: what OpenMP says on the calling thread, as torch sets it

}  // namespace pykern::runtime
