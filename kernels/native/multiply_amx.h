// Products by AMX tiles: 16 rows or fewer by 16 outputs at a time, 32 inputs to an instruction.
#pragma once

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

// TDPBF16PS takes subnormals as zeros and gives none; so does all else between these two (few.h).
static inline unsigned begin_multiply() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
}
static inline void end_multiply(unsigned before) {
  asm volatile("tilerelease");
  _mm_setcsr(before);
}

static inline void promote(const float *c, int num_rows, const float *sx, float sw, float *acc, int64_t stride) {
  for (int m = 0; m < num_rows; m++)
    store(acc + m * stride, fma(load(c + m * 16), set1(sx[m] * sw), load(acc + m * stride)));
}

// A block of two panels, decoded some lines at a time between the tiles that work on the two before: vector units
// and tiles then run at once. Panels follow one another, in memory and when decoded.
struct Coming {
  const uint8_t *source;
  Wt *to; // null: bfloat16 is read where it lies
  int lines_left, at_once;

  void one() {
    fetch(source);
    if (to) {
      __m512i pair0, pair1;
      decode64(source, pair0, pair1);
      _mm512_store_si512(to, pair0);
      _mm512_store_si512(to + 32, pair1);
      to += 64;
    }
    source += 64;
    lines_left--;
  }
  void some() {
    for (int i = 0; i < at_once && lines_left > 0; i++)
      one();
  }
  void rest() {
    while (lines_left > 0)
      one();
  }
};

// acc[m][..] += (a[m] . b) * sx[m] * sw of one or two panels (b1 null).
static inline void multiply(const Act *a, int depth, int num_rows, const Wt *b0, const Wt *b1, const float *sx,
                            const float *sw, float *acc, int64_t stride, Coming &coming) {
  alignas(64) float c[4][256];
  const Wt *second = b1 ? b1 : b0;
  for (int row = 0; row < num_rows; row += 32) {
    const int left = num_rows - row, top = left < 16 ? left : 16, bottom = left >= 32 ? 16 : left - top;
    if (row == 0 || bottom != 16)
      configure(top, bottom);
    const Act *top_a = a + int64_t(row) * depth, *bottom_a = bottom ? top_a + 16 * depth : top_a;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int k = 0; k < depth; k += 32) {
      tile_load<4>(top_a + k, depth * 2);
      tile_load<6>(b0 + k * 16, 64);
      tile_dot<0, 4, 6>();
      tile_load<7>(second + k * 16, 64);
      tile_dot<1, 4, 7>();
      if (bottom) {
        tile_load<5>(bottom_a + k, depth * 2);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      coming.some();
    }
    tile_store<0>(c[0], 64), tile_store<1>(c[1], 64);
    if (bottom)
      tile_store<2>(c[2], 64), tile_store<3>(c[3], 64);
    for (int q = 0; q < (b1 ? 2 : 1); q++) {
      promote(c[q], top, sx + row, sw[q], acc + row * stride + 16 * q, stride);
      promote(c[q + 2], bottom, sx + row + 16, sw[q], acc + (row + 16) * stride + 16 * q, stride);
    }
  }
}

// A group of panels for more than 16 rows, two panels of a block after another.
static void multiply_many(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
                          int64_t first, int num_rows, Wt *scratch, float *acc, int64_t stride) {
  const bool is_fp8 = w->kind == K2_FP8;
  const int rounds = (num_rows + 31) / 32;
  int turn = 0;
  auto begin = [&](int depth, int count) {
    const int lines = count * depth / (is_fp8 ? 4 : 2), steps = rounds * (depth / 32);
    Wt *to = is_fp8 ? scratch + (turn++ & 1) * 2 * kBlockMax * 16 : nullptr;
    return Coming{source, to, lines, (lines + steps - 1) / steps};
  };
  auto width_of = [&](int p) { return panels - p < 2 ? panels - p : 2; };
  Coming coming = begin(depth_of(w, 0), width_of(0));
  const Wt *ready = is_fp8 ? coming.to : (const Wt *)source;
  coming.rest();
  for (int block = 0; block < w->num_blocks; block++) {
    const int depth = depth_of(w, block);
    for (int p = 0; p < panels; p += 2) {
      const int here = width_of(p);
      const Wt *b = ready;
      source += here * depth * (is_fp8 ? 16 : 32);
      const bool is_last_pair = p + 2 >= panels;
      coming = {};
      if (!is_last_pair || block + 1 < w->num_blocks) {
        coming = begin(is_last_pair ? depth_of(w, block + 1) : depth, width_of(is_last_pair ? 0 : p + 2));
        ready = is_fp8 ? coming.to : (const Wt *)source;
      }
      float sw[2] = {1.0f, 1.0f};
      for (int q = 0; scale && q < here; q++)
        sw[q] = scale[(p + q) * w->num_blocks + block];
      multiply(laid.a + laid.rows * laid.stride * block + first * depth, depth, num_rows, b,
               here > 1 ? b + depth * 16 : nullptr, laid.sx + block * laid.rows + first, sw, acc + 16 * p, stride, coming);
      coming.rest();
    }
  }
}

template <int n> struct Int {
  static constexpr int value = n;
};

// A group of panels for at most 16 rows, where reading the weights is what takes time: a panel is decoded while
// the tiles still work on the one before it, so that memory is never left waiting. The bits are those of
// `multiply`.
static void multiply_16(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
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
