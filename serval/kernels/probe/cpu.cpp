// Loops that do nothing but what they measure: reading memory, float32 multiply-adds, int8 multiply-adds.
#include "simd.h"

// Sum n floats (a multiple of 64 * W per thread is read in full; the rest is ignored).
EXPORT int probe_read(const float* x, int64_t n, float* out, int threads) {
  const int64_t block = 16384, blocks = n / block;
  float* results = out;
  for (int i = 0; i < threads; i++) results[i] = 0;
  parallel_for(blocks, threads, [&](int64_t begin, int64_t end) {
    vf acc[8] = {};
    for (const float* p = x + begin * block; p < x + end * block; p += 8 * W) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) acc[i] += load(p + i * W);
      __builtin_prefetch((const char*)p + 4096, 0, 2);
    }
    vf total = {};
    for (int i = 0; i < 8; i++) total += acc[i];
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    results[thread] += sum(total);
  });
  return 0;
}

// rounds * 12 vector multiply-adds per thread; returns the operations in each.
EXPORT int probe_fma(int64_t rounds, float* out, int threads) {
  for (int i = 0; i < threads; i++) out[i] = 0;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    vf acc[12], a = splat(0.999f), b = splat(1e-6f);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = splat((float)i);
    for (int64_t r = 0; r < rounds * (end - begin); r++)
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) {
        acc[i] = acc[i] * a + b;
        asm volatile("" : "+x"(acc[i]));
      }
    vf total = {};
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) total += acc[i];
    out[begin] = sum(total);
  });
  return 2 * W;
}

#if SERVAL_AVX512 && defined(__AVX512VNNI__)
#define VNNI 1
typedef __m512i wide;
#elif SERVAL_AVX2 || SERVAL_AVX512
typedef __m256i wide;
#endif

#if SERVAL_AVX2 || SERVAL_AVX512
// rounds * 12 integer dot steps per thread.
template <class Step> static void dots(int64_t rounds, float* out, int threads, Step step) {
  for (int i = 0; i < threads; i++) out[i] = 0;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    wide acc[12], x, y;
    memset(&x, 1, sizeof x), memset(&y, 2, sizeof y);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = wide{};
    for (int64_t r = 0; r < rounds * (end - begin); r++)
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) {
        acc[i] = step(acc[i], x, y);
        asm volatile("" : "+x"(acc[i]), "+x"(x));  // nothing of the step may leave the loop
      }
    wide total = acc[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) total += acc[i];
    int32_t first;
    memcpy(&first, &total, 4);
    out[begin] = (float)first;
  });
}
#endif

// Dot steps of full 8-bit numbers; returns the operations in each step of one vector, 0 where there is no such step.
EXPORT int probe_int8(int64_t rounds, float* out, int threads) {
#if VNNI
  dots(rounds, out, threads, [](wide s, wide x, wide y) { return _mm512_dpbusd_epi32(s, x, y); });
  return 128;
#elif SERVAL_AVX2 || SERVAL_AVX512  // one vpmaddwd and one vpaddd
  dots(rounds, out, threads, [](wide s, wide x, wide y) { return _mm256_add_epi32(s, _mm256_madd_epi16(x, y)); });
  return 32;
#else
  return 0;
#endif
}

// Dot steps of 4-bit and 8-bit numbers: the same with VNNI; with AVX2 one vpmaddubsw and one vpaddw.
EXPORT int probe_int4(int64_t rounds, float* out, int threads) {
#if VNNI
  return probe_int8(rounds, out, threads);
#elif SERVAL_AVX2 || SERVAL_AVX512
  dots(rounds, out, threads, [](wide s, wide x, wide y) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(x, y)); });
  return 64;
#else
  return 0;
#endif
}
