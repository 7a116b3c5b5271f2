// Sixteen floats, on AVX-512 in one register and on AVX2 in two: the same operations, each rounded once, in the
// same lanes. Included once by each ISA's file, inside its namespace; nothing here may become a shared symbol.
//
//   load, store          float32;  *_bf16: bfloat16, rounded to nearest even
//   ..._some(p, n)       the first n lanes, zeros after them; no byte beyond is touched
#pragma once

using bf16 = uint16_t;

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
using Ints = __m512i;

static inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec zero() { return {_mm512_setzero_ps()}; }
static inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
static inline Vec load_some(const float *p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline void store_some(float *p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
static inline Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
static inline Vec load_bf16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
static inline Vec load_bf16_some(const bf16 *p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline __m256i narrow(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
static inline void store_bf16(bf16 *p, Vec a) { _mm256_storeu_si256((__m256i *)p, narrow(a)); }
static inline void store_bf16_some(bf16 *p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second argument where either is NaN.
static inline Vec min2(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec max2(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec round_int(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
static inline Ints bits_of(Vec a) { return _mm512_castps_si512(a.v); }
static inline Vec from_bits(Ints i) { return {_mm512_castsi512_ps(i)}; }
static inline Ints iset(int x) { return _mm512_set1_epi32(x); }
static inline Ints iadd(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Ints iand(Ints a, Ints b) { return _mm512_and_si512(a, b); }
static inline Ints ior(Ints a, Ints b) { return _mm512_or_si512(a, b); }
static inline Ints imax(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
template <int n> static inline Ints ishl(Ints a) { return _mm512_slli_epi32(a, n); }
template <int n> static inline Ints ishr(Ints a) { return _mm512_srli_epi32(a, n); }
static inline Ints to_int(Vec a) { return _mm512_cvtps_epi32(a.v); }
static inline Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a)}; }
static inline Ints load_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline void store_bytes(uint8_t *p, Ints a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }

#else

struct Vec {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};

static inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec zero() { return set1(0.0f); }
static inline Vec load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
static inline Vec load_some(const float *p, int n) {
  float all[16] = {};
  memcpy(all, p, size_t(n) * 4);
  return load(all);
}
static inline void store_some(float *p, Vec x, int n) {
  float all[16];
  store(all, x);
  memcpy(p, all, size_t(n) * 4);
}
static inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline Vec load_bf16(const bf16 *p) {
  return {widen(_mm_loadu_si128((const __m128i *)p)), widen(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline Vec load_bf16_some(const bf16 *p, int n) {
  bf16 all[16] = {};
  memcpy(all, p, size_t(n) * 2);
  return load_bf16(all);
}
static inline __m128i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline void store_bf16(bf16 *p, Vec x) {
  _mm_storeu_si128((__m128i *)p, narrow(x.a)), _mm_storeu_si128((__m128i *)(p + 8), narrow(x.b));
}
static inline void store_bf16_some(bf16 *p, Vec x, int n) {
  bf16 all[16];
  store_bf16(all, x);
  memcpy(p, all, size_t(n) * 2);
}
static inline Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline Vec min2(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline Vec max2(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline Vec round_int(Vec x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
static inline Vec select_less(Vec x, Vec y, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
static inline Ints bits_of(Vec x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
static inline Vec from_bits(Ints i) { return {_mm256_castsi256_ps(i.a), _mm256_castsi256_ps(i.b)}; }
static inline Ints iset(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline Ints iadd(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline Ints iand(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
static inline Ints ior(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline Ints imax(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int n> static inline Ints ishl(Ints x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n> static inline Ints ishr(Ints x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
static inline Ints to_int(Vec x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline Vec to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline Ints load_bytes(const uint8_t *p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
static inline void store_bytes(uint8_t *p, Ints x) {
  int32_t all[16];
  _mm256_storeu_si256((__m256i *)all, x.a), _mm256_storeu_si256((__m256i *)(all + 8), x.b);
  for (int i = 0; i < 16; i++)
    p[i] = uint8_t(all[i]);
}

#endif

static inline Vec abs_of(Vec a) { return from_bits(iand(bits_of(a), iset(0x7fffffff))); }

// Lanes in pairs, then their sums, and so on.
static inline float sum_lanes(Vec a) {
  float x[16];
  store(x, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++)
      x[i] = x[i] + x[i + width];
  return x[0];
}

// e^x for x <= 0, as k2kernels.rows.exp_of_negative has it, operation by operation: the same bits.
static inline Vec exp_of_negative(Vec x) {
  const Vec smallest = set1(-87.0f);
  const Vec bounded = max2(smallest, x); // NaN stays
  const Vec power = round_int(bounded * set1(1.44269504f));
  const Vec rest = bounded - power * set1(0.693359375f) - power * set1(-2.12194440e-4f);
  Vec p = set1(1.9875691500e-4f);
  p = p * rest + set1(1.3981999507e-3f);
  p = p * rest + set1(8.3334519073e-3f);
  p = p * rest + set1(4.1665795894e-2f);
  p = p * rest + set1(1.6666665459e-1f);
  p = p * rest + set1(5.0000001201e-1f);
  const Vec mantissa = p * rest * rest + rest + set1(1.0f);
  const Vec two_to_power = from_bits(ishl<23>(iadd(to_int(power), iset(127))));
  return select_less(x, smallest, zero(), mantissa * two_to_power);
}

// 1 / (1 + e^-x), as k2kernels.rows.sigmoid.
static inline Vec sigmoid(Vec x) {
  const Vec small = exp_of_negative(zero() - abs_of(x));
  return select_less(x, zero(), small, set1(1.0f)) / (set1(1.0f) + small);
}

// The nearest value of the e4m3 grid, ties to even; |x| <= 448, or NaN.
static inline Vec round_e4m3(Vec x) {
  const Ints bits = bits_of(x);
  const Ints odd = iand(ishr<20>(bits), iset(1));
  const Vec normal = from_bits(iand(iadd(bits, iadd(odd, iset(0x7ffff))), iset(int(0xfff00000))));
  const Vec shift = set1(24576.0f); // 1.5 * 2^23 * 2^-9: below 2^-6 the grid is even
  const Vec sub = from_bits(ior(bits_of((abs_of(x) + shift) - shift), iand(bits, iset(int(0x80000000)))));
  return select_less(abs_of(x), set1(0.015625f), sub, normal);
}

// The byte of a value of the e4m3 grid.
static inline Ints encode_e4m3(Vec x) {
  const Ints bits = bits_of(x), magnitude = iand(bits, iset(0x7fffffff));
  const Ints normal = iadd(ishr<20>(magnitude), iset(-(120 << 3)));
  const Ints sub = to_int(from_bits(magnitude) * set1(512.0f));
  const Vec code = select_less(from_bits(magnitude), set1(0.015625f), from_bits(sub), from_bits(normal));
  const Vec with_nan = select_less(from_bits(magnitude), set1(449.0f), code, from_bits(iset(0x7f)));
  return ior(bits_of(with_nan), ishl<7>(ishr<31>(bits)));
}

// The value of e4m3 bytes, NaN too.
static inline Vec decode_e4m3(Ints byte) {
  const Ints magnitude = iand(byte, iset(0x7f));
  const Vec normal = from_bits(iadd(ishl<20>(magnitude), iset(120 << 23)));
  const Vec sub = to_float(magnitude) * set1(0.001953125f);
  Vec value = select_less(to_float(magnitude), set1(8.0f), sub, normal);
  value = select_less(to_float(magnitude), set1(126.5f), value, from_bits(iset(0x7fc00000)));
  return from_bits(ior(bits_of(value), ishl<24>(iand(byte, iset(0x80)))));
}
