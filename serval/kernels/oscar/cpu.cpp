// Low-bit key-value caches: quantise and pack, unpack, and attention over packed codes. Floors in __init__.py.
#include "attend.h"
#include "store.h"

static bool usable(const Format& f) {
  return f.k_dim % 16 == 0 && f.v_dim % 16 == 0 && f.k_dim <= MAX_DIM && f.v_dim <= MAX_DIM;
}

// k, v [n, heads, dim] dense, n = blocks * block size. Block ids are checked by the caller. Returns 0, or 9: head dims that
// this code does not cover.
EXPORT int oscar_store(const Format* format, uint8_t* records, uint8_t* exponents, float* norms, const float* k, const float* v,
                       const int32_t* block_ids, int64_t count, int threads) {
  const Format& f = *format;
  if (!usable(f)) return 9;
  const Storage s{records, exponents, norms};
  parallel_for(count * f.per_block, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = block_ids[i / f.per_block], index = i % f.per_block;
      store_record(f, k, v, i * GROUP, f.record(block_ids, i), s, block, index);
    }
  });
  return 0;
}

// The first `count` tokens of the blocks to k, v [count, heads, dim] dense.
EXPORT int oscar_fetch(const Format* format, uint8_t* records, uint8_t* exponents, float* norms, const int32_t* block_ids,
                       int64_t count, float* k, float* v, int threads) {
  const Format& f = *format;
  if (!usable(f)) return 9;
  const Storage s{records, exponents, norms};
  const int64_t k_row = f.heads * f.k_dim, v_row = f.heads * f.v_dim;
  parallel_for((count + GROUP - 1) / GROUP, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = block_ids[i / f.per_block], index = i % f.per_block, first = i * GROUP;
      const float* scales = f.norms ? norms + (block * f.per_block + index) * GROUP : nullptr;
      for (int64_t h = 0; h < f.heads; h++)
        fetch_record(f, s, f.record(block_ids, i) + h * f.per_block, scales, std::min(GROUP, count - first),
                     k + first * k_row + h * f.k_dim, k_row, v + first * v_row + h * f.v_dim, v_row);
    }
  });
  return 0;
}

// Rows k [n, k_row numbers], v alike, k_stride and v_stride apart, to row (length - 1) % capacity of their states. Returns 0, or
// 1: a length is 0, 3: a state does not exist; then nothing is written.
EXPORT int oscar_hold(const float* k, int64_t k_stride, int64_t k_row, const float* v, int64_t v_stride, int64_t v_row,
                      const int32_t* states, const int32_t* lens, int64_t n, float* residual_k, float* residual_v, int64_t slots,
                      int64_t capacity) {
  for (int64_t i = 0; i < n; i++) {
    if (lens[i] < 1) return 1;
    if (states[i] < 0 || states[i] >= slots) return 3;
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t to = states[i] * capacity + (lens[i] - 1) % capacity;
    memcpy(residual_k + to * k_row, k + i * k_stride, k_row * sizeof(float));
    memcpy(residual_v + to * v_row, v + i * v_stride, v_row * sizeof(float));
  }
  return 0;
}
PACKED(oscar_hold)

EXPORT int oscar_attend(const Format* format, uint8_t* records, uint8_t* exponents, float* norms, const float* q, int64_t heads,
                        const int32_t* tables, int64_t width, const int32_t* stored, const int32_t* lens, const int32_t* starts,
                        int64_t sequences, const float* residual_k, const float* residual_v, const int32_t* states,
                        int64_t slots, int64_t capacity, float scale, const float* sinks, float* out, float* lse, int threads) {
  if (!usable(*format)) return 9;
  const Call c{*format, {records, exponents, norms}, heads, tables, stored, lens, starts, states, width, sequences,
               residual_k, residual_v, slots, capacity, sinks, out, lse};
  return attend_packed(c, q, scale, threads);
}
PACKED(oscar_attend)
