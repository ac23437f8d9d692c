// Attention of few query rows per sequence over packed records, then over the exact rows that are not packed yet.
//
// A sequence is cut into parts of its records and one part for its exact rows; where the cuts lie depends on lengths only,
// never on the number of threads, hence neither does the result. A part walks memory in order: tile by tile, in a tile
// head by head, requesting the records of the next head while it computes.
#pragma once
#include "packed.h"

struct Call {
  Format f;
  Storage storage;
  int64_t heads;
  const int32_t *tables, *stored, *lens, *starts, *states;  // stored: in tokens
  int64_t width, sequences;
  const float *residual_k, *residual_v;  // [slots, capacity, heads, dim], dense
  int64_t slots, capacity;
  const float* sinks;
  float *out, *lse;
};

// Heads h.. of records or exact rows from..to of a sequence; partials from row `partial` on.
struct Part { int64_t sequence, head, heads, from, to, partial; bool exact; };

static thread_local Workspace workspace;

template <int DIM>
static void run_packed(const Call& c, const Part& t, const Queries& queries, int64_t first_row, int64_t rows,
                       const Partials& partials) {
  const Format& f = c.f;
  const int64_t width = f.v_groups() * GROUP, per_head = f.per_block * f.bytes;
  const int32_t* table = c.tables + t.sequence * c.width;
  const int64_t need = t.heads * rows * (width + 2) + 3 * 32 + 16;
  if ((int64_t)scratch.memory.size() < need) scratch.memory.resize(need);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  float *o = scratch.take(cursor, t.heads * rows * width), *m = scratch.take(cursor, t.heads * rows);
  float* l = scratch.take(cursor, t.heads * rows);
  for (int64_t r = 0; r < t.heads * rows; r++) m[r] = LOWEST, l[r] = 0;
  memset(o, 0, t.heads * rows * width * sizeof(float));

  int64_t index[2][RECORDS], count[2];  // of head 0's records
  auto locate = [&](int64_t from, int side) {
    count[side] = std::min(RECORDS, t.to - from);
    for (int64_t i = 0; i < count[side]; i++) {
      const int64_t at = index[side][i] = f.record(table, from + i);
      __builtin_prefetch(c.storage.exponents + 2 * (at + t.head * f.per_block), 0, 3);
      if (f.norms) {
        const float* norms = c.storage.norms + (table[(from + i) / f.per_block] * f.per_block + (from + i) % f.per_block) * GROUP;
        __builtin_prefetch(norms, 0, 3), __builtin_prefetch(norms + 16, 0, 3);
      }
    }
  };
  locate(t.from, 0);
  Workspace& space = workspace;
  int side = 0;
  for (int64_t from = t.from; from < t.to; from += RECORDS, side ^= 1) {
    const bool more = from + RECORDS < t.to;
    if (more) locate(from + RECORDS, side ^ 1);
    Tile tile;
    tile.count = count[side];
    for (int64_t i = 0; i < tile.count; i++)
      tile.norms[i] = f.norms ? c.storage.norms + (table[(from + i) / f.per_block] * f.per_block + (from + i) % f.per_block) * GROUP
                              : nullptr;
    for (int64_t h = 0; h < t.heads; h++) {
      const bool last = h + 1 == t.heads;
      for (int64_t i = 0; i < tile.count; i++) {
        const int64_t record = index[side][i] + (t.head + h) * f.per_block;
        tile.at[i] = c.storage.records + record * f.bytes;
        tile.k_exponent[i] = c.storage.exponents[2 * record], tile.v_exponent[i] = c.storage.exponents[2 * record + 1];
        if (!last) tile.ahead[i] = tile.at[i] + per_head;
        else if (more && i < count[side ^ 1]) tile.ahead[i] = c.storage.records + (index[side ^ 1][i] + t.head * f.per_block) * f.bytes;
        else tile.ahead[i] = tile.at[i];
      }
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t at = h * rows + r;
        const Rows chunk{&queries, first_row + (t.head + h) * rows + r, m + at, l + at, o + at * width};
        switch (rows - r) {
          case 1: step<1, DIM>(f, tile, chunk, space); break;
          case 2: step<2, DIM>(f, tile, chunk, space); break;
          case 3: step<3, DIM>(f, tile, chunk, space); break;
          default: step<4, DIM>(f, tile, chunk, space); break;
        }
      }
    }
  }
  for (int64_t r = 0; r < t.heads * rows; r++) {
    partials.m[t.partial + r] = m[r] * 0.693147181f, partials.l[t.partial + r] = l[r];
    memcpy(partials.o + (t.partial + r) * f.v_dim, o + r * width, f.v_dim * sizeof(float));
  }
}

