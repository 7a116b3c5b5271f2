// Softmax attention of 16 queries ("lanes") at a time over keys in tiles of 64 from position 0.
//
//   decode    lanes are heads of one row; keys and values are the cached latents themselves
//   prompt    lanes are neighbouring rows of one head; keys and values are made from the latents
//
// A lane's bits depend on its own query and the keys it may see: tiles are taken in order, each rescales what
// came before (m: largest score so far), and a tile or key that a lane does not see adds exact zeros. Shares
// are float32; AMX, which multiplies bfloat16, takes them as the sum of two.
#pragma once

constexpr int kTileKeys = 64;
constexpr int kLanes = 16;

// What the next tile reads: fetched part by part while this one is computed, so that memory is not left waiting.
struct Ahead {
  const uint8_t *data;
  int64_t num_bytes;

  void fetch(int64_t part, int64_t part_bytes) const {
    const int64_t end = least((part + 1) * part_bytes, num_bytes);
    for (int64_t at = part * part_bytes; at < end; at += 64)
      _mm_prefetch((const char *)data + at, _MM_HINT_T1);
  }
};

// -- queries, keys and values as the instruction reads them ----------------------------------------------------
//
//              queries of 16 lanes               keys of a tile       values of a tile
//   AMX        [width / 2][lane][2] bfloat16     [64][width]          [V / 16][32 key pairs][16][2] bfloat16
//   others     [width][lane] float32             [64][width]          [64][V]                      float32
//
// width: padded to 32 with zeros, V to 16.

#if defined(K2_USE_AMX)

using Query = bf16;
using Key = bf16;
using Value = bf16;

static inline void put_query(Query *q, int lane, int64_t k, bf16 x) { q[(k / 2) * 32 + lane * 2 + (k & 1)] = x; }

static inline void transpose16(const float *from, int64_t from_stride, __m512 out[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i++)
    a[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
  for (int i = 0; i < 4; i++) { // lanes of 128 bits: rows 4j + i of a hold columns i, i + 4, i + 8, i + 12
    const __m512 p = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), q = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 r = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd), s = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    out[i] = _mm512_shuffle_f32x4(p, q, 0x88);
    out[i + 8] = _mm512_shuffle_f32x4(p, q, 0xdd);
    out[i + 4] = _mm512_shuffle_f32x4(r, s, 0x88);
    out[i + 12] = _mm512_shuffle_f32x4(r, s, 0xdd);
  }
}

// Values of two neighbouring keys, 32 columns: words in turn.
static inline void put_value_pair(Value *v, int pair, int64_t column, __m512i even, __m512i odd, bool are_both) {
  const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
  Value *to = v + (column / 16) * (kTileKeys * 16) + pair * 32;
  _mm512_store_si512(to, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
  if (are_both)
    _mm512_store_si512(to + kTileKeys * 16,
                       _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
}

static inline void begin_attention() { configure(16, 0); }
static inline void end_attention() { asm volatile("tilerelease"); }

// score[key][lane], without scale.
static inline void score_tile(const Query *q, const Key *keys, int width, float *score) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int k = 0; k < width; k += 32) {
    tile_load<6>(q + k * 16, 64);
    tile_load<4>(keys + k, width * 2);
    tile_dot<0, 4, 6>();
    tile_load<5>(keys + 16 * width + k, width * 2);
    tile_dot<1, 5, 6>();
    tile_load<4>(keys + 32 * width + k, width * 2);
    tile_dot<2, 4, 6>();
    tile_load<5>(keys + 48 * width + k, width * 2);
    tile_dot<3, 5, 6>();
  }
  tile_store<0>(score, 64), tile_store<1>(score + 256, 64);
  tile_store<2>(score + 512, 64), tile_store<3>(score + 768, 64);
}

