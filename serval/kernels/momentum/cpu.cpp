// One pass over memory for what Muon and MONA do element by element before orthogonalisation, and one for the update after.
// Floor, bytes per element: Muon reads 8, writes 8; MONA 12 and 12 (Lite: 10 and 10); the update reads 8, writes 4.
#include "simd.h"

// torch.lerp's own formula, so that results agree with it to the last bit.
struct Lerp {
  float coefficient;
  bool from_end;
  explicit Lerp(float weight) : coefficient(weight < 0.5f ? weight : weight - 1.0f), from_end(weight >= 0.5f) {}
  INLINE vf operator()(vf start, vf end) const { return (from_end ? end : start) + splat(coefficient) * (end - start); }
};

// Round to bfloat16 up or down at random, in proportion: 16 hashed bits are added below the kept ones.
static INLINE vf rounded(vf x, uint32_t first, uint32_t seed) {
  vu i;
  for (int l = 0; l < W; l++) i[l] = l;
  vu h = (i + first) * 0x9e3779b9u ^ seed;
  h ^= h >> 16, h *= 0x7feb352du, h ^= h >> 15, h *= 0x846ca68bu, h ^= h >> 16;
  vu bits = (vu)x;
  vu finite = (vu)((bits & 0x7f800000u) != 0x7f800000u);
  return (vf)((bits + (h & 0xffffu & finite)) & 0xffff0000u);
}
static INLINE void keep(float* p, vf v, int64_t n, uint32_t, uint32_t) { n == W ? store(p, v) : store_some(p, v, n); }
static INLINE void keep(bf16* p, vf v, int64_t n, uint32_t first, uint32_t seed) {
  v = rounded(v, first, seed);
  n == W ? store(p, v) : store_some(p, v, n);
}
template <class T> static INLINE vf get(const T* p, int64_t n) { return n == W ? load(p) : load_some(p, n); }

template <class T, bool average>
static int run(const float* grad, float* momentum, T* mean, float* out, int64_t n, float fresh, float mu, int nesterov,
               float weight, float correction, float newest, uint32_t seed, int threads) {
  const Lerp into(fresh), ahead(mu), slow(newest);
  auto body = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    vf g = get(grad + i, count);
    if (average) {
      vf m = get(mean + i, count);
      vf corrected = g + splat(weight) * (g - m * correction);
      keep(mean + i, slow(m, g), count, (uint32_t)i, seed);
      g = corrected;
    }
    vf buffer = into(get(momentum + i, count), g);
    keep(momentum + i, buffer, count, 0, 0);
    keep(out + i, nesterov ? ahead(g, buffer) : buffer, count, 0, 0);
  };
  parallel_for(n / W + 1, n < 50000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      if (v * W + W <= n) body(v * W, W);
      else if (v * W < n) body(v * W, n - v * W);
    }
  });
  return 0;
}

// fresh = 1 - mu and newest = 1 - beta come from the caller, who has them in double precision.
EXPORT int momentum_f32(const float* grad, float* momentum, void* mean, float* out, int64_t n, float fresh, float mu,
                        int nesterov, float weight, float correction, float newest, int64_t seed, int half, int threads) {
  const uint32_t s = (uint32_t)seed;
  if (!mean) return run<float, false>(grad, momentum, nullptr, out, n, fresh, mu, nesterov, 0, 1, 0, s, threads);
  if (half)
    return run<bf16, true>(grad, momentum, (bf16*)mean, out, n, fresh, mu, nesterov, weight, correction, newest, s, threads);
  return run<float, true>(grad, momentum, (float*)mean, out, n, fresh, mu, nesterov, weight, correction, newest, s, threads);
}

// parameter = parameter * decay - scale * update
EXPORT int descend_f32(float* parameter, const float* update, int64_t n, float decay, float scale, int threads) {
  parallel_for(n / W + 1, n < 50000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      const int64_t i = v * W, count = i + W <= n ? W : n - i;
      if (count > 0) keep(parameter + i, get(parameter + i, count) * decay - get(update + i, count) * scale, count, 0, 0);
    }
  });
  return 0;
}
