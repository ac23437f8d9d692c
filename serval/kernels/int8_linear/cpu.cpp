// int8 x int8 linear layers, one or several that share their input. Weight layout: packing.py.
// Floors: N K bytes of weights for few rows, 2 M N K integer operations for many.
//
// A unit of work is a few panels of 16 channels; its micro-kernels keep all sums in registers along the whole of K:
//   VNNI (AVX-512 or AVX-VNNI): vpdpbusd, weights unsigned from memory, four activations broadcast to every lane;
//   AVX2: weights widened to int16 as they are read, vpmaddwd with four broadcast int16 activations. Exact, where
//         vpmaddubsw would saturate on two products of full 8-bit numbers.
#include <cmath>
#include <vector>
#include "simd.h"

#if SERVAL_AVX512 && defined(__AVX512VNNI__)
#define VNNI 1
typedef __m512i wide;
static INLINE wide dot(wide sum, wide w, wide x) { return _mm512_dpbusd_epi32(sum, w, x); }
static INLINE wide cell(const uint8_t* p) { return _mm512_loadu_si512(p); }
static INLINE wide four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
constexpr int PARTS = 1, MAX_ROWS = 12, MAX_PANELS = 2, FEW = 4, FEW_PANELS = 4;
#elif defined(__AVXVNNI__)
#define VNNI 1
typedef __m256i wide;
static INLINE wide dot(wide sum, wide w, wide x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
static INLINE wide cell(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static INLINE wide four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
constexpr int PARTS = 2, MAX_ROWS = 6, MAX_PANELS = 1, FEW = 2, FEW_PANELS = 2;
#elif SERVAL_AVX2 || SERVAL_AVX512
constexpr int MAX_ROWS = 6, MAX_PANELS = 1, FEW = 2, FEW_PANELS = 1;
#else
constexpr int MAX_ROWS = 4, MAX_PANELS = 1, FEW = 1, FEW_PANELS = 1;
#endif
#if VNNI || !(SERVAL_AVX2 || SERVAL_AVX512)
typedef int8_t code;
#else
typedef int16_t code;  // already as wide as vpmaddwd wants them
#endif

struct Linear { const uint8_t* data; const float *scale, *bias; float* out; int64_t n; };
struct Input { const code* codes; const float* scale; const int32_t* offset; int64_t rows, cells; };

// sums[r][16 P] = sum_k (w + 128) x for R rows and P panels.
#if VNNI
template <int R, int P>
static INLINE void micro(const uint8_t* w, const code* x, int64_t ldx, int64_t cells, int32_t* sums) {
  constexpr int V = P * PARTS;
  wide acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = wide{};
  const int64_t panel = cells * 64;
  for (int64_t k = 0; k < cells; k++) {
    wide b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const uint8_t* at = w + (v / PARTS) * panel + k * 64 + (v % PARTS) * 32;
      b[v] = cell(at);
      if (v % PARTS == 0) __builtin_prefetch(at + 2048, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      wide a = four(x + r * ldx + k * 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = dot(acc[r][v], b[v], a);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) memcpy(sums + r * 16 * P + v * (16 / PARTS), &acc[r][v], sizeof(wide));
}
#elif SERVAL_AVX2 || SERVAL_AVX512
template <int R, int J>  // J * 4 channels at a time
static INLINE void slice(const uint8_t* w, const code* x, int64_t ldx, int64_t cells, int32_t* sums, bool fetch) {
  __m256i acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) acc[r][j] = _mm256_setzero_si256();
  for (int64_t k = 0; k < cells; k++) {
    if (fetch) __builtin_prefetch(w + k * 64 + 2048, 0, 2);
    __m256i b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) b[j] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + k * 64 + j * 16)));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int64_t four;
      memcpy(&four, x + r * ldx + k * 4, 8);
      __m256i a = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(b[j], a));
        // Keep rows in order: GCC would hoist the broadcasts of all rows and spill the sums.
        asm volatile("" : "+x"(acc[r][j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int j = 0; j < J; j += 2) {
      __m256i pairs = _mm256_hadd_epi32(acc[r][j], acc[r][j + 1]);
      _mm256_storeu_si256((__m256i*)(sums + r * 16 + j * 4), _mm256_permute4x64_epi64(pairs, 0xd8));
    }
}
template <int R, int P>
static INLINE void micro(const uint8_t* w, const code* x, int64_t ldx, int64_t cells, int32_t* sums) {
  if (R <= 2) return slice<R, 4>(w, x, ldx, cells, sums, true);
  slice<R, 2>(w, x, ldx, cells, sums, true);  // the cell's second half is in L1 when it is read again
  slice<R, 2>(w + 32, x, ldx, cells, sums + 8, false);
}
#else
template <int R, int P>
static void micro(const uint8_t* w, const code* x, int64_t ldx, int64_t cells, int32_t* sums) {
  for (int i = 0; i < R * 16; i++) sums[i] = 0;
  for (int64_t k = 0; k < cells; k++)
    for (int r = 0; r < R; r++) {
      const code* a = x + r * ldx + k * 4;
      for (int n = 0; n < 16; n++) {
        const uint8_t* b = w + k * 64 + n * 4;
        sums[r * 16 + n] += b[0] * a[0] + b[1] * a[1] + b[2] * a[2] + b[3] * a[3];
      }
    }
}
#endif

template <int R, int P>
static void block(const Linear& y, const Input& x, int64_t row, int64_t panel) {
  alignas(64) int32_t sums[R * P * 16];
  micro<R, P>(y.data + panel * x.cells * 64, x.codes + row * x.cells * 4, x.cells * 4, x.cells, sums);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      const int64_t first = (panel + p) * 16, n = y.n - first < 16 ? y.n - first : 16, at = row + r;
      float* out = y.out + at * y.n + first;
      for (int64_t i = 0; i < n; i++) {
        float v = (float)(sums[(r * P + p) * 16 + i] - x.offset[at]) * (x.scale[at] * y.scale[first + i]);
        out[i] = y.bias ? v + y.bias[first + i] : v;
      }
    }
}

