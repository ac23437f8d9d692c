// SnapMLA (arXiv:2602.10718): latent attention over E4M3 codes and pre-scaled bfloat16 rotary keys.
//
// Floor per visible token: C + 4 + 2R bytes, read once, and H (2C + R) multiply-adds. With AVX512-BF16 these are exact
// products of bfloat16 numbers (an E4M3 number is one) summed in float32, twice as fast as float32 multiply-adds; else
// float32. A block of 64 tokens is decoded once for up to ROWS query rows:
//   scores: lanes are query rows, numbers of a key are broadcast, so that nothing is summed across lanes, and the
//   softmax, with its maxima over keys, works on whole vectors of rows;
//   sums: lanes are latent dims. Two keys' numbers lie side by side there, which is what a bfloat16 product sums.
// The next block's lines are requested meanwhile, evenly. Blocks start at multiples of 64 tokens, whatever the page.
#include <algorithm>
#include <cmath>
#include <vector>
#include "products.h"
#include "storage.h"

constexpr int64_t ROWS = 128;

struct Snap {
  const float *q, *q2;  // query row (t, h): q + t * q_row + h * q_head, `latent` floats; q2 likewise, `rope` floats
  int64_t q_row, q_head, q2_row, q2_head, heads, latent, rope;
  const uint8_t* codes; const float* scales; const uint16_t* ropes;  // [block, page, latent], [block, page], [.., rope]
  int64_t page, blocks;
  const int32_t* tables; int64_t table_width; const int32_t *lens, *starts; int64_t sequences, total;
  float scale; int rope8;
  float *out, *lse;  // [total, heads, latent], [total, heads] or null
};
// Query rows (query * heads + head) first.. of a sequence, keys from..to; partial: row of the partial buffers, or -1.
struct Task { int64_t sequence, first, rows, from, to, partial; };

struct Scratch {
  std::vector<float> memory;
  Ahead::Piece pieces[3 * BLOCK];
  float* take(float*& cursor, int64_t n) { float* p = cursor; cursor += (n + 31) & ~31ll; return p; }
};
static thread_local Scratch scratch;
static INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// One query row as units, [cp | rp] numbers at `line`, which is zero beyond them; returns the scale.
static float code_query(const Snap& a, const float* q, const float* q2, int64_t cp, unit* line) {
  float largest = largest_of(q, a.latent);
  if (a.rope8) largest = std::max(largest, largest_of(q2, a.rope));
  const float s = scale_of(largest);
  for (int64_t i = 0; i < a.latent; i += W) put(line, i, round_e4m3(load_upto(q + i, a.latent - i) / s), a.latent - i);
  for (int64_t i = 0; i < a.rope; i += W) {
    const vf v = load_upto(q2 + i, a.rope - i) / s;
    bf16 narrow[W]; store(narrow, v);
    put(line, cp + i, a.rope8 ? round_e4m3(v) : load(narrow), a.rope - i);
  }
  return s;
}

// A token as units: cp decoded latent numbers (zeros beyond `latent`, where `to` holds zeros already), then rp rotary.
static INLINE void unpack_key(const Snap& a, const uint8_t* codes, const uint16_t* rope, int64_t cp, unit* to) {
#if SNAP_BF16
  uint16_t* words = (uint16_t*)to;
  int64_t i = 0;
  for (; i + 64 <= a.latent; i += 64) decode64(_mm512_loadu_si512(codes + i), words + i);
  if (i < a.latent) decode64(_mm512_maskz_loadu_epi8(~0ull >> (64 - (a.latent - i)), codes + i), words + i);
  memcpy(words + cp, rope, a.rope * 2);
#else
  int64_t i = 0;
  for (; i + W <= a.latent; i += W) store(to + i, decode(codes + i));
  if (i < a.latent) {
    uint8_t some[W] = {}; memcpy(some, codes + i, a.latent - i);
    store(to + i, decode(some));
  }
  for (i = 0; i + W <= a.rope; i += W) store(to + cp + i, load((const bf16*)rope + i));
  if (i < a.rope) store_some(to + cp + i, load_some((const bf16*)rope + i, a.rope - i), a.rope - i);
#endif
}

struct Partials { float *lse, *o; };

