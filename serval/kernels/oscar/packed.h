// Up to four query rows of one key-value head over up to four records (128 tokens).
//
// Keys grouped along tokens: q . x = sum_d q_d s_d (code_d - c) + q . m. The integers of q are multiplied by the record's
// integer scales with one vpmulhrsw, which lands in +-127 because both have a known largest value; q . m stays in float.
// Values: sum_t p_t x_t likewise, with 2^(score - the tile's largest score) in 0..4080 for p and products in 0..255; p . m
// stays in float. Codes are taken relative to their middle c, so that rounding a factor to 0 does not bias the result.
#pragma once
#include "queries.h"

constexpr int64_t RECORDS = 4, TOKENS = RECORDS * GROUP;

// 2^x, x at most 0, to 4e-6, a tenth of the last place of the integers that probabilities become; about 0 below -126.
static INLINE vf vexp2(vf x) {
  x = vmax(x, splat(-126.0f));
#if SERVAL_AVX512
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23, whose low bits are zero
  const vf shifted = (x - 0.5f) + magic, r = x - (shifted - magic);
#endif
  const vf p = (((1.3534167e-2f * r + 5.2011464e-2f) * r + 2.4144275e-1f) * r + 6.9300383e-1f) * r + 1.0000026f;
#if SERVAL_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // times 2^floor(x)
#else
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// The records of a tile, for one key-value head, and those that come next.
struct Tile {
  int64_t count;
  const uint8_t *at[RECORDS], *ahead[RECORDS];
  uint8_t k_exponent[RECORDS], v_exponent[RECORDS];
  const float* norms[RECORDS];  // null without
};

// State of up to four rows: their queries, running maximum (of scores in base 2), mass, and sums [v_groups * 32].
struct Rows {
  const Queries* queries;
  int64_t first;
  float *m, *l, *o;
};

// Numbers of one tile; a thread has one.
struct Workspace {
  alignas(64) uint8_t factors[4 * RECORDS * MAX_DIM];  // folded queries [record][row][depth], then probabilities [row][group][token]
  alignas(64) float weights[4 * TOKENS];               // scores, then probabilities [row][token]
  alignas(64) int16_t integers[4 * TOKENS];            // of the probabilities
  alignas(64) int32_t sums[4 * GROUP];
  alignas(64) float high[4 * W];  // largest scores of each row, lane by lane
  alignas(64) float parts[4 * (MAX_DIM / GROUP > RECORDS ? MAX_DIM / GROUP : RECORDS) * W];
  float base[4 * MAX_DIM / GROUP];
};

// out[i] = sum(parts[i]) of n vectors; rounds n up to 16 (or 4).
static INLINE void sum_all(const float* parts, int64_t n, float* out) {
#if SERVAL_AVX512
  for (int64_t i = 0; i < n; i += 16) {
    vf v[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) v[j] = load(parts + (i + j) * W);
    _mm512_storeu_ps(out + i, sums16(v));
  }
#else
  for (int64_t i = 0; i < n; i += 4) {
    vf v[4];
    for (int j = 0; j < 4; j++) v[j] = load(parts + (i + j) * W);
    sums(v, out + i);
  }
#endif
}

// Scores, in base 2, of keys grouped along tokens. DIM: the head dim where known at compile time, else 0.
template <int R, int BITS, int DIM>
static void scores_by_channel(const Format& f, const Tile& t, const Rows& rows, Workspace& w) {
  constexpr float CENTRE = ((1 << BITS) - 1) * 0.5f;
  const Queries& all = *rows.queries;
  const int64_t depth = DIM ? DIM : f.k_dim, wide = DIM ? DIM : all.wide;
  const int16_t* integers = all.words.data() + rows.first * wide;
  const float *q = all.q + rows.first * depth, *q_units = all.unit + rows.first;
  float units[RECORDS * R];
  for (int64_t i = 0; i < t.count; i++) {
    const int16_t* scale = (const int16_t*)(t.at[i] + f.k_scale);
    const fp16* middle = (const fp16*)(t.at[i] + f.k_mid);
    Totals total[R];
    vf exact[R], more[R];  // two chains of sums each, or their latency would set the pace
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = no_totals(), exact[r] = more[r] = vf{};
    uint8_t* out = w.factors + i * R * wide;
    for (int64_t d = 0; d < depth; d += GROUP) {
      __builtin_prefetch(t.ahead[i] + f.k_scale + 2 * d, 0, 2);
      const Fractions s = fractions(scale + d, 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) fold<true>(integers + r * wide + d, s, out + r * wide + d, total[r]);
    }
    int64_t d = 0;
    for (; d + 2 * W <= depth; d += 2 * W) {
      if (d % 32 == 0) __builtin_prefetch(t.ahead[i] + f.k_mid + 2 * d, 0, 2);
      const vf m = load(middle + d), n = load(middle + d + W);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) exact[r] += load(q + r * depth + d) * m, more[r] += load(q + r * depth + d + W) * n;
    }
    for (; d < depth; d += W) for (int r = 0; r < R; r++) exact[r] += load(q + r * depth + d) * load(middle + d);
    const float unit = power_of_two(t.k_exponent[i] - BIAS) * 524288.0f;  // 16 * 2^15, from `fractions` and `fold`
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const float u = units[i * R + r] = q_units[r] * unit;
      store(w.parts + (i * R + r) * W, exact[r] + more[r] - to_float(widen(total[r])) * (CENTRE * u));
    }
  }
  sum_all(w.parts, t.count * R, w.base);
  vf high[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) high[r] = splat(LOWEST);
  for (int64_t i = 0; i < t.count; i++) {
    const uint8_t *at = t.at[i] + f.k_codes, *ahead = t.ahead[i] + f.k_codes;
    products<R, BITS, true>({&at, &ahead, 1, depth * BITS / 16}, w.factors + i * R * wide, wide, w.sums);
#pragma GCC unroll 8
    for (int64_t j = 0; j < GROUP; j += W) {
      const vf norm = (t.norms[i] ? load(t.norms[i] + j) : splat(1.0f)) * 1.44269504f;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const vf s = (to_float(load_i(w.sums + r * GROUP + j)) * units[i * R + r] + w.base[i * R + r]) * norm;
        store(w.weights + r * TOKENS + i * GROUP + j, s);
        high[r] = vmax(high[r], s);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store(w.high + r * W, high[r]);
}

// The same of keys grouped along channels.
template <int R, int BITS>
static void scores_by_token(const Format& f, const Tile& t, const Rows& rows, Workspace& w) {
  constexpr float CENTRE = ((1 << BITS) - 1) * 0.5f;
  const Queries& all = *rows.queries;
  for (int r = 0; r < R; r++) store(w.high + r * W, splat(LOWEST));
  for (int64_t i = 0; i < t.count; i++) {
    float* out = w.weights + i * GROUP;
    for (int r = 0; r < R; r++) for (int64_t j = 0; j < GROUP; j += W) store(out + r * TOKENS + j, vf{});
    for (int64_t g = 0; g < all.groups; g++) {
      const int64_t first = g * GROUP, n = std::min(GROUP, f.k_dim - first), skip = f.k_codes + first * BITS * 4;
      const uint8_t *at = t.at[i] + skip, *ahead = t.ahead[i] + skip;
      products<R, BITS, true>({&at, &ahead, 1, n * BITS / 16}, all.small(rows.first) + first, all.wide, w.sums);
      const int16_t* scale = (const int16_t*)(t.at[i] + f.k_scale) + first;
      const fp16* middle = (const fp16*)(t.at[i] + f.k_mid) + first;
      __builtin_prefetch(t.ahead[i] + f.k_scale + 2 * first, 0, 2);
      __builtin_prefetch(t.ahead[i] + f.k_mid + 2 * first, 0, 2);
      const float unit = power_of_two(t.k_exponent[i] - BIAS) * 1.44269504f;
      for (int64_t j = 0; j < GROUP; j += W) {
        const vf s = load_f(scale + j) * unit, m = load(middle + j) * 1.44269504f;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const int64_t row = (rows.first + r) * all.groups + g;
          const vf x = (to_float(load_i(w.sums + r * GROUP + j)) - CENTRE * all.sums[row]) * all.units[row];
          store(out + r * TOKENS + j, load(out + r * TOKENS + j) + x * s + m * all.exact[row]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int64_t j = 0; j < GROUP; j += W) store(w.high + r * W, vmax(load(w.high + r * W), load(out + r * TOKENS + j)));
  }
}

template <int R, int BITS, int DIM>
static void sum_values(const Format& f, const Tile& t, const Rows& rows, Workspace& w) {
  constexpr float CENTRE = ((1 << BITS) - 1) * 0.5f;
  const int64_t groups = DIM ? DIM / GROUP : f.v_groups(), tokens = t.count * GROUP, width = groups * GROUP;
  uint8_t top = 0;
  for (int64_t i = 0; i < t.count; i++) top = std::max(top, t.v_exponent[i]);
  // Probabilities relative to the tile's largest, their integers in units of the tile's largest value scale.
  // past[r], now[r]: what the sums so far and this tile's are multiplied by.
  alignas(64) float past[W] = {}, now[W] = {};
  float most[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    most[r] = max_lane(load(w.high + r * W));
    const float after = std::max(rows.m[r], most[r]);
    past[r] = rows.m[r] - after, now[r] = most[r] - after;
    rows.m[r] = after;
  }
  store(past, vexp2(load(past))), store(now, vexp2(load(now)));
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    float* p = w.weights + r * TOKENS;
    vf mass = {};
    for (int64_t i = 0; i < t.count; i++) {
      const float factor = P_TOP * power_of_two(std::max(-126, (int)t.v_exponent[i] - (int)top));
#pragma GCC unroll 8
      for (int64_t j = i * GROUP; j < (i + 1) * GROUP; j += W) {
        const vf e = vexp2(load(p + j) - most[r]);
        mass += e;
        store(p + j, e);
#if SERVAL_AVX512
        const __m512i n = _mm512_cvtps_epi32((__m512)(e * factor));
        _mm256_storeu_si256((__m256i*)(w.integers + r * TOKENS + j), _mm512_cvtepi32_epi16(n));
#else
        const vi n = __builtin_convertvector(vround(e * factor), vi);
        const vs narrow = __builtin_convertvector(n, vs);
        memcpy(w.integers + r * TOKENS + j, &narrow, sizeof narrow);
#endif
      }
    }
    rows.l[r] = rows.l[r] * past[r] + sum(mass) * now[r];
  }
  const float unit = power_of_two((int)top - BIAS) * (262144.0f / P_TOP);  // 8 * 2^15, from `fractions` and `fold`
  for (int64_t g = 0; g < groups; g++) {
    Totals total[R];
    vf exact[R], more[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = no_totals(), exact[r] = more[r] = vf{};
    for (int64_t i = 0; i < t.count; i++) {
      const int64_t scale_at = f.v_scale + 2 * g * GROUP, middle_at = f.v_mid + 2 * g * GROUP;
      __builtin_prefetch(t.ahead[i] + scale_at, 0, 2);
      __builtin_prefetch(t.ahead[i] + middle_at, 0, 2);
      const Fractions s = fractions((const int16_t*)(t.at[i] + scale_at), 3);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        fold<false>(w.integers + r * TOKENS + i * GROUP, s, w.factors + (r * groups + g) * TOKENS + i * GROUP, total[r]);
      const fp16* middle = (const fp16*)(t.at[i] + middle_at);
#pragma GCC unroll 4
      for (int64_t j = 0; j < GROUP; j += 2 * W) {
        const vf m = load(middle + j), n = load(middle + j + W);
        const float* p = w.weights + i * GROUP + j;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) exact[r] += load(p + r * TOKENS) * m, more[r] += load(p + r * TOKENS + W) * n;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(w.parts + (g * R + r) * W, exact[r] + more[r] - to_float(widen(total[r])) * (CENTRE * unit));
  }
  sum_all(w.parts, groups * R, w.base);
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t *at[RECORDS], *ahead[RECORDS];
    const int64_t skip = f.v_codes + g * GROUP * BITS * 4;
    for (int64_t i = 0; i < t.count; i++) at[i] = t.at[i] + skip, ahead[i] = t.ahead[i] + skip;
    products<R, BITS, false>({at, ahead, t.count, 2 * BITS}, w.factors + g * TOKENS, groups * TOKENS, w.sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const float factor = now[r] * unit, base = now[r] * w.base[g * R + r];
      float* o = rows.o + r * width + g * GROUP;
#pragma GCC unroll 8
      for (int64_t j = 0; j < GROUP; j += W)
        store(o + j, load(o + j) * past[r] + (to_float(load_i(w.sums + r * GROUP + j)) * factor + base));
    }
  }
}

// One step of attention: R rows over a tile.
template <int R, int DIM>
static void step(const Format& f, const Tile& t, const Rows& rows, Workspace& w) {
  if (f.by_token) f.k_bits == 2 ? scores_by_token<R, 2>(f, t, rows, w) : scores_by_token<R, 4>(f, t, rows, w);
  else f.k_bits == 2 ? scores_by_channel<R, 2, DIM>(f, t, rows, w) : scores_by_channel<R, 4, 0>(f, t, rows, w);
  f.v_bits == 2 ? sum_values<R, 2, DIM>(f, t, rows, w) : sum_values<R, 4, 0>(f, t, rows, w);
}
