// Linear layers with 4- or 8-bit weights; layout: packing.py, micro-kernels: vnni.h, avx2.h, portable.h, float.h.
// Floors: weights and scales read once for few rows, 2 M N K integer operations for many.
//
// A call has one x and one or several layers, each with its rows of x: all layers share all rows (q, k, v), or each
// has its own (experts). Rows are cut into blocks that a micro-kernel takes at once, quantised and laid out block by
// block; then one parallel region walks (layer, panels) units, each taking all blocks of its layer.
#include "quantize.h"
#include "float.h"
#include "vnni_one.h"

// Buffers of the calling thread; other threads only read or fill what they are handed.
struct Work {
  std::vector<char> memory;
  std::vector<Block> blocks;
  std::vector<int64_t> first_block, units;  // by layer
};
static thread_local Work work;

static int64_t size_for(int64_t rows) {  // 0: there is no micro-kernel for so many
  for (int size : SIZES)
    if (size >= rows) return size;
  return 0;
}

template <int BITS, int MODE, class... Rest>
static void block_of(const Layer& y, const Spec& s, const Block& b, const Rest&... rest) {
  switch (b.size) {
#if VNNI
    case 1: one_row<BITS, MODE>(y, s, b, rest...); break;
#else
    case 1: rows_of<BITS, MODE, 1>(y, s, b, rest...); break;
#endif
    case 2: rows_of<BITS, MODE, 2>(y, s, b, rest...); break;
    case 4: rows_of<BITS, MODE, 4>(y, s, b, rest...); break;
#if VNNI || SERVAL_AVX2 || SERVAL_AVX512
    case 3: rows_of<BITS, MODE, 3>(y, s, b, rest...); break;
    case 6: rows_of<BITS, MODE, 6>(y, s, b, rest...); break;
#if !VNNI
    case 5: rows_of<BITS, MODE, 5>(y, s, b, rest...); break;
#endif
#if VNNI && SERVAL_AVX512
    case 8: rows_of<BITS, MODE, 8>(y, s, b, rest...); break;
    case 12: rows_of<BITS, CHANNEL, 12>(y, s, b, rest...); break;  // group scales take 8 rows at most
#endif
#endif
  }
}

struct Input { const char* words; const int32_t* starts; const float* scale; int64_t row_bytes, row_starts; };

template <int BITS, int MODE>
static void unit(const Layer& y, const Spec& s, const Input& x, const Block* b, int64_t blocks, int64_t panel,
                 int64_t panels) {
#if VNNI
  for (int64_t i = 0; i < blocks; i++)
    block_of<BITS, MODE>(y, s, b[i], x.words + b[i].slot * x.row_bytes, x.starts + b[i].slot * x.row_starts, x.scale,
                         panel, panels);
#else
  for (int64_t at = panel; at < panel + panels; at++) {
#if SERVAL_AVX2 || SERVAL_AVX512
    const uint8_t* open = BITS == 4 && blocks > 1 ? open_panel(y.data + at * s.panel_bytes(), s.panel_bytes()) : nullptr;
    for (int64_t i = 0; i < blocks; i++)
      block_of<BITS, MODE>(y, s, b[i], x.words + b[i].slot * x.row_bytes, x.starts + b[i].slot * x.row_starts, x.scale,
                           at, open);
#else
    for (int64_t i = 0; i < blocks; i++)
      block_of<BITS, MODE>(y, s, b[i], x.words + b[i].slot * x.row_bytes, x.starts + b[i].slot * x.row_starts, x.scale, at);
#endif
  }
#endif
}

// Blocks of one range of rows: as large as is fastest, and a rest; up to 8 rows stay together where a kernel takes them,
// since they read the weight once. Blocks of 8 take what blocks of 6 would leave over: few rows are slower.
static void cut(int64_t first, int64_t rows, int mode, std::vector<Block>& blocks) {
  int64_t slot = blocks.empty() ? 0 : blocks.back().slot + blocks.back().size;
  for (int64_t row = 0, count; row < rows; row += count) {
    const int64_t left = rows - row, most = max_rows(mode);
    const bool eight = most == 6 && size_for(8) && (left % 6 == 2 || (left % 6 == 4 && left >= 16));
    count = left <= most || (left <= 8 && size_for(left)) ? left : left <= 8 ? (left + 1) / 2 : eight ? 8 : most;
    const int64_t size = size_for(count);
    blocks.push_back({first + row, count, size, slot});
    slot += size;
  }
}

