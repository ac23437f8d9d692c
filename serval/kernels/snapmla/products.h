// The phases of attention over one block of decoded tokens: scores, softmax with quantised probabilities, sums.
//
// Numbers come in units: pairs of bfloat16 numbers where the CPU multiplies and adds those, else single floats.
#pragma once
#include <limits>
#include "fp8.h"
#include "tile.h"

constexpr int64_t BLOCK = 64;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

#if SNAP_BF16
constexpr int PAIR = 2;  // numbers in a unit
typedef uint32_t unit;
typedef vu vunit;
static INLINE vf multiply(vf acc, vunit a, vunit b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
static INLINE vf multiply(vf acc, vunit a, unit b) { return multiply(acc, a, (vunit)_mm512_set1_epi32((int)b)); }
#else
constexpr int PAIR = 1;
typedef float unit;
typedef vf vunit;
static INLINE vf multiply(vf acc, vunit a, vunit b) { return acc + a * b; }
static INLINE vf multiply(vf acc, vunit a, unit b) { return acc + a * b; }
#endif
static INLINE vunit load_units(const unit* p) { vunit v; memcpy(&v, p, sizeof v); return v; }
// p[0], p[1], p[0], p[1], ...
static INLINE vunit broadcast_two(const unit* p) {
  typedef int64_t vl __attribute__((vector_size(W * 4)));
  int64_t both; memcpy(&both, p, 8);
  return (vunit)(both - vl{});
}
// a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], ...
static INLINE vf add_neighbours(vf a, vf b) {
#if SERVAL_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return (vf)_mm512_add_ps(_mm512_permutex2var_ps((__m512)a, even, (__m512)b), _mm512_permutex2var_ps((__m512)a, odd, (__m512)b));
#elif SERVAL_AVX2
  return (vf)_mm256_permute4x64_pd((__m256d)_mm256_hadd_ps((__m256)a, (__m256)b), 0xd8);
#else
  vf c;
  for (int i = 0; i < W / 2; i++) c[i] = a[2 * i] + a[2 * i + 1], c[W / 2 + i] = b[2 * i] + b[2 * i + 1];
  return c;
#endif
}
// x[0], y[0], x[1], y[1], ... in place.
static INLINE void interleave(unit* x, unit* y) {
#if SERVAL_AVX512
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8)), a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  _mm512_storeu_si512(x, _mm512_permutex2var_epi32(a, low, b));
  _mm512_storeu_si512(y, _mm512_permutex2var_epi32(a, high, b));
#else
  unit both[2 * W];
  for (int i = 0; i < W; i++) both[2 * i] = x[i], both[2 * i + 1] = y[i];
  memcpy(x, both, sizeof(unit) * W), memcpy(y, both + W, sizeof(unit) * W);
#endif
}
constexpr int COLUMNS = TILE_VECS * W, KEYS = W == 16 ? 8 : 4;  // latent dims and keys of a tile

