// RMSNorm, alone and fused with the residual addition, forward and backward.
// Floor: one read of every input and one write of every output; a row stays in cache between its two passes.
#include <vector>
#include <cmath>
#include "simd.h"

template <class T> static INLINE vf get(const T* p, int64_t i, int64_t d) {
  return i + W <= d ? load(p + i) : load_some(p + i, d - i);
}
template <class T> static INLINE void put(T* p, int64_t i, int64_t d, vf v) {
  if (i + W <= d) store(p + i, v); else store_some(p + i, v, d - i);
}

template <class TX, class TR>
static void forward(const TX* x, const TR* residual, const float* weight, TR* normed, TR* summed, int64_t rows,
                    int64_t d, float eps, int threads) {
  parallel_for(rows, rows * d < 131072 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const TX* xr = x + r * d;
      TR *nr = normed + r * d, *sr = residual ? summed + r * d : nullptr;
      vf square = {};
      for (int64_t i = 0; i < d; i += W) {
        vf v = get(xr, i, d);
        if (residual) {
          put(sr, i, d, v + get(residual + r * d, i, d));
          v = get(sr, i, d);  // as stored, so that the norm sees what the next layer sees
        }
        square += v * v;
      }
      float inverse = 1.0f / std::sqrt(sum(square) / (float)d + eps);
      for (int64_t i = 0; i < d; i += W) {
        vf v = residual ? get(sr, i, d) : get(xr, i, d);
        put(nr, i, d, v * inverse * get(weight, i, d));
      }
    }
  });
}

// dx = r g - x r^3 mean(g x) [+ extra] with g = dy w, r = rsqrt(mean x^2 + eps); dw = sum over rows of dy x r.
// Rows are cut into a fixed number of parts whose dw are added in order: the sum does not depend on the threads.
template <class TX, class TR>
static void backward(const TR* dy, const TR* extra, const TR* x, const float* weight, TX* dx, float* dw, int64_t rows,
                     int64_t d, float eps, int threads) {
  const int64_t parts = rows < 16 ? rows : 16;
  std::vector<float> partial(parts * d, 0.0f);
  parallel_tasks(parts, 1, rows * d < 131072 ? 1 : threads, [&](int64_t part) {
    float* acc = partial.data() + part * d;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const TR *xr = x + r * d, *gr = dy + r * d;
      vf square = {}, dot = {};
      for (int64_t i = 0; i < d; i += W) {
        vf v = get(xr, i, d), g = get(gr, i, d) * get(weight, i, d);
        square += v * v;
        dot += v * g;
      }
      float inverse = 1.0f / std::sqrt(sum(square) / (float)d + eps);
      float pull = inverse * inverse * inverse * sum(dot) / (float)d;
      for (int64_t i = 0; i < d; i += W) {
        vf v = get(xr, i, d), y = get(gr, i, d);
        vf grad = inverse * y * get(weight, i, d) - pull * v;
        if (extra) grad += get(extra + r * d, i, d);
        put(dx + r * d, i, d, grad);
        put(acc, i, d, get(acc, i, d) + y * v * inverse);
      }
    }
  });
  for (int64_t i = 0; i < d; i++) {
    float total = 0;
    for (int64_t part = 0; part < parts; part++) total += partial[part * d + i];
    dw[i] = total;
  }
}

#define INSTANCE(name, TX, TR)                                                                                       \
  EXPORT int rms_norm_##name(const void* x, const void* residual, const float* weight, void* normed, void* summed,   \
                             int64_t rows, int64_t d, float eps, int threads) {                                      \
    forward((const TX*)x, (const TR*)residual, weight, (TR*)normed, (TR*)summed, rows, d, eps, threads);             \
    return 0;                                                                                                        \
  }                                                                                                                  \
  PACKED(rms_norm_##name)                                                                                            \
  EXPORT int rms_norm_backward_##name(const void* dy, const void* extra, const void* x, const float* weight,         \
                                      void* dx, float* dw, int64_t rows, int64_t d, float eps, int threads) {        \
    backward((const TR*)dy, (const TR*)extra, (const TR*)x, weight, (TX*)dx, dw, rows, d, eps, threads);             \
    return 0;                                                                                                        \
  }
INSTANCE(f32, float, float)
INSTANCE(bf16, bf16, bf16)
INSTANCE(mixed, bf16, float)
