// What a token becomes when it is stored, and back.
#pragma once
#include <algorithm>
#include "fp8.h"

static INLINE float scale_of(float largest) { return largest == 0 ? 1.0f : std::max(largest, SMALLEST) / LARGEST; }

static float largest_of(const float* x, int64_t n) {  // NaN when there is one
  vf top = {}, bad = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) { vf v = load(x + i); top = vmax(top, vabs(v)), bad += v * 0.0f; }
  if (i < n) { vf v = load_some(x + i, n - i); top = vmax(top, vabs(v)), bad += v * 0.0f; }
  return max_lane(top) + sum(bad);
}

// Quantise latent rows and align rotary keys, into the slots of the cache; negative slots are skipped. Returns 1, having
// written nothing, when a slot lies outside the cache. Floor: each number is read once and written once.
EXPORT int snapmla_write(const float* x, int64_t x_row, int64_t latent, const float* x2, int64_t x2_row, int64_t rope,
                         const int64_t* slots, int64_t tokens, uint8_t* codes, float* scales, uint16_t* ropes,
                         int64_t capacity, int rope8, int threads) {
  for (int64_t t = 0; t < tokens; t++) if (slots[t] >= capacity) return 1;
  parallel_for(tokens, tokens * (latent + rope) < 131072 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (slots[t] < 0) continue;
      const float *c = x + t * x_row, *r = x2 + t * x2_row;
      float largest = largest_of(c, latent);
      if (rope8) largest = std::max(largest, largest_of(r, rope));
      const float s = scale_of(largest);
      scales[slots[t]] = s;
      uint8_t* to = codes + slots[t] * latent;
      for (int64_t i = 0; i < latent; i += W) {
        const vb code = codes_of(round_e4m3(load_upto(c + i, latent - i) / s));
        memcpy(to + i, &code, std::min<int64_t>(W, latent - i));
      }
      for (int64_t i = 0; i < rope; i += W) {
        const vf v = load_upto(r + i, rope - i) / s;
        store_upto((bf16*)ropes + slots[t] * rope + i, rope8 ? round_e4m3(v) : v, rope - i);
      }
    }
  });
  return 0;
}

// out [length, latent + rope]: what the stored tokens of one sequence stand for.
EXPORT int snapmla_fetch(const uint8_t* codes, const float* scales, const uint16_t* ropes, int64_t latent, int64_t rope,
                         int64_t page, int64_t blocks, const int32_t* table, int64_t width, int64_t length, float* out,
                         int threads) {
  if (length > width * page) return 1;
  for (int64_t b = 0; b * page < length; b++) if (table[b] < 0 || table[b] >= blocks) return 2;
  parallel_for(length, length * (latent + rope) < 131072 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t from = table[t / page] * page + t % page;
      const float s = scales[from];
      float* to = out + t * (latent + rope);
      for (int64_t i = 0; i < latent; i += W) {
        const int64_t n = std::min<int64_t>(W, latent - i);
        uint8_t some[W] = {}; memcpy(some, codes + from * latent + i, n);
        store_upto(to + i, decode(some) * s, n);
      }
      for (int64_t i = 0; i < rope; i += W) {
        store_upto(to + latent + i, load_upto((const bf16*)ropes + from * rope + i, rope - i) * s, rope - i);
      }
    }
  });
  return 0;
}
