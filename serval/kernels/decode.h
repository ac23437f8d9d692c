// Attention of few query rows over many keys (decode): bound by how fast memory delivers the cache.
//
// Keys and values are asked of memory in the order in which they lie there: block by block, in a block head by head, row
// by row, while the running state of all heads stays in the core's own cache. On the machine this was tuned on, reading
// 16 KiB pieces of one head with the stride of a block reaches 60 % of what reading in order does, and four rows read in
// turn defeat the hardware's prefetching. The lines needed next are requested evenly while computing (values during the
// scores, the next keys during the sums): requested in bursts, they block the loads behind them.
#pragma once
#include <type_traits>
#include "flash.h"

constexpr int TILE = 32;  // keys per step: a block of the default size, so that a tile is one piece of memory

// One key and R query rows: acc[r * step] += products, lane by lane; depth a multiple of W (of 2 W for pairs). Meanwhile
// row `ahead`, as long as a key, is requested. DEPTH: depth where known at compile time, else 0.
template <int R, int DEPTH, class T>
static INLINE void few_products(int64_t depth, const float* a, int64_t lda, const T* key, const T* ahead, vf* acc,
                                int step) {
  constexpr int64_t LINE = 64 / sizeof(T);
  constexpr int V = std::is_same<T, bf16_pairs>::value ? 2 : 1;
  if (DEPTH) depth = DEPTH;
#pragma GCC unroll 16
  for (int64_t i = 0; i < depth; i += V * W) {
    if (i % LINE == 0) __builtin_prefetch(ahead + i, 0, 2);
    if (V * W > LINE) __builtin_prefetch(ahead + i + LINE, 0, 2);
    vf b[V];
    load_row<V>(key + i, b);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r * step] += load(a + r * lda + i + v * W) * b[v];
  }
}

// c[r][j] = dot product of query row r and key row j, for R rows and four keys, one key after the other.
template <int R, int DEPTH, class T>
static INLINE void few_dots(int64_t depth, const float* a, int64_t lda, const T* const* keys, const T* const* ahead,
                            float* c) {
#if SERVAL_AVX512
  if (R == 4) {
    vf acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) acc[i] = vf{};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) few_products<R, DEPTH>(depth, a, lda, keys[j], ahead[j], acc + j, 4);
    const __m512 out = sums16(acc);
    _mm_storeu_ps(c, _mm512_castps512_ps128(out));
    _mm_storeu_ps(c + TILE, _mm512_extractf32x4_ps(out, 1));
    _mm_storeu_ps(c + 2 * TILE, _mm512_extractf32x4_ps(out, 2));
    _mm_storeu_ps(c + 3 * TILE, _mm512_extractf32x4_ps(out, 3));
    return;
  }
#endif
  constexpr int J = R == 1 ? 4 : R == 2 ? 2 : 1;  // keys whose sums are made together
  for (int64_t j = 0; j < 4; j += J) {
    vf acc[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) acc[i] = vf{};
#pragma GCC unroll 4
    for (int i = 0; i < J; i++) few_products<R, DEPTH>(depth, a, lda, keys[j + i], ahead[j + i], acc + i, J);
    float out[4];
    sums(acc, out);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < J; i++) c[r * TILE + j + i] = out[r * J + i];
  }
}

// Scores s [rows, TILE] of query rows with `count` keys (rounded up to 4; the pointers beyond are valid rows).
template <int DEPTH, class T>
static INLINE void few_scores(int64_t rows, int64_t count, int64_t depth, const float* q, const T* const* keys,
                              const T* const* ahead, float* s) {
  for (int64_t j = 0; j < count; j += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) few_dots<4, DEPTH>(depth, q + r * depth, depth, keys + j, ahead + j, s + r * TILE + j);
    const float* rest = q + r * depth;
    float* to = s + r * TILE + j;
    if (rows - r == 3) few_dots<3, DEPTH>(depth, rest, depth, keys + j, ahead + j, to);
    else if (rows - r == 2) few_dots<2, DEPTH>(depth, rest, depth, keys + j, ahead + j, to);
    else if (rows - r == 1) few_dots<1, DEPTH>(depth, rest, depth, keys + j, ahead + j, to);
  }
}

// Rows to request while computing, SHARE cache lines at a time, in order.
template <int SHARE> struct Ahead {
  const char* const* rows; int64_t count, bytes, row, offset;
  INLINE void request() {
    const char* p = rows[row] + offset;
#pragma GCC unroll 8
    for (int i = 0; i < SHARE; i++) __builtin_prefetch(p + 64 * i, 0, 2);
    offset += 64 * SHARE;
    if (offset >= bytes) offset = 0, row = row + 1 < count ? row + 1 : row;
  }
};

