// Dot products of packed codes with 8-bit factors: the inner loop of both halves of attention.
//
// out[r][16 t + lane] = sum over lines and bytes of code * factor[r]. A line is 16 lanes of four codes, a factor the four
// numbers that meet a lane's codes, the same for every lane, so it is broadcast. For keys lanes are tokens and factors are
// signed (queries times scales), for values lanes are channels and factors are unsigned (probabilities times scales).
//
// AVX-512 VNNI: vpdpbusd adds four products into 32 bits, so planes need not even be shifted down: their sums are. A 2-bit
// line and 4 rows take one load, 4 ands, 8 broadcasts (in the load unit) and 16 vpdpbusd. AVX2: two halves of a line,
// vpmaddubsw and vpaddw in 16 bits, widened before they can overflow: 2 * 3 * 127 * 32 = 24,384 for keys.
#pragma once
#include "record.h"

#if SERVAL_AVX512 && defined(__AVX512VNNI__)
#define OSCAR_VNNI 1
#endif

// Lines of one group, in `pieces` runs of `count` lines; `row` bytes between the factors of two rows. Lines of `ahead`
// at the same places are requested meanwhile.
struct Lines { const uint8_t *const *at, *const *ahead; int64_t pieces, count; };

#if OSCAR_VNNI
// In assembler and volatile: from intrinsics GCC reorders the loop and spills sums.
static INLINE __m512i dot(__m512i sum, __m512i u, __m512i s) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}
template <bool KEYS> static INLINE __m512i meet(__m512i sum, __m512i codes, __m512i factor) {
  return KEYS ? dot(sum, codes, factor) : dot(sum, factor, codes);
}

