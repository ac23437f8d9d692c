// SwiGLU forward and backward. Floor: forward 12 bytes per float32 element, backward 20. Rows may be strided, so the two
// halves of one fused gate-up product need no copy.
#include "simd.h"

template <class T, class F> static INLINE void each(int64_t n, F body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, (int64_t)W);
  if (i < n) body(i, n - i);
}
template <class T> static INLINE vf get(const T* p, int64_t n) { return n == W ? load(p) : load_some(p, n); }
template <class T> static INLINE void put(T* p, vf v, int64_t n) {
  if (n == W) store(p, v); else store_some(p, v, n);
}

template <class T>
static void forward(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* out, int64_t rows, int64_t d,
                    int threads) {
  // Parts are counted in vectors, not rows: one long row is still shared by all threads.
  int64_t pieces = (d + 1023) / 1024;
  parallel_for(rows * pieces, rows * d < 65536 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      int64_t r = task / pieces, from = task % pieces * 1024, n = d - from < 1024 ? d - from : 1024;
      const T *g = gate + r * gate_row + from, *u = up + r * up_row + from;
      T* o = out + r * d + from;
      each<T>(n, [&](int64_t i, int64_t m) {
        vf x = get(g + i, m);
        put(o + i, x / (1.0f + vexp(-x)) * get(u + i, m), m);
      });
    }
  });
}

// d silu(g)/dg = s (1 + g (1 - s)), s = sigmoid(g).
template <class T>
static void backward(const T* dy, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* d_gate, T* d_up,
                     int64_t rows, int64_t d, int threads) {
  int64_t pieces = (d + 1023) / 1024;
  parallel_for(rows * pieces, rows * d < 65536 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      int64_t r = task / pieces, from = task % pieces * 1024, n = d - from < 1024 ? d - from : 1024;
      const T *g = gate + r * gate_row + from, *u = up + r * up_row + from, *y = dy + r * d + from;
      T *dg = d_gate + r * d + from, *du = d_up + r * d + from;
      each<T>(n, [&](int64_t i, int64_t m) {
        vf x = get(g + i, m), v = get(u + i, m), grad = get(y + i, m);
        vf s = 1.0f / (1.0f + vexp(-x));
        put(dg + i, grad * v * s * (1.0f + x * (1.0f - s)), m);
        put(du + i, grad * x * s, m);
      });
    }
  });
}

#define INSTANCE(name, T)                                                                                            \
  EXPORT int swiglu_##name(const void* gate, int64_t gate_row, const void* up, int64_t up_row, void* out,            \
                           int64_t rows, int64_t d, int threads) {                                                   \
    forward((const T*)gate, gate_row, (const T*)up, up_row, (T*)out, rows, d, threads);                              \
    return 0;                                                                                                        \
  }                                                                                                                  \
  PACKED(swiglu_##name)                                                                                              \
  EXPORT int swiglu_backward_##name(const void* dy, const void* gate, int64_t gate_row, const void* up,              \
                                    int64_t up_row, void* d_gate, void* d_up, int64_t rows, int64_t d, int threads) { \
    backward((const T*)dy, (const T*)gate, gate_row, (const T*)up, up_row, (T*)d_gate, (T*)d_up, rows, d, threads);  \
    return 0;                                                                                                        \
  }
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
