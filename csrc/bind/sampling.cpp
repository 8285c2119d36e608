#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kSample = "sample";

static void sample(py::handle logits, py::handle seeds, py::handle draws, py::handle history,
                   py::handle counts, py::handle ids, double temperature, int64_t top_k,
                   double top_p, double min_p, double repetition_penalty) {
  const Borrowed logits_(logits, kSample, "logits"), seeds_(seeds, kSample, "seeds"),
      draws_(draws, kSample, "draws"), ids_(ids, kSample, "ids");
  const Optional history_(history, kSample, "history"), counts_(counts, kSample, "counts");
  const Sample op{logits_,
                  seeds_,
                  draws_,
                  history_,
                  counts_,
                  ids_,
                  {temperature, top_p, min_p, repetition_penalty, top_k}};
  PYKERN_RUN(sample, op, op.logits);
}

void bind_sampling(py::module_& m) {
  using py::arg;
  m.def("sample", sample, arg("logits"), arg("seeds"), arg("draws"), arg("history"), arg("counts"),
        arg("ids"), py::kw_only(), arg("temperature"), arg("top_k"), arg("top_p"), arg("min_p"),
        arg("repetition_penalty"));
}

}  // namespace pykern
