// Products of activation rows with packed weights.
//
// One order of sums for every number of rows, so that a row's bits depend on it alone: along each block of
// (128) inputs in the order of the instruction below, from zero; then acc = fma(that, x scale * w scale, acc),
// block by block. Rows are never split along inputs.
//
//   AMX              TDPBF16PS, 32 inputs at a time
//   AVX512-BF16      VDPBF16PS, 2 at a time         both factors are e4m3 values, exact in bfloat16
//   AVX-512, AVX2    float32 FMA, 1 at a time
#pragma once

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Inputs of a block, with the zeros that fill it up.
static inline int depth_of(const K2Packed *w, int block) {
  return int(round_up(least(w->block, w->num_inputs - int64_t(block) * w->block), 32));
}

// -- decoding ------------------------------------------------------------------------------------------------

// bfloat16 of an e4m3 byte, by its high and its low byte. High: sign, exponent + 120 without its last bit.
// Codes with exponent 0 (zero, 1/512 .. 7/512) and NaN, which packing turns into -0, are looked up.
#define K2_HIGH                                                                                                \
  0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43, char(0xbc), char(0xbd), char(0xbe), char(0xbf), char(0xc0),  \
      char(0xc1), char(0xc2), char(0xc3)
#define K2_RARE_HIGH                                                                                           \
  0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0x7f, char(0xbb), char(0xbb), char(0xbb), char(0xbc),        \
      char(0xbc), char(0xbc), char(0xbc)
#define K2_RARE_LOW                                                                                            \
  0x00, 0x00, char(0x80), char(0xc0), 0x00, 0x20, 0x40, 0x60, char(0xc0), 0x00, char(0x80), char(0xc0), 0x00,  \
      0x20, 0x40, 0x60

#if defined(__AVX512BW__)
// 64 codes -> two registers of 32 bfloat16.
static inline void decode64(const uint8_t *p, __m512i &pair0, __m512i &pair1) {
  const __m512i x = _mm512_loadu_si512(p);
  const __m512i low_bits = _mm512_set1_epi8(0x0f);
  const __m512i top = _mm512_and_si512(_mm512_srli_epi16(x, 4), low_bits);
  __m512i high = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(K2_HIGH)), top);
  __m512i low = _mm512_andnot_si512(low_bits, _mm512_slli_epi16(x, 4));
  const __mmask64 rare = _mm512_testn_epi8_mask(x, _mm512_set1_epi8(0x78));
  if (__builtin_expect(rare != 0, 0)) {
    const __m512i which = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi8(7)),
                                          _mm512_and_si512(top, _mm512_set1_epi8(8)));
    high = _mm512_mask_shuffle_epi8(high, rare, _mm512_broadcast_i32x4(_mm_setr_epi8(K2_RARE_HIGH)), which);
    low = _mm512_mask_shuffle_epi8(low, rare, _mm512_broadcast_i32x4(_mm_setr_epi8(K2_RARE_LOW)), which);
  }
  pair0 = _mm512_unpacklo_epi8(low, high);
  pair1 = _mm512_unpackhi_epi8(low, high);
}
#else
// 32 codes, the half of a chunk that belongs to 8 outputs -> two registers of 16 bfloat16.
static inline void decode32(const uint8_t *p, __m256i &pair0, __m256i &pair1) {
  const __m256i x = _mm256_loadu_si256((const __m256i *)p);
  const __m256i low_bits = _mm256_set1_epi8(0x0f);
  const __m256i top = _mm256_and_si256(_mm256_srli_epi16(x, 4), low_bits);
  __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi8(K2_HIGH)), top);
  __m256i low = _mm256_andnot_si256(low_bits, _mm256_slli_epi16(x, 4));
  const __m256i rare =
      _mm256_cmpeq_epi8(_mm256_and_si256(x, _mm256_set1_epi8(0x78)), _mm256_setzero_si256());
  if (__builtin_expect(_mm256_movemask_epi8(rare) != 0, 0)) {
    const __m256i which = _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi8(7)),
                                          _mm256_and_si256(top, _mm256_set1_epi8(8)));
    const __m256i rare_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(K2_RARE_HIGH));
    const __m256i rare_low = _mm256_broadcastsi128_si256(_mm_setr_epi8(K2_RARE_LOW));
    high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(rare_high, which), rare);
    low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(rare_low, which), rare);
  }
  pair0 = _mm256_unpacklo_epi8(low, high);
  pair1 = _mm256_unpackhi_epi8(low, high);
}
#endif

