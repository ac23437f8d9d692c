// The same sums in plain C++, for CPUs without AVX2. Unsigned arithmetic: sums in between may wrap.
#pragma once
#include "spec.h"

#if !VNNI && !SERVAL_AVX2 && !SERVAL_AVX512
constexpr int SIZES[] = {1, 2, 4};
static INLINE int64_t max_rows(int) { return 4; }
static INLINE int64_t word_bytes(int) { return 4; }

template <int BITS, int MODE, int R>
static void rows_of(const Layer& y, const Spec& s, const Block& b, const char* codes, const int32_t* start,
                    const float* x_scale, int64_t panel) {
  const uint8_t* w = y.data + panel * s.panel_bytes();
  const int8_t* x = (const int8_t*)codes;
  const void* scales = MODE == CHANNEL ? nullptr : panel_scales(y, s, panel);
  const int64_t segments = MODE == CHANNEL ? 1 : s.groups, cells = s.length / (BITS == 4 ? 8 : 4);
  uint32_t totals[R][PANEL] = {};
  float sums[R][PANEL] = {};
  for (int64_t segment = 0; segment < segments; segment++) {
    uint32_t acc[R][PANEL];
    for (int r = 0; r < R; r++)
      for (int n = 0; n < PANEL; n++) acc[r][n] = (uint32_t)start[segment * R + r];
    for (int64_t c = 0; c < cells; c++, w += CELL)
      for (int half = 0; half < (BITS == 4 ? 2 : 1); half++, x += R * 4)
        for (int r = 0; r < R; r++) {
          const int8_t* a = x + r * 4;
          for (int n = 0; n < PANEL; n++)
            for (int i = 0; i < 4; i++) {
              const int byte = w[n * 4 + i], code = BITS == 8 ? byte : half ? byte >> 4 : byte & 15;
              acc[r][n] += (uint32_t)(code * a[i]);
            }
        }
    for (int r = 0; r < R; r++)
      for (int n = 0; n < PANEL; n++) {
        const int64_t at = segment * PANEL + n;
        if (MODE == CHANNEL) totals[r][n] = acc[r][n];
        if (MODE == INTEGER) totals[r][n] += acc[r][n] * (uint32_t)(int32_t)((const int16_t*)scales)[at];
        if (MODE == FLOAT) sums[r][n] += (float)(int32_t)acc[r][n] * ((const float*)scales)[at];
      }
  }
  for (int64_t r = 0; r < b.rows; r++)
    finish<MODE>(y, MODE == FLOAT ? (const void*)sums[r] : totals[r], panel, b.row - y.first + r, x_scale[b.row + r]);
}
#endif