// sum[lane][V] = sum * shrink[lane] + share^T values, of `num_lanes` lanes.
static inline void add_values(const float *share, const Value *values, int width, const float *shrink,
                              int num_lanes, Ahead ahead, float *sum) {
  alignas(64) bf16 high[kLanes * kTileKeys], low[kLanes * kTileKeys];
  for (int k = 0; k < kTileKeys; k += 16) {
    __m512 row[16];
    transpose16(share + k * kLanes, kLanes, row);
    for (int lane = 0; lane < kLanes; lane++) {
      const __m256i top = narrow(Vec{row[lane]});
      _mm256_store_si256((__m256i *)(high + lane * kTileKeys + k), top);
      store_bf16(low + lane * kTileKeys + k, Vec{row[lane]} - widen(top));
    }
  }
  alignas(64) float c[2][256];
  tile_load<4>(high, 128), tile_load<5>(high + 32, 128);
  tile_load<2>(low, 128), tile_load<3>(low + 32, 128);
  const int64_t part_bytes = round_up(ahead.num_bytes / (width / 16) + 1, 64);
  for (int v = 0; v < width; v += 16, values += kTileKeys * 16) {
    ahead.fetch(v / 16, part_bytes);
    float *to = c[(v / 16) & 1];
    tile_load<6>(values, 64), tile_load<7>(values + 512, 64);
    tile_zero<0>();
    tile_dot<0, 4, 6>();
    tile_dot<0, 5, 7>();
    tile_dot<0, 2, 6>();
    tile_dot<0, 3, 7>();
    tile_store<0>(to, 64);
    for (int lane = 0; lane < num_lanes; lane++) {
      float *at = sum + lane * width + v;
      store(at, fma(load(at), set1(shrink[lane]), load(to + lane * 16)));
    }
  }
}

#else

using Query = float;
using Key = float;
using Value = float;

static inline float as_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline void put_query(Query *q, int lane, int64_t k, bf16 x) { q[k * kLanes + lane] = as_float(x); }

static inline void begin_attention() {}
static inline void end_attention() {}

static inline void score_tile(const Query *q, const Key *keys, int width, float *score) {
  for (int j = 0; j < kTileKeys; j += 4) {
    Vec s[4] = {zero(), zero(), zero(), zero()};
    for (int k = 0; k < width; k++) {
      const Vec x = load(q + k * kLanes);
      for (int i = 0; i < 4; i++)
        s[i] = fma(set1(keys[(j + i) * width + k]), x, s[i]);
    }
    for (int i = 0; i < 4; i++)
      store(score + (j + i) * kLanes, s[i]);
  }
}

static inline void add_values(const float *share, const Value *values, int width, const float *shrink,
                              int num_lanes, Ahead ahead, float *sum) {
  const int64_t part_bytes = round_up(ahead.num_bytes / num_lanes + 1, 64);
  for (int lane = 0; lane < num_lanes; lane++) {
    ahead.fetch(lane, part_bytes);
    for (int v = 0; v < width; v += 64) {
      const int n = width - v < 64 ? (width - v) / 16 : 4;
      Vec c[4] = {zero(), zero(), zero(), zero()};
      for (int j = 0; j < kTileKeys; j++) {
        const Vec p = set1(share[j * kLanes + lane]);
        for (int i = 0; i < n; i++)
          c[i] = fma(p, load(values + int64_t(j) * width + v + 16 * i), c[i]);
      }
      for (int i = 0; i < n; i++) {
        float *at = sum + lane * width + v + 16 * i;
        store(at, fma(load(at), set1(shrink[lane]), c[i]));
      }
    }
  }
}

#endif

// -- one tile ------------------------------------------------------------------------------------------------

// What 16 lanes have come to: largest score, sum of shares, sums of values [16][V].
struct Lanes {
  float m[kLanes], l[kLanes];
  float *sum;
};

static inline void clear(Lanes &lanes, int value_width) {
  for (int i = 0; i < kLanes; i++) {
    lanes.m[i] = -1e30f; // finite: a lane that is not there sees no key, and must not become NaN
    lanes.l[i] = 0.0f;
  }
  memset(lanes.sum, 0, size_t(kLanes) * size_t(value_width) * 4);
}

