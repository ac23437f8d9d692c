// Rotary embedding of queries and keys in one call. Floor: one read and one write of q and k (tables stay in cache).
#include "simd.h"

// Rows of x are [heads, d] with d contiguous; the first 2 * half dims turn, the rest are copied.
template <class T>
static void rotate(const T* x, int64_t row_stride, int64_t head_stride, T* out, int64_t heads, int64_t d, int64_t half,
                   const float* cos, const float* sin, float sign, int interleaved, int64_t begin, int64_t end,
                   const int64_t* positions) {
  for (int64_t t = begin; t < end; t++) {
    const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
    for (int64_t h = 0; h < heads; h++) {
      const T* a = x + t * row_stride + h * head_stride;
      T* o = out + (t * heads + h) * d;
      if (interleaved) {
        for (int64_t j = 0; j < half; j++) {
          T pair[2] = {a[2 * j], a[2 * j + 1]}, turned[2];
          vf v = load_some(pair, 2), w = {};
          float sj = sign * s[j];
          w[0] = v[0] * c[j] - v[1] * sj;
          w[1] = v[1] * c[j] + v[0] * sj;
          store_some(turned, w, 2);
          o[2 * j] = turned[0];
          o[2 * j + 1] = turned[1];
        }
      } else {
        int64_t j = 0;
        for (; j + W <= half; j += W) {
          vf lo = load(a + j), hi = load(a + half + j), cj = load(c + j), sj = sign * load(s + j);
          store(o + j, lo * cj - hi * sj);
          store(o + half + j, hi * cj + lo * sj);
        }
        if (j < half) {
          int64_t n = half - j;
          vf lo = load_some(a + j, n), hi = load_some(a + half + j, n);
          vf cj = load_some(c + j, n), sj = sign * load_some(s + j, n);
          store_some(o + j, lo * cj - hi * sj, n);
          store_some(o + half + j, hi * cj + lo * sj, n);
        }
      }
      if (d > 2 * half) memcpy(o + 2 * half, a + 2 * half, (d - 2 * half) * sizeof(T));
    }
  }
}

// float32 interleaved: plain scalar code that the compiler vectorises.
template <>
void rotate<float>(const float* x, int64_t row_stride, int64_t head_stride, float* out, int64_t heads, int64_t d,
                   int64_t half, const float* cos, const float* sin, float sign, int interleaved, int64_t begin,
                   int64_t end, const int64_t* positions) {
  for (int64_t t = begin; t < end; t++) {
    const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
    for (int64_t h = 0; h < heads; h++) {
      const float* __restrict a = x + t * row_stride + h * head_stride;
      float* __restrict o = out + (t * heads + h) * d;
      if (interleaved) {
        for (int64_t j = 0; j < half; j++) {
          float lo = a[2 * j], hi = a[2 * j + 1], sj = sign * s[j];
          o[2 * j] = lo * c[j] - hi * sj;
          o[2 * j + 1] = hi * c[j] + lo * sj;
        }
      } else {
        for (int64_t j = 0; j < half; j++) {
          float lo = a[j], hi = a[half + j], sj = sign * s[j];
          o[j] = lo * c[j] - hi * sj;
          o[half + j] = hi * c[j] + lo * sj;
        }
      }
      if (d > 2 * half) memcpy(o + 2 * half, a + 2 * half, (d - 2 * half) * sizeof(float));
    }
  }
}

template <class T>
static int both(const void* q, int64_t q_row, int64_t q_head, void* q_out, int64_t q_heads, int64_t q_dim,
                const void* k, int64_t k_row, int64_t k_head, void* k_out, int64_t k_heads, int64_t k_dim,
                const float* cos, const float* sin, const int64_t* positions, int64_t rows, int64_t half,
                int64_t table, float sign, int interleaved, int threads) {
  for (int64_t t = 0; t < rows; t++)
    if (positions[t] < 0 || positions[t] >= table) return 1;
  int64_t work = rows * (q_heads * q_dim + k_heads * k_dim);
  parallel_for(rows, work < 65536 ? 1 : threads, [&](int64_t begin, int64_t end) {
    rotate((const T*)q, q_row, q_head, (T*)q_out, q_heads, q_dim, half, cos, sin, sign, interleaved, begin, end,
           positions);
    rotate((const T*)k, k_row, k_head, (T*)k_out, k_heads, k_dim, half, cos, sin, sign, interleaved, begin, end,
           positions);
  });
  return 0;
}

#define INSTANCE(name, T)                                                                                            \
  EXPORT int rotary_##name(const void* q, int64_t q_row, int64_t q_head, void* q_out, int64_t q_heads, int64_t q_dim, \
                           const void* k, int64_t k_row, int64_t k_head, void* k_out, int64_t k_heads, int64_t k_dim, \
                           const float* cos, const float* sin, const int64_t* positions, int64_t rows, int64_t half, \
                           int64_t table, float sign, int interleaved, int threads) {                                \
    return both<T>(q, q_row, q_head, q_out, q_heads, q_dim, k, k_row, k_head, k_out, k_heads, k_dim, cos, sin,       \
                   positions, rows, half, table, sign, interleaved, threads);                                       \
  }                                                                                                                  \
  PACKED(rotary_##name)
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
