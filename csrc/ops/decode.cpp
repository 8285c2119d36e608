#include "ops/decode.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"attention_with_kvcache"};

// The pages that sequence b uses, whose slots end at `length`.
static void check_pages(const DecodeForward& op, int64_t b, int64_t padding, int64_t length) {
  const int64_t page = op.k_cache.size[2], pages = op.k_cache.size[0];
  const Tensor& table = op.block_table;
  for (int64_t i = padding / page; i * page < length; ++i) {
    const int64_t at =
        static_cast<const int32_t*>(table.data)[b * table.stride[0] + i * table.stride[1]];
    PYKERN_CHECK(index, at >= 0 && at < pages, c.op, ": block_table[", b, ", ", i, "] is ", at,
                 ", expected 0..", pages - 1);
  }
}

static void check_lengths(const DecodeForward& op, int64_t appended) {
  if (op.q.device != Device::cpu) return;  // a CUDA kernel looks for itself
  const int64_t B = op.q.size[0], T = op.q.size[2];
  const int64_t capacity = op.k_cache.size[2] * (op.block_table.given ? op.block_table.size[1] : 1);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length =
        static_cast<const int32_t*>(op.cache_seqlens.data)[b * op.cache_seqlens.stride[0]];
    PYKERN_CHECK(index, length >= 0 && length <= capacity, c.op, ": cache_seqlens[", b, "] is ",
                 length, ", expected 0..", capacity);
    const int64_t padding =
        op.cache_leftpad.given
            ? static_cast<const int32_t*>(op.cache_leftpad.data)[b * op.cache_leftpad.stride[0]]
            : 0;
    PYKERN_CHECK(index, padding >= 0 && padding <= length, c.op, ": cache_leftpad[", b, "] is ",
                 padding, ", expected 0..cache_seqlens[", b, "] = ", length);
    PYKERN_CHECK(value, length + appended <= capacity, c.op, ": the cache is full: sequence ", b,
                 " holds ", length, " keys and ", appended,
                 " are appended, but k_cache has room for ", capacity);
    if (op.block_table.given) check_pages(op, b, padding, length + appended);
    if (!op.rotary_cos.given) continue;
    const int64_t last = length + appended - padding, first = last - T;
    PYKERN_CHECK(index, T + appended == 0 || (first >= 0 && last <= op.rotary_cos.size[0]), c.op,
                 ": sequence ", b, " rotates positions ", first, "..", last - 1,
                 ", but rotary_cos has ", op.rotary_cos.size[0], " rows");
  }
}

