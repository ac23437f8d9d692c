// x W^T + bias for few rows of x, float32 or bfloat16 weights, float32 sums.
// Floor: the weight is read once from memory. With several rows of x, four rows of W stream side by side and meet all of
// them, in register tiles, before they leave the cache; x is small and stays in L1 or L2.
#include <algorithm>
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

// The same for one row of x. Weight rows are read one after the other, as one stream that is fetched well ahead and not
// kept: four streams side by side reach less of the read bandwidth. Each has one sum, added up in the order of `corner`, so
// that a row's result does not depend on its neighbours; narrower registers would wait for that sum.
constexpr bool ONE_STREAM = W == 16;
template <class T> static INLINE void one_row(const float* a, const T* w, int64_t k, float* c) {
  vf acc[4];
  for (int j = 0; j < 4; j++, w += k) {
    vf one = {};
    int64_t i = 0;
    for (; i + 4 * W <= k; i += 4 * W)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const T* p = w + i + u * W;
        if (u * W * sizeof(T) % 64 == 0) __builtin_prefetch((const char*)p + 4096, 0, 0);
        one += load(a + i + u * W) * load(p);
      }
    for (; i + W <= k; i += W) one += load(a + i) * load(w + i);
    if (i < k) one += load_some(a + i, k - i) * load_some(w + i, k - i);
    acc[j] = one;
  }
  sums(acc, c);
}

template <class T>
static int run(const float* x, int64_t lda, int64_t rows, int64_t k, const T* w, const float* bias, float* out, int64_t n,
               int threads) {
  constexpr int R = W == 16 ? 6 : 3;
  const int64_t passes = (rows + R - 1) / R;
  // Bytes of weights per task: long streams for one row, at least two tasks a thread; else what stays in L2.
  const int64_t row = k * (int64_t)sizeof(T), bytes = std::min<int64_t>(524288, n * row / (2 * threads));
  const int64_t step = std::max<int64_t>(4, (rows == 1 ? bytes : 131072) / row / 4 * 4);
  parallel_tasks((n + step - 1) / step, 1, n * k < 200000 ? 1 : threads, [&](int64_t task) {
    const int64_t end = (task + 1) * step < n ? (task + 1) * step : n;
    for (int64_t j = task * step; j < end; j += 4) {
      if (end - j < 4) {
        for (; j < end; j++)
          for (int64_t r = 0; r < rows; r++) single(x + r * lda, w + j * k, k, out + r * n + j);
        break;
      }
      if (ONE_STREAM && rows == 1) {
        one_row(x, w + j * k, k, out + j);
        continue;
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
