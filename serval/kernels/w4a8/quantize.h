// Activations: float rows to int8 codes, laid out for blocks of rows, with what the weights' offset takes from each sum.
#pragma once
#include <limits>
#include "vnni.h"  // first: the others step aside for it
#include "avx2.h"
#include "portable.h"

#if !VNNI && (SERVAL_AVX2 || SERVAL_AVX512)
constexpr bool PAIRS = true;  // 4 bits: two int16 starts for every 32 inputs of a group
#else
constexpr bool PAIRS = false;
#endif

// int32 starts of one row.
static INLINE int64_t starts_of(const Spec& s) {
  return PAIRS && s.bits == 4 ? s.groups * ((s.length + 31) / 32) : s.groups;
}

// Codes [-127, 127] of one row; returns its scale, NaN when the row holds NaN or infinity.
static float round_row(const float* x, const Spec& s, int8_t* codes) {
  const int64_t k = s.k;
  float scale = s.input_scale;
  vf top = {}, bad = {};
  int64_t i = 0;
  for (; i + W <= k; i += W) { vf v = load(x + i); top = vmax(top, vabs(v)), bad += v * 0.0f; }
  if (i < k) { vf v = load_some(x + i, k - i); top = vmax(top, vabs(v)), bad += v * 0.0f; }
  if (s.activations == TOKEN) scale = max_lane(top) * (1.0f / 127.0f);
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f, magic = 12582912.0f;  // the magic rounds to nearest even
  for (i = 0; i < k; i += W) {
    vf v = i + W <= k ? load(x + i) : load_some(x + i, k - i);
    vi q = (vi)(vmin(vmax(v * inverse, splat(-127.0f)), splat(127.0f)) + magic) - (vi)splat(magic);
    vb narrow = __builtin_convertvector(q, vb);
    memcpy(codes + i, &narrow, std::min<int64_t>(W, k - i));
  }
  return sum(bad) == 0.0f ? scale : std::numeric_limits<float>::quiet_NaN();
}

static INLINE int32_t total(const int8_t* codes, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += codes[i];
  return sum;
}

// Row `lane` of a block of `size` rows: words [k / 4][size], starts [..][size].
static void place(const int8_t* codes, const Spec& s, int64_t lane, int64_t size, char* words, int32_t* starts) {
  const int64_t padded = s.padded();
  starts += lane;
  for (int64_t g = 0; g < s.groups; g++) {
    const int8_t* p = codes + g * s.length;
    if (!PAIRS || s.bits == 8) {
      *starts = -(s.bits == 8 ? 128 : 8) * total(p, s.length), starts += size;
      continue;
    }
    for (int64_t k = 0; k < s.length; k += 32, starts += size) {
      int even = 0, odd = 0;
      for (int64_t i = k; i < std::min(k + 32, s.length); i += 4) even += p[i] + p[i + 1], odd += p[i + 2] + p[i + 3];
      *starts = (int32_t)((uint32_t)(uint16_t)(-8 * even) | (uint32_t)(uint16_t)(-8 * odd) << 16);
    }
  }
  if (word_bytes(s.bits) == 4) {
    if (size == 1) { memcpy(words, codes, padded); return; }
    for (int64_t k = 0; k < padded; k += 4) memcpy(words + (k * size + lane * 4), codes + k, 4);
    return;
  }
  int16_t* wide = (int16_t*)words + lane * 4;
  for (int64_t k = 0; k < padded; k += 4)
    for (int i = 0; i < 4; i++) wide[k * size + i] = codes[k + i];
}

// The codes of one row of x, spread so that each group begins with a cell.
static void prepare_row(const float* x, const Spec& s, int64_t lane, int64_t size, char* words, int32_t* starts,
                        float* scale) {
  static thread_local std::vector<int8_t> memory;
  const int64_t padded = s.padded();
  memory.resize(s.k + padded);
  int8_t *tight = memory.data(), *codes = s.length == s.group ? tight : tight + s.k;
  *scale = round_row(x, s, tight);
  if (codes != tight) {
    memset(codes, 0, padded);
    for (int64_t g = 0; g < s.groups; g++) memcpy(codes + g * s.length, tight + g * s.group, s.group);
  }
  place(codes, s, lane, size, words, starts);
}