static void run(const Snap& a, const Task& t, const Partials& partials) {
  const int64_t cp = round_up(a.latent, 64), rp = round_up(a.rope, 16 * PAIR), depth = (cp + rp) / PAIR, pitch = depth;
  const int64_t rows = round_up(t.rows, W), groups = rows / W, pairs = BLOCK / PAIR;
  const int64_t need = rows * depth + BLOCK * pitch + BLOCK * COLUMNS + BLOCK * 2 * W + pairs * rows + rows * cp +
                       6 * rows + cp + W * depth + BLOCK + 20 * 32;
  if ((int64_t)scratch.memory.size() < need + 16) scratch.memory.resize(need + 16);
  float* cursor = (float*)(((uintptr_t)scratch.memory.data() + 63) & ~(uintptr_t)63);
  unit *q = (unit*)scratch.take(cursor, rows * depth), *keys = (unit*)scratch.take(cursor, BLOCK * pitch);
  unit *buffer = (unit*)scratch.take(cursor, BLOCK * COLUMNS), *p = (unit*)scratch.take(cursor, pairs * rows);
  float *s = scratch.take(cursor, BLOCK * 2 * W), *o = scratch.take(cursor, rows * cp), *m = scratch.take(cursor, rows);
  float *scale = scratch.take(cursor, rows), *mass = scratch.take(cursor, rows), *beta = scratch.take(cursor, rows);
  float *factor = scratch.take(cursor, rows), *line = scratch.take(cursor, cp), *ks = scratch.take(cursor, BLOCK);
  unit* lines = (unit*)scratch.take(cursor, W * depth);
  int32_t* limits = (int32_t*)scratch.take(cursor, rows);
  Ahead ahead{scratch.pieces, 0, nullptr, nullptr, 0};

  const int64_t begin = a.starts[t.sequence], past = a.lens[t.sequence] - (a.starts[t.sequence + 1] - begin);
  const int32_t* table = a.tables + t.sequence * a.table_width;
  memset((void*)lines, 0, W * depth * sizeof(unit));
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t i = 0, r = g * W; i < W; i++, r++) {
      m[r] = LOWEST, scale[r] = 1, mass[r] = 0, factor[r] = 0, limits[r] = 0;
      if (r >= t.rows) { memset((void*)(lines + i * depth), 0, depth * sizeof(unit)); continue; }
      const int64_t query = (t.first + r) / a.heads, head = (t.first + r) % a.heads;
      const float* x = a.q + (begin + query) * a.q_row + head * a.q_head;
      const float* x2 = a.q2 + (begin + query) * a.q2_row + head * a.q2_head;
      factor[r] = code_query(a, x, x2, cp, lines + i * depth) * a.scale;
      limits[r] = (int32_t)(past + query + 1);
    }
    pack(lines, depth, g == groups - 1 && groups % 2, q + g * W * depth);
  }
  memset(o, 0, rows * cp * sizeof(float));
  if (cp != a.latent || rp != a.rope) memset((void*)keys, 0, BLOCK * pitch * sizeof(unit));

  // Calls body(first token's place, count) for pieces of tokens at.. that lie together.
  auto pieces = [&](int64_t at, int64_t n, auto body) {
    for (int64_t j = 0; j < n;) {
      const int64_t slot = (at + j) % a.page, count = std::min(n - j, a.page - slot);
      body(table[(at + j) / a.page] * a.page + slot, j, count);
      j += count;
    }
  };
  for (int64_t at = t.from; at < t.to; at += BLOCK) {
    const int64_t n = std::min(BLOCK, t.to - at), following = std::min(BLOCK, t.to - at - BLOCK);
    pieces(at, n, [&](int64_t from, int64_t j, int64_t count) {
      memcpy(ks + j, a.scales + from, count * sizeof(float));
      for (int64_t i = 0; i < count; i++)
        unpack_key(a, a.codes + (from + i) * a.latent, a.ropes + (from + i) * a.rope, cp, keys + (j + i) * pitch);
    });
    // What an earlier block left behind the last token would meet probabilities of zero, unless it is not finite.
    if (n < BLOCK) memset((void*)(keys + n * pitch), 0, (BLOCK - n) * pitch * sizeof(unit));
    ahead.count = 0;
    if (following > 0) pieces(at + BLOCK, following, [&](int64_t from, int64_t, int64_t count) {
      ahead.add(a.codes + from * a.latent, count * a.latent);
      ahead.add(a.ropes + from * a.rope, count * a.rope * 2);
      ahead.add(a.scales + from, count * 4);
    });
    ahead.start();
    for (int64_t g = 0; g < groups; g += 2) {
      const unit* x = q + g * depth * W;
      const int64_t vectors = std::min<int64_t>(2, groups - g);
      for (int64_t k = 0; k < n; k += KEYS)
        if (vectors == 2) scores<KEYS>(depth, x, depth * W, keys + k * pitch, pitch, s + k * 2 * W, ahead);
        else scores_one<KEYS>(depth, x, keys + k * pitch, pitch, s + k * 2 * W, ahead);
      for (int64_t v = 0; v < vectors; v++) {
        const int64_t r = (g + v) * W;
        vi limit; memcpy(&limit, limits + r, sizeof limit);
        store(beta + r, soften(s + v * W, n, load(factor + r), ks, limit - (int32_t)at, m + r, scale + r, mass + r, p + r, rows));
      }
    }
    for (int64_t c = 0; c < cp; c += COLUMNS) {
      const unit* values;
      const int64_t stride = arrange(keys, pitch, c, buffer, &values);
      auto some = [&](auto count, int64_t r) {
        sums<decltype(count)::value>(pairs, p + r, rows, values, stride, o + r * cp + c, cp, beta + r, ahead);
      };
      int64_t r = 0;
      for (; r + TILE_ROWS <= t.rows; r += TILE_ROWS) some(std::integral_constant<int, TILE_ROWS>(), r);
      switch (t.rows - r) {
        case 1: some(std::integral_constant<int, 1>(), r); break;
        case 2: some(std::integral_constant<int, 2>(), r); break;
        case 3: some(std::integral_constant<int, 3>(), r); break;
        case 4: some(std::integral_constant<int, 4>(), r); break;
        case 5: some(std::integral_constant<int, 5>(), r); break;
        default: break;
      }
    }
  }
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t row = begin * a.heads + t.first + r;
    float *to = t.partial < 0 ? a.out + row * a.latent : partials.o + (t.partial + r) * a.latent;
    const float lse = mass[r] == 0 ? LOWEST : m[r] + std::log(mass[r] * scale[r]), inverse = mass[r] == 0 ? 0 : 1 / mass[r];
    restore(o + r * cp, cp, inverse, line);
    memcpy(to, line, a.latent * sizeof(float));
    if (t.partial >= 0) partials.lse[t.partial + r] = lse;
    else if (a.lse) a.lse[row] = lse;
  }
}