// o [rows, columns] = alpha * o + s [rows, TILE] * values; columns a multiple of W. Requests `coming` rows of `next`.
template <int SHARE, class T>
static INLINE void few_sums(int64_t rows, int64_t count, int64_t columns, const float* s, const T* const* values,
                            const T* const* next, int64_t coming, int64_t bytes, float* o, const float* alpha) {
  Ahead<SHARE> ahead{(const char* const*)next, coming, bytes, 0, 0};
  int64_t j = 0;
  for (; j + TILE_VECS * W <= columns; j += TILE_VECS * W)
    tile_rows<TILE_VECS>(rows, count, s, TILE, [&](int64_t k) { ahead.request(); return values[k] + j; }, o + j, columns, alpha);
  if constexpr (!std::is_same<T, bf16_pairs>::value) for (; j < columns; j += W)
    tile_rows<1>(rows, count, s, TILE, [&](int64_t k) { ahead.request(); return values[k] + j; }, o + j, columns, alpha);
}

// Whether `queries` queries of one sequence are few enough, and of a shape, for run_few.
static inline bool is_few(const Attention& a, int64_t queries) {
  const int64_t rows = queries * (a.heads / a.kv_heads), state = a.kv_heads * rows * (a.q_dim + a.v_dim);
  return rows < 24 && state <= 65536 && a.q2_dim == 0 && a.q_dim % W == 0 && a.v_dim % W == 0;
}

// Where the rows of a tile lie: offsets in elements of head 0; a short tile repeats its first row.
struct Places { int64_t count, k[TILE], v[TILE], scale[TILE]; };

static INLINE void locate(const Attention& a, const int32_t* table, int64_t first, int64_t to, Places& at) {
  at.count = std::min<int64_t>(TILE, to - first);
  for (int64_t j = 0; j < at.count;) {
    const int64_t slot = (first + j) % a.page, end = j + std::min(at.count - j, a.page - slot), block = table[(first + j) / a.page];
    int64_t k = block * a.k_block + slot * a.k_slot, v = block * a.v_block + slot * a.v_slot;
    int64_t scale = block * a.kv_heads * a.page + slot;
    for (; j < end; j++, k += a.k_slot, v += a.v_slot) at.k[j] = k, at.v[j] = v, at.scale[j] = scale++;
  }
  for (int64_t j = at.count; j < TILE; j++) at.k[j] = at.k[0], at.v[j] = at.v[0], at.scale[j] = at.scale[0];
}

