// Quantising tokens into records and back; the arithmetic of reference.py, operation by operation.
#pragma once
#include "record.h"

// Keep the compiler from fusing a product with a later sum: the reference rounds both.
static INLINE vf rounded(vf x) {
#if SERVAL_AVX512
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// Groups in, parameters out: scale integers, middles, the shared exponent, and what codes are made with.
struct Groups {
  alignas(64) float high[MAX_DIM], low[MAX_DIM], lowest[MAX_DIM], inverse[MAX_DIM];
};
struct Packer {
  alignas(64) float x[GROUP * MAX_DIM];
  alignas(64) uint8_t codes[GROUP * MAX_DIM];
  Groups groups;
};
static thread_local Packer packer;

// `count` groups, a multiple of W.
static uint8_t parameters(Groups& g, int64_t count, int64_t bits, int64_t zero, int16_t* scale, fp16* middle) {
  const float levels = (float)((1 << bits) - 1), centre = levels * 0.5f;
  auto farthest = [&](int64_t i) { const vf high = load(g.high + i), low = load(g.low + i); return high >= -low ? high : low; };
  auto ideal = [&](int64_t i) {
    return zero == SYMMETRIC ? vabs(farthest(i)) / (centre + 0.5f) : (load(g.high + i) - load(g.low + i)) / levels;
  };
  vf most = {};
  for (int64_t i = 0; i < count; i += W) most = vmax(most, ideal(i));
  const float top = max_lane(most);
  int exponent = 0;
  if (top > 0) std::frexp(top, &exponent);
  exponent = std::min(255 - BIAS, std::max(-BIAS, exponent - 14));
  const float unit = power_of_two(exponent), per_unit = 1.0f / unit;
  for (int64_t i = 0; i < count; i += W) {
    const vf high = load(g.high + i), low = load(g.low + i);
    const vf n = vround(ideal(i) * per_unit), s = n * unit;
    const vi some = s > 0.0f;
    const vf safe = some ? s : splat(1.0f);
    vf m;
    if (zero == SMALLEST) m = low + rounded(s * centre);
    else if (zero == SYMMETRIC) m = farthest(i) > 0.0f ? s * 0.5f : s * -0.5f;
    else m = s * (centre - vround(-low / safe));
    m = some ? m : (high + low) * 0.5f;
    store(middle + i, m);
    m = load(middle + i);
    for (int j = 0; j < W; j++) scale[i + j] = (int16_t)n[j];
    store(g.lowest + i, m - rounded(s * centre));
    store(g.inverse + i, some ? 1.0f / safe : vf{});
  }
  return top > 0 ? (uint8_t)(exponent + BIAS) : 0;
}

// W codes from W numbers.
static INLINE void make_codes(vf x, vf lowest, vf inverse, float levels, uint8_t* out) {
  const vf q = vmin(vmax(vround((x - lowest) * inverse), vf{}), splat(levels));
#if SERVAL_AVX512
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)q)));
#else
  const vc c = __builtin_convertvector(__builtin_convertvector(q, vi), vc);
  memcpy(out, &c, sizeof c);
#endif
}

// Rows x [32][dim] quantised in groups of channels; codes to [32][width]. Parameters lie [group][token].
static uint8_t by_token(Packer& p, int64_t dim, int64_t width, int64_t bits, int64_t zero, int16_t* scale, fp16* middle) {
  const int64_t groups = width / GROUP;
  Groups& g = p.groups;
  for (int64_t t = 0; t < GROUP; t++)
    for (int64_t k = 0; k < groups; k++) {
      const float* x = p.x + t * dim + k * GROUP;
      const int64_t n = std::min(GROUP, dim - k * GROUP);
      vf high = load(x), low = high;
      for (int64_t d = W; d < n; d += W) high = vmax(high, load(x + d)), low = vmin(low, load(x + d));
      g.high[k * GROUP + t] = max_lane(high), g.low[k * GROUP + t] = -max_lane(-low);
    }
  const uint8_t exponent = parameters(g, groups * GROUP, bits, zero, scale, middle);
  const float levels = (float)((1 << bits) - 1);
  memset(p.codes, 0, GROUP * width);
  for (int64_t t = 0; t < GROUP; t++)
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t at = d / GROUP * GROUP + t;
      make_codes(load(p.x + t * dim + d), splat(g.lowest[at]), splat(g.inverse[at]), levels, p.codes + t * width + d);
    }
  return exponent;
}

