// Products by vector instructions: VDPBF16PS, two inputs at a time, or float32 FMA, one at a time.
#pragma once

#if defined(K2_USE_DPBF16)

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

static inline unsigned begin_multiply() { return 0; }
static inline void end_multiply(unsigned) {}

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

// A group of panels for any number of rows: block by block, all its panels made ready, then multiplied.
static void multiply_many(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
                          int64_t first, int num_rows, Wt *scratch, float *acc, int64_t stride) {
  for (int block = 0; block < w->num_blocks; block++) {
    const int depth = depth_of(w, block);
    const Wt *b[kPanels];
    float sw[kPanels];
    for (int p = 0; p < panels; p++) {
      b[p] = ready(w->kind, source, depth, scratch + p * kBlockMax * 16);
      source += depth * (w->kind == K2_FP8 ? 16 : 32);
      sw[p] = scale ? scale[p * w->num_blocks + block] : 1.0f;
    }
    multiply(laid.a + laid.rows * laid.stride * block + first * depth, depth, num_rows, b, panels,
             laid.sx + block * laid.rows + first, sw, acc, stride);
  }
}