// A part of a sequence of few rows, for several heads; writes partials.
template <int DEPTH, class T>
static void run_few(const Attention& a, const Task& t, const Partials& partials) {
  constexpr bool PAIRS = std::is_same<T, bf16_pairs>::value;
  const int64_t group = a.heads / a.kv_heads, rows = t.count * group, depth = a.q_dim, columns = a.v_dim;
  const int64_t need = t.heads * rows * (depth + columns + 2) + rows * (TILE + 1) + 2 * TILE + 8 * 32;
  if ((int64_t)scratch.memory.size() < need + 16) scratch.memory.resize(need + 16);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  float *q = scratch.take(cursor, t.heads * rows * depth), *o = scratch.take(cursor, t.heads * rows * columns);
  float *m = scratch.take(cursor, t.heads * rows), *l = scratch.take(cursor, t.heads * rows);
  float *s = scratch.take(cursor, rows * TILE), *alpha = scratch.take(cursor, rows);
  float *ks = scratch.take(cursor, TILE), *vs = scratch.take(cursor, TILE);

  const int64_t begin = a.starts[t.sequence], past = a.lens[t.sequence] - (a.starts[t.sequence + 1] - begin);
  const int32_t* table = a.tables + t.sequence * a.table_width;
  for (int64_t h = 0; h < t.heads; h++)
    for (int64_t r = 0; r < rows; r++) {
      const float* from = a.q + (begin + t.first + r / group) * a.q_row + ((t.kv_head + h) * group + r % group) * a.q_head;
      float* to = q + (h * rows + r) * depth;
      for (int64_t d = 0; d < depth; d++) to[PAIRS ? pair_place(d) : d] = from[d] * a.scale;
    }
  for (int64_t r = 0; r < t.heads * rows; r++) m[r] = LOWEST, l[r] = 0;
  memset(o, 0, t.heads * rows * columns * sizeof(float));

  const T *keys = (const T*)a.keys + t.kv_head * a.k_head, *values = (const T*)a.values + t.kv_head * a.v_head;
  const T *k_rows[2][TILE], *v_rows[TILE];
  const int64_t k_bytes = depth * sizeof(T), passes = std::max<int64_t>(1, columns / (TILE_VECS * W));
  const int64_t share = (k_bytes + 64 * passes - 1) / (64 * passes);  // cache lines of a key to request per pass
  Places places[2];
  locate(a, table, t.from, t.to, places[0]);
  for (int j = 0; j < TILE; j++) k_rows[0][j] = keys + places[0].k[j];
  int side = 0, turn = 0;
  for (int64_t at = t.from; at < t.to; at += TILE, side ^= 1) {
    const Places& here = places[side];
    const bool more = at + TILE < t.to;
    if (more) locate(a, table, at + TILE, t.to, places[side ^ 1]);
    for (int64_t h = 0; h < t.heads; h++, turn ^= 1) {
      const bool last = h + 1 == t.heads;
      const Places& then = last ? places[side ^ 1] : here;  // of the head or tile that comes next
      const int64_t next_head = last ? 0 : h + 1, coming = last && !more ? 0 : then.count;
      for (int j = 0; j < TILE; j++) v_rows[j] = values + here.v[j] + h * a.v_head;
      if (coming) for (int j = 0; j < TILE; j++) k_rows[turn ^ 1][j] = keys + then.k[j] + next_head * a.k_head;
      if (sizeof(T) == 1) {
        const int64_t shift = (t.kv_head + h) * a.page, next_shift = (t.kv_head + next_head) * a.page;
        for (int j = 0; j < TILE; j++) ks[j] = a.key_scales[here.scale[j] + shift], vs[j] = a.value_scales[here.scale[j] + shift];
        for (int j = 0; j < coming; j += 16) {
          __builtin_prefetch(a.key_scales + then.scale[j] + next_shift, 0, 2);
          __builtin_prefetch(a.value_scales + then.scale[j] + next_shift, 0, 2);
        }
      }
      few_scores<DEPTH, T>(rows, here.count, depth, q + h * rows * depth, k_rows[turn], v_rows, s);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t position = past + t.first + r / group;
        const int64_t to = std::min(here.count, position + 1 - at), from = a.window ? position - a.window + 1 - at : 0;
        alpha[r] = soften<TILE>(s + r * TILE, from, to, from > 0 || to < TILE, sizeof(T) == 1 ? ks : nullptr,
                                sizeof(T) == 1 ? vs : nullptr, m[h * rows + r], l[h * rows + r]);
      }
      auto sums_of = [&](auto lines) {
        few_sums<decltype(lines)::value, T>(rows, here.count, columns, s, v_rows, coming ? k_rows[turn ^ 1] : v_rows,
                                            coming ? coming : 1, k_bytes, o + h * rows * columns, alpha);
      };
      if (share > 2) sums_of(std::integral_constant<int, 4>());
      else if (share == 2) sums_of(std::integral_constant<int, 2>());
      else sums_of(std::integral_constant<int, 1>());
    }
  }
  memcpy(partials.m + t.partial, m, t.heads * rows * sizeof(float));
  memcpy(partials.l + t.partial, l, t.heads * rows * sizeof(float));
  float* out = partials.o + t.partial * columns;
  for (int64_t r = 0; r < t.heads * rows; r++)
    if (PAIRS) for (int64_t d = 0; d < columns; d++) out[r * columns + d] = o[r * columns + pair_place(d)];
    else memcpy(out + r * columns, o + r * columns, columns * sizeof(float));
}

template <class T> static void run_few_of(const Attention& a, const Task& t, const Partials& partials) {
  if (a.q_dim == 128) run_few<128, T>(a, t, partials);
  else if (a.q_dim == 64) run_few<64, T>(a, t, partials);
  else run_few<0, T>(a, t, partials);
}
template <> void run_few_of<bf16>(const Attention& a, const Task& t, const Partials& partials) {
  if (a.q_dim % (2 * W) || a.v_dim % (TILE_VECS * W)) run_few<0, bf16>(a, t, partials);
  else if (a.q_dim == 128) run_few<128, bf16_pairs>(a, t, partials);
  else if (a.q_dim == 64) run_few<64, bf16_pairs>(a, t, partials);
  else run_few<0, bf16_pairs>(a, t, partials);
}