// -- the instruction -----------------------------------------------------------------------------------------
//
//   Act        an activation as the instruction reads it       Wt    a weight likewise
//   Wt *of(..)    one panel's block, ready to multiply: from `scratch`, or where it lies
//   multiply      acc[m][16 p ..] += (a[m] . b[p]) * sx[m] * sw[p]    m < num_rows, p < kPanels at most

// What comes 4 KiB later. Without it the memory waits while the tiles work: 6.8 against 11.2 GB/s of one thread.
static inline void fetch(const uint8_t *p) { _mm_prefetch((const char *)p + 4096, _MM_HINT_T0); }

constexpr int kBlockMax = 128;    // inputs; larger scale blocks are refused when weights are packed

#if defined(K2_USE_AMX) || defined(K2_USE_DPBF16)
using Act = bf16;
using Wt = bf16;
#else
using Act = float;
using Wt = float;
#endif

// Rows laid out for `multiply`: block after block, in each row after row; padded with zeros to the weights' depth.
struct Laid {
  Act *a;
  float *sx; // [blocks][rows]
  int64_t rows;
  int64_t stride; // between blocks, of one row
};

#if defined(K2_USE_AMX)

static inline const Wt *ready(int kind, const uint8_t *source, int depth, Wt *scratch) {
  if (kind == K2_BF16) {
    for (int i = 0; i < depth * 32; i += 64)
      fetch(source + i);
    return (const Wt *)source;
  }
  for (int k = 0; k < depth; k += 4, source += 64, scratch += 64) {
    fetch(source);
    __m512i pair0, pair1;
    decode64(source, pair0, pair1);
    _mm512_store_si512(scratch, pair0);
    _mm512_store_si512(scratch + 32, pair1);
  }
  return scratch - depth * 16;
}

// GCC's own intrinsics do not tell the compiler that a tile load reads memory.
template <int t> static inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> static inline void tile_load(const void *p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(t) : "memory");
}
template <int t> static inline void tile_store(void *p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(t) : "memory");
}
template <int c, int a, int b> static inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums; 4, 5: activations of `top` and `bottom` rows; 6, 7: weights.
// One set of activation rows: sums 0-3 are of four panels. Two sets: 0, 1 and 2, 3 of two panels.
static inline void configure(int top, int bottom) {
  TileConfig c;
  const int rows[8] = {top, top, bottom ? bottom : top, bottom ? bottom : top, top, bottom ? bottom : top, 16, 16};
  for (int t = 0; t < 8; t++) {
    c.rows[t] = uint8_t(rows[t]);
    c.row_bytes[t] = 64;
  }
  asm volatile("ldtilecfg %0" ::"m"(c));
}

static inline void begin_multiply() {}
static inline void end_multiply() { asm volatile("tilerelease"); }

static inline void promote(const float *c, int num_rows, const float *sx, float sw, float *acc, int64_t stride) {
  for (int m = 0; m < num_rows; m++)
    store(acc + m * stride, fma(load(c + m * 16), set1(sx[m] * sw), load(acc + m * stride)));
}

