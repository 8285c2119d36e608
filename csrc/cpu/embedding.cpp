// embedding: forward copies rows; backward adds the rows of each token in the order of their
// places, one token by one thread, so that the sum does not depend on the thread count.
#include "ops/embedding.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kGrain = 16384;  // numbers per task: tens of kilobytes

static int64_t id_at(const Tensor& ids, int64_t i) {
  int64_t offset = 0;
  for (int d = ids.rank - 1; d >= 0; --d) {
    offset += i % ids.size[d] * ids.stride[d];
    i /= ids.size[d];
  }
  return ids.dtype == DType::i64 ? static_cast<const int64_t*>(ids.data)[offset]
                                 : static_cast<const int32_t*>(ids.data)[offset];
}

// first[v] is the first place of token v, next[i] the place after i with the same token; -1: none
static void link_places(const Tensor& ids, int64_t places, int64_t V, int64_t* first,
                        int64_t* next) {
  for (int64_t v = 0; v < V; ++v) first[v] = -1;
  for (int64_t i = places - 1; i >= 0; --i) {
    const int64_t v = id_at(ids, i);
    next[i] = first[v];
    first[v] = i;
  }
}

// out = the sum of the rows of dout at place and the places after it, added in C
template <class T, class C = Compute<T>>
static void add_rows(const Tensor& dout, int64_t place, const int64_t* next, int64_t D, C* sum,
                     T* out) {
  if (place < 0) {
    memset(out, 0, D * sizeof(T));
    return;
  }
  if (next[place] < 0) {
    memcpy(out, row_of<const T>(dout, place), D * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < D; ++i) sum[i] = 0;
  for (; place >= 0; place = next[place]) {
    const T* row = row_of<const T>(dout, place);
    each_vector<C>(
        D, [&](int64_t i, int n) { store_n(sum + i, load_n(sum + i, n) + load_n(row + i, n), n); });
  }
  each_vector<C>(D, [&](int64_t i, int n) { store_n(out + i, load_n(sum + i, n), n); });
}

}  // namespace

Status embedding_forward(const EmbeddingForward& op, int threads) {
  const int64_t D = row_length(op.weight), places = row_count(op.out);
  with_type(op.weight.dtype, [&]<class T>(T) {
    parallel_rows(places, kGrain / (D + 1) + 1, threads, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; ++i)
        memcpy(row_of<T>(op.out, i), row_of<const T>(op.weight, id_at(op.ids, i)), D * sizeof(T));
    });
  });
  return Status::ok;
}

Status embedding_backward(const EmbeddingBackward& op, int threads) {
  const int64_t V = row_count(op.dweight), D = row_length(op.dweight);
  const int64_t places = row_count(op.dout);
  const Scratch links((V + places) * sizeof(int64_t)), sums(D * sizeof(double), threads);
  if (!links.ok() || !sums.ok()) return Status::out_of_memory;
  int64_t *first = links.at<int64_t>(), *next = first + V;
  link_places(op.ids, places, V, first, next);
  with_type(op.dout.dtype, [&]<class T>(T) {
    parallel_rows(V, kGrain / (D + 1) + 1, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t v = begin; v < end; ++v)
        add_rows(op.dout, first[v], next, D, sums.at<Compute<T>>(thread), row_of<T>(op.dweight, v));
    });
  });
  return Status::ok;
}

PYKERN_END_ISA
