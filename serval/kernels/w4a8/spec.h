// What the kernels of w4a8 share: the description of a call, and how finished sums become outputs.
#pragma once
#include <algorithm>
#include <vector>
#include "simd.h"

enum Mode { CHANNEL = 0, INTEGER = 1, FLOAT = 2 };
enum Activations { TOKEN = 0, STATIC = 1, NONE = 2 };
constexpr int PANEL = 16, CELL = 64;  // channels in a panel, bytes in a cell

// One call. group inputs share a scale and take `length` inputs, whole cells, in the packed form.
struct Spec {
  int64_t k, group, groups, length;
  int bits, mode;
  Activations activations;
  float input_scale;
  int64_t depth() const { return bits == 4 ? 8 : 4; }             // inputs in a cell
  int64_t padded() const { return groups * length; }              // inputs in the packed form
  int64_t panel_bytes() const { return padded() / depth() * CELL; }
};

// One matrix and the rows of x that it multiplies. Each field has 64 bits: Python writes these records.
struct Layer {
  const uint8_t* data;
  const void* scales;          // int16 or float [panels, groups, 16], or null
  const float *factor, *bias;  // [n]; bias may be null
  float* out;                  // [rows, n]
  int64_t n, first, rows;
  int64_t panels() const { return (n + PANEL - 1) / PANEL; }
};

// Rows that one micro-kernel call takes together; `size` is what it computes, at least `rows`.
struct Block { int64_t row, rows, size, slot; };

static INLINE const void* panel_scales(const Layer& y, const Spec& s, int64_t panel) {
  const int64_t at = panel * s.groups * PANEL;
  return s.mode == INTEGER ? (const void*)((const int16_t*)y.scales + at) : (const void*)((const float*)y.scales + at);
}

// out = FLOAT(sums) * (x_scale * factor) + bias for the channels of one panel and one row.
template <int MODE>
static INLINE void finish(const Layer& y, const void* sums, int64_t panel, int64_t row, float x_scale) {
  const int64_t first = panel * PANEL, n = std::min<int64_t>(PANEL, y.n - first);
  float* out = y.out + row * y.n + first;
  for (int64_t i = 0; i < PANEL; i += W) {
    vf v;
    if (MODE == FLOAT) v = load((const float*)sums + i);
    else { vi t; memcpy(&t, (const int32_t*)sums + i, sizeof t); v = __builtin_convertvector(t, vf); }
    if (n - i >= W) {
      v *= x_scale * load(y.factor + first + i);
      if (y.bias) v += load(y.bias + first + i);
      store(out + i, v);
    } else if (n > i) {
      v *= x_scale * load_some(y.factor + first + i, n - i);
      if (y.bias) v += load_some(y.bias + first + i, n - i);
      store_some(out + i, v, n - i);
    }
  }
}