static uint8_t by_channel(Packer& p, int64_t dim, int64_t bits, int64_t zero, int16_t* scale, fp16* middle) {
  Groups& g = p.groups;
  for (int64_t d = 0; d < dim; d += W) {
    vf high = load(p.x + d), low = high;
    for (int64_t t = 1; t < GROUP; t++) high = vmax(high, load(p.x + t * dim + d)), low = vmin(low, load(p.x + t * dim + d));
    store(g.high + d, high), store(g.low + d, low);
  }
  const uint8_t exponent = parameters(g, dim, bits, zero, scale, middle);
  const float levels = (float)((1 << bits) - 1);
  for (int64_t t = 0; t < GROUP; t++)
    for (int64_t d = 0; d < dim; d += W)
      make_codes(load(p.x + t * dim + d), load(g.lowest + d), load(g.inverse + d), levels, p.codes + t * dim + d);
  return exponent;
}

// codes [32 tokens][dim] into lines whose lanes are tokens. Codes of 8 channels travel in one 64-bit word.
static void pack_keys(const uint8_t* codes, int64_t dim, int64_t bits, uint8_t* out) {
  for (int64_t c = 0; c < dim; c += 16 / bits)
    for (int64_t lane = 0; lane < 16; lane++, out += 4) {
      uint32_t word;
      if (bits == 2) {
        uint64_t a, b;
        memcpy(&a, codes + lane * dim + c, 8), memcpy(&b, codes + (lane + 16) * dim + c, 8);
        a |= b << 2;
        word = (uint32_t)a | (uint32_t)(a >> 32) << 4;
      } else {
        uint32_t b;
        memcpy(&word, codes + lane * dim + c, 4), memcpy(&b, codes + (lane + 16) * dim + c, 4);
        word |= b << 4;
      }
      memcpy(out, &word, 4);
    }
}

// codes [32 tokens][width] into lines whose lanes are channels.
static void pack_values(const uint8_t* codes, int64_t width, int64_t bits, uint8_t* out) {
  const int64_t step = 16 / bits;  // tokens of a line
  for (int64_t g = 0; g < width; g += GROUP)
    for (int64_t first = 0; first < GROUP; first += step, out += LINE)
      for (int64_t i = 0; i < 4; i++) {
        uint8_t byte[16];
        const uint8_t* a = codes + (first + i) * width + g;
        if (bits == 2) {
          const uint8_t* b = a + 4 * width;
          for (int lane = 0; lane < 16; lane++) byte[lane] = (uint8_t)(a[lane] | a[lane + 16] << 2 | b[lane] << 4 | b[lane + 16] << 6);
        } else {
          for (int lane = 0; lane < 16; lane++) byte[lane] = (uint8_t)(a[lane] | a[lane + 16] << 4);
        }
        for (int lane = 0; lane < 16; lane++) out[4 * lane + i] = byte[lane];
      }
}

// 32 tokens from `first` of k, v [n, heads, dim] into one record of every head, `stride` bytes apart.
static void store_record(const Format& f, const float* k, const float* v, int64_t first, int64_t record, const Storage& s,
                         int64_t block, int64_t index) {
  float inverse[GROUP];
  const int64_t k_row = f.heads * f.k_dim, v_row = f.heads * f.v_dim;
  for (int64_t t = 0; t < GROUP; t++) {
    inverse[t] = 1.0f;
    if (!f.norms) continue;
    const float* row = k + (first + t) * k_row;
    vf total[4] = {};
    for (int64_t d = 0; d < k_row; d += W) { const vf x = load(row + d); total[d / W % 4] += x * x; }
    const float norm = std::sqrt(std::max(sum((total[0] + total[1]) + (total[2] + total[3])), 1e-8f));
    s.norms[(block * f.per_block + index) * GROUP + t] = norm;
    inverse[t] = 1.0f / norm;
  }
  Packer& p = packer;
  for (int64_t h = 0; h < f.heads; h++) {
    const int64_t at = record + h * f.per_block;
    uint8_t *to = s.records + at * f.bytes, *exponents = s.exponents + 2 * at;
    for (int64_t t = 0; t < GROUP; t++)
      for (int64_t d = 0; d < f.k_dim; d += W)
        store(p.x + t * f.k_dim + d, load(k + (first + t) * k_row + h * f.k_dim + d) * inverse[t]);
    int64_t width = f.k_dim;
    if (f.by_token) {
      width = f.k_groups() * GROUP;
      exponents[0] = by_token(p, f.k_dim, width, f.k_bits, f.zero, (int16_t*)(to + f.k_scale), (fp16*)(to + f.k_mid));
      if (width != f.k_dim) for (int64_t t = 1; t < GROUP; t++) memmove(p.codes + t * f.k_dim, p.codes + t * width, f.k_dim);
    } else {
      exponents[0] = by_channel(p, f.k_dim, f.k_bits, f.zero, (int16_t*)(to + f.k_scale), (fp16*)(to + f.k_mid));
    }
    pack_keys(p.codes, f.k_dim, f.k_bits, to + f.k_codes);
    for (int64_t t = 0; t < GROUP; t++) memcpy(p.x + t * f.v_dim, v + (first + t) * v_row + h * f.v_dim, f.v_dim * sizeof(float));
    width = f.v_groups() * GROUP;
    exponents[1] = by_token(p, f.v_dim, width, f.v_bits, f.zero, (int16_t*)(to + f.v_scale), (fp16*)(to + f.v_mid));
    pack_values(p.codes, width, f.v_bits, to + f.v_codes);
  }
}

