#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kDecode = "attention_with_kvcache";

static void attention_with_kvcache(py::handle q, py::handle k_cache, py::handle v_cache,
                                   py::handle k, py::handle v, py::handle cache_seqlens,
                                   py::handle rotary_cos, py::handle rotary_sin, py::handle out,
                                   py::handle lse, bool causal, double scale,
                                   bool rotary_interleaved, int64_t left, int64_t right,
                                   double softcap, py::handle alibi_slopes, py::handle sinks,
                                   py::handle block_table, py::handle cache_leftpad) {
  const Borrowed q_(q, kDecode, "q"), k_cache_(k_cache, kDecode, "k_cache"),
      v_cache_(v_cache, kDecode, "v_cache");
  const Optional k_(k, kDecode, "k"), v_(v, kDecode, "v");
  const Borrowed cache_seqlens_(cache_seqlens, kDecode, "cache_seqlens");
  const Optional rotary_cos_(rotary_cos, kDecode, "rotary_cos"),
      rotary_sin_(rotary_sin, kDecode, "rotary_sin");
  const Borrowed out_(out, kDecode, "out");
  const Optional lse_(lse, kDecode, "lse");
  const Optional padding_(cache_leftpad, kDecode, "cache_leftpad"),
      table_(block_table, kDecode, "block_table"), slopes_(alibi_slopes, kDecode, "alibi_slopes"),
      sinks_(sinks, kDecode, "sinks");
  DecodeForward op;
  op.q = q_, op.k_cache = k_cache_, op.v_cache = v_cache_, op.k = k_, op.v = v_;
  op.cache_seqlens = cache_seqlens_, op.cache_leftpad = padding_, op.block_table = table_;
  op.rotary_cos = rotary_cos_, op.rotary_sin = rotary_sin_;
  op.rotary_interleaved = rotary_interleaved;
  op.alibi_slopes = slopes_, op.sinks = sinks_;
  op.out = out_, op.lse = lse_;
  op.left = left, op.right = causal && right >= -1 ? 0 : right;
  op.scale = scale, op.softcap = softcap;
  PYKERN_RUN(attention_with_kvcache, op, op.q);
}

void bind_decode(py::module_& m) {
  using py::arg;
  m.def("attention_with_kvcache", attention_with_kvcache, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k"), arg("v"), arg("cache_seqlens"), arg("rotary_cos"), arg("rotary_sin"), arg("out"),
        arg("lse"), py::kw_only(), arg("causal"), arg("scale"), arg("rotary_interleaved"),
        arg("window_left") = -1, arg("window_right") = -1, arg("softcap") = 0.0,
        arg("alibi_slopes") = py::none(), arg("sinks") = py::none(),
        arg("block_table") = py::none(), arg("cache_leftpad") = py::none());
}

}  // namespace pykern
