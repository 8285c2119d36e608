#include "ops/check.h"

#include <cmath>

namespace pykern {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::b8: return "bool";
    case DType::u8: return "uint8";
  }
  return "unknown";
}

int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::b8:
    case DType::u8: return 1;
  }
  return 8;
}

bool is_floating(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16 || dtype == DType::f16;
}

DType stat_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < t.rank; ++i) text << (i ? ", " : "") << t.size[i];
  text << "]";
  return text.str();
}

int64_t rows(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t.rank; ++i) n *= t.size[i];
  return n;
}

bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.size[i] != 1 && t.stride[i] != expected) return count(t) == 0;
    expected *= t.size[i];
  }
  return true;
}

int64_t count(const Tensor& t) { return t.rank == 0 ? 1 : rows(t) * t.size[t.rank - 1]; }

void Checker::floating(Arg a) const {
  PYKERN_CHECK(type, is_floating(a.t.dtype), op, ": ", a.name, " has dtype ", name(a.t.dtype),
               ", expected float32, float64, bfloat16 or float16");
}

void Checker::dtype(Arg a, DType expected) const {
  if (!a.t.given) return;
  PYKERN_CHECK(type, a.t.dtype == expected, op, ": ", a.name, " has dtype ", name(a.t.dtype),
               ", expected ", name(expected));
}

void Checker::same_device(Arg a, Arg reference) const {
  if (!a.t.given) return;
  PYKERN_CHECK(value,
               a.t.device == reference.t.device && a.t.device_index == reference.t.device_index, op,
               ": ", a.name, " and ", reference.name, " are on different devices");
}

void Checker::same_dtype(Arg a, Arg reference) const {
  if (!a.t.given) return;
  same_device(a, reference);
  PYKERN_CHECK(type, a.t.dtype == reference.t.dtype, op, ": ", a.name, " has dtype ",
               name(a.t.dtype), " but ", reference.name, " has ", name(reference.t.dtype));
}

void Checker::same_dtype_or_float(Arg a, Arg reference) const {
  if (!a.t.given) return;
  const DType half = reference.t.dtype;
  if (a.t.dtype == DType::f32 && (half == DType::bf16 || half == DType::f16))
    same_device(a, reference);
  else
    same_dtype(a, reference);
}

void Checker::rank(Arg a, int expected, const char* layout) const {
  if (!a.t.given) return;
  PYKERN_CHECK(value, a.t.rank == expected, op, ": ", a.name, " must be ", layout, ", got shape ",
               shape(a.t));
}

void Checker::size(Arg a, int dim, int64_t expected, const char* meaning) const {
  if (!a.t.given) return;
  PYKERN_CHECK(value, a.t.size[dim] == expected, op, ": ", a.name, " has shape ", shape(a.t),
               ", expected ", meaning, " = ", expected, " in dimension ", dim);
}

void Checker::same_shape(Arg a, Arg reference) const {
  if (!a.t.given) return;
  bool same = a.t.rank == reference.t.rank;
  for (int i = 0; same && i < a.t.rank; ++i) same = a.t.size[i] == reference.t.size[i];
  PYKERN_CHECK(value, same, op, ": ", a.name, " has shape ", shape(a.t), " but ", reference.name,
               " has ", shape(reference.t));
}

void Checker::rows_of(Arg a, Arg reference) const {
  if (!a.t.given) return;
  bool same = a.t.rank + 1 == reference.t.rank;
  for (int i = 0; same && i < a.t.rank; ++i) same = a.t.size[i] == reference.t.size[i];
  PYKERN_CHECK(value, same, op, ": ", a.name, " has shape ", shape(a.t), ", expected that of ",
               reference.name, " without its last dimension, which has ", shape(reference.t));
}

void Checker::unit_last(Arg a) const {
  if (!a.t.given || a.t.rank == 0 || count(a.t) == 0) return;
  const int last = a.t.rank - 1;
  PYKERN_CHECK(value, a.t.size[last] <= 1 || a.t.stride[last] == 1, op, ": ", a.name,
               " must have stride 1 in its last dimension, got ", a.t.stride[last]);
}

// Dimensions of one element do not count; the others must nest: stride[i] = size[i+1] stride[i+1].
static bool rows_nest(const Tensor& t) {
  bool seen = false;
  int64_t expected = 0;
  for (int i = t.rank - 2; i >= 0; --i) {
    if (t.size[i] == 1) continue;
    if (seen && t.stride[i] != expected) return false;
    expected = t.stride[i] * t.size[i];
    seen = true;
  }
  return true;
}

void Checker::row_strided(Arg a) const {
  if (!a.t.given || count(a.t) == 0) return;
  unit_last(a);
  PYKERN_CHECK(value, rows_nest(a.t), op, ": ", a.name, " of shape ", shape(a.t),
               " must have rows of one constant stride; call contiguous() on it first");
}

int64_t row_stride(const Tensor& t) {
  for (int i = t.rank - 2; i >= 0; --i)
    if (t.size[i] != 1) return t.stride[i];
  return t.rank ? t.size[t.rank - 1] : 1;
}

void Checker::contiguous(Arg a) const {
  PYKERN_CHECK(value, !a.t.given || is_contiguous(a.t), op, ": ", a.name, " of shape ", shape(a.t),
               " must be contiguous");
}

