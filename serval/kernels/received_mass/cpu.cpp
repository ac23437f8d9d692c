// Row log-sum-exps and column masses of causal attention, without its matrix. Floor in __init__.py.
//
// A task walks blocks of a key-value head's query rows. A block's scores are softened tile by tile as in flash.h, with
// the running maximum of the moment, and kept ([tiles, rows, KEYS], sized to the second-level cache); once the rows' sums
// are known, each tile's columns are added up with the factor that corrects its maximum. So a pair costs one product and
// one exponential, and reading its score back costs less than computing it again.
#include "flash.h"

struct Pairs {
  const float* q;  // row (i, head): q + i * q_row + head * q_head
  int64_t q_row, q_head, queries, heads, dim;
  const float* k;
  int64_t k_row, k_head, keys, kv_heads, first, window;  // query i sits at first + i; window 0: unlimited
  float scale;
  const float* sinks;  // [heads] or null
  float* lse;          // [queries, heads]
};

constexpr int64_t KEPT = 1 << 18, MOST_ROWS = 96, FEWEST_ROWS = 24;  // scores kept at a time; rows of a block

static INLINE int64_t oldest_key(const Pairs& a, int64_t query) {
  return a.window ? std::max<int64_t>(0, a.first + query - a.window + 1) : 0;
}

// Add what the keys receive from queries begin..end of one key-value head's group to mass ([group, keys] when per_head,
// else [keys]), and write those rows' lse. Rows lie head by head.
static void add_block(const Pairs& a, int64_t kv_head, int64_t begin, int64_t end, bool per_head, float* mass) {
  const int64_t group = a.heads / a.kv_heads, count = end - begin, rows = group * count;
  const int64_t from = oldest_key(a, begin), to = a.first + end, tiles = (to - from + KEYS - 1) / KEYS;
  const int64_t dp = round_up(a.dim, W);
  const bool packed = rows >= FEWEST_ROWS && dp < 256, direct = dp == a.dim;
  const int64_t need = rows * (dp + 2 + tiles * (KEYS + 1)) + 2 * KEYS * dp + 32 * 8;
  if ((int64_t)scratch.memory.size() < need) scratch.memory.resize(need);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  float *q = scratch.take(cursor, rows * dp), *m = scratch.take(cursor, rows), *l = scratch.take(cursor, rows);
  float *kt = scratch.take(cursor, KEYS * dp), *kbuf = scratch.take(cursor, KEYS * dp);
  float *at = scratch.take(cursor, rows * tiles), *kept = scratch.take(cursor, rows * tiles * KEYS);

  for (int64_t r = 0; r < rows; r++) {
    const float* source = a.q + (begin + r % count) * a.q_row + (kv_head * group + r / count) * a.q_head;
    for (int64_t d = 0; d < a.dim; d++) q[r * dp + d] = source[d] * a.scale;
    for (int64_t d = a.dim; d < dp; d++) q[r * dp + d] = 0;
    m[r] = LOWEST, l[r] = 0;
  }
  const float* row_of[KEYS];
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t tile = from + t * KEYS, n = std::min(KEYS, to - tile);
    for (int64_t j = 0; j < KEYS; j++)  // a short tile repeats its first row; those scores are masked
      row_of[j] = a.k + (tile + (j < n ? j : 0)) * a.k_row + kv_head * a.k_head;
    if (!direct)
      for (int64_t j = 0; j < KEYS; j++) {
        float* copy = kbuf + j * dp;
        memcpy(copy, row_of[j], a.dim * sizeof(float));
        memset(copy + a.dim, 0, (dp - a.dim) * sizeof(float));
        row_of[j] = copy;
      }
    float* s = kept + t * rows * KEYS;
    if (packed) {
      for (int64_t j = 0; j < KEYS; j += W)
        for (int64_t d = 0; d < dp; d += W) transpose(row_of + j, d, kt + d * KEYS + j, KEYS);
      product(rows, KEYS, dp, q, dp, [&](int64_t d) { return kt + d * KEYS; }, s, KEYS, nullptr);
    } else {
      dot_product(rows, KEYS, dp, q, dp, row_of, (const float* const*)nullptr, s, KEYS);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t query = begin + r % count, last = a.first + query + 1 - tile;
      const int64_t youngest = std::min(n, last), oldest = oldest_key(a, query) - tile;
      soften<KEYS>(s + r * KEYS, oldest, youngest, oldest > 0 || youngest < KEYS, nullptr, nullptr, m[r], l[r]);
      at[t * rows + r] = m[r];
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = kv_head * group + r / count;
    const float high = a.sinks ? std::max(m[r], a.sinks[head]) : m[r];
    const float total = l[r] * std::exp(m[r] - high) + (a.sinks ? std::exp(a.sinks[head] - high) : 0.0f);
    l[r] = high + std::log(total);
    a.lse[(begin + r % count) * a.heads + head] = l[r];
  }
  constexpr int N = KEYS / W;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t tile = from + t * KEYS, n = std::min(KEYS, to - tile);
    for (int64_t g = 0, parts = per_head ? group : 1, span = rows / parts; g < parts; g++) {
      vf sums_[N] = {};
      for (int64_t r = g * span; r < (g + 1) * span; r++) {
        const float top = at[t * rows + r];
        if (top == LOWEST) continue;  // no visible key so far
        const float factor = std::exp(top - l[r]), *s = kept + (t * rows + r) * KEYS;
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) sums_[j] += load(s + j * W) * factor;
      }
      float buffer[KEYS];
      for (int j = 0; j < N; j++) store(buffer + j * W, sums_[j]);
      float* out = mass + g * a.keys + tile;
      for (int64_t j = 0; j < n; j++) out[j] += buffer[j];
    }
  }
}