// Parts of a context, `parts` tasks from `first`, weighted by exp(lse).
static void merge(const Snap& a, const Task* first, int64_t parts, const Partials& partials) {
  for (int64_t r = 0; r < first->rows; r++) {
    const int64_t row = a.starts[first->sequence] * a.heads + first->first + r;
    float high = LOWEST, total = 0;
    for (int64_t p = 0; p < parts; p++) high = std::max(high, partials.lse[first[p].partial + r]);
    float* to = a.out + row * a.latent;
    for (int64_t d = 0; d < a.latent; d++) to[d] = 0;
    for (int64_t p = 0; p < parts; p++) {
      const float lse = partials.lse[first[p].partial + r], weight = lse == LOWEST ? 0 : std::exp(lse - high);
      const float* from = partials.o + (first[p].partial + r) * a.latent;
      total += weight;
      for (int64_t d = 0; d < a.latent; d++) to[d] += weight * from[d];
    }
    for (int64_t d = 0; d < a.latent; d++) to[d] *= total == 0 ? 0 : 1 / total;
    if (a.lse) a.lse[row] = total == 0 ? LOWEST : high + std::log(total);
  }
}

// Returns 0, or 1: lengths or query starts are inconsistent, 2: a block table names a block that does not exist. Where a
// context is cut depends on lengths only, never on threads, hence neither does the result.
EXPORT int snapmla_attention(const float* q, int64_t q_row, int64_t q_head, int64_t heads, int64_t latent, const float* q2,
                             int64_t q2_row, int64_t q2_head, int64_t rope, const uint8_t* codes, const float* scales,
                             const uint16_t* ropes, int64_t page, int64_t blocks, const int32_t* tables, int64_t width,
                             const int32_t* lens, const int32_t* starts, int64_t sequences, int64_t total, float scale,
                             int rope8, float* out, float* lse, int threads) {
  const Snap a{q, q2, q_row, q_head, q2_row, q2_head, heads, latent, rope, codes, scales, ropes, page, blocks, tables,
               width, lens, starts, sequences, total, scale, rope8, out, lse};
  if (sequences && starts[0] != 0) return 1;
  std::vector<Task> tasks;
  std::vector<std::pair<int64_t, int64_t>> merges;  // first task, parts
  int64_t partial_rows = 0, work = 0;
  for (int64_t n = 0; n < sequences; n++) {
    const int64_t queries = starts[n + 1] - starts[n], length = lens[n];
    if (queries < 0 || starts[n + 1] > total) return 1;
    if (!queries) continue;
    if (length < queries || length > width * page) return 1;
    for (int64_t b = 0; b * page < length; b++) if (tables[n * width + b] < 0 || tables[n * width + b] >= blocks) return 2;
    const int64_t all = queries * heads;
    // Parts only where there are few rows: else there is work enough, and partial results would fill the memory.
    const int64_t part = all > 2 * ROWS ? length : std::min<int64_t>(4096, std::max<int64_t>(512, round_up(length / 32, BLOCK)));
    for (int64_t first = (all - 1) / ROWS * ROWS; first >= 0; first -= ROWS) {  // longest first
      const int64_t rows = std::min(ROWS, all - first), to = length - queries + (first + rows - 1) / heads + 1;
      const int64_t parts = (to + part - 1) / part;
      work += rows * to * (2 * latent + rope);
      if (parts == 1) { tasks.push_back({n, first, rows, 0, to, -1}); continue; }
      merges.push_back({(int64_t)tasks.size(), parts});
      for (int64_t p = 0; p < parts; p++, partial_rows += rows)
        tasks.push_back({n, first, rows, p * part, std::min(to, (p + 1) * part), partial_rows});
    }
  }
  std::vector<float> memory(partial_rows * (latent + 1));
  const Partials partials{memory.data(), memory.data() + partial_rows};
  parallel_tasks(tasks.size(), 1, work < 400000 ? 1 : threads, [&](int64_t i) { run(a, tasks[i], partials); });
  parallel_tasks(merges.size(), 1, partial_rows * latent < 1000000 ? 1 : threads, [&](int64_t i) {
    merge(a, &tasks[merges[i].first], merges[i].second, partials);
  });
  return 0;
}