// One token's codes of a head, from lines whose lanes are tokens.
static INLINE void unpack_token(const uint8_t* lines, int64_t token, int64_t dim, int64_t bits, uint8_t* out) {
  const uint8_t* at = lines + token % 16 * 4;
  const int64_t shift = token / 16 * bits;
  for (int64_t c = 0; c < dim; c += 16 / bits, at += LINE) {
    uint32_t word;
    memcpy(&word, at, 4);
    if (bits == 2) {
      const uint32_t pair[2] = {word >> shift & 0x03030303u, word >> (shift + 4) & 0x03030303u};
      memcpy(out + c, pair, 8);
    } else {
      word = word >> shift & 0x0f0f0f0fu;
      memcpy(out + c, &word, 4);
    }
  }
}

// The first `count` tokens of one record of one head, to rows `k_row` and `v_row` floats apart.
static void fetch_record(const Format& f, const Storage& s, int64_t record, const float* norms, int64_t count, float* k,
                         int64_t k_row, float* v, int64_t v_row) {
  const uint8_t* at = s.records + record * f.bytes;
  const float k_unit = power_of_two(s.exponents[2 * record] - BIAS), v_unit = power_of_two(s.exponents[2 * record + 1] - BIAS);
  const float k_centre = ((1 << f.k_bits) - 1) * 0.5f, v_centre = ((1 << f.v_bits) - 1) * 0.5f;
  const int16_t *k_scale = (const int16_t*)(at + f.k_scale), *v_scale = (const int16_t*)(at + f.v_scale);
  const fp16 *k_mid = (const fp16*)(at + f.k_mid), *v_mid = (const fp16*)(at + f.v_mid);
  Packer& p = packer;
  Groups& g = p.groups;
  const int64_t parameters = f.by_token ? f.k_groups() * GROUP : f.k_dim;
  for (int64_t i = 0; i < parameters; i += W) store(g.high + i, load_f(k_scale + i) * k_unit), store(g.low + i, load(k_mid + i));
  for (int64_t t = 0; t < count; t++) {
    unpack_token(at + f.k_codes, t, f.k_dim, f.k_bits, p.codes);
    const float norm = norms ? norms[t] : 1.0f;
    for (int64_t d = 0; d < f.k_dim; d += W) {
      const int64_t place = d / GROUP * GROUP + t;
      const vf scale = f.by_token ? splat(g.high[place]) : load(g.high + d), mid = f.by_token ? splat(g.low[place]) : load(g.low + d);
      store(k + t * k_row + d, (rounded(scale * (load_f(p.codes + d) - k_centre)) + mid) * norm);
    }
  }
  const int64_t step = 16 / f.v_bits, mask = (1 << f.v_bits) - 1;
  for (int64_t c = 0; c < f.v_dim; c += 16) {
    const int64_t group = c / GROUP, half = c / 16 % 2;
    for (int64_t t = 0; t < count; t++) {
      const uint8_t* line = at + f.v_codes + (group * GROUP * f.v_bits / 16 + t / step) * LINE;
      const int64_t shift = t % 4 * 8 + (t % step / 4 * 2 + half) * f.v_bits;
      const float scale = v_scale[group * GROUP + t] * v_unit;
      fp16 stored[W];
      for (int i = 0; i < W; i++) stored[i] = v_mid[group * GROUP + t];
      const vf mid = load(stored);
      for (int64_t d = 0; d < 16; d += W) {
        vu word;
        memcpy(&word, line + 4 * d, sizeof word);
        const vf code = to_float((vi)(word >> (uint32_t)shift & (uint32_t)mask));
        store(v + t * v_row + c + d, rounded(splat(scale) * (code - v_centre)) + mid);
      }
    }
  }
}
