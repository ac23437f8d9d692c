// Where a record's bytes lie (format.py), and how tasks name records.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "decode.h"

constexpr int64_t GROUP = 32, LINE = 64, MAX_DIM = 512;

// In the order in which Python passes it.
struct Format {
  int64_t heads, k_dim, v_dim, k_bits, v_bits, zero, by_token, norms;
  int64_t k_codes, k_scale, k_mid, v_codes, v_scale, v_mid, bytes;  // offsets in a record, its size
  int64_t per_block, blocks;                                        // records per head of a block

  int64_t k_groups() const { return (k_dim + GROUP - 1) / GROUP; }
  int64_t v_groups() const { return (v_dim + GROUP - 1) / GROUP; }
  // Of head 0 of a token's record (tokens of a table in order).
  int64_t record(const int32_t* table, int64_t index) const {
    return table[index / per_block] * heads * per_block + index % per_block;
  }
};

enum Zero { INTEGER, SMALLEST, SYMMETRIC };  // rules of zero points, reference.py

struct Storage { uint8_t *records, *exponents; float* norms; };

constexpr int BIAS = 120;
constexpr float TOP = 16384.0f;
static INLINE float power_of_two(int e) {  // e at least -126
  int32_t bits = (e + 127) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

typedef int16_t vs __attribute__((vector_size(W * 2)));
typedef uint8_t vc __attribute__((vector_size(W)));
static INLINE vi load_i(const int32_t* p) { vi v; memcpy(&v, p, sizeof v); return v; }
static INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
static INLINE vf load_f(const int16_t* p) { vs v; memcpy(&v, p, sizeof v); return to_float(__builtin_convertvector(v, vi)); }
static INLINE vf load_f(const uint8_t* p) {
#if SERVAL_AVX512
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif SERVAL_AVX2
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf v; for (int i = 0; i < W; i++) v[i] = p[i]; return v;
#endif
}
static INLINE vf vround(vf x) {  // to the nearest integer, ties to even
#if SERVAL_AVX512
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif SERVAL_AVX2
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < W; i++) x[i] = std::nearbyint(x[i]);
  return x;
#endif
}