// As promote, without scales: x * 1 + acc.
static inline void multiply(const Act *a, int depth, int num_rows, const Wt *const *b, int panels,
                            const float *sx, const float *sw, float *acc, int64_t stride) {
  alignas(64) float c[4][256];
  int row = 0;
  if (num_rows > 16)
    for (; row < num_rows; row += 32) {
      const int left = num_rows - row;
      if (left <= 16)
        break;
      const int bottom = left >= 32 ? 16 : left - 16;
      if (row == 0 || bottom != 16)
        configure(16, bottom);
      const Act *top_a = a + int64_t(row) * depth, *bottom_a = top_a + 16 * depth;
      for (int p = 0; p < panels; p += 2) {
        const Wt *b0 = b[p], *b1 = b[p + 1 < panels ? p + 1 : p];
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (int k = 0; k < depth; k += 32) {
          tile_load<4>(top_a + k, depth * 2);
          tile_load<6>(b0 + k * 16, 64);
          tile_dot<0, 4, 6>();
          tile_load<7>(b1 + k * 16, 64);
          tile_dot<1, 4, 7>();
          tile_load<5>(bottom_a + k, depth * 2);
          tile_dot<2, 5, 6>();
          tile_dot<3, 5, 7>();
        }
        tile_store<0>(c[0], 64), tile_store<1>(c[1], 64);
        tile_store<2>(c[2], 64), tile_store<3>(c[3], 64);
        for (int q = p; q < p + 2 && q < panels; q++) {
          promote(c[q - p], 16, sx + row, sw[q], acc + row * stride + 16 * q, stride);
          promote(c[q - p + 2], bottom, sx + row + 16, sw[q], acc + (row + 16) * stride + 16 * q, stride);
        }
      }
    }
  if (row >= num_rows)
    return;
  const int top = num_rows - row;
  configure(top, 0);
  const Act *top_a = a + int64_t(row) * depth;
  const Wt *b1 = b[panels > 1 ? 1 : 0], *b2 = b[panels > 2 ? 2 : 0], *b3 = b[panels > 3 ? 3 : 0];
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int k = 0; k < depth; k += 32) {
    tile_load<4>(top_a + k, depth * 2);
    tile_load<6>(b[0] + k * 16, 64);
    tile_dot<0, 4, 6>();
    if (panels > 1) {
      tile_load<7>(b1 + k * 16, 64);
      tile_dot<1, 4, 7>();
    }
    if (panels > 2) {
      tile_load<6>(b2 + k * 16, 64);
      tile_dot<2, 4, 6>();
    }
    if (panels > 3) {
      tile_load<7>(b3 + k * 16, 64);
      tile_dot<3, 4, 7>();
    }
  }
  tile_store<0>(c[0], 64), tile_store<1>(c[1], 64);
  tile_store<2>(c[2], 64), tile_store<3>(c[3], 64);
  for (int p = 0; p < panels; p++)
    promote(c[p], top, sx + row, sw[p], acc + row * stride + 16 * p, stride);
}

template <int n> struct Int {
  static constexpr int value = n;
};

// A group of panels for at most 16 rows, where reading the weights is what takes time: a panel is decoded while
// the tiles still work on the one before it, so that memory is never left waiting. The bits are those of
// `multiply`.
static void multiply_few(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
                         int64_t first, int num_rows, Wt *scratch, float *acc, int64_t stride) {
  alignas(64) float c[4][256];
  const int size = w->kind == K2_FP8 ? 16 : 32;
  configure(num_rows, 0);
  const Wt *next = ready(w->kind, source, depth_of(w, 0), scratch);
  for (int block = 0, turn = 1; block < w->num_blocks; block++) {
    const int depth = depth_of(w, block), next_depth = block + 1 < w->num_blocks ? depth_of(w, block + 1) : 0;
    const Act *a = laid.a + laid.rows * laid.stride * block + first * depth;
    auto one_panel = [&](auto number) {
      constexpr int p = decltype(number)::value;
      if (p >= panels)
        return;
      const Wt *b = next;
      source += depth * size;
      const int coming = p + 1 < panels ? depth : next_depth;
      if (coming > 0)
        next = ready(w->kind, source, coming, scratch + (turn++ & 1) * kBlockMax * 16);
      tile_zero<p>();
      for (int k = 0; k < depth; k += 32) {
        tile_load<4>(a + k, depth * 2);
        tile_load<6>(b + k * 16, 64);
        tile_dot<p, 4, 6>();
      }
    };
    one_panel(Int<0>()), one_panel(Int<1>()), one_panel(Int<2>()), one_panel(Int<3>());
    tile_store<0>(c[0], 64), tile_store<1>(c[1], 64), tile_store<2>(c[2], 64), tile_store<3>(c[3], 64);
    for (int p = 0; p < panels; p++)
      promote(c[p], num_rows, laid.sx + block * laid.rows + first, scale ? scale[p * w->num_blocks + block] : 1.0f, acc + 16 * p, stride);
  }
}

#elif defined(K2_USE_DPBF16)

