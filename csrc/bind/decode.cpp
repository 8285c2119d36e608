#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kOp = "attention_with_kvcache";

static void attention_with_kvcache(py::handle q, py::handle k_cache, py::handle v_cache,
                                   py::handle k, py::handle v, py::handle cache_seqlens,
                                   py::handle rotary_cos, py::handle rotary_sin, py::handle out,
                                   py::handle lse, bool causal, double scale,
                                   bool rotary_interleaved) {
  const Borrowed q_(q, kOp, "q"), k_cache_(k_cache, kOp, "k_cache"),
      v_cache_(v_cache, kOp, "v_cache");
  const Optional k_(k, kOp, "k"), v_(v, kOp, "v");
  const Borrowed cache_seqlens_(cache_seqlens, kOp, "cache_seqlens");
  const Optional rotary_cos_(rotary_cos, kOp, "rotary_cos"),
      rotary_sin_(rotary_sin, kOp, "rotary_sin");
  const Borrowed out_(out, kOp, "out"), lse_(lse, kOp, "lse");
  const DecodeForward op{
      q_,          k_cache_, v_cache_, k_,     v_,    cache_seqlens_,    rotary_cos_,
      rotary_sin_, out_,     lse_,     causal, scale, rotary_interleaved};
  PYKERN_RUN(attention_with_kvcache, op, op.q);
}

void bind_decode(py::module_& m) {
  using py::arg;
  m.def("attention_with_kvcache", attention_with_kvcache, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k"), arg("v"), arg("cache_seqlens"), arg("rotary_cos"), arg("rotary_sin"), arg("out"),
        arg("lse"), py::kw_only(), arg("causal"), arg("scale"), arg("rotary_interleaved"));
}

}  // namespace pykern
