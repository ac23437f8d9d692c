// Vectors of float for every kernel: 16 lanes with AVX-512, 8 with AVX2, 4 elsewhere (any CPU; the compiler lowers the
// vector extensions to what it has). Plain C++, GCC or Clang, no PyTorch.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SERVAL_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define SERVAL_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };  // IEEE binary16

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf load(const bf16* p) {
  vh h; memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE void store(bf16* p, vf v) {  // round to nearest even; NaN stays NaN
  vu u = (vu)v;
  vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (vu)(v != v);
  vh h = __builtin_convertvector((r & ~nan) | (nan & 0x7fc0u), vh);
  memcpy(p, &h, sizeof h);
}
INLINE vf load(const fp16* p) {
#if SERVAL_AVX512
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif SERVAL_AVX2 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vh h; memcpy(&h, p, sizeof h);
  vu u = __builtin_convertvector(h, vu), magnitude = (u & 0x7fffu) << 13;
  vu special = magnitude >= (0x7c00u << 13) ? vu{} + (255u << 23) : vu{};  // infinity and NaN keep their exponent
  vu sign = (u & 0x8000u) << 16;
  return (vf)((vu)((vf)magnitude * 0x1p112f) | special | sign);  // the product also makes subnormals normal
#endif
}
INLINE void store(fp16* p, vf v) {  // round to nearest even; beyond the largest number it is stored; NaN stays NaN
  const float top = 65504.0f;
  v = ((vf)((vu)v & 0x7fffffffu) <= splat(top)) | (v != v) ? v : v > 0.0f ? splat(top) : splat(-top);
#if SERVAL_AVX512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif SERVAL_AVX2 && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  vu u = (vu)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Adding the power of two whose last place is the result's rounds to it.
  vu base = magnitude < (113u << 23) ? vu{} + (113u << 23) : magnitude & 0x7f800000u;
  vf power = (vf)(base + (13u << 23));
  vu whole = (vu)((vf)magnitude + power) - (vu)power;  // units of the last place
  vu r = (((base >> 23) - 113u) << 10) + whole;
  vu nan = (vu)(v != v);
  vh h = __builtin_convertvector(sign | (r & ~nan) | (nan & 0x7e00u), vh);
  memcpy(p, &h, sizeof h);
#endif
}
INLINE vf load(const int8_t* p) {  // integer values as floats
#if SERVAL_AVX512
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif SERVAL_AVX2
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf v; for (int i = 0; i < W; i++) v[i] = p[i]; return v;
#endif
}

// The first n < W elements; missing lanes read as zero and are not written.
template <class T> INLINE vf load_some(const T* p, int64_t n) {
  T buf[W]; memset(buf, 0, sizeof buf); memcpy(buf, p, n * sizeof(T)); return load(buf);
}
template <class T> INLINE void store_some(T* p, vf v, int64_t n) {
  T buf[W]; store(buf, v); memcpy(p, buf, n * sizeof(T));
}

INLINE float sum(vf v) {
#if SERVAL_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  typedef float v4 __attribute__((vector_size(16)));
#if SERVAL_AVX2
  v4 a = (v4)_mm256_castps256_ps128((__m256)v) + (v4)_mm256_extractf128_ps((__m256)v, 1);
#else
  v4 a = v;
#endif
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}
INLINE vf vmax(vf a, vf b) {
#if SERVAL_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif SERVAL_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vf vmin(vf a, vf b) { return -vmax(-a, -b); }
INLINE vf vabs(vf a) { return (vf)((vu)a & 0x7fffffffu); }
INLINE float max_lane(vf v) {
#if SERVAL_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0]; for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m; return m;
#endif
}

// e^x to about 1 ulp (Cephes polynomial); below -87 exactly 0, above 88 clamped.
INLINE vf vexp(vf x) {
  vi tiny = x < -87.0f;
  x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
          1.6666665459e-1f) * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi power = ((vi)shifted - (vi)splat(magic) + 127) << 23;
  return (vf)((vi)(p * (vf)power) & ~tiny);
}

// Run body(begin, end) over [0, n) in at most `threads` contiguous parts; one parallel region, none when threads is 1.
template <class F> void parallel_for(int64_t n, int threads, F body) {
  if (threads > n) threads = (int)n;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
      int64_t begin = n * part / parts, end = n * (part + 1) / parts;
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  if (n > 0) body((int64_t)0, n);
}

// Run body(i) for every i in [0, n), handed out `chunk` at a time: for work of uneven size.
template <class F> void parallel_tasks(int64_t n, int64_t chunk, int threads, F body) {
  if (threads > n) threads = (int)n;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; i++) body(i);
}

// NAME_packed: NAME with its arguments read from 64-bit fields, so that a list of calls can be made again without Python
// (see replay/). A float is in the low half of its field.
template <class T> INLINE T field(int64_t value) {
  if constexpr (std::is_same<T, float>::value) {
    const int32_t low = (int32_t)value;
    float v; memcpy(&v, &low, sizeof v); return v;
  } else if constexpr (std::is_pointer<T>::value) {
    return (T)(intptr_t)value;
  } else {
    return (T)value;
  }
}
template <class... A, size_t... I>
INLINE int unpack(int (*function)(A...), const int64_t* fields, std::index_sequence<I...>) {
  return function(field<A>(fields[I])...);
}
template <class... A> INLINE int unpack(int (*function)(A...), const int64_t* fields) {
  return unpack(function, fields, std::index_sequence_for<A...>{});
}
#define PACKED(name) EXPORT int name##_packed(const int64_t* fields) { return unpack(name, fields); }
