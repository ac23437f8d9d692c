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

// rounds * 12 int8 dot steps per thread; returns the operations in each step of one vector.
EXPORT int probe_int8(int64_t rounds, float* out, int threads) {
  int operations = 0;
#if SERVAL_AVX512 && defined(__AVX512VNNI__)
  operations = 128;
#define STEP(s, x, y) _mm512_dpbusd_epi32(s, x, y)
  typedef __m512i wide;
#elif SERVAL_AVX2 || SERVAL_AVX512
  operations = 32;  // one vpmaddwd and one vpaddd
#define STEP(s, x, y) _mm256_add_epi32(s, _mm256_madd_epi16(x, y))
  typedef __m256i wide;
#endif
#ifdef STEP
  for (int i = 0; i < threads; i++) out[i] = 0;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    wide acc[12], x, y;
    memset(&x, 1, sizeof x), memset(&y, 2, sizeof y);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = wide{};
    for (int64_t r = 0; r < rounds * (end - begin); r++)
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) {
        acc[i] = STEP(acc[i], x, y);
        asm volatile("" : "+x"(acc[i]), "+x"(x));  // nothing of the step may leave the loop
      }
    wide total = acc[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) total += acc[i];
    int32_t first;
    memcpy(&first, &total, 4);
    out[begin] = (float)first;
  });
#endif
  return operations;
}
