// Micro-kernels for AVX2, which has no signed-by-signed byte product.
//
// 4 bits: vpmaddubsw of unsigned codes [0, 15] and int8 activations cannot saturate; up to 32 inputs are summed in
//   16-bit lanes, which start at the correction for the codes' offset, so the final lane is the signed sum of 16
//   products, at most 16 * 8 * 127 = 16,256 (wrapping in between is harmless). One vpmaddwd then widens to 32 bits and
//   multiplies by the integer group scale, or by ones: the scale is free.
// 8 bits: vpmaddubsw would saturate, so codes are widened to int16 as they are read and meet int16 activations.
#pragma once
#include "spec.h"

#if !VNNI && (SERVAL_AVX2 || SERVAL_AVX512)
constexpr int SIZES[] = {1, 2, 3, 4, 5, 6};
constexpr int BLOCK = 32;  // inputs summed in 16 bits
static INLINE int64_t max_rows(int) { return 6; }
static INLINE int64_t word_bytes(int bits) { return bits == 4 ? 4 : 8; }
static INLINE __m256i read(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static INLINE __m256i read32(const void* p) { int32_t v; memcpy(&v, p, 4); return _mm256_set1_epi32(v); }

// A barrier: keeps GCC from reassociating sums and from hoisting every broadcast, which would spill the sums.
static INLINE __m256i keep(__m256i v) { asm volatile("" : "+x"(v)); return v; }

// Eight channels' int32 sums of a finished group, scaled and added to the totals.
template <int MODE> static INLINE void fold(int32_t* total, __m256i sum, const void* scales, int64_t lane) {
  if (MODE == FLOAT) {
    const __m256 factor = _mm256_loadu_ps((const float*)scales + lane);
    float* f = (float*)total;
    _mm256_storeu_ps(f, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, _mm256_loadu_ps(f)));
    return;
  }
  if (MODE == INTEGER)
    sum = _mm256_mullo_epi32(sum, _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)((const int16_t*)scales + lane))));
  _mm256_storeu_si256((__m256i*)total, _mm256_add_epi32(read(total), sum));
}

// One 4-input step of R rows and V vectors of 8 channels.
template <int R, int V> static INLINE void step(__m256i (&h)[R][V], const __m256i (&w)[V], const int8_t* x) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const __m256i a = read32(x + r * 4);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      h[r][v] = keep(_mm256_add_epi16(h[r][v], _mm256_maddubs_epi16(w[v], a)));
    }
  }
}

// 4 bits: totals[R][8 V] of V * 8 channels; OPEN: `w` holds one code per byte, [k / 4][16][4], else packed cells.
// start: [groups][blocks of a group][R], two int16 each. lane: the first channel's place in its panel.
template <int MODE, int R, int V, bool OPEN>
static void nibbles(const uint8_t* w, const void* scales, const int8_t* x, const int32_t* start, const Spec& s, int lane,
                    int32_t* totals) {
  const __m256i mask = _mm256_set1_epi8(15);
  const int64_t segments = MODE == CHANNEL ? 1 : s.groups;
  alignas(32) int32_t part[MODE == FLOAT ? R * V * 8 : 1];
  int32_t* sums = MODE == FLOAT ? part : totals;
  memset(totals, 0, sizeof(int32_t) * R * V * 8);
  w += lane * 4;
  for (int64_t segment = 0; segment < segments; segment++) {
    __m256i scale[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      scale[v] = _mm256_set1_epi16(1);
      if (MODE == INTEGER) {
        const int16_t* p = (const int16_t*)scales + segment * PANEL + lane + v * 8;
        const __m256i one = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        scale[v] = _mm256_or_si256(one, _mm256_slli_epi32(one, 16));
      }
    }
    if (MODE == FLOAT) memset(part, 0, sizeof part);
    for (int64_t k = 0; k < s.length; k += BLOCK) {
      __m256i h[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) h[r][v] = read32(start + r);
      start += R;
      const int cells = (int)std::min<int64_t>(BLOCK, s.length - k) / 8;
      for (int c = 0; c < cells; c++) {
        __m256i b[V];
        if (OPEN) {
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) b[v] = read(w + v * 32);
          step<R, V>(h, b, x);
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) b[v] = read(w + CELL + v * 32);
          step<R, V>(h, b, x + R * 4);
          w += 2 * CELL;
        } else {
          __m256i raw[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) raw[v] = read(w + v * 32), b[v] = _mm256_and_si256(raw[v], mask);
          if (lane == 0) __builtin_prefetch(w + 2048, 0, 2);
          step<R, V>(h, b, x);
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) b[v] = _mm256_and_si256(_mm256_srli_epi16(raw[v], 4), mask);
          step<R, V>(h, b, x + R * 4);
          w += CELL;
        }
        x += R * 8;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          int32_t* total = sums + (r * V + v) * 8;
          const __m256i sum = _mm256_add_epi32(read(total), _mm256_madd_epi16(h[r][v], scale[v]));
          _mm256_storeu_si256((__m256i*)total, sum);
        }
    }
    if (MODE == FLOAT)
      for (int i = 0; i < R * V; i++)
        fold<FLOAT>(totals + i * 8, read(part + i * 8), scales, segment * PANEL + lane + i % V * 8);
  }
}

