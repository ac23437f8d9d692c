// Batches of float32 products C = alpha A op(B) + beta D + diagonal I, whole or, where the result is known to be symmetric,
// its lower half only, mirrored.
// Floor: m n k multiply-adds (symmetric: half of them). A panel of B is packed once per block of rows of A and stays in L1;
// the block's sums stay in L2 until they are complete. Each element's terms are added in one order, whatever the threads.
#include "tile.h"
#include <memory>

constexpr int NR = TILE_VECS * W;        // columns of a panel
constexpr int64_t KC = 8192 / NR;        // depth of a packed panel: 32 KB
constexpr int64_t BLOCK = 384;           // rows of A that meet one panel, at most

struct Product {
  const float *a, *b, *d;
  float* c;
  int64_t batch, m, n, k, lda, ldb, stride_a, stride_b;
  float alpha, beta, diagonal;
  bool transposed, symmetric;
};

// panel[k][j] = b[k][j], or b[j][k] when transposed; missing columns are zero.
static void pack(const float* b, int64_t ld, bool transposed, int64_t depth, int64_t width, float* panel) {
  static const float zeros[KC] = {};
  if (!transposed) {
    for (int64_t k = 0; k < depth; k++) {
      memcpy(panel + k * NR, b + k * ld, width * sizeof(float));
      memset(panel + k * NR + width, 0, (NR - width) * sizeof(float));
    }
    return;
  }
  for (int64_t j = 0; j < NR; j += W) {
    const float* keys[W];
    for (int i = 0; i < W; i++) keys[i] = j + i < width ? b + (j + i) * ld : zeros;
    int64_t k = 0;
    for (; k + W <= depth; k += W) transpose(keys, k, panel + k * NR + j, NR);
    for (; k < depth; k++)
      for (int i = 0; i < W; i++) panel[k * NR + j + i] = keys[i][k];
  }
}

// Complete rows [first, last) x columns [j, j + width) from their sums, and write them, mirrored if symmetric.
static void finish(const Product& p, int64_t matrix, int64_t first, int64_t last, int64_t j, int64_t width, float* sums) {
  float* c = p.c + matrix * p.m * p.n;
  const float* d = p.d ? p.d + matrix * p.m * p.n : nullptr;
  for (int64_t i = first; i < last; i++) {
    float* s = sums + (i - first) * NR;
    const float* di = d ? d + i * p.n + j : nullptr;
    for (int64_t x = 0; x < width; x += W) {
      vf v = load(s + x) * p.alpha;
      if (di) v += (x + W <= width ? load(di + x) : load_some(di + x, width - x)) * p.beta;
      store(s + x, v);
    }
    if (i >= j && i < j + width) s[i - j] += p.diagonal;
    const int64_t count = p.symmetric && i < j + width ? i - j + 1 : width;
    memcpy(c + i * p.n + j, s, count * sizeof(float));
  }
  if (!p.symmetric) return;
  for (int64_t x = 0; x < width; x += W) {
    int64_t i = first;
    while (i < last) {
      float* out = c + (j + x) * p.n + i;
      if (i >= j + x + W && i + W <= last && x + W <= width) {
        const float* rows[W];
        for (int r = 0; r < W; r++) rows[r] = sums + (i - first + r) * NR;
        transpose(rows, x, out, p.n);
        i += W;
        continue;
      }
      for (int64_t y = 0; y < W && x + y < width && j + x + y < i; y++) out[y * p.n] = sums[(i - first) * NR + x + y];
      i++;
    }
  }
}

// The rows of a panel's own diagonal block, W at a time: those at r need only the columns up to r + W.
template <int V, class Row>
static void diagonal_rows(int64_t rows, int64_t depth, const float* a, int64_t lda, Row row, float* sums,
                          const float* ones) {
  if (rows <= 0) return;
  tile_rows<V>(rows < W ? rows : W, depth, a, lda, row, sums, NR, ones);
  if constexpr (V < TILE_VECS) diagonal_rows<V + 1>(rows - W, depth, a + W * lda, lda, row, sums + W * NR, ones);
}