template <int R, int P> struct Rows {  // dispatch on the number of rows, 1..R
  static INLINE void run(int64_t rows, const Linear& y, const Input& x, int64_t row, int64_t panel) {
    if (rows == R) block<R, P>(y, x, row, panel); else Rows<R - 1, P>::run(rows, y, x, row, panel);
  }
};
template <int P> struct Rows<0, P> {
  static INLINE void run(int64_t, const Linear&, const Input&, int64_t, int64_t) {}
};

// All rows of a few neighbouring panels; rows are split evenly, 8 rows as 4 + 4 rather than 6 + 2.
static void unit(const Linear& y, const Input& x, int64_t panel, int64_t panels) {
  while (panels > 0) {
    if (x.rows <= FEW && panels >= FEW_PANELS) {
      Rows<FEW, FEW_PANELS>::run(x.rows, y, x, 0, panel);
      panel += FEW_PANELS, panels -= FEW_PANELS;
      continue;
    }
    const int64_t passes = (x.rows + MAX_ROWS - 1) / MAX_ROWS;
    const bool full = panels >= MAX_PANELS;
    for (int64_t i = 0; i < passes; i++) {
      const int64_t row = x.rows * i / passes, rows = x.rows * (i + 1) / passes - row;
      if (full) Rows<MAX_ROWS, MAX_PANELS>::run(rows, y, x, row, panel);
      else Rows<MAX_ROWS, 1>::run(rows, y, x, row, panel);
    }
    const int64_t done = full ? MAX_PANELS : 1;
    panel += done, panels -= done;
  }
}

// Symmetric int8 per row: scale = max|x| / 127; offset = 128 sum(codes), what the weight's offset adds to each sum.
static void quantize(const float* x, int64_t k, int64_t padded, code* codes, float* scale, int32_t* offset) {
  vf top = {};
  int64_t i = 0;
  for (; i + W <= k; i += W) top = vmax(top, vabs(load(x + i)));
  if (i < k) top = vmax(top, vabs(load_some(x + i, k - i)));
  const float s = max_lane(top) * (1.0f / 127.0f), inverse = s > 0 ? 1.0f / s : 0.0f;
  const float magic = 12582912.0f;  // rounds to nearest even
  vi total = {};
  for (i = 0; i < padded; i += W) {
    vf v = i + W <= k ? load(x + i) : i < k ? load_some(x + i, k - i) : vf{};
    vi q = (vi)(vmin(vmax(v * inverse, splat(-127.0f)), splat(127.0f)) + magic) - (vi)splat(magic);
    total += q;
    typedef code out __attribute__((vector_size(W * sizeof(code))));
    out narrow = __builtin_convertvector(q, out);
    if (i + W <= padded) memcpy(codes + i, &narrow, sizeof narrow);
    else memcpy(codes + i, &narrow, (padded - i) * sizeof(code));
  }
  int32_t all = 0;
  for (int j = 0; j < W; j++) all += total[j];
  *scale = s, *offset = 128 * all;
}

static void run(const float* x, int64_t x_row, int64_t rows, int64_t k, const Linear* layers, int64_t count, int threads) {
  static thread_local std::vector<char> memory;
  const int64_t cells = (k + 3) / 4, padded = cells * 4;
  memory.resize(rows * (padded * sizeof(code) + 8) + 256);
  float* scale = (float*)memory.data();
  int32_t* offset = (int32_t*)(scale + rows);
  code* codes = (code*)(((uintptr_t)(offset + rows) + 63) & ~(uintptr_t)63);
  parallel_for(rows, rows * k < 200000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) quantize(x + r * x_row, k, padded, codes + r * padded, scale + r, offset + r);
  });
  const Input input{codes, scale, offset, rows, cells};
  // Units of about 128 KB of weights when rows are few (long streams), smaller when there is more work in each.
  const int64_t step = MAX_PANELS > FEW_PANELS ? MAX_PANELS : FEW_PANELS;
  int64_t panels = rows <= 16 ? 131072 / (cells * 64) / step * step : step;
  if (panels < step) panels = step;
  int64_t units = 0, work = 0;
  for (int64_t i = 0; i < count; i++) units += ((layers[i].n + 15) / 16 + panels - 1) / panels, work += layers[i].n;
  parallel_tasks(units, 1, work * k * (rows + 2) < 2000000 ? 1 : threads, [&](int64_t task) {
    const Linear* y = layers;
    for (int64_t n; task >= (n = ((y->n + 15) / 16 + panels - 1) / panels); y++) task -= n;
    const int64_t all = (y->n + 15) / 16, from = task * panels;
    unit(*y, input, from, all - from < panels ? all - from : panels);
  });
}

EXPORT int int8_linear(const float* x, int64_t x_row, int64_t rows, int64_t k, const uint8_t* data, const float* scale,
                       const float* bias, float* out, int64_t n, int threads) {
  Linear y{data, scale, bias, out, n};
  run(x, x_row, rows, k, &y, 1, threads);
  return 0;
}

// layers: count records of {data, scale, bias, out, n}, each field 64 bits.
EXPORT int int8_linear_multi(const float* x, int64_t x_row, int64_t rows, int64_t k, const void* layers, int64_t count,
                             int threads) {
  static_assert(sizeof(Linear) == 40, "five 64-bit fields");
  run(x, x_row, rows, k, (const Linear*)layers, count, threads);
  return 0;
}
