// Grouped-query attention over a paged cache of float32, 16-bit or int8 numbers. Floors in __init__.py, algorithm
// in flash.h.
#include "plan.h"

template <class T>
static int call(const float* q, int64_t q_row, int64_t q_head, int64_t heads, int64_t q_dim, const void* keys,
                int64_t k_block, int64_t k_head, int64_t k_slot, const void* values, int64_t v_block, int64_t v_head,
                int64_t v_slot, int64_t v_dim, int64_t kv_heads, int64_t page, int64_t blocks, const float* key_scales,
                const float* value_scales, const int32_t* tables, int64_t width, const int32_t* lens,
                const int32_t* starts, int64_t sequences, int64_t rows, float scale, int64_t window, const float* sinks,
                float* out, int threads) {
  Attention a{q, nullptr, q_row, q_head, q_dim, 0, 0, 0, heads, keys, values, k_block, k_head, k_slot, v_block, v_head,
              v_slot, v_dim, kv_heads, page, blocks, key_scales, value_scales, tables, lens, starts, width, sequences,
              rows, scale, window, sinks, out};
  return attend<T>(a, threads);
}

#define INSTANCE(name, T)                                                                                             \
  EXPORT int paged_attention_##name(                                                                                  \
      const float* q, int64_t q_row, int64_t q_head, int64_t heads, int64_t q_dim, const void* keys, int64_t k_block, \
      int64_t k_head, int64_t k_slot, const void* values, int64_t v_block, int64_t v_head, int64_t v_slot,            \
      int64_t v_dim, int64_t kv_heads, int64_t page, int64_t blocks, const float* key_scales,                         \
      const float* value_scales, const int32_t* tables, int64_t width, const int32_t* lens, const int32_t* starts,    \
      int64_t sequences, int64_t rows, float scale, int64_t window, const float* sinks, float* out, int threads) {    \
    return call<T>(q, q_row, q_head, heads, q_dim, keys, k_block, k_head, k_slot, values, v_block, v_head, v_slot,    \
                   v_dim, kv_heads, page, blocks, key_scales, value_scales, tables, width, lens, starts, sequences,   \
                   rows, scale, window, sinks, out, threads);                                                         \
  }                                                                                                                   \
  PACKED(paged_attention_##name)
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
INSTANCE(fp16, fp16)
INSTANCE(int8, int8_t)