template <int R, int BITS, bool KEYS>
static INLINE void products(const Lines& lines, const uint8_t* factors, int64_t row, int32_t* out) {
  constexpr int P = 8 / BITS;
  __m512i acc[R][P];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = _mm512_setzero_si512();
  const __m512i m0 = _mm512_set1_epi8(BITS == 2 ? 0x03 : 0x0f), m1 = _mm512_set1_epi8(BITS == 2 ? 0x0c : (char)0xf0);
  const __m512i m2 = _mm512_set1_epi8(0x30), m3 = _mm512_set1_epi8((char)0xc0);
  for (int64_t piece = 0; piece < lines.pieces; piece++) {
    const uint8_t *at = lines.at[piece], *ahead = lines.ahead[piece];
    for (int64_t i = 0; i < lines.count; i++, at += LINE, ahead += LINE) {
      const __m512i raw = _mm512_loadu_si512(at);
      __builtin_prefetch(ahead, 0, 2);
      __m512i a[P];
      a[0] = _mm512_and_si512(raw, m0);
      if (BITS == 2) {
        a[1] = _mm512_and_si512(raw, m1), a[2] = _mm512_and_si512(raw, m2);
        a[3] = KEYS ? _mm512_and_si512(raw, m3) : _mm512_and_si512(_mm512_srli_epi16(raw, 2), m2);  // signed codes
      } else {
        a[1] = KEYS ? _mm512_and_si512(raw, m1) : _mm512_and_si512(_mm512_srli_epi16(raw, 4), m0);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        int32_t word;
        memcpy(&word, factors + r * row, 4);
        const __m512i x = _mm512_set1_epi32(word);
        acc[r][0] = meet<KEYS>(acc[r][0], a[0], x), acc[r][1] = meet<KEYS>(acc[r][1], a[1], x);
        if (BITS == 2) {
          memcpy(&word, factors + r * row + 4, 4);
          const __m512i y = _mm512_set1_epi32(word);
          acc[r][2] = meet<KEYS>(acc[r][2], a[2], y), acc[r][3] = meet<KEYS>(acc[r][3], a[3], y);
        }
      }
      factors += BITS == 2 ? 8 : 4;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    __m512i low = acc[r][0], high = acc[r][1];
    if (BITS == 2) {
      low = _mm512_add_epi32(low, _mm512_srai_epi32(acc[r][2], 4));
      high = _mm512_add_epi32(_mm512_srai_epi32(high, 2), _mm512_srai_epi32(acc[r][3], KEYS ? 6 : 4));
    } else if (KEYS) {
      high = _mm512_srai_epi32(high, 4);
    }
    _mm512_storeu_si512(out + r * GROUP, low), _mm512_storeu_si512(out + r * GROUP + 16, high);
  }
}

#elif SERVAL_AVX2 || SERVAL_AVX512
// Two planes with one factor. One block of assembler: from intrinsics GCC hoists the broadcasts of all rows and spills.
template <bool KEYS>
static INLINE void meet(__m256i& s0, __m256i& s1, __m256i a0, __m256i a1, const uint8_t* factor) {
  __m256i x, y;
  const int32_t& word = *(const int32_t*)factor;
#if defined(__AVXVNNI__)
  if (KEYS)
    asm volatile("vpbroadcastd %[w], %[x]\n\t%{vex%} vpdpbusd %[x], %[a0], %[s0]\n\t%{vex%} vpdpbusd %[x], %[a1], %[s1]"
                 : [s0] "+x"(s0), [s1] "+x"(s1), [x] "=&x"(x) : [w] "m"(word), [a0] "x"(a0), [a1] "x"(a1));
  else
    asm volatile("vpbroadcastd %[w], %[x]\n\t%{vex%} vpdpbusd %[a0], %[x], %[s0]\n\t%{vex%} vpdpbusd %[a1], %[x], %[s1]"
                 : [s0] "+x"(s0), [s1] "+x"(s1), [x] "=&x"(x) : [w] "m"(word), [a0] "x"(a0), [a1] "x"(a1));
  (void)y;
#else
  if (KEYS)
    asm volatile("vpbroadcastd %[w], %[x]\n\tvpmaddubsw %[x], %[a0], %[y]\n\tvpmaddubsw %[x], %[a1], %[x]\n\t"
                 "vpaddw %[y], %[s0], %[s0]\n\tvpaddw %[x], %[s1], %[s1]"
                 : [s0] "+x"(s0), [s1] "+x"(s1), [x] "=&x"(x), [y] "=&x"(y) : [w] "m"(word), [a0] "x"(a0), [a1] "x"(a1));
  else
    asm volatile("vpbroadcastd %[w], %[x]\n\tvpmaddubsw %[a0], %[x], %[y]\n\tvpmaddubsw %[a1], %[x], %[x]\n\t"
                 "vpaddw %[y], %[s0], %[s0]\n\tvpaddw %[x], %[s1], %[s1]"
                 : [s0] "+x"(s0), [s1] "+x"(s1), [x] "=&x"(x), [y] "=&x"(y) : [w] "m"(word), [a0] "x"(a0), [a1] "x"(a1));
#endif
}

template <int R, int BITS, bool KEYS>
static INLINE void products(const Lines& lines, const uint8_t* factors, int64_t row, int32_t* out) {
  // Lines whose 16-bit sums cannot overflow, see above; with 4 bits 2 * 15 * 127 * 8 and 2 * 15 * 255 * 4.
  constexpr int64_t LIMIT = (KEYS ? 16 : 8) / (BITS == 2 ? 1 : 2);
  constexpr int P = BITS == 2 ? 2 : 1;  // factors of a line
  const __m256i mask = _mm256_set1_epi8(BITS == 2 ? 3 : 15);
  for (int half = 0; half < 2; half++) {
    __m256i acc[R][2];
    auto clear = [&]() {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    };
    bool first = true;
    auto flush = [&]() {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int t = 0; t < 2; t++) {
          __m256i* to = (__m256i*)(out + r * GROUP + 16 * t + 8 * half);
#if defined(__AVXVNNI__)
          const __m256i sum = acc[r][t];
#else
          const __m256i sum = _mm256_madd_epi16(acc[r][t], _mm256_set1_epi16(1));
#endif
          _mm256_storeu_si256(to, first ? sum : _mm256_add_epi32(_mm256_loadu_si256(to), sum));
        }
      first = false;
      clear();
    };
    clear();
    const uint8_t* f = factors;
    int64_t left = LIMIT;
    for (int64_t piece = 0; piece < lines.pieces; piece++) {
      const uint8_t *at = lines.at[piece] + 32 * half, *ahead = lines.ahead[piece];
      for (int64_t i = 0; i < lines.count; i++, at += LINE, ahead += LINE, f += 4 * P) {
        if (left == 0) { flush(); left = LIMIT; }
        left--;
        const __m256i raw = _mm256_loadu_si256((const __m256i*)at);
        if (half == 0) __builtin_prefetch(ahead, 0, 2);
        const __m256i a0 = _mm256_and_si256(raw, mask), a1 = _mm256_and_si256(_mm256_srli_epi16(raw, BITS), mask);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) meet<KEYS>(acc[r][0], acc[r][1], a0, a1, f + r * row);
        if (P == 2) {
          const __m256i a2 = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
          const __m256i a3 = _mm256_and_si256(_mm256_srli_epi16(raw, 6), mask);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) meet<KEYS>(acc[r][0], acc[r][1], a2, a3, f + r * row + 4);
        }
      }
    }
    flush();
  }
}

