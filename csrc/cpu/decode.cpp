// decode: append, rotate, attend. The rows of q run through the same code as a prefill's, so each
// gets the bits it would have there.
#include "ops/decode.h"

#include "cpu/attention_forward.h"
#include "cpu/parallel.h"
#include "cpu/rotate.h"

PYKERN_BEGIN_ISA
namespace {

static int64_t length_of(const DecodeForward& op, int64_t b) {
  return static_cast<const int32_t*>(op.cache_seqlens.data)[b * op.cache_seqlens.stride[0]];
}

// The slot of its first key.
static int64_t padding_of(const DecodeForward& op, int64_t b) {
  if (!op.cache_leftpad.given) return 0;
  return static_cast<const int32_t*>(op.cache_leftpad.data)[b * op.cache_leftpad.stride[0]];
}

// Where slot s of sequence b is: the batch or page, and the row in it.
struct Slot {
  int64_t batch, row;
};
static Slot slot_of(const DecodeForward& op, int64_t b, int64_t s) {
  if (!op.block_table.given) return {b, s};
  const Tensor& table = op.block_table;
  const int64_t page = op.k_cache.size[2];
  const int64_t at = b * table.stride[0] + s / page * table.stride[1];
  return {static_cast<const int32_t*>(table.data)[at], s % page};
}

// to = from [D], rotated to its position when there is a rotary table
template <class T>
static void rotate_to(const DecodeForward& op, const T* from, int64_t position, int64_t D, T* to) {
  if (!op.rotary_cos.given) {
    memcpy(to, from, D * sizeof(T));
    return;
  }
  const int64_t half = op.rotary_cos.size[1];
  const auto rotate = [&]<class Table>(const Table*) {
    const Table* cos = row_at<const Table>(op.rotary_cos, position, 0, 0);
    const Table* sin = row_at<const Table>(op.rotary_sin, position, 0, 0);
    if (op.rotary_interleaved)
      rotate_row<true>(from, cos, sin, 1, half, D, to);
    else
      rotate_row<false>(from, cos, sin, 1, half, D, to);
  };
  if (op.rotary_cos.dtype == op.q.dtype)
    rotate(static_cast<const T*>(nullptr));
  else
    rotate(static_cast<const Compute<T>*>(nullptr));
}

template <class T>
static void append(const DecodeForward& op, int threads) {
  const int64_t B = op.q.size[0], G = op.k_cache.size[1], D = op.q.size[3], E = op.v_cache.size[3];
  const int64_t N = op.k.size[2];
  parallel_for(B * G, threads, [&](int64_t task, int) {
    const int64_t b = task / G, g = task % G, length = length_of(op, b);
    const int64_t padding = padding_of(op, b);
    for (int64_t n = 0; n < N; ++n) {
      const auto [batch, slot] = slot_of(op, b, length + n);
      rotate_to<T>(op, row_at<const T>(op.k, b, g, n), length - padding + n, D,
                   row_at<T>(op.k_cache, batch, g, slot));
      memcpy(row_at<T>(op.v_cache, batch, g, slot), row_at<const T>(op.v, b, g, n), E * sizeof(T));
    }
  });
}

// The query heads of key head g in sequence b, which holds S keys behind its padding.
template <class T>
static Group<T> group_of_cache(const DecodeForward& op, int64_t b, int64_t g, int64_t S) {
  Group<T> x = {};
  x.heads = op.q.size[1] / op.k_cache.size[1], x.T_ = op.q.size[2], x.S = S;
  x.D = op.q.size[3], x.E = op.v_cache.size[3];
  const int64_t h = g * x.heads, padding = padding_of(op, b);
  const int64_t batch = op.block_table.given ? 0 : b, row = op.block_table.given ? 0 : padding;
  x.q = {row_at<const T>(op.q, b, h, 0), op.q.stride[1], op.q.stride[2]};
  x.k = row_at<const T>(op.k_cache, batch, g, row), x.k_row = op.k_cache.stride[2];
  x.v = row_at<const T>(op.v_cache, batch, g, row), x.v_row = op.v_cache.stride[2];
  if (op.block_table.given) {
    x.pages = static_cast<const int32_t*>(op.block_table.data) + b * op.block_table.stride[0];
    x.pages_step = op.block_table.stride[1], x.page = op.k_cache.size[2];
    x.k_page = op.k_cache.stride[0], x.v_page = op.v_cache.stride[0];
    x.first_slot = padding;
  }
  if (op.alibi_slopes.given)
    x.slopes = static_cast<const float*>(op.alibi_slopes.data) + b * op.alibi_slopes.stride[0] +
               h * op.alibi_slopes.stride[1];
  x.slope_head = op.alibi_slopes.stride[1];
  if (op.sinks.given) x.sinks = static_cast<const T*>(op.sinks.data) + h * op.sinks.stride[0];
  x.sink_head = op.sinks.stride[0];
  set_window(x, op.left, op.right);
  set_scores(x, op.scale, op.softcap);
  return x;
}

template <class T>
static Status forward(const DecodeForward& op, int threads) {
  const int64_t B = op.q.size[0], H = op.q.size[1], T_ = op.q.size[2], D = op.q.size[3];
  const int64_t G = op.k_cache.size[1], E = op.v_cache.size[3];
  const int64_t appended = op.k.given ? op.k.size[2] : 0;
  const int64_t heads = G == 0 ? 0 : H / G, rows = heads * T_;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  int64_t most = 0;  // keys of a sequence
  for (int64_t b = 0; b < B; ++b) {
    const int64_t keys = length_of(op, b) + appended - padding_of(op, b);
    most = keys > most ? keys : most;
  }
  const int64_t parts = deals_parts<T>(B * G, rows, most, threads) ? parts_of(most) : 0;
  const Scratch scratch(forward_bytes<T>(D, E), threads);
  const Scratch rotated(kBlockRows * D * sizeof(T), threads);
  const Scratch partial(B * G * parts * part_size<T>(E) * sizeof(Compute<T>));
  if (!scratch.ok() || !rotated.ok() || !partial.ok()) return Status::out_of_memory;
  if (appended) append<T>(op, threads);

  // rows first .. last - 1 of a group, rotated when there is a rotary table
  const auto group = [&](int64_t b, int64_t g, int64_t first, int64_t last, int thread) {
    Group<T> x = group_of_cache<T>(op, b, g, length_of(op, b) + appended - padding_of(op, b));
    if (op.rotary_cos.given) {  // as if the whole group were contiguous
      T* q = rotated.at<T>(thread);
      for (int64_t r = first; r < last; ++r)
        rotate_to<T>(op, x.q.at(r / T_, r % T_), x.S - T_ + r % T_, D, q + (r - first) * D);
      x.q = {q - first * D, T_ * D, D};
    }
    return x;
  };
  if (parts > 0) {
    const auto at = [&](int64_t task, int64_t part) {
      return partial.at<Compute<T>>() + (task * parts + part) * part_size<T>(E);
    };
    parallel_for(B * G * parts, threads, [&](int64_t i, int thread) {
      const int64_t task = i / parts, part = i % parts;
      const Group<T> x = group(task / G, task % G, 0, rows, thread);
      if (part < parts_of(x.S)) sum_one_part(x, part, at(task, part), scratch.at<char>(thread));
    });
    parallel_for(B * G, threads, [&](int64_t task, int thread) {
      const Group<T> x = group(task / G, task % G, 0, rows, thread);
      join_parts(x, at(task, 0), {op.out, op.lse, task / G, task % G * heads, 0},
                 scratch.at<char>(thread));
    });
    return Status::ok;
  }
  parallel_for(B * G * blocks, threads, [&](int64_t task, int thread) {
    const int64_t b = task / blocks / G, g = task / blocks % G;
    const int64_t first = task % blocks * kBlockRows;
    const int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
    Group<T> x = group(b, g, first, last, thread);
    if (const int64_t next = task / blocks + threads; next < B * G)
      expect(x, group_of_cache<T>(op, next / G, next % G, 0));
    forward_block<T>(x, first, last, {op.out, op.lse, b, g * heads, 0}, scratch.at<char>(thread));
  });
  return Status::ok;
}

}  // namespace

Status attention_with_kvcache(const DecodeForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA
