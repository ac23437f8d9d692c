// Float activations (W4A16, W8A16), and rows of a quantised table.
// Few rows: codes become floats in registers and meet every row; the weight is streamed once. Many rows: a strip of
// columns is expanded once, at most DEPTH inputs deep so that it stays in cache, and multiplied as a float matrix.
#pragma once
#include "spec.h"
#include "tile.h"

constexpr int64_t FEW = 8, DEPTH = 256, STRIP = TILE_VECS * W > PANEL ? TILE_VECS * W : PANEL;

// The codes at input j of a cell for W channels, as floats. Bits of byte i of a lane begin at 8 i.
template <int BITS> static INLINE vf values(vi raw, int j) {
  const int shift = BITS == 4 ? j % 4 * 8 + j / 4 * 4 : j * 8;
#if SERVAL_AVX512
  if (BITS == 4) {  // vpermps looks at the low four bits of an index only
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)raw, shift), table);
  }
#endif
  const vi signs = raw ^ (vi)((vu{} + (BITS == 4 ? 0x88888888u : 0x80808080u)));
  return __builtin_convertvector((signs << (32 - BITS - shift)) >> (32 - BITS), vf);
}

static INLINE vi lanes(const uint8_t* cell, int64_t lane) { vi v; memcpy(&v, cell + lane * 4, sizeof v); return v; }

static INLINE vf scale_of(const void* scales, int mode, int64_t at) {
  if (mode == CHANNEL) return splat(1.0f);
  if (mode == FLOAT) return load((const float*)scales + at);
  typedef int16_t narrow __attribute__((vector_size(W * 2)));
  narrow v;
  memcpy(&v, (const int16_t*)scales + at, sizeof v);
  return __builtin_convertvector(v, vf);
}

// R rows of x by one panel.
template <int BITS, int R>
static void few_rows(const Layer& y, const Spec& s, const float* x, int64_t x_row, int64_t row, int64_t panel) {
  constexpr int D = BITS == 4 ? 8 : 4, PARTS_ = PANEL / W;
  alignas(64) float out[R][PANEL];
  const void* scales = s.mode == CHANNEL ? nullptr : panel_scales(y, s, panel);
  for (int part = 0; part < PARTS_; part++) {
    const uint8_t* w = y.data + panel * s.panel_bytes();
    vf total[R] = {};
    for (int64_t g = 0; g < s.groups; g++) {
      const float* a = x + g * s.group;
      vf acc[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = vf{};
      int64_t k = 0;
      for (; k + D <= s.group; k += D, w += CELL) {
        if (part == 0) __builtin_prefetch(w + 4096, 0, 2);
        const vi raw = lanes(w, part * W);
#pragma GCC unroll 8
        for (int j = 0; j < D; j++) {
          const vf v = values<BITS>(raw, j);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) acc[r][j % 2] += v * a[r * x_row + k + j];
        }
      }
      if (k < s.group) {
        const vi raw = lanes(w, part * W);
        for (int j = 0; k + j < s.group; j++)
          for (int r = 0; r < R; r++) acc[r][0] += values<BITS>(raw, j) * a[r * x_row + k + j];
        w += CELL;
      }
      const vf scale = scale_of(scales, s.mode, g * PANEL + part * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) total[r] += (acc[r][0] + acc[r][1]) * scale;
    }
    for (int r = 0; r < R; r++) store(out[r] + part * W, total[r]);
  }
  for (int r = 0; r < R; r++) finish<FLOAT>(y, out[r], panel, row + r, 1.0f);
}

// One cell of one panel as floats: out[j * STRIP + channel] for the `count` inputs of it that exist.
template <int BITS> static INLINE void expand(const uint8_t* cell, const vf* scale, int64_t count, float* out) {
  for (int part = 0; part < PANEL / W; part++) {
    const vi raw = lanes(cell, part * W);
#pragma GCC unroll 8
    for (int j = 0; j < (BITS == 4 ? 8 : 4); j++)
      if (j < count) store(out + j * STRIP + part * W, values<BITS>(raw, j) * scale[part]);
  }
}

template <int BITS>
static void many_rows(const Layer& y, const Spec& s, const float* x, int64_t x_row, int64_t panel, int64_t panels) {
  constexpr int D = BITS == 4 ? 8 : 4;
  static thread_local std::vector<float> memory;
  memory.resize(DEPTH * STRIP + y.rows * (STRIP + 1) + 16);
  float* strip = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
  float *c = strip + DEPTH * STRIP, *ones = c + y.rows * STRIP;
  std::fill(ones, ones + y.rows, 1.0f);
  const int64_t cells = s.length / D;
  int64_t filled = 0, done = 0;
  auto flush = [&]() {
    auto row = [&](int64_t k) { return strip + k * STRIP; };
    product(y.rows, panels * PANEL, filled, x + done, x_row, row, c, STRIP, done ? ones : nullptr);
    done += filled, filled = 0;
  };
  for (int64_t g = 0; g < s.groups; g++) {
    vf scale[STRIP / W];
    for (int64_t p = 0; p < panels; p++)
      for (int part = 0; part < PANEL / W; part++)
        scale[p * (PANEL / W) + part] =
            scale_of(s.mode == CHANNEL ? nullptr : panel_scales(y, s, panel + p), s.mode, g * PANEL + part * W);
    for (int64_t k = 0; k < s.group; k += D) {
      const int64_t count = std::min<int64_t>(D, s.group - k);
      if (filled + count > DEPTH) flush();
      for (int64_t p = 0; p < panels; p++)
        expand<BITS>(y.data + (panel + p) * s.panel_bytes() + (g * cells + k / D) * CELL, scale + p * (PANEL / W), count,
                     strip + filled * STRIP + p * PANEL);
      filled += count;
    }
  }
  flush();
  for (int64_t r = 0; r < y.rows; r++)
    for (int64_t p = 0; p < panels; p++) finish<FLOAT>(y, c + r * STRIP + p * PANEL, panel + p, r, 1.0f);
}

template <int BITS>
static void float_rows(const Layer& y, const Spec& s, const float* x, int64_t x_row, int64_t panel, int64_t panels) {
  x += y.first * x_row;
  if (y.rows > FEW) {
    for (int64_t p = 0; p < panels; p += STRIP / PANEL)
      many_rows<BITS>(y, s, x, x_row, panel + p, std::min<int64_t>(STRIP / PANEL, panels - p));
    return;
  }
  for (int64_t p = panel; p < panel + panels; p++)
    for (int64_t r = 0; r < y.rows;) {
      const float* a = x + r * x_row;
      switch (std::min<int64_t>(4, y.rows - r)) {
        case 1: few_rows<BITS, 1>(y, s, a, x_row, r, p), r += 1; break;
        case 2: few_rows<BITS, 2>(y, s, a, x_row, r, p), r += 2; break;
        case 3: few_rows<BITS, 3>(y, s, a, x_row, r, p), r += 3; break;
        default: few_rows<BITS, 4>(y, s, a, x_row, r, p), r += 4; break;
      }
    }
}

static void float_unit(const Layer& y, const Spec& s, const float* x, int64_t x_row, int64_t panel, int64_t panels) {
  if (s.bits == 4) float_rows<4>(y, s, x, x_row, panel, panels);
  else float_rows<8>(y, s, x, x_row, panel, panels);
}

// Row `index` of the matrix.
static void table_row(const Layer& y, const Spec& s, int64_t index, float* out) {
  const int64_t panel = index / PANEL, lane = index % PANEL, depth = s.depth();
  const uint8_t* w = y.data + panel * s.panel_bytes() + lane * 4;
  const void* scales = s.mode == CHANNEL ? nullptr : panel_scales(y, s, panel);
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t at = g * PANEL + lane;
    float scale = y.factor[index];
    if (s.mode == INTEGER) scale *= ((const int16_t*)scales)[at];
    if (s.mode == FLOAT) scale *= ((const float*)scales)[at];
    for (int64_t k = 0; k < s.group; k += depth, w += CELL)
      for (int64_t j = 0; j < std::min(depth, s.group - k); j++) {
        const int code = s.bits == 8 ? w[j] - 128 : (j < 4 ? w[j] & 15 : w[j - 4] >> 4) - 8;
        *out++ = (float)code * scale;
      }
  }
}
