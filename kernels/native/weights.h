// Packed weights (`abi.h`) as numbers: blocks of inputs, and float8 codes to bfloat16.
#pragma once

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Inputs of a block, with the zeros that fill it up.
static inline int depth_of(const K2Packed *w, int block) {
  return int(round_up(least(w->block, w->num_inputs - int64_t(block) * w->block), 32));
}
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

// What comes 4 KiB later. Without it the memory waits while the tiles work: 6.8 against 11.2 GB/s of one thread.
static inline void fetch(const uint8_t *p) { _mm_prefetch((const char *)p + 4096, _MM_HINT_T0); }
