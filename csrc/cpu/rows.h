// Walking tensors: a tensor [..., D] is a list of rows, at any strides of its leading dimensions.
#pragma once
#include "core/tensor.h"
#include "cpu/vec.h"

PYKERN_BEGIN_ISA
namespace {

static inline int64_t row_count(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t.rank; ++i) n *= t.size[i];
  return n;
}

static inline int64_t row_length(const Tensor& t) { return t.rank ? t.size[t.rank - 1] : 1; }

static inline int64_t row_offset(const Tensor& t, int64_t row) {
  int64_t offset = 0;
  for (int i = t.rank - 2; i > 0; --i) {
    offset += row % t.size[i] * t.stride[i];
    row /= t.size[i];
  }
  return t.rank > 1 ? offset + row * t.stride[0] : 0;  // no division for a matrix
}

// The distance between rows of a tensor whose rows nest (checked at the boundary).
static inline int64_t row_step(const Tensor& t) {
  for (int i = t.rank - 2; i >= 0; --i)
    if (t.size[i] != 1) return t.stride[i];
  return row_length(t);
}

// The row-th row, rows counted in the order of the leading dimensions.
template <class T>
static inline T* row_of(const Tensor& t, int64_t row) {
  return static_cast<T*>(t.data) + row_offset(t, row);
}

// t[i][j][k] as a pointer to its first element
template <class T>
static inline T* row_at(const Tensor& t, int64_t i, int64_t j, int64_t k) {
  return static_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
}

// Calls body(T{}) with the storage type of a floating dtype.
template <class Body>
static inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return;  // refused by check()
  }
}

// body(offset, n) for n <= lanes numbers at a time: whole vectors, then the tail.
template <class C, class Body>
static inline void each_vector(int64_t length, const Body& body) {
  constexpr int lanes = Vec<C>::lanes;
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) body(i, lanes);
  if (i < length) body(i, static_cast<int>(length - i));
}

// load and store of n <= lanes numbers; n == lanes is the common case
template <class T>
static inline Vec<Compute<T>> load_n(const T* p, int n) {
  return n == Vec<Compute<T>>::lanes ? load(p) : load(p, n);
}
template <class T>
static inline void store_n(T* p, Vec<Compute<T>> v, int n) {
  if (n == Vec<Compute<T>>::lanes)
    store(p, v);
  else
    store(p, v, n);
}

// The numbers of a tensor, computed in C and stored in whatever floating dtype it has.
template <class C>
struct Numbers {
  void* data;
  DType dtype;

  explicit Numbers(const Tensor& t) : data(t.data), dtype(t.dtype) {}
  Numbers(void* data, DType dtype) : data(data), dtype(dtype) {}

  // n <= lanes numbers from number i on
  Vec<C> load(int64_t i, int n) const {
    if constexpr (sizeof(C) == sizeof(double)) {
      return load_n(static_cast<const double*>(data) + i, n);
    } else {
      if (dtype == DType::bf16) return load_n(static_cast<const bf16*>(data) + i, n);
      if (dtype == DType::f16) return load_n(static_cast<const f16*>(data) + i, n);
      return load_n(static_cast<const float*>(data) + i, n);
    }
  }
  void store(int64_t i, Vec<C> v, int n) const {
    if constexpr (sizeof(C) == sizeof(double)) {
      store_n(static_cast<double*>(data) + i, v, n);
    } else {
      if (dtype == DType::bf16) return store_n(static_cast<bf16*>(data) + i, v, n);
      if (dtype == DType::f16) return store_n(static_cast<f16*>(data) + i, v, n);
      store_n(static_cast<float*>(data) + i, v, n);
    }
  }
};

}  // namespace
PYKERN_END_ISA