void check(const DecodeForward& op) {
  const Arg q{"q", op.q}, k_cache{"k_cache", op.k_cache}, v_cache{"v_cache", op.v_cache};
  const Arg k{"k", op.k}, v{"v", op.v}, lengths{"cache_seqlens", op.cache_seqlens};
  const Arg padding{"cache_leftpad", op.cache_leftpad};
  const Arg cos{"rotary_cos", op.rotary_cos}, sin{"rotary_sin", op.rotary_sin};
  const Arg table{"block_table", op.block_table}, slopes{"alibi_slopes", op.alibi_slopes};
  const Arg sinks{"sinks", op.sinks}, out{"out", op.out}, lse{"lse", op.lse};
  const bool paged = op.block_table.given;
  c.floating(q);
  c.rank(q, 4, "[B, H, T, D]");
  c.rank(k_cache, 4, "[B, G, capacity, D]");
  c.rank(v_cache, 4, "[B, G, capacity, E]");
  c.rank(k, 4, "[B, G, N, D]");
  c.rank(v, 4, "[B, G, N, E]");
  for (const Arg& a : {k_cache, v_cache, k, v, out}) c.same_dtype(a, q);
  const int64_t B = op.q.size[0], H = op.q.size[1], T = op.q.size[2], D = op.q.size[3];
  const int64_t G = op.k_cache.size[1], capacity = op.k_cache.size[2], E = op.v_cache.size[3];
  PYKERN_CHECK(value, op.k.given == op.v.given, c.op, ": k and v must be given together");
  const int64_t N = op.k.given ? op.k.size[2] : 0;
  PYKERN_CHECK(value, H == 0 || (G > 0 && H % G == 0), c.op, ": q has ", H,
               " heads, which is not a multiple of the ", G, " heads of k_cache");
  PYKERN_CHECK(value, D >= 1 && D <= 1024 && E <= 1024, c.op, ": head sizes ", D, " and ", E,
               " must be 1..1024");
  const int64_t rows = paged ? op.k_cache.size[0] : B;
  const int64_t k_shape[] = {rows, G, capacity, D}, v_shape[] = {rows, G, capacity, E};
  const int64_t new_k[] = {B, G, N, D}, new_v[] = {B, G, N, E};
  for (int i = 0; i < 4; ++i) {
    c.size(k_cache, i, k_shape[i], i == 3 ? "head size of q" : "batch of q");
    c.size(v_cache, i, v_shape[i], "that of q or k_cache");
    c.size(k, i, new_k[i], i == 0 ? "batch of q" : "that of k_cache");
    c.size(v, i, new_v[i], i == 0 ? "batch of q" : "that of k and v_cache");
  }
  if (paged) {
    c.dtype(table, DType::i32);
    c.same_device(table, q);
    c.rank(table, 2, "[B, pages of a sequence]");
    c.size(table, 0, B, "batch");
    PYKERN_CHECK(value, capacity > 0, c.op, ": k_cache has pages of 0 keys");
  }
  if (op.alibi_slopes.given) {
    c.dtype(slopes, DType::f32);
    c.same_device(slopes, q);
    c.rank(slopes, 2, "[B, H]");
    c.size(slopes, 0, B, "batch");
    c.size(slopes, 1, H, "heads of q");
  }
  if (op.sinks.given) {
    c.same_dtype(sinks, q);
    c.rank(sinks, 1, "[H]");
    c.size(sinks, 0, H, "heads of q");
  }
  for (const Arg& a : {lengths, padding}) {
    c.dtype(a, DType::i32);
    c.same_device(a, q);
    c.rank(a, 1, "[B]");
    c.size(a, 0, B, "batch");
  }
  PYKERN_CHECK(value, op.rotary_cos.given == op.rotary_sin.given, c.op,
               ": rotary_cos and rotary_sin must be given together");
  if (op.rotary_cos.given) {
    PYKERN_CHECK(type,
                 op.rotary_cos.dtype == op.q.dtype || op.rotary_cos.dtype == stat_dtype(op.q.dtype),
                 c.op, ": rotary_cos has dtype ", name(op.rotary_cos.dtype),
                 ", expected that of q, ", name(op.q.dtype), ", or ", name(stat_dtype(op.q.dtype)));
    c.same_device(cos, q);
    c.rank(cos, 2, "[positions, R/2]");
    c.same_dtype(sin, cos);
    c.same_shape(sin, cos);
    PYKERN_CHECK(value, 2 * op.rotary_cos.size[1] <= D, c.op, ": rotary_cos of shape ",
                 shape(op.rotary_cos), " rotates R = ", 2 * op.rotary_cos.size[1],
                 " numbers, but q has D = ", D);
  }
  c.rank(out, 4, "[B, H, T, E]");
  const int64_t out_shape[] = {B, H, T, E};
  for (int i = 0; i < 4; ++i) c.size(out, i, out_shape[i], "that of q and v_cache");
  if (op.lse.dtype != DType::f64) c.dtype(lse, stat_dtype(op.q.dtype));
  c.same_device(lse, q);
  c.rows_of(lse, q);
  for (const Arg& a : {q, k_cache, v_cache, k, v, cos, sin, out}) c.unit_last(a);
  for (const Arg& a : {k_cache, v_cache, out, lse}) c.output(a);
  c.disjoint({k_cache, v_cache, out, lse},
             {q, k, v, lengths, padding, cos, sin, table, slopes, sinks});
  PYKERN_CHECK(value, std::isfinite(op.scale), c.op, ": scale is ", op.scale,
               ", expected a finite number");
  PYKERN_CHECK(value, std::isfinite(op.softcap) && op.softcap >= 0, c.op, ": softcap is ",
               op.softcap, ", expected a positive number, or 0 for none");
  PYKERN_CHECK(value, op.left >= -1 && op.right >= -1, c.op, ": window is (", op.left, ", ",
               op.right, "), expected numbers of keys, or None for no limit");
  check_lengths(op, N);
}

}  // namespace pykern
