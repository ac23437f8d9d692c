// One row of activations: bound by how fast memory delivers the weights. Panels are read one after the other, so that all
// of a thread's weights are one stream, fetched well ahead with the hint that nobody reads them again. Four streams side by
// side, or lines that are to stay in L2, reach 10 to 15 % less of the read bandwidth.
//
// A cell has two products only, so sums are split over CHAINS chains, or the latency of products would set the pace.
#pragma once
#include "vnni.h"

#if VNNI
constexpr int CHAINS = 8 / PARTS, FAR = 4096;  // FAR: bytes ahead

// One cell, into chains 2 u and 2 u + 1 (4 bits) or u (8 bits).
template <int BITS> static INLINE void one_cell(wide (&acc)[CHAINS][PARTS], int u, const uint8_t* w, const int8_t* x) {
  __builtin_prefetch(w + FAR, 0, 0);
#pragma GCC unroll 2
  for (int v = 0; v < PARTS; v++) {
    const wide raw = cell(w + v * 32);
    if (BITS == 8) {
      acc[u][v] = dot(acc[u][v], raw, four(x));
    } else {
      acc[2 * u][v] = dot(acc[2 * u][v], low(raw), four(x));
      acc[2 * u + 1][v] = dot(acc[2 * u + 1][v], high(raw), four(x + 4));
    }
  }
}

// Every panel in [panel, panel + panels) for one row; x: [k], start: [groups].
template <int BITS, int MODE>
static void one_row(const Layer& y, const Spec& s, const Block& b, const char* codes, const int32_t* start,
                    const float* x_scale, int64_t panel, int64_t panels) {
  constexpr int DEPTH = BITS == 4 ? 8 : 4, TURN = BITS == 4 ? CHAINS / 2 : CHAINS;  // inputs of a cell, cells in a turn
  const int64_t cells = s.length / DEPTH, segments = MODE == CHANNEL ? 1 : s.groups, next = s.groups * PANEL;
  const bool narrow = s.length <= 32 && BITS == 4;  // a group's sum fits 16 bits
  const uint8_t* w = y.data + panel * s.panel_bytes();
  for (int64_t p = panel; p < panel + panels; p++) {
    const void* scales = MODE == CHANNEL ? nullptr : panel_scales(y, s, p);
    const int8_t* x = (const int8_t*)codes;
    wide total[PARTS] = {};
    for (int64_t segment = 0; segment < segments; segment++) {
      wide acc[CHAINS][PARTS];
#pragma GCC unroll 8
      for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 2
        for (int v = 0; v < PARTS; v++) acc[c][v] = c ? wide{} : all(start[segment]);
      int64_t left = cells;
      for (; left >= TURN; left -= TURN, w += TURN * CELL, x += TURN * DEPTH)
#pragma GCC unroll 8
        for (int u = 0; u < TURN; u++) one_cell<BITS>(acc, u, w + u * CELL, x + u * DEPTH);
      for (; left > 0; left--, w += CELL, x += DEPTH) one_cell<BITS>(acc, 0, w, x);
#pragma GCC unroll 2
      for (int v = 0; v < PARTS; v++) {
        wide sum = acc[0][v];
#pragma GCC unroll 8
        for (int c = 1; c < CHAINS; c++) sum = plus(sum, acc[c][v]);
        const int64_t lane = segment * PANEL + v * LANES;
        if (MODE == CHANNEL) total[v] = sum;
        if (MODE == INTEGER) {
          const int16_t* scale = (const int16_t*)scales + lane;
          __builtin_prefetch(scale + next, 0, 0);
          if (narrow) total[v] = dot16(total[v], sum, unsigned16(scale));
          else total[v] = plus(total[v], times(sum, signed16(scale)));
        }
        if (MODE == FLOAT) {
          const float* scale = (const float*)scales + lane;
          __builtin_prefetch(scale + next, 0, 0);
          total[v] = (wide)((wide_float)total[v] + to_float(sum) * floats(scale));
        }
      }
    }
    alignas(64) int32_t totals[PANEL];
#pragma GCC unroll 2
    for (int v = 0; v < PARTS; v++) memcpy(totals + v * LANES, &total[v], sizeof(wide));
    finish<MODE>(y, totals, p, b.row - y.first, x_scale[b.row]);
  }
}
#endif