template <class Index>
static void check_indices(const char* op, Arg a, int64_t limit, const char* table) {
  const int64_t length = a.t.rank ? a.t.size[a.t.rank - 1] : 1;
  const int64_t step = a.t.rank ? a.t.stride[a.t.rank - 1] : 1;
  for (int64_t row = 0; row < rows(a.t) && length > 0; ++row) {
    const Index* p = static_cast<const Index*>(a.t.data);
    int64_t rest = row;
    for (int d = a.t.rank - 2; d >= 0; --d) {
      p += rest % a.t.size[d] * a.t.stride[d];
      rest /= a.t.size[d];
    }
    for (int64_t i = 0; i < length; ++i)
      PYKERN_CHECK(index, p[i * step] >= 0 && p[i * step] < limit, op, ": ", a.name, " contains ",
                   p[i * step], ", but ", table, " has ", limit, " rows");
  }
}

void Checker::indices(Arg a, int64_t limit, const char* table) const {
  if (!a.t.given || a.t.device != Device::cpu) return;  // a CUDA kernel looks for itself
  if (a.t.dtype == DType::i32)
    check_indices<int32_t>(op, a, limit, table);
  else
    check_indices<int64_t>(op, a, limit, table);
}

// Fills order with the dimensions of more than one element, smallest stride first.
static int by_stride(const Tensor& t, int order[kMaxRank]) {
  int n = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] <= 1) continue;
    int at = n++;
    for (; at > 0 && t.stride[order[at - 1]] > t.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  return n;
}

static bool overlaps_itself(const Tensor& t) {
  if (count(t) == 0) return false;
  int order[kMaxRank];
  const int n = by_stride(t, order);
  int64_t reach = 0;  // the farthest element of the dimensions so far
  for (int i = 0; i < n; ++i) {
    if (t.stride[order[i]] <= reach) return true;
    reach += t.stride[order[i]] * (t.size[order[i]] - 1);
  }
  return false;
}

void Checker::output(Arg a) const {
  if (!a.t.given) return;
  PYKERN_CHECK(value, !a.t.readonly, op, ": ", a.name, " is read-only");
  PYKERN_CHECK(value, !overlaps_itself(a.t), op, ": elements of ", a.name,
               " share memory (an expanded view, or a negative stride)");
}

struct Range {
  intptr_t first, last;  // bytes, last exclusive
};

static Range address_range(const Tensor& t) {
  int64_t low = 0, high = 0;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t reach = t.stride[i] * (t.size[i] - 1);
    (reach < 0 ? low : high) += reach;
  }
  const intptr_t base = reinterpret_cast<intptr_t>(t.data);
  const int64_t item = item_size(t.dtype);
  return {base + low * item, base + (high + 1) * item};
}

// Is there an index difference with -size_a < c_i < size_b whose strides add up to distance?
static bool reaches(const Tensor& a, const Tensor& b, const int* order, int n, int64_t distance) {
  if (n == 0) return distance == 0;
  const int i = order[n - 1];
  const int64_t down = static_cast<int64_t>(
      std::floor(static_cast<double>(distance) / static_cast<double>(a.stride[i])));
  for (int64_t c = down - 1; c <= down + 1; ++c)
    if (-b.size[i] < c && c < a.size[i] && reaches(a, b, order, n - 1, distance - c * a.stride[i]))
      return true;
  return false;
}

bool may_overlap(const Tensor& a, const Tensor& b) {
  if (!a.given || !b.given || count(a) == 0 || count(b) == 0 || a.device != b.device) return false;
  const Range ra = address_range(a), rb = address_range(b);
  if (ra.last <= rb.first || rb.last <= ra.first) return false;
  bool alike = a.rank == b.rank && a.dtype == b.dtype && !overlaps_itself(a) && !overlaps_itself(b);
  for (int i = 0; alike && i < a.rank; ++i)
    alike = a.stride[i] == b.stride[i] || (a.size[i] == 1 && b.size[i] == 1);
  const intptr_t bytes = reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data);
  if (!alike || bytes % item_size(a.dtype) != 0) return true;
  // One order serves both: take it from a view that is as large as either in every dimension.
  Tensor both = a;
  for (int i = 0; i < a.rank; ++i)
    if (b.size[i] > a.size[i]) both.size[i] = b.size[i], both.stride[i] = b.stride[i];
  int order[kMaxRank];
  const int n = by_stride(both, order);
  if (overlaps_itself(both)) return true;  // one is large where the other's strides are small
  Tensor wide = both;
  for (int i = 0; i < a.rank; ++i) wide.size[i] = a.size[i];
  return reaches(wide, b, order, n, bytes / item_size(a.dtype));
}

void Checker::disjoint(std::initializer_list<Arg> outputs,
                       std::initializer_list<Arg> inputs) const {
  for (const Arg* o = outputs.begin(); o != outputs.end(); ++o) {
    for (const Arg& i : inputs)
      PYKERN_CHECK(value, !may_overlap(o->t, i.t), op, ": ", o->name, " shares memory with ",
                   i.name);
    for (const Arg* other = outputs.begin(); other != o; ++other)
      PYKERN_CHECK(value, !may_overlap(o->t, other->t), op, ": ", o->name, " shares memory with ",
                   other->name);
  }
}

}  // namespace pykern
