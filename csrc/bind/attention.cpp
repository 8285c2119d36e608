#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kAttention = "attention";

// The arguments that forward, backward and weights share, borrowed for the length of one call.
struct BorrowedInputs {
  Borrowed q, k, v;
  Optional mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seed;
  int64_t left, right;
  double scale, softcap, dropout_p;

  void fill(AttentionInputs& op) const {
    op.q = q, op.k = k, op.v = v, op.mask = mask, op.bias = bias;
    op.alibi_slopes = alibi_slopes, op.sinks = sinks, op.seed = seed;
    op.cu_seqlens_q = cu_seqlens_q, op.cu_seqlens_k = cu_seqlens_k;
    op.left = left, op.right = right;
    op.scale = scale, op.softcap = softcap, op.dropout_p = dropout_p;
  }
};

static void attention_forward(const BorrowedInputs& inputs, py::handle out, py::handle lse) {
  const Borrowed out_(out, kAttention, "out");
  const Optional lse_(lse, kAttention, "lse");
  AttentionForward op;
  inputs.fill(op);
  op.out = out_, op.lse = lse_;
  PYKERN_RUN(attention_forward, op, op.q);
}

static void attention_backward(const BorrowedInputs& inputs, py::handle out, py::handle lse,
                               py::handle dout, py::handle dlse, py::handle dq, py::handle dk,
                               py::handle dv, py::handle dbias, py::handle dsinks) {
  const Borrowed out_(out, kAttention, "out"), lse_(lse, kAttention, "lse"),
      dout_(dout, kAttention, "dout");
  const Optional dlse_(dlse, kAttention, "dlse"), dbias_(dbias, kAttention, "dbias");
  const Optional dsinks_(dsinks, kAttention, "dsinks");
  const Borrowed dq_(dq, kAttention, "dq"), dk_(dk, kAttention, "dk"), dv_(dv, kAttention, "dv");
  AttentionBackward op;
  inputs.fill(op);
  op.out = out_, op.lse = lse_, op.dout = dout_, op.dlse = dlse_;
  op.dq = dq_, op.dk = dk_, op.dv = dv_, op.dbias = dbias_, op.dsinks = dsinks_;
  PYKERN_RUN(attention_backward, op, op.q);
}

static void attention_weights(const BorrowedInputs& inputs, py::handle lse, py::handle rows,
                              py::handle weights) {
  const Borrowed lse_(lse, kAttention, "lse"), weights_(weights, kAttention, "weights");
  const Optional rows_(rows, kAttention, "rows");
  AttentionWeights op;
  inputs.fill(op);
  op.lse = lse_, op.rows = rows_, op.weights = weights_;
  PYKERN_RUN(attention_weights, op, op.q);
}

static void attention_dropout(py::handle seed, py::handle keep, double dropout_p) {
  const Borrowed seed_(seed, kAttention, "seed"), keep_(keep, kAttention, "keep");
  const AttentionDropout op{seed_, keep_, dropout_p};
  PYKERN_RUN(attention_dropout, op, op.keep);
}

// kernel(inputs, results...) as a function of the inputs, the results and the options. causal
// limits the window to nothing on the right.
template <class... Handles, class... Args>
static void define(py::module_& m, const char* name,
                   void (*kernel)(const BorrowedInputs&, Handles...), const Args&... args) {
  using py::arg, py::handle;
  const py::none none;
  m.def(
      name,
      [kernel](handle q, handle k, handle v, handle mask, handle bias, Handles... results,
               bool causal, double scale, int64_t left, int64_t right, double softcap,
               handle alibi_slopes, handle sinks, double dropout_p, handle seed,
               handle cu_seqlens_q, handle cu_seqlens_k) {
        kernel({{q, kAttention, "q"},
                {k, kAttention, "k"},
                {v, kAttention, "v"},
                {mask, kAttention, "mask"},
                {bias, kAttention, "bias"},
                {alibi_slopes, kAttention, "alibi_slopes"},
                {sinks, kAttention, "sinks"},
                {cu_seqlens_q, kAttention, "cu_seqlens_q"},
                {cu_seqlens_k, kAttention, "cu_seqlens_k"},
                {seed, kAttention, "seed"},
                left,
                causal && right >= -1 ? 0 : right,
                scale,
                softcap,
                dropout_p},
               results...);
      },
      arg("q"), arg("k"), arg("v"), arg("mask"), arg("bias"), args..., py::kw_only(), arg("causal"),
      arg("scale"), arg("window_left") = -1, arg("window_right") = -1, arg("softcap") = 0.0,
      arg("alibi_slopes") = none, arg("sinks") = none, arg("dropout_p") = 0.0, arg("seed") = none,
      arg("cu_seqlens_q") = none, arg("cu_seqlens_k") = none);
}

void bind_attention(py::module_& m) {
  using py::arg;
  define(m, "attention_forward", attention_forward, arg("out"), arg("lse"));
  define(m, "attention_backward", attention_backward, arg("out"), arg("lse"), arg("dout"),
         arg("dlse"), arg("dq"), arg("dk"), arg("dv"), arg("dbias"), arg("dsinks") = py::none());
  define(m, "attention_weights", attention_weights, arg("lse"), arg("rows"), arg("weights"));
  m.def("attention_dropout", attention_dropout, arg("seed"), arg("keep"), py::kw_only(),
        arg("dropout_p"));
}

}  // namespace pykern