// Take in one tile. limit[lane]: how many of its 64 keys the lane sees, from the first on.
static inline void attend_tile(const Query *q, const Key *keys, int width, const Value *values, int value_width,
                               const int *limit, float scale, int num_lanes, Ahead ahead, Lanes &lanes) {
  alignas(64) float score[kTileKeys * kLanes];
  alignas(64) float shrink[kLanes];
  score_tile(q, keys, width, score);
  float limit_f[kLanes];
  int least_limit = kTileKeys;
  for (int i = 0; i < kLanes; i++) {
    limit_f[i] = float(limit[i]);
    least_limit = limit[i] < least_limit ? limit[i] : least_limit;
  }
  const Vec seen = load(limit_f), by = set1(scale), nothing = set1(-__builtin_inff());
  const Vec before = load(lanes.m);
  Vec m = before;
  for (int j = 0; j < kTileKeys; j++) {
    Vec s = load(score + j * kLanes) * by;
    if (j >= least_limit)
      s = select_less(set1(float(j)), seen, s, nothing);
    store(score + j * kLanes, s);
    m = max2(s, m);
  }
  Vec total = zero();
  for (int j = 0; j < kTileKeys; j++) {
    const Vec p = exp_of_negative(load(score + j * kLanes) - m);
    store(score + j * kLanes, p);
    total = total + p;
  }
  const Vec by_before = exp_of_negative(before - m);
  store(shrink, by_before);
  store(lanes.m, m);
  store(lanes.l, fma(load(lanes.l), by_before, total));
  add_values(score, values, value_width, shrink, num_lanes, ahead, lanes.sum);
}

// Queries of 16 lanes, `n` values each; lanes that are not there are zeros. `width`: n, padded.
static inline void put_queries(Query *q, const bf16 *from, int64_t lane_stride, int num_lanes, int64_t n, int width) {
#if defined(K2_USE_AMX)
  if (num_lanes == kLanes && n % 32 == 0 && lane_stride % 2 == 0) { // pairs of values as if they were floats
    for (int64_t k = 0; k < n; k += 32) {
      __m512 column[16];
      transpose16((const float *)(from + k), lane_stride / 2, column);
      for (int i = 0; i < 16; i++)
        _mm512_store_ps((float *)(q + k * kLanes + i * 32), column[i]);
    }
    return;
  }
#endif
  memset(q, 0, size_t(width) * kLanes * sizeof(Query));
  for (int lane = 0; lane < num_lanes; lane++)
    for (int64_t k = 0; k < n; k++)
      put_query(q, lane, k, from[lane * lane_stride + k]);
}

// -- the paged cache -----------------------------------------------------------------------------------------

using Cache = K2Cache;

static inline const bf16 *cached(const Cache &cache, const int64_t *pages, int64_t position) {
  const int64_t place = pages[position / cache.page_tokens] * cache.page_tokens + position % cache.page_tokens;
  return cache.data + place * cache.width;
}

static inline void copy_row(Key *to, const bf16 *from, int64_t n) {
  for (int64_t k = 0; k < n; k += 16)
    put_act(to + k, get_bf16(from + k, n - k), int(least(16, n - k)));
}

// Values of a tile from rows of bfloat16, `row(j)` of key j; null where there is no key.
template <class Row> static inline void lay_values(Value *values, int64_t width, const Row &row) {
  for (int j = 0; j < kTileKeys; j += 2) {
    const bf16 *rows[2] = {row(j), row(j + 1)};
#if defined(K2_USE_AMX)
    for (int64_t v = 0; v < width; v += 32) {
      const __mmask32 some = __mmask32((uint64_t(1) << least(32, width - v)) - 1);
      __m512i both[2];
      for (int i = 0; i < 2; i++)
        both[i] = rows[i] ? _mm512_maskz_loadu_epi16(some, rows[i] + v) : _mm512_setzero_si512();
      put_value_pair(values, j / 2, v, both[0], both[1], width - v > 16);
    }
#else
    const int64_t padded = round_up(width, 16);
    for (int i = 0; i < 2; i++)
      for (int64_t v = 0; v < width; v += 16)
        store(values + (j + i) * padded + v, rows[i] ? get_bf16(rows[i] + v, width - v) : zero());
#endif
  }
}
