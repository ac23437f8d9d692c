// Loops that do nothing but what they measure: reading memory, float32 multiply-adds, int8 multiply-adds.
#include <time.h>

#include "simd.h"

// Every thread does its work `repeats` times against its own clock and keeps the best in out[its index], in seconds:
// threads that a busy machine does not run at the same time still show what each can do. Infinite: that thread did not
// run.
template <class Work> static void best_seconds(int repeats, float* out, int threads, Work work) {
  for (int i = 0; i < threads; i++) out[i] = __builtin_inff();
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int r = 0; r < repeats; r++) {
      timespec from, to;
      clock_gettime(CLOCK_MONOTONIC, &from);
      work();
      clock_gettime(CLOCK_MONOTONIC, &to);
      float seconds = (float)(to.tv_sec - from.tv_sec) + 1e-9f * (float)(to.tv_nsec - from.tv_nsec);
      if (seconds < out[begin]) out[begin] = seconds;
    }
  });
}

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

// rounds * 12 vector multiply-adds per thread and repeat; returns the operations in each.
EXPORT int probe_fma(int64_t rounds, int repeats, float* out, int threads) {
  best_seconds(repeats, out, threads, [&] {
    vf acc[12], a = splat(0.999f), b = splat(1e-6f);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = splat((float)i);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) {
        acc[i] = acc[i] * a + b;
        asm volatile("" : "+x"(acc[i]));
      }
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
// rounds * 12 integer dot steps per thread and repeat.
template <class Step> static void dots(int64_t rounds, int repeats, float* out, int threads, Step step) {
  best_seconds(repeats, out, threads, [&] {
    wide acc[12], x, y;
    memset(&x, 1, sizeof x), memset(&y, 2, sizeof y);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = wide{};
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) {
        acc[i] = step(acc[i], x, y);
        asm volatile("" : "+x"(acc[i]), "+x"(x));  // nothing of the step may leave the loop
      }
  });
}
#endif

// Dot steps of full 8-bit numbers; returns the operations in each step of one vector, 0 where there is no such step.
EXPORT int probe_int8(int64_t rounds, int repeats, float* out, int threads) {
#if VNNI
  dots(rounds, repeats, out, threads, [](wide s, wide x, wide y) { return _mm512_dpbusd_epi32(s, x, y); });
  return 128;
#elif SERVAL_AVX2 || SERVAL_AVX512  // one vpmaddwd and one vpaddd
  dots(rounds, repeats, out, threads, [](wide s, wide x, wide y) { return _mm256_add_epi32(s, _mm256_madd_epi16(x, y)); });
  return 32;
#else
  return 0;
#endif
}

// Dot steps of 4-bit and 8-bit numbers: the same with VNNI; with AVX2 one vpmaddubsw and one vpaddw.
EXPORT int probe_int4(int64_t rounds, int repeats, float* out, int threads) {
#if VNNI
  return probe_int8(rounds, repeats, out, threads);
#elif SERVAL_AVX2 || SERVAL_AVX512
  dots(rounds, repeats, out, threads, [](wide s, wide x, wide y) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(x, y)); });
  return 64;
#else
  return 0;
#endif
}
