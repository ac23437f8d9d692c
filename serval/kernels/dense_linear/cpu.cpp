// x W^T + bias for few rows of x, float32 or bfloat16 weights, float32 sums.
// Floor: the weight is read once from memory. Four rows of W stream side by side and meet every row of x, in register
// tiles, before they leave the cache; x is small and stays in L1 or L2.
#include "tile.h"

// c[r * ldc + j] = a[r] . w[j] for R rows of x and four weight rows.
template <int R, class T>
static INLINE void corner(const float* a, int64_t lda, const T* w, int64_t k, float* c, int64_t ldc, bool fetch) {
  vf acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[r][j] = vf{};
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    vf b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      b[j] = load(w + j * k + i);
      if (fetch) __builtin_prefetch((const char*)(w + j * k + i) + 1024, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      vf x = load(a + r * lda + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[r][j] += x * b[j];
    }
  }
  if (i < k)
    for (int r = 0; r < R; r++) {
      vf x = load_some(a + r * lda + i, k - i);
      for (int j = 0; j < 4; j++) acc[r][j] += x * load_some(w + j * k + i, k - i);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums(acc[r], c + r * ldc);
}

template <class T>
static void single(const float* a, const T* w, int64_t k, float* c) {  // one row of x, one of W
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= k; i += W) acc += load(a + i) * load(w + i);
  if (i < k) acc += load_some(a + i, k - i) * load_some(w + i, k - i);
  *c = sum(acc);
}

template <class T>
static int run(const float* x, int64_t lda, int64_t rows, int64_t k, const T* w, const float* bias, float* out, int64_t n,
               int threads) {
  constexpr int R = W == 16 ? 6 : 3;
  const int64_t passes = (rows + R - 1) / R;
  int64_t step = 131072 / (k * (int64_t)sizeof(T)) / 4 * 4;  // about 128 KB of weights per task
  if (step < 4) step = 4;
  parallel_tasks((n + step - 1) / step, 1, n * k < 200000 ? 1 : threads, [&](int64_t task) {
    const int64_t end = (task + 1) * step < n ? (task + 1) * step : n;
    for (int64_t j = task * step; j < end; j += 4) {
      if (end - j < 4) {
        for (; j < end; j++)
          for (int64_t r = 0; r < rows; r++) single(x + r * lda, w + j * k, k, out + r * n + j);
        break;
      }
      for (int64_t p = 0; p < passes; p++) {
        const int64_t r = rows * p / passes, count = rows * (p + 1) / passes - r;
        const float* a = x + r * lda;
        float* c = out + r * n + j;
        const bool fetch = p == 0;
        switch (count) {
          case 1: corner<1>(a, lda, w + j * k, k, c, n, fetch); break;
          case 2: corner<2>(a, lda, w + j * k, k, c, n, fetch); break;
          case 3: corner<3>(a, lda, w + j * k, k, c, n, fetch); break;
          case 4: corner<(R > 3 ? 4 : 3)>(a, lda, w + j * k, k, c, n, fetch); break;
          case 5: corner<(R > 3 ? 5 : 3)>(a, lda, w + j * k, k, c, n, fetch); break;
          default: corner<R>(a, lda, w + j * k, k, c, n, fetch); break;
        }
      }
    }
    if (bias)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = task * step; j < end; j++) out[r * n + j] += bias[j];
  });
  return 0;
}

EXPORT int linear_f32(const float* x, int64_t lda, int64_t rows, int64_t k, const void* w, const float* bias, float* out,
                      int64_t n, int threads) {
  return run(x, lda, rows, k, (const float*)w, bias, out, n, threads);
}
PACKED(linear_f32)
EXPORT int linear_bf16(const float* x, int64_t lda, int64_t rows, int64_t k, const void* w, const float* bias, float* out,
                       int64_t n, int threads) {
  return run(x, lda, rows, k, (const bf16*)w, bias, out, n, threads);
}
PACKED(linear_bf16)
