// The rules that many ops share, checked at the boundary before any element is read or written.
// Every message begins with the op's public name and names the argument.
#pragma once
#include <initializer_list>

#include "core/error.h"
#include "core/tensor.h"

namespace pykern {

struct Arg {
  const char* name;
  const Tensor& t;
};

const char* name(DType dtype);
int64_t item_size(DType dtype);  // bytes
bool is_floating(DType dtype);
DType stat_dtype(DType dtype);       // float64 for float64, else float32
std::string shape(const Tensor& t);  // "[2, 3, 4]"
int64_t count(const Tensor& t);      // number of elements
int64_t rows(const Tensor& t);       // number of elements without the last dimension
bool is_contiguous(const Tensor& t);

struct Checker {
  const char* op;

  void floating(Arg a) const;  // float32, float64, bfloat16, float16
  void dtype(Arg a, DType expected) const;
  void same_dtype(Arg a, Arg reference) const;  // and the same device; an absent argument passes
  // the dtype of reference, or float32 where that is bfloat16 or float16; and the same device
  void same_dtype_or_float(Arg a, Arg reference) const;
  void same_device(Arg a, Arg reference) const;
  void rank(Arg a, int expected, const char* layout) const;
  void size(Arg a, int dim, int64_t expected, const char* meaning) const;
  void same_shape(Arg a, Arg reference) const;
  // the shape of reference without its last dimension
  void rows_of(Arg a, Arg reference) const;
  // the last stride is 1, or the last dimension has at most one element
  void unit_last(Arg a) const;
  // all but the last dimension can be walked as rows of one constant stride
  void row_strided(Arg a) const;
  void contiguous(Arg a) const;
  // every element of an int32 or int64 tensor is a row of table, which has limit of them; reads
  // the elements, so it stands last among the checks
  void indices(Arg a, int64_t limit, const char* table) const;
  // writable, and no two of its elements share memory
  void output(Arg a) const;
  // no output shares memory with an input or with another output
  void disjoint(std::initializer_list<Arg> outputs, std::initializer_list<Arg> inputs) const;
};

// The distance between consecutive rows, for a tensor that passed row_strided().
int64_t row_stride(const Tensor& t);

// True when some element of a may share a byte with some element of b. Exact when both have the
// same strides and no overlap of their own, as views of one buffer do; otherwise by address range.
bool may_overlap(const Tensor& a, const Tensor& b);

}  // namespace pykern
