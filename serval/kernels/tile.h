// Register-blocked products on small tiles, the building blocks of attention.
#pragma once
#include "simd.h"

#if SERVAL_AVX512
constexpr int TILE_ROWS = 6, TILE_VECS = 4;  // 24 accumulators of 32 registers
#elif SERVAL_AVX2
constexpr int TILE_ROWS = 6, TILE_VECS = 2;  // 12 of 16
#else
constexpr int TILE_ROWS = 4, TILE_VECS = 2;
#endif

// V vectors of a row, in order.
template <int V, class T> static INLINE void load_row(const T* p, vf* out) {
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) out[v] = load(p + v * W);
}

// bfloat16 numbers taken two vectors at a time: first those at even places, then those at odd ones. That saves half of
// the widening, where the order within 2 W places may be changed; see `pair_place`.
struct bf16_pairs { uint16_t bits; };
template <int V> static INLINE void load_row(const bf16_pairs* p, vf* out) {
  static_assert(V % 2 == 0, "pairs of vectors");
#pragma GCC unroll 8
  for (int v = 0; v < V; v += 2) {
    vu both;
    memcpy(&both, p + v * W, sizeof both);
    out[v] = (vf)(both << 16), out[v + 1] = (vf)(both & 0xffff0000u);
  }
}
// Where place i of a row goes when its vectors are taken as pairs.
static INLINE int64_t pair_place(int64_t i) { return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2; }

// c[r][:] = (alpha ? alpha[r] * c[r][:] : 0) + sum_k a[r][k] * row(k)[:], for R rows and V vectors of columns.
// row(k) may be float or int8, and may issue a prefetch.
template <int R, int V, class Row>
static INLINE void tile(int64_t depth, const float* a, int64_t lda, Row row, float* c, int64_t ldc,
                        const float* alpha) {
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = alpha ? load(c + r * ldc + v * W) * alpha[r] : vf{};
  for (int64_t k = 0; k < depth; k++) {
    const auto* b = row(k);
    vf bv[V];
    load_row<V>(b, bv);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      vf x = splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] += x * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(c + r * ldc + v * W, acc[r][v]);
}

template <int V, class Row>
static void tile_rows(int64_t rows, int64_t depth, const float* a, int64_t lda, Row row, float* c, int64_t ldc,
                      const float* alpha) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
    tile<TILE_ROWS, V>(depth, a + r * lda, lda, row, c + r * ldc, ldc, alpha ? alpha + r : nullptr);
  a += r * lda, c += r * ldc;
  if (alpha) alpha += r;
  switch (rows - r) {
    case 1: tile<1, V>(depth, a, lda, row, c, ldc, alpha); break;
    case 2: tile<2, V>(depth, a, lda, row, c, ldc, alpha); break;
    case 3: tile<3, V>(depth, a, lda, row, c, ldc, alpha); break;
    case 4: tile<(TILE_ROWS > 4 ? 4 : 3), V>(depth, a, lda, row, c, ldc, alpha); break;
    case 5: tile<(TILE_ROWS > 4 ? 5 : 3), V>(depth, a, lda, row, c, ldc, alpha); break;
    default: break;
  }
}

// c [rows, columns] = alpha * c + a [rows, depth] * B, where row(k) is row k of B; columns a multiple of W.
template <class Row>
static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, Row row, float* c,
                    int64_t ldc, const float* alpha) {
  int64_t j = 0;
  for (; j + TILE_VECS * W <= columns; j += TILE_VECS * W)
    tile_rows<TILE_VECS>(rows, depth, a, lda, [&](int64_t k) { return row(k) + j; }, c + j, ldc, alpha);
  for (; j < columns; j += W)
    tile_rows<1>(rows, depth, a, lda, [&](int64_t k) { return row(k) + j; }, c + j, ldc, alpha);
}

#if SERVAL_AVX512 || SERVAL_AVX2
static INLINE __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 d) {  // four horizontal sums
  __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}
#endif
static INLINE void sums(const vf* v, float* out) {  // out[i] = sum(v[i]) for four vectors
#if SERVAL_AVX512
  __m256 h[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v[i], 1)));
  _mm_storeu_ps(out, sum4(h[0], h[1], h[2], h[3]));