static inline const Wt *ready(int kind, const uint8_t *source, int depth, Wt *scratch) {
  if (kind == K2_BF16) {
    for (int i = 0; i < depth * 32; i += 64)
      fetch(source + i);
    return (const Wt *)source;
  }
  for (int k = 0; k < depth; k += 4, source += 64, scratch += 64) {
    fetch(source);
    __m512i pair0, pair1;
    decode64(source, pair0, pair1);
    _mm512_store_si512(scratch, pair0);
    _mm512_store_si512(scratch + 32, pair1);
  }
  return scratch - depth * 16;
}

static inline void begin_multiply() {}
static inline void end_multiply() {}

template <int R, int P>
static inline void multiply_tile(const Act *a, int depth, const Wt *const *b, const float *sx, const float *sw,
                                 float *acc, int64_t stride) {
  __m512 c[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      c[r][p] = _mm512_setzero_ps();
  for (int k = 0; k < depth; k += 2) {
    __m512bh w[P];
    for (int p = 0; p < P; p++)
      w[p] = (__m512bh)_mm512_loadu_si512(b[p] + k * 16);
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, a + r * depth + k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int p = 0; p < P; p++)
        c[r][p] = _mm512_dpbf16_ps(c[r][p], x, w[p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      float *to = acc + r * stride + 16 * p;
      store(to, fma(Vec{c[r][p]}, set1(sx[r] * sw[p]), load(to)));
    }
}

#else

static inline const Wt *ready(int kind, const uint8_t *source, int depth, Wt *scratch) {
  Wt *to = scratch;
  for (int i = 0; i < depth * (kind == K2_FP8 ? 16 : 32); i += 64)
    fetch(source + i);
#if defined(__AVX512BW__)
  const __m512i odd_half = _mm512_set1_epi32(int(0xffff0000));
  auto put = [&](__m512i pair) {
    _mm512_store_si512(to, _mm512_slli_epi32(pair, 16));
    _mm512_store_si512(to + 16, _mm512_and_si512(pair, odd_half));
    to += 32;
  };
  if (kind == K2_BF16)
    for (int k = 0; k < depth; k += 2, source += 64)
      put(_mm512_loadu_si512(source));
  else
    for (int k = 0; k < depth; k += 4, source += 64) {
      __m512i pair0, pair1;
      decode64(source, pair0, pair1);
      put(pair0), put(pair1);
    }
#else
  const __m256i odd_half = _mm256_set1_epi32(int(0xffff0000));
  auto put = [&](float *at, __m256i pair) {
    _mm256_store_si256((__m256i *)at, _mm256_slli_epi32(pair, 16));
    _mm256_store_si256((__m256i *)(at + 16), _mm256_and_si256(pair, odd_half));
  };
  if (kind == K2_BF16)
    for (int k = 0; k < depth; k += 2, source += 64, to += 32)
      for (int half = 0; half < 2; half++)
        put(to + 8 * half, _mm256_loadu_si256((const __m256i *)(source + 32 * half)));
  else
    for (int k = 0; k < depth; k += 4, source += 64, to += 64)
      for (int half = 0; half < 2; half++) {
        __m256i pair0, pair1;
        decode32(source + 32 * half, pair0, pair1);
        put(to + 8 * half, pair0), put(to + 32 + 8 * half, pair1);
      }
#endif
  return scratch;
}

static inline void begin_multiply() {}
static inline void end_multiply() {}

template <int R, int P>
static inline void multiply_tile(const Act *a, int depth, const Wt *const *b, const float *sx, const float *sw,
                                 float *acc, int64_t stride) {
  Vec c[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      c[r][p] = zero();
  for (int k = 0; k < depth; k++) {
    Vec w[P];
    for (int p = 0; p < P; p++)
      w[p] = load(b[p] + k * 16);
    for (int r = 0; r < R; r++) {
      const Vec x = set1(a[r * depth + k]);
      for (int p = 0; p < P; p++)
        c[r][p] = fma(x, w[p], c[r][p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      float *to = acc + r * stride + 16 * p;
      store(to, fma(c[r][p], set1(sx[r] * sw[p]), load(to)));
    }
}

#endif

#if !defined(K2_USE_AMX)
template <int P>
static inline void multiply_panels(const Act *a, int depth, int num_rows, const Wt *const *b, const float *sx,
                                   const float *sw, float *acc, int64_t stride) {
#if defined(__AVX512F__)
  constexpr int R = P == 4 ? 6 : 8; // 24 or 16 sums of 32 registers
#else
  constexpr int R = 4; // 8 of 16 registers at P == 1
#endif
  int row = 0;
  for (; row + R <= num_rows; row += R)
    multiply_tile<R, P>(a + int64_t(row) * depth, depth, b, sx + row, sw, acc + row * stride, stride);
  for (; row < num_rows; row++)
    multiply_tile<1, P>(a + int64_t(row) * depth, depth, b, sx + row, sw, acc + row * stride, stride);
}

static inline void multiply(const Act *a, int depth, int num_rows, const Wt *const *b, int panels,
                            const float *sx, const float *sw, float *acc, int64_t stride) {
  int p = 0;
#if defined(__AVX512F__)
  for (; p + 4 <= panels; p += 4)
    multiply_panels<4>(a, depth, num_rows, b + p, sx, sw + p, acc + 16 * p, stride);
#endif
  for (; p < panels; p++)
    multiply_panels<1>(a, depth, num_rows, b + p, sx, sw + p, acc + 16 * p, stride);
}
#endif

// -- activations ---------------------------------------------------------------------------------------------

static inline void put_act(bf16 *to, Vec x, int n) {
  if (n == 16)
    store_bf16(to, x);
  else
    store_bf16_some(to, x, n);
}
static inline void put_act(float *to, Vec x, int n) {
  if (n == 16)
    store(to, x);
  else
    store_some(to, x, n);
}

static inline Vec get_bf16(const bf16 *p, int64_t n) { return n >= 16 ? load_bf16(p) : load_bf16_some(p, int(n)); }

// max(|x|, 1e-4) / 448 of n values, the values' grid points handed to `put(i, vec, n)`.
template <class Put> static inline float quantise_group(const bf16 *x, int64_t n, const Put &put) {
  Ints largest = iset(0); // as integers, NaN is larger than all
  for (int64_t i = 0; i < n; i += 16)
    largest = imax(largest, bits_of(abs_of(get_bf16(x + i, n - i))));
  int32_t all[16];
  memcpy(all, &largest, 64);
  int32_t top = all[0];
  for (int i = 1; i < 16; i++)
    top = all[i] > top ? all[i] : top;
  float amax;
  memcpy(&amax, &top, 4);
  const float scale = (amax < 1e-4f ? 1e-4f : amax) / 448.0f;
  const Vec by = set1(scale), limit = set1(448.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Vec q = max2(zero() - limit, min2(limit, get_bf16(x + i, n - i) / by)); // NaN stays
    put(i, round_e4m3(q), int(least(16, n - i)));
  }
  return scale;
}

// Row `to` of `laid` from row `i` of `rows`, as weights `w` take it.
static void lay_row(const K2Packed *w, const K2Rows *rows, int64_t i, const Laid &laid, int64_t to) {
  const int64_t number = rows->index ? rows->index[i] : i;
  const uint8_t *data = rows->data + number * rows->stride_bytes;
  for (int b = 0; b < w->num_blocks; b++) {
    const int64_t begin = int64_t(b) * w->block, n = least(w->block, w->num_inputs - begin);
    const int depth = depth_of(w, b);
    Act *a = laid.a + laid.rows * laid.stride * b + to * depth;
    float *sx = laid.sx + b * laid.rows + to;
    if (n < depth)
      memset(a, 0, size_t(depth) * sizeof(Act));
    if (rows->kind == K2_ROWS_E4M3) {
      memcpy(sx, rows->scale + number * rows->scale_stride_bytes + 4 * b, 4);
      for (int64_t k = 0; k < n; k += 16) {
        uint8_t some[16] = {};
        const int count = int(least(16, n - k));
        memcpy(some, data + begin + k, size_t(count));
        put_act(a + k, decode_e4m3(load_bytes(some)), count);
      }
    } else if (w->scale != nullptr) {
      *sx = quantise_group((const bf16 *)data + begin, n, [&](int64_t k, Vec q, int count) { put_act(a + k, q, count); });
    } else {
      *sx = 1.0f;
      for (int64_t k = 0; k < n; k += 16)
        put_act(a + k, get_bf16((const bf16 *)data + begin + k, n - k), int(least(16, n - k)));
    }
  }
}

constexpr int64_t kLayRows = 16; // of one task

// All of `rows`, in memory of the calling thread's scratch `which`.
static Laid lay(int threads, const K2Packed *w, const K2Rows *rows, int which) {
  Laid laid;
  laid.rows = rows->num_rows;
  laid.stride = round_up(w->block, 32);
  const size_t act_bytes = size_t(round_up(int64_t(sizeof(Act)) * laid.rows * laid.stride * w->num_blocks, 64));
  uint8_t *memory = (uint8_t *)k2_scratch(which, act_bytes + 4 * size_t(laid.rows) * size_t(w->num_blocks));
  laid.a = (Act *)memory;
  laid.sx = (float *)(memory + act_bytes);
  parallel(threads, (laid.rows + kLayRows - 1) / kLayRows, [&](int64_t task) {
    for (int64_t i = task * kLayRows; i < least((task + 1) * kLayRows, laid.rows); i++)
      lay_row(w, rows, i, laid, i);
  });
  return laid;
}

// -- linears -------------------------------------------------------------------------------------------------

constexpr int64_t kChunkRows = 512; // of one task: its sums take 128 KiB

// acc[m][16 i ..] = x[first + m] . panel i of group `group`; how many panels it has.
static int multiply_group(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                          int64_t num_rows, float *acc) {
  const int first_panel = group * kPanels, panels = int(least(kPanels, w->num_panels - first_panel));
  constexpr int64_t stride = 16 * kPanels;
  Wt *scratch = (Wt *)k2_scratch(K2_SCRATCH_WEIGHTS, sizeof(Wt) * kPanels * kBlockMax * 16);
  memset(acc, 0, size_t(num_rows * stride) * 4);
  const uint8_t *source = w->data + (slot * w->num_panels + first_panel) * w->panel_bytes;
  const float *scale = w->scale ? w->scale + (slot * w->num_panels + first_panel) * w->num_blocks : nullptr;
#if defined(K2_USE_AMX)
  if (num_rows <= 16) {
    multiply_few(w, source, scale, panels, laid, first, int(num_rows), scratch, acc, stride);
    end_multiply();
    return panels;
  }
#endif
  for (int block = 0; block < w->num_blocks; block++) {
    const int depth = depth_of(w, block);
    const Wt *b[kPanels];
    float sw[kPanels];
    for (int p = 0; p < panels; p++) {
      b[p] = ready(w->kind, source, depth, scratch + p * kBlockMax * 16);
      source += depth * (w->kind == K2_FP8 ? 16 : 32);
      sw[p] = scale ? scale[p * w->num_blocks + block] : 1.0f;
    }
    multiply(laid.a + laid.rows * laid.stride * block + first * depth, depth, int(num_rows), b, panels,
             laid.sx + block * laid.rows + first, sw, acc, stride);
  }
  end_multiply();
  return panels;
}

static inline void put_out(void *y, int out_kind, int64_t at, Vec x, int n) {
  if (out_kind == K2_OUT_F32) {
    float *to = (float *)y + at;
    n == 16 ? store(to, x) : store_some(to, x, n);
  } else {
    bf16 *to = (bf16 *)y + at;
    n == 16 ? store_bf16(to, x) : store_bf16_some(to, x, n);
  }
}

// Rows [first, first + num_rows) of y = x w^T for a group of panels.
static void linear_task(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                        int64_t num_rows, void *y, int out_kind, int64_t y_stride) {
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(num_rows) * 16 * kPanels * 4);
  const int panels = multiply_group(w, slot, group, laid, first, num_rows, acc);
  for (int64_t m = 0; m < num_rows; m++)
    for (int p = 0; p < panels; p++)
      put_out(y, out_kind, (first + m) * y_stride + w->column[group * kPanels + p],
              load(acc + m * 16 * kPanels + 16 * p), w->width[group * kPanels + p]);
}

// Rows are sorted by slot, counts[s] of slot s. A task is a group of panels for a part: one slot's rows, or a
// chunk of them.
struct Part {
  int64_t slot, first, num_rows;
};

static inline int64_t count_parts(int64_t num_slots, const int64_t *counts) {
  int64_t num_parts = 0;
  for (int64_t s = 0; s < num_slots; s++)
    num_parts += (counts[s] + kChunkRows - 1) / kChunkRows;
  return num_parts;
}

static inline void put_parts(int64_t num_slots, const int64_t *counts, Part *part) {
  int64_t row = 0;
  for (int64_t s = 0; s < num_slots; s++)
    for (int64_t left = counts[s]; left > 0; left -= kChunkRows) {
      *part++ = {s, row, least(kChunkRows, left)};
      row += least(kChunkRows, left);
    }
}

static void linear(int threads, const K2Packed *w, int64_t num_slots, const int64_t *counts, const K2Rows *rows,
                   void *y, int out_kind, int64_t y_stride) {
  const int64_t groups = (w->num_panels + kPanels - 1) / kPanels, num_parts = count_parts(num_slots, counts);
  Part *parts = (Part *)k2_scratch(K2_SCRATCH_INNER, size_t(num_parts) * sizeof(Part));
  put_parts(num_slots, counts, parts);
  const Laid laid = lay(threads, w, rows, K2_SCRATCH_ROWS);
  parallel(threads, num_parts * groups, [&](int64_t task) {
    const Part &p = parts[task / groups];
    linear_task(w, p.slot, int(task % groups), laid, p.first, p.num_rows, y, out_kind, y_stride);
  });
}

// -- MLPs: down(silu(gate x) * (up x)), of one or of many slots ----------------------------------------------

// The inner values of rows [first, first + num_rows) for a group: half its panels are of gate, half of up.
static void inner_task(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                       int64_t num_rows, bf16 *inner, int64_t width) {
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(num_rows) * 16 * kPanels * 4);
  const int pairs = multiply_group(w, slot, group, laid, first, num_rows, acc) / 2;
  const int32_t *columns = w->column + group * kPanels, *widths = w->width + group * kPanels;
  for (int64_t m = 0; m < num_rows; m++)
    for (int i = 0; i < pairs; i++) {
      bf16 both[32]; // gate and up are results of a linear: rounded
      store_bf16(both, load(acc + m * 16 * kPanels + 16 * i));
      store_bf16(both + 16, load(acc + m * 16 * kPanels + 16 * (pairs + i)));
      const Vec gate = load_bf16(both), up = load_bf16(both + 16);
      const Vec value = gate * sigmoid(gate) * up;
      const int n = widths[i];
      bf16 *to = inner + (first + m) * width + columns[i];
      n == 16 ? store_bf16(to, value) : store_bf16_some(to, value, n);
    }
}

// y: contiguous. Rows as of `linear`.
static void mlp(int threads, const K2Packed *gate_up, const K2Packed *down, int64_t num_slots,
                const int64_t *counts, const K2Rows *rows, void *y, int out_kind) {
  const int64_t width = down->num_inputs, num_parts = count_parts(num_slots, counts);
  const Laid laid = lay(threads, gate_up, rows, K2_SCRATCH_ROWS);
  const size_t part_bytes = size_t(round_up(num_parts * int64_t(sizeof(Part)), 64));
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_INNER, part_bytes + size_t(laid.rows * width) * 2);
  Part *parts = (Part *)memory;
  bf16 *inner = (bf16 *)(memory + part_bytes);
  put_parts(num_slots, counts, parts);
  const int64_t inner_groups = (gate_up->num_panels + kPanels - 1) / kPanels;
  parallel(threads, num_parts * inner_groups, [&](int64_t task) {
    const Part &p = parts[task / inner_groups];
    inner_task(gate_up, p.slot, int(task % inner_groups), laid, p.first, p.num_rows, inner, width);
  });
  const K2Rows inner_rows = {K2_ROWS_BF16, laid.rows, width * 2, (const uint8_t *)inner, 0, nullptr, nullptr};
  const Laid again = lay(threads, down, &inner_rows, K2_SCRATCH_INNER_ROWS);
  const int64_t groups = (down->num_panels + kPanels - 1) / kPanels;
  parallel(threads, num_parts * groups, [&](int64_t task) {
    const Part &p = parts[task / groups];
    linear_task(down, p.slot, int(task % groups), again, p.first, p.num_rows, y, out_kind, down->num_outputs);
  });
}
