// Paged attention with an online softmax (FlashAttention-2, arXiv:2307.08691), shared by the attention kernels.
//
// A task is a block of query rows (queries times the heads that share one key-value head) and a range of keys, walked in
// tiles of 64 keys that are used by every row while they are in cache. decode.h walks the keys of few rows; plan.h cuts a
// step into tasks.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#include "tile.h"

constexpr int64_t KEYS = 64, ROWS = 256;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Attention {
  // Query row (t, h): q + t * q_row + h * q_head, q_dim floats; then optionally q2 likewise, q2_dim floats.
  const float *q, *q2;
  int64_t q_row, q_head, q_dim, q2_row, q2_head, q2_dim, heads;
  // Key row of (block, kv head, slot): keys + block * k_block + head * k_head + slot * k_slot (elements); values alike.
  const void *keys, *values;
  int64_t k_block, k_head, k_slot, v_block, v_head, v_slot, v_dim, kv_heads, page, blocks;
  const float *key_scales, *value_scales;  // int8 caches: [block, kv head, slot], dense
  const int32_t *tables, *lens, *starts;   // [n, width], [n], [n + 1]
  int64_t table_width, sequences, total_rows;
  float scale;
  int64_t window;       // 0: unlimited
  const float* sinks;   // [heads] or null
  float* out;           // [T, heads, v_dim]
};

// Key-value heads kv_head.., queries first.., keys from..to; partial: row of the partial buffers, -1 for none.
struct Task { int64_t sequence, kv_head, heads, first, count, from, to, partial; bool few; };

// Unnormalised outputs of tasks, a row per (key-value head, query, head of its group): running max, mass, sum [v_dim].
struct Partials { float *m, *l, *o; };

// Buffers of one thread, reused between calls.
struct Scratch {
  std::vector<float> memory;
  float* take(float*& cursor, int64_t n) { float* p = cursor; cursor += (n + 31) & ~31ll; return p; }
};
static thread_local Scratch scratch;

static INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <class T> static INLINE void widen(const T* row, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(row + i));
  if (i < n) store(out + i, load_some(row + i, n - i));
}

// Softmax step of one row over a tile of K keys: s becomes exp(s - max), m and l are updated, returns the rescale of the
// past.
template <int K>
static INLINE float soften(float* s, int64_t from, int64_t to, bool edge, const float* key_scale, const float* value_scale,
                           float& m, float& l) {
  constexpr int N = K / W;
  vf v[N], top = splat(LOWEST);
  vi lane; for (int i = 0; i < W; i++) lane[i] = i;
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) {
    v[j] = load(s + j * W);
    if (key_scale) v[j] *= load(key_scale + j * W);
    if (edge) {
      vi index = lane + (int32_t)(j * W);
      v[j] = (index >= (int32_t)from) & (index < (int32_t)to) ? v[j] : splat(LOWEST);
    }
    top = vmax(top, v[j]);
  }
  float high = std::max(m, max_lane(top));
  if (high == LOWEST) {
    for (int j = 0; j < N; j++) store(s + j * W, vf{});
    return 1.0f;
  }
  vf total = {};
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) {
    vf e = vexp(v[j] - high);
    total += e;
    if (value_scale) e *= load(value_scale + j * W);
    store(s + j * W, e);
  }
  float past = m == high ? 1.0f : m == LOWEST ? 0.0f : std::exp(m - high);
  l = l * past + sum(total);
  m = high;
  return past;
}

