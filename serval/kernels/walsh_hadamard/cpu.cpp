// The Walsh-Hadamard transform of rows, in registers where a block is at most 256 numbers. Floor in __init__.py.
#include <algorithm>
#include "simd.h"

// v[i] +- v[i with its lanes exchanged at distance `half`], for half < W: a butterfly inside vectors.
template <int HALF> static INLINE vf inside(vf v) {
  vf other, sign;
#if SERVAL_AVX512
  if (HALF == 1) other = (vf)_mm512_permute_ps((__m512)v, 0xb1);
  else if (HALF == 2) other = (vf)_mm512_permute_ps((__m512)v, 0x4e);
  else if (HALF == 4) other = (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
  else other = (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
#elif SERVAL_AVX2
  if (HALF == 1) other = (vf)_mm256_permute_ps((__m256)v, 0xb1);
  else if (HALF == 2) other = (vf)_mm256_permute_ps((__m256)v, 0x4e);
  else other = (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
#else
  for (int i = 0; i < W; i++) other[i] = v[i ^ HALF];
#endif
  for (int i = 0; i < W; i++) sign[i] = i & HALF ? -1.0f : 1.0f;
  return other + v * sign;
}

template <int N> static INLINE void transform(const float* x, float* y, float scale) {  // N vectors
  vf v[N];
#pragma GCC unroll 64
  for (int i = 0; i < N; i++) v[i] = inside<1>(load(x + i * W) * scale);
#pragma GCC unroll 64
  for (int i = 0; i < N; i++) v[i] = inside<2>(v[i]);
  if (W > 4)
#pragma GCC unroll 64
    for (int i = 0; i < N; i++) v[i] = inside<(W > 4 ? 4 : 1)>(v[i]);
  if (W > 8)
#pragma GCC unroll 64
    for (int i = 0; i < N; i++) v[i] = inside<(W > 8 ? 8 : 1)>(v[i]);
#pragma GCC unroll 8
  for (int half = 1; half < N; half *= 2)
#pragma GCC unroll 64
    for (int i = 0; i < N; i++)
      if (!(i & half)) {
        const vf a = v[i], b = v[i + half];
        v[i] = a + b, v[i + half] = a - b;
      }
#pragma GCC unroll 64
  for (int i = 0; i < N; i++) store(y + i * W, v[i]);
}

static void any(const float* x, float* y, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale;
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t at = 0; at < n; at += 2 * half)
      for (int64_t i = at; i < at + half; i++) {
        const float a = y[i], b = y[i + half];
        y[i] = a + b, y[i + half] = a - b;
      }
}

static void rows(const float* x, float* y, int64_t count, int64_t block, float scale) {
  switch (block / W) {
    case 1: for (int64_t i = 0; i < count; i++) transform<1>(x + i * W, y + i * W, scale); return;
    case 2: for (int64_t i = 0; i < count; i++) transform<2>(x + i * 2 * W, y + i * 2 * W, scale); return;
    case 4: for (int64_t i = 0; i < count; i++) transform<4>(x + i * 4 * W, y + i * 4 * W, scale); return;
    case 8: for (int64_t i = 0; i < count; i++) transform<8>(x + i * 8 * W, y + i * 8 * W, scale); return;
    case 16: for (int64_t i = 0; i < count; i++) transform<16>(x + i * 16 * W, y + i * 16 * W, scale); return;
    default: for (int64_t i = 0; i < count; i++) any(x + i * block, y + i * block, block, scale);
  }
}

// Blocks begin..end of an input whose `run` blocks are dense, and the next ones `stride` numbers on.
static void span(const float* x, float* y, int64_t run, int64_t stride, int64_t begin, int64_t end, int64_t block, float scale) {
  while (begin < end) {
    const int64_t first = begin % run, n = std::min(end - begin, run - first);
    rows(x + begin / run * stride + first * block, y + begin * block, n, block, scale);
    begin += n;
  }
}

// y = x H / sqrt(block) for `count` blocks of each of two inputs, y dense; the second may have none.
EXPORT int walsh_hadamard(const float* x, float* y, int64_t count, int64_t run, int64_t stride, const float* x2, float* y2,
                          int64_t count2, int64_t run2, int64_t stride2, int64_t block, float scale, int threads) {
  const int64_t total = count + count2;
  parallel_for(total, total * block < 262144 ? 1 : threads, [&](int64_t begin, int64_t end) {
    const int64_t middle = std::max(begin, std::min(end, count));
    span(x, y, run, stride, begin, std::min(end, middle), block, scale);
    span(x2, y2, run2, stride2, std::max<int64_t>(0, begin - count), end - count, block, scale);
  });
  return 0;
}
PACKED(walsh_hadamard)