static void block_of_rows(const Product& p, int64_t matrix, int64_t begin, int64_t end, float* panel, float* sums,
                          const float* ones) {
  const float *a = p.a + matrix * p.stride_a, *b = p.b + matrix * p.stride_b;
  for (int64_t j = 0; j < (p.symmetric ? end : p.n); j += NR) {
    const int64_t width = p.n - j < NR ? p.n - j : NR;
    const int64_t first = p.symmetric && j > begin ? j : begin;
    for (int64_t k = 0; k < p.k; k += KC) {
      const int64_t depth = p.k - k < KC ? p.k - k : KC;
      pack(p.transposed ? b + j * p.ldb + k : b + k * p.ldb + j, p.ldb, p.transposed, depth, width, panel);
      const auto row = [&](int64_t r) { return panel + r * NR; };
      const float *rows = a + first * p.lda + k, *add = k ? ones : nullptr;
      int64_t done = 0;
      if (p.symmetric && first == j && width == NR) {
        done = end - first < NR ? end - first : NR;
        diagonal_rows<1>(done, depth, rows, p.lda, row, sums, add);
      }
      product(end - first - done, (width + W - 1) / W * W, depth, rows + done * p.lda, p.lda, row, sums + done * NR, NR,
              add);
    }
    finish(p, matrix, first, end, j, width, sums);
  }
}

EXPORT int product_f32(const float* a, int64_t lda, int64_t stride_a, const float* b, int64_t ldb, int64_t stride_b,
                       const float* d, float* c, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha, float beta,
                       float diagonal, int transposed, int symmetric, int threads) {
  const Product p{a,     b,     d,    c,        batch,           m,              n, k, lda, ldb, stride_a, stride_b,
                  alpha, beta, diagonal, transposed != 0, symmetric != 0};
  if (batch * m * n * k < 1000000) threads = 1;
  int64_t block = BLOCK;
  while (block > 48 && batch * ((m + block - 1) / block) < 4 * threads) block /= 2;
  const int64_t blocks = (m + block - 1) / block;
  parallel_tasks(batch * blocks, 1, threads, [&](int64_t task) {
    alignas(64) thread_local float panel[KC * NR];
    thread_local std::unique_ptr<float[]> sums;
    if (!sums) {
      sums.reset(new float[BLOCK * (NR + 1)]);
      for (int64_t i = 0; i < BLOCK; i++) sums[i] = 1.0f;
    }
    const int64_t last = blocks - 1 - task % blocks;  // the longest rows of a triangle first
    const int64_t end = (last + 1) * block < m ? (last + 1) * block : m;
    block_of_rows(p, task / blocks, last * block, end, panel, sums.get() + BLOCK, sums.get());
  });
  return 0;
}

// c[x][j][i] = a[x][i][j] for a [batch, m, n] with rows lda apart.
EXPORT int transpose_f32(const float* a, int64_t lda, int64_t stride_a, float* c, int64_t batch, int64_t m, int64_t n,
                         int threads) {
  const int64_t bands = (n + W - 1) / W;
  if (batch * m * n < 200000) threads = 1;
  parallel_for(batch * bands, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t j = t % bands * W;
      const float* from = a + t / bands * stride_a + j;
      float* to = c + t / bands * m * n + j * m;
      int64_t i = 0;
      for (; j + W <= n && i + W <= m; i += W) {
        const float* rows[W];
        for (int r = 0; r < W; r++) rows[r] = from + (i + r) * lda;
        transpose(rows, 0, to + i, m);
      }
      for (; i < m; i++)
        for (int64_t x = 0; x < W && j + x < n; x++) to[x * m + i] = from[i * lda + x];
    }
  });
  return 0;
}
