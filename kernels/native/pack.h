// Weights into the order of K2Packed. Every machine with one of our instruction sets has AVX2.
#pragma once
#include "abi.h"

#include <cstring>
#include <immintrin.h>

namespace {

#define K2_AVX2_CODE __attribute__((target("avx2")))

inline uint8_t recoded(uint8_t code) { // NaN takes the place of -0, whose product with anything adds nothing
  return code == 0x80 ? 0x00 : (code & 0x7f) == 0x7f ? 0x80 : code;
}

K2_AVX2_CODE inline __m128i recoded16(__m128i x) {
  const __m128i sign = _mm_set1_epi8(char(0x80));
  const __m128i minus_zero = _mm_cmpeq_epi8(x, sign);
  const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(x, sign), _mm_set1_epi8(char(0xff)));
  return _mm_blendv_epi8(_mm_andnot_si128(minus_zero, x), sign, nan);
}

// Four outputs of a panel from its row `n` on, inputs [begin, end), four bytes of each at a time; returns the
// first input that is left.
K2_AVX2_CODE inline int64_t pack_four(int kind, const uint8_t *rows, int64_t row_bytes, int64_t begin, int64_t end,
                                      int n, uint8_t *to) {
  const int64_t size = kind == K2_FP8 ? 1 : 2, step = 16 / size;
  const __m128i turn = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  to += n * 4;
  int64_t k = begin;
  for (; k + step <= end; k += step, to += 4 * 64) {
    __m128i row[4];
    for (int i = 0; i < 4; i++) {
      const uint8_t *from = rows + (n + i) * row_bytes + k * size;
      _mm_prefetch((const char *)from + 384, _MM_HINT_T0); // rows are short and far apart: nobody else foresees it
      row[i] = _mm_loadu_si128((const __m128i *)from);
      if (kind == K2_FP8)
        row[i] = recoded16(row[i]);
    }
    const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpackhi_epi32(row[0], row[1]);
    const __m128i c = _mm_unpacklo_epi32(row[2], row[3]), d = _mm_unpackhi_epi32(row[2], row[3]);
    __m128i line[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                       _mm_unpackhi_epi64(b, d)};
    for (int i = 0; i < 4; i++)
      _mm_storeu_si128((__m128i *)(to + 64 * i), kind == K2_FP8 ? _mm_shuffle_epi8(line[i], turn) : line[i]);
  }
  return k;
}

// Two inputs of 16 outputs that lie next to one another, bfloat16; returns the first input that is left.
K2_AVX2_CODE inline int64_t pack_across(const uint8_t *rows, int64_t col_bytes, int64_t begin, int64_t end, uint8_t *to) {
  int64_t k = begin;
  for (; k + 2 <= end; k += 2, to += 64) {
    const __m256i even = _mm256_loadu_si256((const __m256i *)(rows + k * col_bytes));
    const __m256i odd = _mm256_loadu_si256((const __m256i *)(rows + (k + 1) * col_bytes));
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)(to + 32), _mm256_permute2x128_si256(low, high, 0x31));
  }
  return k;
}

inline void pack_one(int kind, const uint8_t *from, uint8_t *to, int64_t k, int n) { // input k of its block
  if (kind == K2_BF16)
    memcpy(to + k / 2 * 64 + k % 2 * 2 + n * 4, from, 2);
  else
    to[k / 4 * 64 + n / 4 * 16 + n % 4 * 2 + k % 4 / 2 * 8 + k % 2] = recoded(*from);
}

// Inputs [begin, end) of a panel; `rows`: its first output.
inline void pack_block(int kind, const uint8_t *rows, int64_t row_stride, int64_t col_stride, int64_t begin,
                       int64_t end, int width, int64_t block_bytes, uint8_t *to) {
  const int64_t size = kind == K2_FP8 ? 1 : 2;
  if (width < 16 || (end - begin) % 32 != 0)
    memset(to, 0, size_t(block_bytes));
  const bool is_across = kind == K2_BF16 && row_stride == 1 && width == 16;
  const int64_t across = is_across ? pack_across(rows, col_stride * 2, begin, end, to) : begin;
  for (int n = 0; n < width; n += 4) {
    const bool are_four = col_stride == 1 && n + 4 <= width;
    const int64_t done = are_four ? pack_four(kind, rows, row_stride * size, begin, end, n, to) : across;
    for (int i = n; i < width && i < n + 4; i++)
      for (int64_t k = done; k < end; k++)
        pack_one(kind, rows + (i * row_stride + k * col_stride) * size, to, k - begin, i);
  }
}

} // namespace