// 8 bits: totals[R][4 J] of 4 J channels. start: [groups][R].
template <int MODE, int R, int J>
static INLINE void bytes(const uint8_t* w, const void* scales, const int16_t* x, const int32_t* start, const Spec& s, int lane,
                  int32_t* totals) {
  const int64_t segments = MODE == CHANNEL ? 1 : s.groups;
  memset(totals, 0, sizeof(int32_t) * R * J * 4);
  w += lane * 4;
  for (int64_t segment = 0; segment < segments; segment++) {
    __m256i acc[R][J];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) acc[r][j] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int64_t k = 0; k < s.length; k += 4, w += CELL, x += R * 4) {
      if (lane == 0) __builtin_prefetch(w + 2048, 0, 2);
      __m256i b[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) b[j] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + j * 16)));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int64_t four;
        memcpy(&four, x + r * 4, 8);
        const __m256i a = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
          acc[r][j] = keep(_mm256_add_epi32(acc[r][j], _mm256_madd_epi16(b[j], a)));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int j = 0; j < J; j += 2) {
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][j], acc[r][j + 1]), 0xd8);
        const __m256i sum = _mm256_add_epi32(pairs, read32(start + segment * R + r));
        fold<MODE>(totals + r * J * 4 + j * 4, sum, scales, segment * PANEL + lane + j * 4);
      }
  }
}

// One code per byte, [k / 4][16][4], of a 4-bit panel: worth it when several blocks of rows read it.
static const uint8_t* open_panel(const uint8_t* data, int64_t bytes) {
  static thread_local std::vector<uint8_t> memory;
  memory.resize(bytes * 2 + 64);
  uint8_t* out = (uint8_t*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < bytes; i += CELL)
    for (int half = 0; half < CELL; half += 32) {
      const __m256i raw = read(data + i + half);
      _mm256_store_si256((__m256i*)(out + 2 * i + half), _mm256_and_si256(raw, mask));
      _mm256_store_si256((__m256i*)(out + 2 * i + CELL + half), _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask));
    }
  return out;
}

// One panel for one block of rows. open: the panel with one code per byte, or null.
template <int BITS, int MODE, int R>
static void rows_of(const Layer& y, const Spec& s, const Block& b, const char* codes, const int32_t* start,
                    const float* x_scale, int64_t panel, const uint8_t* open) {
  constexpr int V = R <= 2 ? 2 : 1;  // vectors of 8 channels that meet R rows at a time, when cells are read as packed
  alignas(32) int32_t totals[2][R * 8], row[PANEL];
  const uint8_t* w = y.data + panel * s.panel_bytes();
  const void* scales = MODE == CHANNEL ? nullptr : panel_scales(y, s, panel);
  int width = 8;  // channels side by side in totals
  if (BITS == 8 && R <= 2) {
    bytes<MODE, R, 4>(w, scales, (const int16_t*)codes, start, s, 0, totals[0]), width = 16;
  } else if (BITS == 8) {
    bytes<MODE, R, 2>(w, scales, (const int16_t*)codes, start, s, 0, totals[0]);
    bytes<MODE, R, 2>(w, scales, (const int16_t*)codes, start, s, 8, totals[1]);  // cells are in L1 by now
  } else if (open) {
    nibbles<MODE, R, 2, true>(open, scales, (const int8_t*)codes, start, s, 0, totals[0]), width = 16;
  } else if (V == 2) {
    nibbles<MODE, R, 2, false>(w, scales, (const int8_t*)codes, start, s, 0, totals[0]), width = 16;
  } else {
    for (int half = 0; half < 2; half++)
      nibbles<MODE, R, 1, false>(w, scales, (const int8_t*)codes, start, s, half * 8, totals[half]);
  }
  for (int64_t r = 0; r < b.rows; r++) {
    for (int half = 0; half < 2; half++)
      memcpy(row + half * 8, width == 16 ? totals[0] + r * 16 + half * 8 : totals[half] + r * 8, 32);
    finish<MODE>(y, row, panel, b.row - y.first + r, x_scale[b.row + r]);
  }
}
#endif