static void run_exact(const Call& c, const Part& t, const Queries& queries, int64_t first_row, int64_t rows,
                      const Partials& partials) {
  const Format& f = c.f;
  const int64_t need = rows * (TILE + 1) + 2 * 32 + 16;
  if ((int64_t)scratch.memory.size() < need) scratch.memory.resize(need);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  float *s = scratch.take(cursor, rows * TILE), *alpha = scratch.take(cursor, rows);
  const int64_t slot = c.states[t.sequence] * c.capacity;
  for (int64_t h = t.head; h < t.head + t.heads; h++) {
    const int64_t at = t.partial + (h - t.head) * rows;
    float *m = partials.m + at, *l = partials.l + at, *o = partials.o + at * f.v_dim;
    const float* q = queries.row(first_row + h * rows);
    for (int64_t r = 0; r < rows; r++) m[r] = LOWEST, l[r] = 0;
    memset(o, 0, rows * f.v_dim * sizeof(float));
    for (int64_t from = t.from; from < t.to; from += TILE) {
      const int64_t count = std::min<int64_t>(TILE, t.to - from);
      const float *keys[TILE], *values[TILE];
      for (int64_t j = 0; j < TILE; j++) {  // a short tile repeats its first row, masked below
        const int64_t row = (slot + (from + (j < count ? j : 0)) % c.capacity) * f.heads + h;
        keys[j] = c.residual_k + row * f.k_dim, values[j] = c.residual_v + row * f.v_dim;
      }
      few_scores<0, float>(rows, count, f.k_dim, q, keys, values, s);
      for (int64_t r = 0; r < rows; r++) alpha[r] = soften<TILE>(s + r * TILE, 0, count, count < TILE, nullptr, nullptr, m[r], l[r]);
      few_sums<1, float>(rows, count, f.v_dim, s, values, keys, count, f.k_dim * 4, o, alpha);
    }
  }
}

// Combine the parts of one row: `count` partials, `stride` rows apart.
static void merge_row(const Call& c, int64_t head, int64_t first, int64_t count, int64_t stride, int64_t to, const Partials& p) {
  const int64_t columns = c.f.v_dim;
  float high = c.sinks ? c.sinks[head] : LOWEST;
  for (int64_t i = 0; i < count; i++) high = std::max(high, p.m[first + i * stride]);
  float total = c.sinks ? std::exp(c.sinks[head] - high) : 0.0f;
  float* out = c.out + to * columns;
  memset(out, 0, columns * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = first + i * stride;
    const float factor = p.m[at] == LOWEST ? 0.0f : std::exp(p.m[at] - high);
    total += p.l[at] * factor;
    const float* from = p.o + at * columns;
    for (int64_t d = 0; d < columns; d += W) store(out + d, load(out + d) + load(from + d) * factor);
  }
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
  for (int64_t d = 0; d < columns; d++) out[d] *= inverse;
  c.lse[to] = total > 0 ? high + std::log(total) : LOWEST;
}

static inline int64_t part_records(int64_t records) {
  return std::min<int64_t>(128, std::max<int64_t>(2 * RECORDS, round_up((records + 15) / 16, RECORDS)));
}

