// Multi-head latent attention (absorbed) over a paged latent cache: one shared key row, whose first part is the value.
#include "plan.h"

template <class T>
static int call(const float* q, int64_t q_row, int64_t q_head, int64_t heads, int64_t latent, const float* q2,
                int64_t q2_row, int64_t q2_head, int64_t rope, const void* cache, int64_t block_stride,
                int64_t slot_stride, int64_t page, int64_t blocks, const int32_t* tables, int64_t width,
                const int32_t* lens, const int32_t* starts, int64_t sequences, int64_t rows, float scale, float* out,
                int threads) {
  Attention a{q, q2, q_row, q_head, latent, q2_row, q2_head, rope, heads, cache, cache, block_stride, 0, slot_stride,
              block_stride, 0, slot_stride, latent, 1, page, blocks, nullptr, nullptr, tables, lens, starts, width,
              sequences, rows, scale, 0, nullptr, out};
  return attend<T>(a, threads);
}

#define INSTANCE(name, T)                                                                                             \
  EXPORT int paged_latent_attention_##name(                                                                           \
      const float* q, int64_t q_row, int64_t q_head, int64_t heads, int64_t latent, const float* q2, int64_t q2_row,  \
      int64_t q2_head, int64_t rope, const void* cache, int64_t block_stride, int64_t slot_stride, int64_t page,      \
      int64_t blocks, const int32_t* tables, int64_t width, const int32_t* lens, const int32_t* starts,               \
      int64_t sequences, int64_t rows, float scale, float* out, int threads) {                                        \
    return call<T>(q, q_row, q_head, heads, latent, q2, q2_row, q2_head, rope, cache, block_stride, slot_stride, page, \
                   blocks, tables, width, lens, starts, sequences, rows, scale, out, threads);                        \
  }
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
INSTANCE(fp16, fp16)