#elif SERVAL_AVX2
  _mm_storeu_ps(out, sum4((__m256)v[0], (__m256)v[1], (__m256)v[2], (__m256)v[3]));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

#if SERVAL_AVX512
// out[4 r + j] = sum(v[4 r + j]) for 16 vectors: halves are added and interleaved until one vector holds all sums.
static INLINE __m512 sums16(const vf* v) {
  __m512 w[8], x[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {  // quarters of w[i]: two of rows 0 or 2, two of rows 1 or 3
    const __m512 a = (__m512)v[i < 4 ? i : i + 4], b = (__m512)v[i < 4 ? i + 4 : i + 8];
    w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)  // quarters of x[i]: rows 0 to 3
    x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(w[i], w[i + 4], 0x88), _mm512_shuffle_f32x4(w[i], w[i + 4], 0xdd));
  const __m512 y0 = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 y1 = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)y0, (__m512d)y1),
                       (__m512)_mm512_unpackhi_pd((__m512d)y0, (__m512d)y1));
}
#endif

static INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// c[r][4 keys] = dot products of R query rows with four key rows; depth a multiple of W.
template <int R, class T>
static INLINE void dots(int64_t depth, const float* a, int64_t lda, const T* const* keys, float* c, int64_t ldc) {
  vf acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[r][j] = vf{};
  const T *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
  for (int64_t i = 0; i < depth; i += W) {
    vf b0 = load(k0 + i), b1 = load(k1 + i), b2 = load(k2 + i), b3 = load(k3 + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      vf x = load(a + r * lda + i);
      acc[r][0] += x * b0, acc[r][1] += x * b1, acc[r][2] += x * b2, acc[r][3] += x * b3;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sums(acc[r], c + r * ldc);
}

// c [rows, columns] = a [rows, depth] * keys^T without packing; columns a multiple of 4 (pad with any valid pointer).
// `ahead` are rows that will be needed next; they are fetched meanwhile.
template <class T>
static void dot_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                        const T* const* keys, const T* const* ahead, float* c, int64_t ldc) {
  constexpr int R = W == 16 ? 4 : 2;  // R * 4 accumulators and 5 operands fit the registers
  for (int64_t j = 0; j < columns; j += 4) {
    for (int i = 0; ahead && i < 4; i++) prefetch(ahead[j + i], depth * sizeof(T));
    int64_t r = 0;
    for (; r + R <= rows; r += R) dots<R>(depth, a + r * lda, lda, keys + j, c + r * ldc + j, ldc);
    for (; r < rows; r++) dots<1>(depth, a + r * lda, lda, keys + j, c + r * ldc + j, ldc);
  }
}

// out[d * ld + j] = keys[j][d] for W keys and W dims.
static INLINE void transpose(const float* const* keys, int64_t d, float* out, int64_t ld) {
#if SERVAL_AVX512
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(keys[i] + d);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    __m512d a = (__m512d)t[i], b = (__m512d)t[i + 2], e = (__m512d)t[i + 1], f = (__m512d)t[i + 3];
    r[i] = (__m512)_mm512_unpacklo_pd(a, b), r[i + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    r[i + 2] = (__m512)_mm512_unpacklo_pd(e, f), r[i + 3] = (__m512)_mm512_unpackhi_pd(e, f);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // r[4g + i]: lane q holds dim 4q + i of keys 4g..4g+3
    __m512 p = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), q = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    __m512 u = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88), v = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_ps(out + (0 + i) * ld, _mm512_shuffle_f32x4(p, u, 0x88));
    _mm512_storeu_ps(out + (8 + i) * ld, _mm512_shuffle_f32x4(p, u, 0xdd));
    _mm512_storeu_ps(out + (4 + i) * ld, _mm512_shuffle_f32x4(q, v, 0x88));
    _mm512_storeu_ps(out + (12 + i) * ld, _mm512_shuffle_f32x4(q, v, 0xdd));
  }
#elif SERVAL_AVX2
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(keys[i] + d);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * ld, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * ld, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
#else
  for (int j = 0; j < W; j++)
    for (int i = 0; i < W; i++) out[i * ld + j] = keys[j][d + i];
#endif
}