// Returns 0, or 1: lengths do not fit, 2: a block table names a block that does not exist, 3: a state does not exist.
static int attend_packed(const Call& c, const float* q, float scale, int threads) {
  const Format& f = c.f;
  const int64_t block = f.per_block * GROUP, group = c.heads / f.heads;
  for (int64_t n = 0; n < c.sequences; n++) {
    const int64_t stored = c.stored[n], length = c.lens[n];
    if (c.starts[n + 1] < c.starts[n] || c.starts[0] != 0) return 1;
    if (stored < 0 || stored % block || stored > c.width * block || length < stored || length - stored > c.capacity) return 1;
    for (int64_t b = 0; b < stored / block; b++)
      if (c.tables[n * c.width + b] < 0 || c.tables[n * c.width + b] >= f.blocks) return 2;
    if (length > stored && (c.states[n] < 0 || c.states[n] >= c.slots)) return 3;
  }
  const Queries queries = prepare_all(q, c.heads, c.starts, c.sequences, scale, f);
  std::vector<Part> parts;
  int64_t packed = 0, work = 0, partial = 0;
  for (int64_t n = 0; n < c.sequences; n++)
    if (c.starts[n + 1] > c.starts[n]) packed += (c.stored[n] / GROUP + part_records(c.stored[n] / GROUP) - 1) / part_records(c.stored[n] / GROUP);
  // All heads of a part in one task, which reads memory in order, unless that leaves cores idle.
  const int64_t wanted = packed ? std::min(f.heads, (2 * threads + packed - 1) / packed) : 1;
  const int64_t together = std::max<int64_t>(1, f.heads / wanted);
  std::vector<int64_t> first(c.sequences), counts(c.sequences);
  for (int64_t n = 0; n < c.sequences; n++) {
    const int64_t queries_of = c.starts[n + 1] - c.starts[n], rows = queries_of * group;
    first[n] = partial, counts[n] = 0;
    if (!queries_of) continue;
    auto add = [&](int64_t from, int64_t to, int64_t step, bool exact) {
      for (int64_t at = from; at < to; at += step, counts[n]++, partial += f.heads * rows)
        for (int64_t h = 0; h < f.heads; h += together)
          parts.push_back({n, h, std::min(together, f.heads - h), at, std::min(to, at + step), partial + h * rows, exact});
    };
    const int64_t records = c.stored[n] / GROUP;
    add(c.stored[n], c.lens[n], TILE, true);
    add(0, records, part_records(records), false);
    work += rows * f.heads * c.lens[n] * (f.k_dim + f.v_dim);
  }
  static thread_local std::vector<float> buffer;
  if ((int64_t)buffer.size() < partial * (f.v_dim + 2)) buffer.resize(partial * (f.v_dim + 2));
  const Partials partials{buffer.data(), buffer.data() + partial, buffer.data() + 2 * partial};
  parallel_tasks(parts.size(), 1, work < 1000000 ? 1 : threads, [&](int64_t i) {
    const Part& t = parts[i];
    const int64_t rows = (c.starts[t.sequence + 1] - c.starts[t.sequence]) * group, base = c.starts[t.sequence] * c.heads;
    if (t.exact) return run_exact(c, t, queries, base, rows, partials);
#if SERVAL_AVX512 || SERVAL_AVX2
    if (f.k_dim == 128 && f.v_dim == 128) return run_packed<128>(c, t, queries, base, rows, partials);
    if (f.k_dim == 64 && f.v_dim == 64) return run_packed<64>(c, t, queries, base, rows, partials);
#endif
    run_packed<0>(c, t, queries, base, rows, partials);
  });
  const int64_t total = c.sequences ? c.starts[c.sequences] * c.heads : 0;
  parallel_for(total, partial * f.v_dim < 1000000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; i++) {
      const int64_t token = i / c.heads, head = i % c.heads;
      while (token >= c.starts[n + 1]) n++;
      const int64_t rows = (c.starts[n + 1] - c.starts[n]) * group, kv_head = head / group;
      const int64_t row = kv_head * rows + (token - c.starts[n]) * group + head % group;
      merge_row(c, head, first[n] + row, counts[n], f.heads * rows, i, partials);
    }
  });
  return 0;
}
