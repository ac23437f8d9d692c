// Scatter the keys and values of new tokens into a paged cache, as they are, rounded to 16 bits, or quantised to int8 per
// token and head.
// Floor: each new element is read once and written once.
#include "simd.h"

struct Side {  // keys or values; strides in elements, the last dim contiguous
  const float* rows; int64_t row, head, dim; void* cache; int64_t block, cache_head, slot; float* scales;
};

static void store_row(const float* x, int64_t n, int8_t* codes, float* scale) {
  vf top = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) top = vmax(top, vabs(load(x + i)));
  if (i < n) top = vmax(top, vabs(load_some(x + i, n - i)));
  const float s = max_lane(top) * (1.0f / 127.0f), inverse = s > 0 ? 1.0f / s : 0.0f;
  const float magic = 12582912.0f;  // rounds to nearest even
  for (i = 0; i < n; i += W) {
    vf v = i + W <= n ? load(x + i) : load_some(x + i, n - i);
    vi q = (vi)(vmin(vmax(v * inverse, splat(-127.0f)), splat(127.0f)) + magic) - (vi)splat(magic);
    vb narrow = __builtin_convertvector(q, vb);
    memcpy(codes + i, &narrow, i + W <= n ? W : n - i);
  }
  *scale = s;
}

template <class T> static void store_row(const float* x, int64_t n, T* to, float*) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(x + i));
  if (i < n) store_some(to + i, load_some(x + i, n - i), n - i);
}

// Returns 1 when a slot lies outside the cache; negative slots are skipped. Nothing is written in case of error.
template <class T>
static int write(const Side* sides, const int64_t* slots, int64_t tokens, int64_t heads, int64_t page, int64_t blocks,
                 int threads) {
  for (int64_t t = 0; t < tokens; t++) if (slots[t] >= page * blocks) return 1;
  const int64_t work = tokens * heads * (sides[0].dim + sides[1].dim);
  parallel_for(tokens, work < 131072 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (slots[t] < 0) continue;
      const int64_t block = slots[t] / page, slot = slots[t] % page;
      for (int i = 0; i < 2; i++) {
        const Side& s = sides[i];
        for (int64_t h = 0; h < heads; h++) {
          const float* from = s.rows + t * s.row + h * s.head;
          const int64_t at = block * s.block + h * s.cache_head + slot * s.slot;
          store_row(from, s.dim, (T*)s.cache + at, s.scales ? s.scales + (block * heads + h) * page + slot : nullptr);
        }
      }
    }
  });
  return 0;
}

#define SIGNATURE                                                                                                     \
  const float *k, int64_t k_row, int64_t k_head, int64_t k_dim, void *kc, int64_t k_block, int64_t kc_head,           \
      int64_t k_slot, float *ks, const float *v, int64_t v_row, int64_t v_head, int64_t v_dim, void *vc,              \
      int64_t v_block, int64_t vc_head, int64_t v_slot, float *vs, const int64_t *slots, int64_t tokens,              \
      int64_t heads, int64_t page, int64_t blocks, int threads
#define BODY                                                                                                          \
  const Side sides[2] = {{k, k_row, k_head, k_dim, kc, k_block, kc_head, k_slot, ks},                                 \
                         {v, v_row, v_head, v_dim, vc, v_block, vc_head, v_slot, vs}};

#define INSTANCE(name, T) \
  EXPORT int write_cache_##name(SIGNATURE) { BODY return write<T>(sides, slots, tokens, heads, page, blocks, threads); } \
  PACKED(write_cache_##name)
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
INSTANCE(fp16, fp16)
INSTANCE(int8, int8_t)
