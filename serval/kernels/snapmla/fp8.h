// E4M3 numbers (1 sign, 4 exponent, 3 mantissa bits; bias 7; largest 448; no infinity) as vectors of float or bfloat16.
#pragma once
#include "simd.h"

#if SERVAL_AVX512 && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define SNAP_BF16 1
#endif

constexpr float LARGEST = 448.0f, SMALLEST = 1e-26f;

// The first n elements of a vector, all where n is more than W.
template <class T> static INLINE vf load_upto(const T* p, int64_t n) { return n >= W ? load(p) : load_some(p, n); }
template <class T> static INLINE void store_upto(T* p, vf v, int64_t n) { n >= W ? store(p, v) : store_some(p, v, n); }

// v in [0, 448] rounded to the nearest E4M3 number, ties to even: adding a power of two whose last place is the result's.
static INLINE vf round_magnitude(vf v) {
  vi base = (vi)v & 0x7f800000, least = vi{} + (121 << 23);  // below 2^-6 the last place stays 2^-9
  base = base > least ? base : least;
  const vf power = (vf)(base + (20 << 23));
  return (v + power) - power;
}
static INLINE vf round_e4m3(vf v) {
  const vu sign = (vu)v & 0x80000000u;
  return (vf)((vu)round_magnitude(vmin(vabs(v), splat(LARGEST))) | sign);
}
// Codes of numbers that round_e4m3 made.
static INLINE vb codes_of(vf v) {
  const vi magnitude = (vi)v & 0x7fffffff, sign = (vi)((vu)v >> 24) & 0x80;
  const vi whole = __builtin_convertvector((vf)magnitude * 512.0f, vi);  // of a subnormal
  const vi code = magnitude < (121 << 23) ? whole : (magnitude >> 20) - (120 << 3);
  return __builtin_convertvector(code | sign, vb);
}

// W codes as floats.
static INLINE vf decode(const uint8_t* p) {
#if SERVAL_AVX512 || (SERVAL_AVX2 && defined(__F16C__))
  // The bits of a half, 2^8 too small: its exponent is a bit wider and its bias 15.
#if SERVAL_AVX512
  const __m256i t = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i sign = _mm256_and_si256(t, _mm256_set1_epi16(0x4000));
  const __m256i half = _mm256_or_si256(_mm256_and_si256(t, _mm256_set1_epi16(0x3f80)), _mm256_add_epi16(sign, sign));
  return (vf)_mm512_cvtph_ps(half) * 256.0f;
#else
  const __m128i t = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  const __m128i sign = _mm_and_si128(t, _mm_set1_epi16(0x4000));
  const __m128i half = _mm_or_si128(_mm_and_si128(t, _mm_set1_epi16(0x3f80)), _mm_add_epi16(sign, sign));
  return (vf)_mm256_cvtph_ps(half) * 256.0f;
#endif
#else
  typedef uint8_t bytes __attribute__((vector_size(W)));
  bytes b; memcpy(&b, p, W);
  const vu c = __builtin_convertvector(b, vu), sign = (c & 0x80u) << 24;
  const vu bits = ((c & 0x7fu) << 20) + (120u << 23);
  const vf tiny = 2.0f * (vf)bits - 0x1p-6f;  // a subnormal: its exponent field is zero, without a leading one
  return (vf)((vu)((c & 0x78u) == 0u ? tiny : (vf)bits) | sign);
#endif
}

#if SNAP_BF16
// The two bytes of the bfloat16 number of each magnitude code (0x7f: NaN).
struct Table {
  alignas(64) uint8_t low[128], high[128];
  constexpr Table() : low{}, high{} {
    for (int c = 0; c < 128; c++) {
      unsigned bits = (c << 4) + (120 << 7);
      if (c < 8) {
        int lead = c >= 4 ? 2 : c >= 2 ? 1 : 0;  // c * 2^-9 = 2^(lead - 9) * (1 + rest)
        bits = c == 0 ? 0 : ((127 - 9 + lead) << 7) | (((c << (7 - lead)) & 0x7f));
      }
      if (c == 127) bits = 0x7fc0;
      low[c] = bits & 0xff, high[c] = bits >> 8;
    }
  }
};
static constexpr Table TABLE;

// 64 codes as bfloat16 numbers, in order.
static INLINE void decode64(__m512i codes, uint16_t* out) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that unpacking puts them in order
  codes = _mm512_permutexvar_epi64(order, codes);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.low), codes, _mm512_load_si512(TABLE.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.high), codes, _mm512_load_si512(TABLE.high + 64));
  high = _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8((char)0x80), 0xf8);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
  _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
}
#endif