// Memory that the next block needs, requested line by line: pieces [begin, end).
struct Ahead {
  struct Piece { const char *begin, *end; };
  Piece *pieces; int64_t count; const char *at, *end; int64_t next;
  void add(const void* p, int64_t bytes) { pieces[count++] = {(const char*)((uintptr_t)p & ~(uintptr_t)63), (const char*)p + bytes}; }
  void start() { next = 0, at = end = nullptr; }
  INLINE void request() {
    if (at >= end) {
      if (next == count) return;
      at = pieces[next].begin, end = pieces[next++].end;
    }
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

static INLINE void put(unit* line, int64_t i, vf v, int64_t n) {  // numbers that a unit holds exactly
#if SNAP_BF16
  store_upto((bf16*)line + i, v, n);
#else
  store_upto(line + i, v, n);
#endif
}
// lines [W rows, depth] to q [depth, W]; one: as scores_one wants it, units u and u + 1 of half the rows in a vector.
static INLINE void pack(const unit* lines, int64_t depth, bool one, unit* q) {
  const float* rows[W];
  for (int r = 0; r < W; r++) rows[r] = (const float*)lines + r * depth;
  for (int64_t u = 0; u < depth; u += W) transpose(rows, u, (float*)q + u * W, W);
  if (one) for (int64_t u = 0; u < depth; u += 2) interleave(q + u * W, q + u * W + W);
}

// s[k * 2W + v * W] = dot products of two vectors of query rows (`next` units apart) with K keys.
template <int K>
static void scores(int64_t depth, const unit* q, int64_t next, const unit* keys, int64_t pitch, float* s, Ahead& ahead) {
  vf acc[K][2];
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) acc[k][0] = acc[k][1] = vf{};
  for (int64_t u = 0; u < depth; u += 4) {
    ahead.request();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const vunit x = load_units(q + (u + i) * W), y = load_units(q + next + (u + i) * W);
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) {
        const unit number = keys[k * pitch + u + i];
        acc[k][0] = multiply(acc[k][0], x, number), acc[k][1] = multiply(acc[k][1], y, number);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) store(s + k * 2 * W, acc[k][0]), store(s + k * 2 * W + W, acc[k][1]);
}
// The same for one vector of rows. Loads, not products, would bound it, so two units are broadcast at once: a vector of
// q holds two units of half the rows.
template <int K>
static void scores_one(int64_t depth, const unit* q, const unit* keys, int64_t pitch, float* s, Ahead& ahead) {
  vf acc[K][2];
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) acc[k][0] = acc[k][1] = vf{};
  for (int64_t u = 0; u < depth; u += 4) {
    ahead.request();
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const vunit x = load_units(q + (u + i) * W), y = load_units(q + (u + i + 1) * W);
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) {
        const vunit both = broadcast_two(keys + k * pitch + u + i);
        acc[k][0] = multiply(acc[k][0], x, both), acc[k][1] = multiply(acc[k][1], y, both);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) store(s + k * 2 * W, add_neighbours(acc[k][0], acc[k][1]));
}
// Softmax step of one vector of rows over n keys: s (stride 2W) in, units of quantised probabilities p (stride ldp) out.
static INLINE vf soften(float* s, int64_t n, vf factor, const float* key_scales, vi limit, float* m, float* scale,
                        float* mass, unit* p, int64_t ldp) {
  vf top = load(m);
  const vf before = top;
  for (int64_t k = 0; k < n; k++) {
    vf x = load(s + k * 2 * W) * factor * key_scales[k];
    x = limit > (int32_t)k ? x : splat(LOWEST);
    store(s + k * 2 * W, x);
    top = vmax(top, x);
  }
  const vf base = top == splat(LOWEST) ? vf{} : top;
  vf total = {}, high = {};
  for (int64_t k = 0; k < n; k++) {
    const vf e = vexp(load(s + k * 2 * W) - base), f = e * key_scales[k];
    total += e, high = vmax(high, f);
    store(s + k * 2 * W, f);
  }
  const vf fresh = high == vf{} ? splat(1.0f) : vmax(high, splat(SMALLEST)) / LARGEST, inverse = 1.0f / fresh;
  auto code = [&](int64_t k) {
    return k < n ? round_magnitude(vmin(load(s + k * 2 * W) * inverse, splat(LARGEST))) : vf{};
  };
  for (int64_t k = 0; k < BLOCK; k += PAIR) {
#if SNAP_BF16
    const vu both = ((vu)code(k) >> 16) | (vu)code(k + 1);
    memcpy(p + k / 2 * ldp, &both, sizeof both);
#else
    store(p + k * ldp, code(k));
#endif
  }
  const vf beta = vexp(before - base) * load(scale) * inverse;
  store(mass, load(mass) * beta + total * inverse);
  store(m, top), store(scale, fresh);
  return beta;
}

// o [R rows, COLUMNS] = beta * o + p * values, where p[u * ldp + r] meets values[u * ldv ..].
template <int R>
static void sums(int64_t depth, const unit* p, int64_t ldp, const unit* values, int64_t ldv, float* o, int64_t ldo,
                 const float* beta, Ahead& ahead) {
  vf acc[R][TILE_VECS];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) acc[r][v] = load(o + r * ldo + v * W) * beta[r];
  for (int64_t u = 0; u < depth; u++) {
    if (u % 2 == 0) ahead.request();
    vunit x[TILE_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) x[v] = load_units(values + u * ldv + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) acc[r][v] = multiply(acc[r][v], x[v], p[u * ldp + r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) store(o + r * ldo + v * W, acc[r][v]);
}

// COLUMNS latent dims of all keys as `sums` wants them: rows of units; returns their stride.
static INLINE int64_t arrange(const unit* keys, int64_t pitch, int64_t column, unit* buffer, const unit** values) {
#if SNAP_BF16
  for (int64_t k = 0; k < BLOCK; k += 2) {
    const uint16_t *x = (const uint16_t*)(keys + k * pitch) + column, *y = (const uint16_t*)(keys + (k + 1) * pitch) + column;
    for (int64_t i = 0; i < COLUMNS; i += 32) {
      const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(y + i);
      _mm512_storeu_si512(buffer + k / 2 * COLUMNS + i, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(buffer + k / 2 * COLUMNS + i + 16, _mm512_unpackhi_epi16(a, b));
    }
  }
  *values = buffer;
  return COLUMNS;
#else
  *values = keys + column;
  return pitch;
#endif
}
// An output row of n numbers (a multiple of 64) times `factor`, its dims in order again after `arrange`.
static INLINE void restore(const float* from, int64_t n, float factor, float* to) {
#if SNAP_BF16
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < n; i += 32) {
    const __m512 a = (__m512)(load(from + i) * factor), b = (__m512)(load(from + i + 16) * factor);
    _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(to + i + 16, _mm512_permutex2var_ps(a, high, b));
  }
#else
  for (int64_t i = 0; i < n; i += W) store(to + i, load(from + i) * factor);
#endif
}