template <class T>
static void run_task(const Attention& a, const Task& t, const Partials& partials) {
  const int64_t group = a.heads / a.kv_heads, rows = t.count * group, depth = a.q_dim + a.q2_dim;
  const int64_t dp = round_up(depth, W), vp = round_up(a.v_dim, W);
  const bool packed = rows >= 24 && dp < 256;  // many rows: transpose the keys once; else dot products in place
  // Rows are used as they lie in the cache unless their length is odd, or they are int8 and used often.
  const bool direct_k = dp == depth && (sizeof(T) == 4 || !packed);
  const bool direct_v = vp == a.v_dim && (sizeof(T) == 4 || rows < 24);
  int64_t need = rows * (dp + KEYS + vp + 3 * 32) + KEYS * (2 * dp + vp) + 2 * KEYS + 1024;
  if ((int64_t)scratch.memory.size() < need + 16) scratch.memory.resize(need + 16);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  float *q = scratch.take(cursor, rows * dp), *s = scratch.take(cursor, rows * KEYS), *o = scratch.take(cursor, rows * vp);
  float *m = scratch.take(cursor, rows), *l = scratch.take(cursor, rows), *alpha = scratch.take(cursor, rows);
  float *kt = scratch.take(cursor, KEYS * dp), *kbuf = scratch.take(cursor, KEYS * dp), *vbuf = scratch.take(cursor, KEYS * vp);
  float *ks = scratch.take(cursor, KEYS), *vs = scratch.take(cursor, KEYS);

  const int64_t begin = a.starts[t.sequence], queries = a.starts[t.sequence + 1] - begin;
  const int64_t past = a.lens[t.sequence] - queries;  // position of the sequence's first query
  const int32_t* table = a.tables + t.sequence * a.table_width;
  for (int64_t i = 0; i < t.count; i++)
    for (int64_t g = 0; g < group; g++) {
      float* row = q + (i * group + g) * dp;
      const float* from = a.q + (begin + t.first + i) * a.q_row + (t.kv_head * group + g) * a.q_head;
      for (int64_t d = 0; d < a.q_dim; d++) row[d] = from[d] * a.scale;
      if (a.q2_dim) {
        const float* more = a.q2 + (begin + t.first + i) * a.q2_row + (t.kv_head * group + g) * a.q2_head;
        for (int64_t d = 0; d < a.q2_dim; d++) row[a.q_dim + d] = more[d] * a.scale;
      }
      for (int64_t d = depth; d < dp; d++) row[d] = 0;
    }
  for (int64_t r = 0; r < rows; r++) m[r] = LOWEST, l[r] = 0;
  memset(o, 0, rows * vp * sizeof(float));

  struct { const T *k[KEYS], *v[KEYS]; } tiles[2];
  // Fill `at` with the addresses of the tile that starts at key `first`. A short last tile repeats its first row; those
  // scores are masked and those weights are zero.
  auto locate = [&](int64_t first, auto& at) {
    const int64_t n = std::min(KEYS, t.to - first);
    for (int64_t j = 0; j < n;) {
      int64_t slot = (first + j) % a.page, run = std::min(n - j, a.page - slot), block = table[(first + j) / a.page];
      const T* k = (const T*)a.keys + block * a.k_block + t.kv_head * a.k_head + slot * a.k_slot;
      const T* v = (const T*)a.values + block * a.v_block + t.kv_head * a.v_head + slot * a.v_slot;
      for (const int64_t end = j + run; j < end; j++, k += a.k_slot, v += a.v_slot) at.k[j] = k, at.v[j] = v;
    }
    for (int64_t j = n; j < KEYS; j++) at.k[j] = at.k[0], at.v[j] = at.v[0];
  };
  const float *kf[KEYS], *vf_[KEYS];
  for (int64_t j = 0; j < KEYS; j++) kf[j] = kbuf + j * dp, vf_[j] = vbuf + j * vp;
  locate(t.from, tiles[0]);
  for (int64_t tile_from = t.from, side = 0; tile_from < t.to; tile_from += KEYS, side ^= 1) {
    const int64_t n = std::min(KEYS, t.to - tile_from);
    const auto& now = tiles[side];
    const bool more = tile_from + KEYS < t.to;
    if (more) locate(tile_from + KEYS, tiles[side ^ 1]);
    const T* const* ahead = more ? tiles[side ^ 1].k : nullptr;
    if (sizeof(T) == 1)
      for (int64_t j = 0; j < n;) {
        int64_t slot = (tile_from + j) % a.page, run = std::min(n - j, a.page - slot);
        int64_t at = (table[(tile_from + j) / a.page] * a.kv_heads + t.kv_head) * a.page + slot;
        memcpy(ks + j, a.key_scales + at, run * 4);
        memcpy(vs + j, a.value_scales + at, run * 4);
        j += run;
      }
    if (!direct_k) for (int64_t j = 0; j < KEYS; j++) widen(now.k[j], depth, kbuf + j * dp);
    if (!direct_v) for (int64_t j = 0; j < n; j++) widen(now.v[j], a.v_dim, vbuf + j * vp);

    if (packed) {
      for (int64_t j = 0; j < KEYS; j += W)
        for (int64_t d = 0; d < dp; d += W) transpose((direct_k ? (const float* const*)now.k : kf) + j, d, kt + d * KEYS + j, KEYS);
      product(rows, KEYS, depth, q, dp, [&](int64_t k) { return kt + k * KEYS; }, s, KEYS, nullptr);
    } else if (direct_k) {
      dot_product(rows, round_up(n, 4), dp, q, dp, now.k, ahead, s, KEYS);
    } else {
      dot_product<float>(rows, round_up(n, 4), dp, q, dp, kf, nullptr, s, KEYS);
    }
    for (int64_t r = 0; r < rows; r++) {
      int64_t position = past + t.first + r / group;
      int64_t to = std::min(n, position + 1 - tile_from), from = a.window ? position - a.window + 1 - tile_from : 0;
      alpha[r] = soften<KEYS>(s + r * KEYS, from, to, from > 0 || to < KEYS, sizeof(T) == 1 ? ks : nullptr,
                        sizeof(T) == 1 ? vs : nullptr, m[r], l[r]);
    }
    if (!direct_v) {
      product(rows, vp, n, s, KEYS, [&](int64_t k) { return vf_[k]; }, o, vp, alpha);
    } else if (more && a.values != a.keys) {
      const T* const* next = tiles[side ^ 1].v;
      const int64_t bytes = vp * sizeof(T);
      product(rows, vp, n, s, KEYS, [&](int64_t k) { prefetch(next[k], bytes); return now.v[k]; }, o, vp, alpha);
    } else {
      product(rows, vp, n, s, KEYS, [&](int64_t k) { return now.v[k]; }, o, vp, alpha);
    }
  }

  for (int64_t r = 0; r < rows; r++) {
    const float* from = o + r * vp;
    if (t.partial >= 0) {
      partials.m[t.partial + r] = m[r], partials.l[t.partial + r] = l[r];
      memcpy(partials.o + (t.partial + r) * a.v_dim, from, a.v_dim * sizeof(float));
      continue;
    }
    int64_t head = t.kv_head * group + r % group;
    float high = a.sinks ? std::max(m[r], a.sinks[head]) : m[r], part = std::exp(m[r] - high);
    float total = l[r] * part + (a.sinks ? std::exp(a.sinks[head] - high) : 0.0f);
    float factor = total > 0 ? part / total : 0.0f;
    float* to = a.out + ((begin + t.first + r / group) * a.heads + head) * a.v_dim;
    for (int64_t d = 0; d < a.v_dim; d++) to[d] = from[d] * factor;
  }
}

