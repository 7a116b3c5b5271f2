// Products for 1 to kFewRows rows, where reading the weights is what takes time: they are decoded in registers
// and multiplied there, line after line as they lie, so that memory is never left waiting for the multiplier.
// The bits are those of `multiply`.
//
// On AMX this is TDPBF16PS by its definition (Intel SDM, volume 2): even and odd inputs of 32 are added up by
// themselves, fused, subnormals as zeros; then their sum is added. 5 million random results were equal.
#pragma once

constexpr int kFewRows = 4;

#if defined(K2_USE_DPBF16)
using FewAct = bf16;
#else
using FewAct = float;
#endif

// A line of 64 bytes: two pairs of inputs by 16 outputs where codes are float8, one where they are bfloat16.
static inline void read_line(const uint8_t *p, Ints &pair0, Ints &pair1) {
#if defined(__AVX512BW__)
  decode64(p, pair0, pair1);
#else
  decode32(p, pair0.a, pair1.a);
  decode32(p + 32, pair0.b, pair1.b);
#endif
}
static inline Ints read_pair(const uint8_t *p) {
#if defined(__AVX512BW__)
  return _mm512_loadu_si512(p);
#else
  return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
#endif
}
static inline Vec even_of(Ints pair) { return from_bits(ishl<16>(pair)); }
static inline Vec odd_of(Ints pair) { return from_bits(iand(pair, iset(int(0xffff0000)))); }

// One panel's sums over a block for R rows.
template <int R> struct FewSums {
  Vec c[R];
#if defined(K2_USE_AMX)
  Vec even[R], odd[R];
#endif

  void begin() {
    for (int r = 0; r < R; r++)
      c[r] = zero();
  }

  void begin32() {
#if defined(K2_USE_AMX)
    for (int r = 0; r < R; r++)
      even[r] = odd[r] = zero();
#endif
  }

  // x: the activations of two inputs, rows `stride` apart.
  void add(Ints pair, const FewAct *x, int stride) {
#if defined(K2_USE_DPBF16)
    for (int r = 0; r < R; r++) {
      int32_t both;
      memcpy(&both, x + r * stride, 4);
      c[r].v = _mm512_dpbf16_ps(c[r].v, (__m512bh)_mm512_set1_epi32(both), (__m512bh)pair);
    }
#else
    const Vec first = even_of(pair), second = odd_of(pair);
    for (int r = 0; r < R; r++) {
#if defined(K2_USE_AMX)
      even[r] = fma(set1(x[r * stride]), first, even[r]);
      odd[r] = fma(set1(x[r * stride + 1]), second, odd[r]);
#else
      c[r] = fma(set1(x[r * stride]), first, c[r]);
      c[r] = fma(set1(x[r * stride + 1]), second, c[r]);
#endif
    }
#endif
  }

  void end32() {
#if defined(K2_USE_AMX)
    for (int r = 0; r < R; r++)
      c[r] = c[r] + (even[r] + odd[r]);
#endif
  }
};

// Block `block` of rows [first, first + R), as `add` takes them: where they lie, or in `wide`.
template <int R>
static inline const FewAct *few_acts(const Laid &laid, int block, int depth, int64_t first, float *wide) {
  const Act *a = laid.a + laid.rows * laid.stride * block + first * depth;
#if defined(K2_USE_AMX)
  for (int k = 0; k < R * depth; k += 16)
    store(wide + k, load_bf16(a + k));
  return wide;
#else
  (void)wide;
  return a;
#endif
}

// acc[r][16 p ..] of a group of panels, as by `multiply` block after block.
template <int R>
static void multiply_rows(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
                          int64_t first, float *acc, int64_t stride) {
  alignas(64) float wide[R * kBlockMax];
  FewSums<R> sums;
  for (int block = 0; block < w->num_blocks; block++) {
    const int depth = depth_of(w, block);
    const FewAct *x = few_acts<R>(laid, block, depth, first, wide);
    const float *sx = laid.sx + block * laid.rows + first;
    for (int p = 0; p < panels; p++) {
      sums.begin();
      for (int k = 0; k < depth; k += 32) {
        sums.begin32();
        if (w->kind == K2_FP8)
          for (int i = 0; i < 32; i += 4, source += 64) {
            Ints pair0, pair1;
            fetch(source);
            read_line(source, pair0, pair1);
            sums.add(pair0, x + k + i, depth);
            sums.add(pair1, x + k + i + 2, depth);
          }
        else
          for (int i = 0; i < 32; i += 2, source += 64) {
            fetch(source);
            sums.add(read_pair(source), x + k + i, depth);
          }
        sums.end32();
      }
      const float sw = scale ? scale[p * w->num_blocks + block] : 1.0f;
      for (int r = 0; r < R; r++) {
        float *to = acc + r * stride + 16 * p;
        store(to, fma(sums.c[r], set1(sx[r] * sw), load(to)));
      }
    }
  }
}

static void multiply_few(const K2Packed *w, const uint8_t *source, const float *scale, int panels, const Laid &laid,
                         int64_t first, int num_rows, float *acc, int64_t stride) {
  switch (num_rows) {
  case 1:
    return multiply_rows<1>(w, source, scale, panels, laid, first, acc, stride);
  case 2:
    return multiply_rows<2>(w, source, scale, panels, laid, first, acc, stride);
  case 3:
    return multiply_rows<3>(w, source, scale, panels, laid, first, acc, stride);
  default:
    return multiply_rows<4>(w, source, scale, panels, laid, first, acc, stride);
  }
}