// mass: [heads, keys] when per_head, else [keys], the mean over heads. The cuts depend on shapes only, never on the
// number of threads, hence neither does the result. Returns 0.
EXPORT int received_mass(const float* q, int64_t q_row, int64_t q_head, int64_t queries, int64_t heads, int64_t dim,
                         const float* k, int64_t k_row, int64_t k_head, int64_t keys, int64_t kv_heads, int64_t first,
                         int64_t window, float scale, const float* sinks, int32_t per_head, float* mass, float* lse,
                         int threads) {
  const Pairs a{q, q_row, q_head, queries, heads, dim, k, k_row, k_head, keys, kv_heads, first, window, scale, sinks, lse};
  const int64_t group = heads / kv_heads, width = (per_head ? group : 1) * keys;
  const int64_t rows = std::min(MOST_ROWS, std::max(FEWEST_ROWS, KEPT / std::max<int64_t>(1, keys)));
  const int64_t step = std::max<int64_t>(1, rows / group), blocks = (queries + step - 1) / step;
  const int64_t chunks = std::max<int64_t>(1, std::min(blocks, (16 + kv_heads - 1) / kv_heads));
  std::vector<float> partial(kv_heads * chunks * width);
  if ((double)queries * keys * heads * dim < 400000) threads = 1;
  parallel_tasks(kv_heads * chunks, 1, threads, [&](int64_t i) {
    // Every chunk takes blocks from all along the rows: later rows see more keys.
    for (int64_t b = i % chunks; b < blocks; b += chunks)
      add_block(a, i / chunks, b * step, std::min(queries, (b + 1) * step), per_head, partial.data() + i * width);
  });
  const int64_t columns = per_head ? heads * keys : keys;
  for (int64_t j = 0; j < columns; j++) {
    double total = 0;
    if (per_head) {
      const int64_t kv_head = j / width;
      for (int64_t c = 0; c < chunks; c++) total += partial[(kv_head * chunks + c) * width + j % width];
    } else {
      for (int64_t i = 0; i < kv_heads * chunks; i++) total += partial[i * width + j];
      total /= (double)heads;
    }
    mass[j] = (float)total;
  }
  return 0;
}
