// Query rows in the forms that attention over codes needs, made once per call.
#pragma once
#include "products.h"

// Rows are ordered (sequence, key-value head, query, head of its group). Per row: q times the scale; as int16 with its
// unit, to be folded with a record's scales (keys grouped along tokens); or as int8 per group of 32 channels with units
// and sums (keys grouped along channels).
struct Queries {
  int64_t depth, wide, groups;  // wide: depth rounded up to 32, zeros behind
  std::vector<float> memory;
  std::vector<int16_t> words;
  std::vector<uint8_t> bytes;
  float *q, *unit, *units, *sums, *exact;

  const float* row(int64_t r) const { return q + r * depth; }
  const uint8_t* small(int64_t r) const { return bytes.data() + r * wide; }
};

constexpr float Q_TOP = 4064.0f, P_TOP = 4080.0f;  // times 1024 or 2048 over 2^15: 127 and 255

// Integers round(x * inverse) of n floats, n a multiple of 16.
template <class T> static void to_integers(const float* x, int64_t n, float inverse, T* out) {
  for (int64_t d = 0; d < n; d += W) {
    const vi v = __builtin_convertvector(vround(load(x + d) * inverse), vi);
    for (int i = 0; i < W; i++) out[d + i] = (T)v[i];
  }
}
#if SERVAL_AVX512
template <> void to_integers<int16_t>(const float* x, int64_t n, float inverse, int16_t* out) {
  for (int64_t d = 0; d < n; d += W)
    _mm256_storeu_si256((__m256i*)(out + d), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load(x + d) * inverse))));
}
#endif

static float largest(const float* x, int64_t n) {
  vf top = {};
  for (int64_t d = 0; d < n; d += W) top = vmax(top, vabs(load(x + d)));
  return max_lane(top);
}

// Row `to` of the queries from one head's numbers.
static void prepare(Queries& all, int64_t to, const float* from, float scale, bool by_token) {
  const int64_t depth = all.depth;
  float* q = all.q + to * depth;
  for (int64_t d = 0; d < depth; d += W) store(q + d, load(from + d) * scale);
  if (!by_token) {
    const float top = largest(q, depth);
    to_integers(q, depth, top > 0 ? Q_TOP / top : 0.0f, all.words.data() + to * all.wide);
    all.unit[to] = top / Q_TOP;
    return;
  }
  for (int64_t g = 0; g < all.groups; g++) {
    const int64_t first = g * GROUP, n = std::min(GROUP, depth - first);
    const float top = largest(q + first, n);
    int8_t* out = (int8_t*)all.bytes.data() + to * all.wide + first;
    to_integers(q + first, n, top > 0 ? 127.0f / top : 0.0f, out);
    int32_t sum = 0;
    float exact = 0;
    for (int64_t d = 0; d < n; d++) sum += out[d], exact += q[first + d];
    const int64_t at = to * all.groups + g;
    all.units[at] = top / 127.0f, all.sums[at] = (float)sum, all.exact[at] = exact;
  }
}

static Queries prepare_all(const float* q, int64_t heads, const int32_t* starts, int64_t sequences, float scale,
                           const Format& f) {
  const int64_t group = heads / f.heads, rows = starts[sequences] * heads;
  Queries all;
  all.depth = f.k_dim, all.wide = round_up(f.k_dim, GROUP), all.groups = f.k_groups();
  const int64_t per_group = f.by_token ? rows * all.groups : 0;
  all.memory.resize(rows * (all.depth + 1) + 3 * per_group + W);
  all.q = all.memory.data(), all.unit = all.q + rows * all.depth;
  all.units = all.unit + rows, all.sums = all.units + per_group, all.exact = all.sums + per_group;
  if (f.by_token) all.bytes.assign(rows * all.wide, 0);
  else all.words.assign(rows * all.wide, 0);
  int64_t to = 0;
  for (int64_t n = 0; n < sequences; n++)
    for (int64_t h = 0; h < f.heads; h++)
      for (int64_t t = starts[n]; t < starts[n + 1]; t++)
        for (int64_t g = 0; g < group; g++, to++)
          prepare(all, to, q + (t * heads + h * group + g) * f.k_dim, scale, f.by_token);
  return all;
}