#else
// One function for all cases: unrolled for each it would take compilers minutes.
__attribute__((noinline)) static void plain_products(int rows, int bits, bool keys, const Lines& lines, const uint8_t* factors,
                                                     int64_t row, int32_t* out) {
  const int words = 4 / bits, mask = (1 << bits) - 1;
  memset(out, 0, rows * GROUP * sizeof(int32_t));
  for (int64_t piece = 0; piece < lines.pieces; piece++)
    for (int64_t i = 0; i < lines.count; i++, factors += 4 * words)
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < 2 * words; j++)  // planes
          for (int b = 0; b < 64; b++) {
            const uint8_t factor = factors[r * row + j / 2 * 4 + b % 4];
            const int code = lines.at[piece][i * LINE + b] >> (bits * j) & mask;
            out[r * GROUP + 16 * (j % 2) + b / 4] += code * (keys ? (int)(int8_t)factor : (int)factor);
          }
}
template <int R, int BITS, bool KEYS>
static INLINE void products(const Lines& lines, const uint8_t* factors, int64_t row, int32_t* out) {
  plain_products(R, BITS, KEYS, lines, factors, row, out);
}
#endif

// 32 products of 15-bit fractions, (a * s + 2^14) >> 15, and their sums in 16-bit lanes, added over a few calls.
#if SERVAL_AVX512
typedef __m512i Totals;
static INLINE Totals no_totals() { return _mm512_setzero_si512(); }
static INLINE vi widen(Totals t) { return (vi)_mm512_madd_epi16(t, _mm512_set1_epi16(1)); }
struct Fractions { __m512i v; };
static INLINE Fractions fractions(const int16_t* s, int shift) {  // s >> shift, rounded
  return {_mm512_mulhrs_epi16(_mm512_loadu_si512(s), _mm512_set1_epi16((int16_t)(1 << (15 - shift))))};
}
template <bool KEYS> static INLINE void fold(const int16_t* a, Fractions s, uint8_t* out, Totals& total) {
  const __m512i x = _mm512_mulhrs_epi16(_mm512_loadu_si512(a), s.v);
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi16_epi8(x));
  total = _mm512_add_epi16(total, x);
}
#elif SERVAL_AVX2
typedef __m256i Totals;
static INLINE Totals no_totals() { return _mm256_setzero_si256(); }
static INLINE vi widen(Totals t) { return (vi)_mm256_madd_epi16(t, _mm256_set1_epi16(1)); }
struct Fractions { __m256i a, b; };
static INLINE Fractions fractions(const int16_t* s, int shift) {
  const __m256i factor = _mm256_set1_epi16((int16_t)(1 << (15 - shift)));
  return {_mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i*)s), factor),
          _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i*)(s + 16)), factor)};
}
template <bool KEYS> static INLINE void fold(const int16_t* a, Fractions s, uint8_t* out, Totals& total) {
  const __m256i x = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i*)a), s.a);
  const __m256i y = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i*)(a + 16)), s.b);
  const __m256i packed = KEYS ? _mm256_packs_epi16(x, y) : _mm256_packus_epi16(x, y);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(packed, 0xd8));
  total = _mm256_add_epi16(total, _mm256_add_epi16(x, y));
}
#else
typedef int32_t Totals;
static INLINE Totals no_totals() { return 0; }
static INLINE vi widen(Totals t) { vi v = {}; v[0] = t; return v; }
struct Fractions { int16_t v[32]; };
static INLINE int16_t fraction(int32_t a, int32_t s) { return (int16_t)((a * s + (1 << 14)) >> 15); }
static Fractions fractions(const int16_t* s, int shift) {
  Fractions f;
  for (int i = 0; i < 32; i++) f.v[i] = fraction(s[i], 1 << (15 - shift));
  return f;
}
__attribute__((noinline)) static Totals plain_fold(const int16_t* a, const Fractions& s, uint8_t* out) {
  Totals total = 0;
  for (int i = 0; i < 32; i++) {
    const int16_t x = fraction(a[i], s.v[i]);
    out[i] = (uint8_t)x;
    total += x;
  }
  return total;
}
template <bool KEYS> static INLINE void fold(const int16_t* a, const Fractions& s, uint8_t* out, Totals& total) {
  total += plain_fold(a, s, out);
}
#endif
