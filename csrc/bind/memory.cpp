// Asks the kernel for huge pages behind a large array that is about to be written for the first
// time: 2 MiB per page fault instead of 4 KiB. Filling 200 MB of new memory takes a third of the
// time. Only a hint: where it is not followed, nothing changes.
#include "bind/borrow.h"
#include "ops/check.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pykern {

static void huge_pages(py::handle array) {
  const Borrowed array_(array, "huge_pages", "array");
  const Tensor& t = array_;
  PYKERN_CHECK(value, t.device == Device::cpu, "huge_pages: array must be on the CPU");
  Checker{"huge_pages"}.contiguous({"array", t});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t first = (start + page - 1) / page * page;
  const uintptr_t last = (start + count(t) * item_size(t.dtype)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void bind_memory(py::module_& m) { m.def("huge_pages", huge_pages, py::arg("array")); }

}  // namespace pykern
