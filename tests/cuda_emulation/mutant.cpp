// The kernels of norm, softmax and embedding against loops in double: prints the largest error in
// units of what float32 allows, or the text of a Fault. tests/test_cuda_emulation.py compiles it
// with one line of the kernels changed, to see that the change shows.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/embedding.cu"
#include "cuda/norm.cu"
#include "cuda/norm_backward.cu"
#include "cuda/workspace.cu"

using namespace pykern;
using Numbers = std::vector<float>;

static Tensor tensor(void* data, std::vector<int64_t> size, DType dtype = DType::f32) {
  Tensor t;
  t.data = data, t.rank = size.size(), t.dtype = dtype, t.given = true;
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i)
    t.size[i] = size[i], t.stride[i] = stride, stride *= size[i];
  return t;
}

static std::mt19937 generator(0);

static Numbers draw(int64_t n) {
  std::normal_distribution<float> normal;
  Numbers x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

static double worst = 0;

static void compare(const Numbers& got, const std::vector<double>& expected, double scale) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected[i]) / (scale * 1e-5);
    if (worst == worst && !(error <= worst)) worst = error;  // a NaN stays
  }
}

static void norm(int64_t rows, int64_t D) {
  Numbers x = draw(rows * D), weight = draw(D), bias = draw(D), dout = draw(rows * D);
  Numbers out(rows * D, NAN), mean(rows, NAN), rstd(rows, NAN), dx(rows * D, NAN), dweight(D, NAN),
      dbias(D, NAN);
  const auto matrix = [&](Numbers& m) { return tensor(m.data(), {rows, D}); };
  const auto vector = [&](Numbers& v) { return tensor(v.data(), {int64_t(v.size())}); };
  cuda::layer_norm_forward({{matrix(x),
                             vector(weight),
                             vector(bias),
                             {},
                             matrix(out),
                             {},
                             vector(mean),
                             vector(rstd),
                             1e-5}},
                           nullptr);
  cuda::layer_norm_backward({{matrix(x),
                              vector(weight),
                              vector(mean),
                              vector(rstd),
                              matrix(dout),
                              {},
                              matrix(dx),
                              vector(dweight),
                              vector(dbias)}},
                            nullptr);
  std::vector<double> y(rows * D), d(rows * D), dw(D), db(D);
  for (int64_t r = 0; r < rows; ++r) {
    const float *row = x.data() + r * D, *dy = dout.data() + r * D;
    double m = 0, v = 0, g = 0, gx = 0;
    for (int64_t i = 0; i < D; ++i) m += row[i] / double(D);
    for (int64_t i = 0; i < D; ++i) v += (row[i] - m) * (row[i] - m) / D;
    const double s = 1 / std::sqrt(v + 1e-5);
    for (int64_t i = 0; i < D; ++i) {
      const double h = (row[i] - m) * s;
      y[r * D + i] = h * weight[i] + bias[i];
      g += dy[i] * weight[i] / double(D), gx += dy[i] * weight[i] * h / D;
      dw[i] += dy[i] * h, db[i] += dy[i];
    }
    for (int64_t i = 0; i < D; ++i)
      d[r * D + i] = s * (dy[i] * weight[i] - g - (row[i] - m) * s * gx);
  }
  compare(out, y, 10), compare(dx, d, 10), compare(dweight, dw, 30), compare(dbias, db, 30);
}

static void embedding(int64_t places, int64_t V, int64_t D) {
  std::vector<int64_t> ids(places);
  for (int64_t& id : ids) id = generator() % V;
  Numbers dout = draw(places * D), dweight(V * D, NAN);
  cuda::embedding_backward({tensor(ids.data(), {places}, DType::i64),
                            tensor(dout.data(), {places, D}), tensor(dweight.data(), {V, D})},
                           nullptr);
  std::vector<double> expected(V * D);
  for (int64_t p = 0; p < places; ++p)
    for (int64_t i = 0; i < D; ++i) expected[ids[p] * D + i] += dout[p * D + i];
  compare(dweight, expected, 30);
}

int main() {
  try {
    for (uint64_t seed : {0, 1, 2}) {
      emulation::set_seed(seed);
      norm(20, 700);            // several warps
      norm(3, 5001);            // more than one chunk
      embedding(5000, 300, 3);  // two rounds of the scan
    }
  } catch (const std::exception& error) {
    printf("%s\n", error.what());
    return 0;
  }
  printf("%.3f\n", worst);
}
