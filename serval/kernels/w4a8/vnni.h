// Micro-kernel with vpdpbusd (AVX-512 VNNI, or AVX-VNNI in 256 bits): unsigned weights from memory, four activations
// broadcast to every 32-bit lane. A group's sums stay in registers; they start at minus the offset's part.
//
// At the end of a group of at most 32 inputs the sum fits 16 bits, so one vpdpwssd multiplies it by its integer scale
// and adds it to the total; longer groups take a 32-bit multiplication.
#pragma once
#include "spec.h"

#if SERVAL_AVX512 && defined(__AVX512VNNI__)
#define VNNI 1
typedef __m512i wide;
typedef __m512 wide_float;
// In assembler, and volatile to stay in order: from intrinsics GCC makes loops that copy or spill the sums.
static INLINE wide dot(wide sum, wide w, wide x) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
static INLINE wide dot16(wide sum, wide a, wide b) { return _mm512_dpwssd_epi32(sum, a, b); }
static INLINE wide times(wide a, wide b) { return _mm512_mullo_epi32(a, b); }
static INLINE wide plus(wide a, wide b) { return _mm512_add_epi32(a, b); }
static INLINE wide_float to_float(wide a) { return _mm512_cvtepi32_ps(a); }
static INLINE wide all(int32_t v) { return _mm512_set1_epi32(v); }
static INLINE wide low(wide v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static INLINE wide high(wide v) { return low(_mm512_srli_epi16(v, 4)); }
static INLINE wide cell(const uint8_t* p) { return _mm512_loadu_si512(p); }
static INLINE wide four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
static INLINE wide signed16(const int16_t* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static INLINE wide unsigned16(const int16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static INLINE wide_float floats(const float* p) { return _mm512_loadu_ps(p); }
constexpr int PARTS = 1;
// With group scales sums and totals share the registers, 12 of each.
static constexpr int panels_of(int rows, int mode) { return rows <= (mode == CHANNEL ? 4 : 3) ? 4 : 2; }
static INLINE int64_t max_rows(int mode) { return mode == CHANNEL ? 12 : 6; }
constexpr int SIZES[] = {1, 2, 3, 4, 6, 8, 12};
#elif defined(__AVXVNNI__)
#define VNNI 1
typedef __m256i wide;
typedef __m256 wide_float;
static INLINE wide dot(wide sum, wide w, wide x) {
  asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  return sum;
}
static INLINE wide dot16(wide sum, wide a, wide b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
static INLINE wide times(wide a, wide b) { return _mm256_mullo_epi32(a, b); }
static INLINE wide plus(wide a, wide b) { return _mm256_add_epi32(a, b); }
static INLINE wide_float to_float(wide a) { return _mm256_cvtepi32_ps(a); }
static INLINE wide all(int32_t v) { return _mm256_set1_epi32(v); }
static INLINE wide low(wide v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static INLINE wide high(wide v) { return low(_mm256_srli_epi16(v, 4)); }
static INLINE wide cell(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static INLINE wide four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
static INLINE wide signed16(const int16_t* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static INLINE wide unsigned16(const int16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static INLINE wide_float floats(const float* p) { return _mm256_loadu_ps(p); }
constexpr int PARTS = 2;
static constexpr int panels_of(int rows, int) { return rows <= 2 ? 2 : 1; }
static INLINE int64_t max_rows(int) { return 6; }
constexpr int SIZES[] = {1, 2, 3, 4, 6};
#endif

#if VNNI
constexpr int LANES = PANEL / PARTS, AHEAD = 1024;

template <int R, int V> static INLINE void step(wide (&acc)[R][V], const wide (&w)[V], const int8_t* x) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const wide a = four(x + r * 4);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = dot(acc[r][v], w[v], a);
  }
}

// One cell of P panels; the sums of a cell's second half may be kept apart.
template <int BITS, int R, int P>
static INLINE void one_cell(wide (&first)[R][P * PARTS], wide (&second)[R][P * PARTS], const uint8_t* (&at)[P],
                            const int8_t*& x, int64_t ahead) {
  constexpr int V = P * PARTS;
  wide b[V], raw[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    const uint8_t* p = at[v / PARTS] + (v % PARTS) * 32;
    raw[v] = cell(p);
    b[v] = BITS == 4 ? low(raw[v]) : raw[v];
    if (v % PARTS == 0) __builtin_prefetch(p + ahead);
  }
  step<R, V>(first, b, x);
  if (BITS == 4) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = high(raw[v]);
    step<R, V>(second, b, x + R * 4);
  }
  x += R * (BITS == 4 ? 8 : 4);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) at[p] += CELL;
}

// totals[R][P][16] of R rows and P panels; x: [k / 4][R][4], start: [groups][R].
template <int BITS, int MODE, int R, int P>
static void micro(const uint8_t* const* w, const void* const* scales, const int8_t* x, const int32_t* start, const Spec& s,
                  int32_t* totals) {
  // With few sums in flight each is split over `C` chains of products, or their latency would set the pace.
  constexpr int V = P * PARTS, C = R * V >= 8 ? 1 : R * V >= 4 ? 2 : 4, HALVES = BITS == 4 ? 2 : 1;
  constexpr int U = C > HALVES ? C / HALVES : 1;  // cells in a turn of the loop
  const int64_t cells = s.length / (BITS == 4 ? 8 : 4), segments = MODE == CHANNEL ? 1 : s.groups;
  const bool narrow = s.length <= 32 && BITS == 4;
  const uint8_t* at[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) at[p] = w[p];
  // What is read next is the same panel further on; near its end, the start of the panel P further on.
  const int64_t turn = (int64_t)(segments * cells) - AHEAD / CELL;
  const int64_t jump = AHEAD + (P - 1) * s.panel_bytes();
  int64_t done = 0;
  wide total[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) total[r][v] = wide{};
  for (int64_t segment = 0; segment < segments; segment++) {
    wide acc[C][R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        acc[0][r][v] = all(start[segment * R + r]);
#pragma GCC unroll 4
        for (int c = 1; c < C; c++) acc[c][r][v] = wide{};
      }
    int64_t left = cells;
    if (U > 1 && left >= U) do {
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) one_cell<BITS, R, P>(acc[u * HALVES % C], acc[(u * HALVES + HALVES - 1) % C], at, x, done < turn ? AHEAD : jump);
      left -= U, done += U;
    } while (left >= U);
    if (U == 1 || left) do one_cell<BITS, R, P>(acc[0], acc[(HALVES - 1) % C], at, x, done++ < turn ? AHEAD : jump); while (--left);
#pragma GCC unroll 4
    for (int c = 1; c < C; c++)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[0][r][v] = plus(acc[0][r][v], acc[c][r][v]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int64_t lane = segment * PANEL + (v % PARTS) * LANES;
      wide scale;
      wide_float factor;
      if (MODE == INTEGER) {
        const int16_t* p = (const int16_t*)scales[v / PARTS] + lane;
        if (R <= 8) __builtin_prefetch(p + P * s.groups * PANEL);  // for the next P panels
        scale = narrow ? unsigned16(p) : signed16(p);
      }
      if (MODE == FLOAT) {
        const float* p = (const float*)scales[v / PARTS] + lane;
        if (R <= 8) __builtin_prefetch(p + P * s.groups * PANEL);
        factor = floats(p);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        wide& t = total[r][v];
        if (MODE == CHANNEL) t = acc[0][r][v];
        if (MODE == INTEGER) t = narrow ? dot16(t, acc[0][r][v], scale) : plus(t, times(acc[0][r][v], scale));
        if (MODE == FLOAT) t = (wide)((wide_float)t + to_float(acc[0][r][v]) * factor);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
      memcpy(totals + (r * P + v / PARTS) * PANEL + (v % PARTS) * LANES, &total[r][v], sizeof(wide));
}

static INLINE int64_t word_bytes(int) { return 4; }

// Every panel in [panel, panel + panels) for one block of rows.
template <int BITS, int MODE, int R>
static void rows_of(const Layer& y, const Spec& s, const Block& b, const char* codes, const int32_t* start,
                    const float* x_scale, int64_t panel, int64_t panels) {
  constexpr int P = panels_of(R, MODE);
  alignas(64) int32_t totals[R * P * PANEL];
  for (int64_t at = panel; at < panel + panels; at += P) {
    const uint8_t* w[P];
    const void* scales[P];
    for (int p = 0; p < P; p++) {  // past the end: the last panel again, its result is dropped
      const int64_t index = std::min(at + p, panel + panels - 1);
      w[p] = y.data + index * s.panel_bytes();
      scales[p] = MODE == CHANNEL ? nullptr : panel_scales(y, s, index);
    }
    micro<BITS, MODE, R, P>(w, scales, (const int8_t*)codes, start, s, totals);
    for (int64_t r = 0; r < b.rows; r++)
      for (int64_t p = 0; p < P && at + p < panel + panels; p++)
        finish<MODE>(y, totals + (r * P + p) * PANEL, at + p, b.row - y.first + r, x_scale[b.row + r]);
  }
}
#endif