static Input quantize(const float* x, int64_t x_row, int64_t rows, const Spec& s, Work& w, int threads) {
  const int64_t slots = w.blocks.back().slot + w.blocks.back().size;
  const int64_t row_bytes = s.padded() / 4 * word_bytes(s.bits), row_starts = starts_of(s);
  w.memory.resize(rows * 4 + slots * (row_bytes + row_starts * 4) + 192);
  char* words = (char*)(((uintptr_t)w.memory.data() + 63) & ~(uintptr_t)63);
  int32_t* starts = (int32_t*)(words + slots * row_bytes);
  float* scale = (float*)(starts + slots * row_starts);
  const Block* blocks = w.blocks.data();
  parallel_for((int64_t)w.blocks.size(), rows * s.k < 200000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (const Block* b = blocks + begin; b < blocks + end; b++)
      for (int64_t r = 0; r < b->rows; r++)
        prepare_row(x + (b->row + r) * x_row, s, r, b->size, words + b->slot * row_bytes, starts + b->slot * row_starts,
                    scale + b->row + r);
  });
  return {words, starts, scale, row_bytes, row_starts};
}

// layers: `count` records of Layer; shared: all have the same rows.
EXPORT int quantized_linear(const float* x, int64_t x_row, int64_t rows, int64_t k, const void* records, int64_t count,
                            int shared, int bits, int64_t group, int mode, int activations, float input_scale,
                            int threads) {
  static_assert(sizeof(Layer) == 64, "eight 64-bit fields");
  const Layer* layers = (const Layer*)records;
  Spec s{k, group, k / group, 0, bits, mode, (Activations)activations, input_scale};
  s.length = (group + s.depth() - 1) / s.depth() * s.depth();
  Work& w = work;
  w.blocks.clear(), w.first_block.clear(), w.units.assign(1, 0);
  for (int64_t i = 0; i < count; i++) {
    if (i == 0 || !shared) w.first_block.push_back(w.blocks.size()), cut(layers[i].first, layers[i].rows, mode, w.blocks);
    else w.first_block.push_back(0);
  }
  if (w.blocks.empty()) return 0;
  w.first_block.push_back(w.blocks.size());

  // Units of at most 512 KB of weights when rows are few (long streams, two for each thread), of a few panels when there
  // is work in each.
  double all = 0;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) bytes += layers[i].panels() * s.panel_bytes();
  const int64_t stream = std::min<int64_t>(524288, bytes / (2 * threads));
  for (int64_t i = 0; i < count; i++) {
    const bool few = layers[i].rows <= 16;
    const int64_t step = std::max<int64_t>(4, few ? stream / s.panel_bytes() / 4 * 4 : 0);
    w.units.push_back(w.units.back() + (layers[i].panels() + step - 1) / step);
    all += (double)layers[i].n * (layers[i].rows + 2) * k;
  }
  const bool real = activations == NONE;
  const Input input = real ? Input{} : quantize(x, x_row, rows, s, w, threads);
  const Block* blocks = w.blocks.data();
  const int64_t* first_block = w.first_block.data();
  const int64_t* units = w.units.data();
  parallel_tasks(units[count], 1, all < 2e6 ? 1 : threads, [&](int64_t task) {
    const int64_t layer = std::upper_bound(units, units + count + 1, task) - units - 1;
    const Layer& y = layers[layer];
    const int64_t parts = units[layer + 1] - units[layer], part = task - units[layer], quads = (y.panels() + 3) / 4;
    const int64_t from = quads * part / parts * 4, to = std::min(y.panels(), quads * (part + 1) / parts * 4);
    if (from >= to) return;
    if (real) return float_unit(y, s, x, x_row, from, to - from);
    const Block* b = blocks + first_block[layer];
    const int64_t n = (shared ? first_block[count] : first_block[layer + 1]) - first_block[layer];
    switch (bits * 4 + mode) {
      case 16: unit<4, CHANNEL>(y, s, input, b, n, from, to - from); break;
      case 17: unit<4, INTEGER>(y, s, input, b, n, from, to - from); break;
      case 18: unit<4, FLOAT>(y, s, input, b, n, from, to - from); break;
      case 32: unit<8, CHANNEL>(y, s, input, b, n, from, to - from); break;
      case 33: unit<8, INTEGER>(y, s, input, b, n, from, to - from); break;
      case 34: unit<8, FLOAT>(y, s, input, b, n, from, to - from); break;
    }
  });
  return 0;
}
PACKED(quantized_linear)

// Rows of a table of n rows in float32: out [count, k]. Returns 1, without reading, for a row that does not exist.
EXPORT int quantized_embedding(const int64_t* tokens, int64_t count, const uint8_t* data, const void* scales,
                               const float* factor, int64_t n, int64_t k, int bits, int64_t group, int mode,
                               float* out, int threads) {
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= n) return 1;
  Spec s{k, group, k / group, 0, bits, mode, NONE, 0.0f};
  s.length = (group + s.depth() - 1) / s.depth() * s.depth();
  Layer y{data, scales, factor, nullptr, out, 0, 0, 0};
  parallel_for(count, count * k < 200000 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) table_row(y, s, tokens[i], out + i * k);
  });
  return 0;
}
