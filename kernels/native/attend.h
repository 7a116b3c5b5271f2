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

// Values of two neighbouring keys, 16 columns: words in turn.
static inline void put_value_pair(Value *v, int pair, int64_t column, __m256i even, __m256i odd) {
  const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
  Value *to = v + (column / 16) * (kTileKeys * 16) + pair * 32;
  _mm256_store_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_store_si256((__m256i *)(to + 16), _mm256_permute2x128_si256(low, high, 0x31));
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

// sum[lane][V] = sum * shrink[lane] + share^T values, of `num_lanes` lanes.
static inline void add_values(const float *share, const Value *values, int width, const float *shrink,
                              int num_lanes, float *sum) {
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
  for (int v = 0; v < width; v += 16, values += kTileKeys * 16) {
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
                              int num_lanes, float *sum) {
  for (int lane = 0; lane < num_lanes; lane++)
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
                               const int *limit, float scale, int num_lanes, Lanes &lanes) {
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
  add_values(score, values, value_width, shrink, num_lanes, lanes.sum);
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
    for (int64_t v = 0; v < width; v += 16) {
      __m256i both[2];
      for (int i = 0; i < 2; i++)
        both[i] = rows[i] ? _mm256_maskz_loadu_epi16(first(int(least(16, width - v))), rows[i] + v)
                          : _mm256_setzero_si256();
      put_value_pair(values, j / 2, v, both[0], both[1]);
    }
#else
    const int64_t padded = round_up(width, 16);
    for (int i = 0; i < 2; i++)
      for (int64_t v = 0; v < width; v += 16)
        store(values + (j + i) * padded + v, rows[i] ? get_bf16(rows[i] + v, width - v) : zero());
#endif
  }
}

// -- generated rows ------------------------------------------------------------------------------------------

constexpr int64_t kChunkKeys = 256; // of one task; fixed, so that sums do not follow the number of threads
constexpr int64_t kPartialBytes = 32 << 20;

// Sums of one chunk of keys of one row, all heads: m, l, values, head by head.
static void decode_chunk(const K2Decode &d, int64_t row, int64_t chunk, float *partial) {
  const int width = int(round_up(d.cache.width, 32)), value_width = int(round_up(d.latent_width, 16));
  const int64_t groups = (d.num_heads + kLanes - 1) / kLanes;
  const size_t query_bytes = size_t(groups) * size_t(width) * kLanes * sizeof(Query);
  const size_t key_bytes = size_t(kTileKeys) * size_t(width) * sizeof(Key);
  const size_t value_bytes = size_t(kTileKeys) * size_t(value_width) * sizeof(Value);
  const size_t sum_bytes = size_t(groups) * kLanes * size_t(value_width) * 4;
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_SUMS, query_bytes + key_bytes + value_bytes + sum_bytes);
  Query *queries = (Query *)memory;
  Key *keys = (Key *)(memory + query_bytes);
  Value *values = (Value *)(memory + query_bytes + key_bytes);
  float *sums = (float *)(memory + query_bytes + key_bytes + value_bytes);
  Lanes lanes[16];
  memset(queries, 0, query_bytes);
  memset(keys, 0, key_bytes);
  for (int64_t h = 0; h < d.num_heads; h++)
    for (int64_t k = 0; k < d.cache.width; k++)
      put_query(queries + (h / kLanes) * width * kLanes, int(h % kLanes), k,
                d.q[row * d.q_row_stride + h * d.cache.width + k]);
  for (int64_t g = 0; g < groups; g++) {
    lanes[g].sum = sums + g * kLanes * value_width;
    clear(lanes[g], value_width);
  }
  const int64_t begin = chunk * kChunkKeys, end = least(begin + kChunkKeys, d.length[row]);
  const int64_t *pages = d.pages + row * d.page_stride;
  begin_attention();
  for (int64_t first = begin; first < end; first += kTileKeys) {
    const int num_keys = int(least(kTileKeys, end - first));
    auto at = [&](int j) -> const bf16 * { return j < num_keys ? cached(d.cache, pages, first + j) : nullptr; };
    for (int j = 0; j < kTileKeys; j++)
      if (const bf16 *from = at(j))
        copy_row(keys + j * width, from, d.cache.width);
      else
        memset(keys + j * width, 0, size_t(width) * sizeof(Key));
    lay_values(values, d.latent_width, at);
    for (int64_t g = 0; g < groups; g++) {
      const int num_lanes = int(least(kLanes, d.num_heads - g * kLanes));
      int limit[kLanes];
      for (int i = 0; i < kLanes; i++)
        limit[i] = i < num_lanes ? num_keys : 0;
      attend_tile(queries + g * width * kLanes, keys, width, values, value_width, limit, d.scale, num_lanes,
                  lanes[g]);
    }
  }
  end_attention();
  for (int64_t h = 0; h < d.num_heads; h++) {
    float *to = partial + h * (2 + value_width);
    const Lanes &of = lanes[h / kLanes];
    to[0] = of.m[h % kLanes], to[1] = of.l[h % kLanes];
    memcpy(to + 2, of.sum + (h % kLanes) * value_width, size_t(value_width) * 4);
  }
}

// One head of one row from its chunks, in order.
static void decode_merge(const K2Decode &d, int64_t row, int64_t head, const float *partial) {
  const int64_t value_width = round_up(d.latent_width, 16), entry = 2 + value_width;
  const int64_t chunks = (d.length[row] + kChunkKeys - 1) / kChunkKeys;
  auto part = [&](int64_t c) { return partial + (c * d.num_heads + head) * entry; };
  float m = -1e30f;
  bool is_nan = false;
  for (int64_t c = 0; c < chunks; c++) {
    m = part(c)[0] > m ? part(c)[0] : m;
    is_nan = is_nan || part(c)[0] != part(c)[0];
  }
  if (is_nan)
    m = __builtin_nanf("");
  Vec l = zero();
  for (int64_t c = 0; c < chunks; c++)
    l = fma(set1(part(c)[1]), exp_of_negative(set1(part(c)[0] - m)), l);
  for (int64_t v = 0; v < d.latent_width; v += 16) {
    Vec sum = zero();
    for (int64_t c = 0; c < chunks; c++)
      sum = fma(load(part(c) + 2 + v), exp_of_negative(set1(part(c)[0] - m)), sum);
    const Vec out = sum / l + zero(); // one zero: a tile of exact zeros may have turned -0 into 0
    bf16 *to = d.out + (row * d.num_heads + head) * d.latent_width + v;
    const int n = int(least(16, d.latent_width - v));
    n == 16 ? store_bf16(to, out) : store_bf16_some(to, out, n);
  }
}

static void mla_decode(int threads, const K2Decode *args) {
  const K2Decode &d = *args;
  const int64_t entry = d.num_heads * (2 + round_up(d.latent_width, 16));
  for (int64_t done = 0; done < d.num_rows;) {
    int64_t num_rows = 0, num_chunks = 0; // as many rows as partial sums may take memory, at least one
    while (done + num_rows < d.num_rows) {
      const int64_t more = (d.length[done + num_rows] + kChunkKeys - 1) / kChunkKeys;
      if (num_rows > 0 && (num_chunks + more) * entry * 4 > kPartialBytes)
        break;
      num_chunks += more;
      num_rows++;
    }
    struct Task {
      int64_t row, chunk;
    };
    const size_t task_bytes = size_t(round_up(num_chunks * int64_t(sizeof(Task)), 64));
    uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_INNER, task_bytes + size_t(num_rows) * 8 + size_t(num_chunks * entry) * 4);
    Task *tasks = (Task *)memory;
    float *partial = (float *)(memory + task_bytes);
    int64_t *begin = (int64_t *)(memory + task_bytes + size_t(num_chunks * entry) * 4);
    int64_t n = 0;
    for (int64_t r = 0; r < num_rows; r++) {
      begin[r] = n;
      for (int64_t c = 0; c * kChunkKeys < d.length[done + r]; c++)
        tasks[n++] = {done + r, c};
    }
    parallel(threads, n, [&](int64_t i) { decode_chunk(d, tasks[i].row, tasks[i].chunk, partial + i * entry); });
    parallel(threads, num_rows, [&](int64_t r) {
      for (int64_t h = 0; h < d.num_heads; h++)
        decode_merge(d, done + r, h, partial + begin[r] * entry);
    });
    done += num_rows;
  }
}

// -- prompt rows ---------------------------------------------------------------------------------------------

constexpr int64_t kHeadBytes = 64 << 20; // of keys and values made at a time

// Keys and values of one head and one tile.
static void decompress(const K2Prefill &a, int64_t head, int64_t tile, const Laid &laid, Key *keys, int width,
                       Value *values) {
  const int64_t begin = tile * kTileKeys, num_keys = least(kTileKeys, a.start + a.num_rows - begin);
  const int64_t latent = a.w_uk->num_inputs, value_width = a.w_uv->num_outputs;
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, kTileKeys * 16 * kPanels * 4 + size_t(kTileKeys * value_width) * 2);
  bf16 *made = (bf16 *)(acc + kTileKeys * 16 * kPanels);
  auto multiply_groups = [&](const K2Packed *w, auto put) {
    for (int p = 0; p < w->num_panels; p += kPanels) {
      const int panels = multiply_group(w, head, p / kPanels, laid, begin, num_keys, acc);
      for (int64_t j = 0; j < num_keys; j++)
        for (int i = 0; i < panels; i++)
          put(j, w->column[p + i], load(acc + j * 16 * kPanels + 16 * i), w->width[p + i]);
    }
  };
  memset(keys, 0, size_t(kTileKeys) * size_t(width) * sizeof(Key));
  multiply_groups(a.w_uk, [&](int64_t j, int column, Vec x, int n) {
    bf16 rounded[16];
    store_bf16(rounded, x);
    put_act(keys + j * width + column, load_bf16(rounded), n);
  });
  for (int64_t j = 0; j < num_keys; j++)
    copy_row(keys + j * width + a.nope, cached(a.cache, a.pages, begin + j) + latent, a.rope);
  multiply_groups(a.w_uv, [&](int64_t j, int column, Vec x, int n) { store_bf16_some(made + j * value_width + column, x, n); });
  lay_values(values, value_width, [&](int j) -> const bf16 * { return j < num_keys ? made + j * value_width : nullptr; });
}

// 16 rows of one head over the tiles that they see.
static void prompt_task(const K2Prefill &a, int64_t head, int64_t first, const Key *keys, int width,
                        const Value *values) {
  const int value_width = int(round_up(a.w_uv->num_outputs, 16)), num_lanes = int(least(kLanes, a.num_rows - first));
  const size_t query_bytes = size_t(width) * kLanes * sizeof(Query);
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_SUMS, query_bytes + size_t(kLanes) * size_t(value_width) * 4);
  Query *q = (Query *)memory;
  Lanes lanes;
  lanes.sum = (float *)(memory + query_bytes);
  clear(lanes, value_width);
  memset(q, 0, query_bytes);
  for (int i = 0; i < num_lanes; i++) {
    const bf16 *from = a.q + (first + i) * a.q_row_stride + head * a.q_head_stride;
    for (int64_t k = 0; k < a.nope + a.rope; k++)
      put_query(q, i, k, from[k]);
  }
  begin_attention();
  for (int64_t begin = 0; begin < a.start + first + num_lanes; begin += kTileKeys) {
    int limit[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const int64_t seen = i < num_lanes ? a.start + first + i + 1 - begin : 0;
      limit[i] = int(seen < 0 ? 0 : least(kTileKeys, seen));
    }
    attend_tile(q, keys + begin * width, width, values + begin * value_width, value_width, limit, a.scale, num_lanes,
                lanes);
  }
  end_attention();
  for (int i = 0; i < num_lanes; i++)
    for (int64_t v = 0; v < a.w_uv->num_outputs; v += 16) {
      const Vec out = load(lanes.sum + i * value_width + v) / set1(lanes.l[i]) + zero();
      bf16 *to = a.out + ((first + i) * a.num_heads + head) * a.w_uv->num_outputs + v;
      store_bf16_some(to, out, int(least(16, a.w_uv->num_outputs - v)));
    }
}

static void mla_prefill(int threads, const K2Prefill *args) {
  const K2Prefill &a = *args;
  const int64_t num_keys = a.start + a.num_rows, tiles = (num_keys + kTileKeys - 1) / kTileKeys;
  const int width = int(round_up(a.nope + a.rope, 32));
  const int64_t value_width = round_up(a.w_uv->num_outputs, 16);
  int64_t *place = (int64_t *)k2_scratch(K2_SCRATCH_PLACES, size_t(num_keys) * 8);
  for (int64_t s = 0; s < num_keys; s++)
    place[s] = (cached(a.cache, a.pages, s) - a.cache.data) / a.cache.width;
  const K2Rows latents = {K2_ROWS_BF16, num_keys, a.cache.width * 2, (const uint8_t *)a.cache.data, 0, nullptr, place};
  const Laid laid = lay(threads, a.w_uk, &latents, K2_SCRATCH_ROWS);
  const int64_t key_bytes = tiles * kTileKeys * width * int64_t(sizeof(Key));
  const int64_t value_bytes = tiles * kTileKeys * value_width * int64_t(sizeof(Value));
  int64_t at_once = kHeadBytes / (key_bytes + value_bytes);
  at_once = at_once < 1 ? 1 : least(at_once, a.num_heads);
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_INNER, size_t(at_once * (key_bytes + value_bytes)));
  const int64_t blocks = (a.num_rows + kLanes - 1) / kLanes;
  for (int64_t head = 0; head < a.num_heads; head += at_once) {
    const int64_t heads = least(at_once, a.num_heads - head);
    auto keys = [&](int64_t h) { return (Key *)(memory + h * (key_bytes + value_bytes)); };
    auto values = [&](int64_t h) { return (Value *)(memory + h * (key_bytes + value_bytes) + key_bytes); };
    parallel(threads, heads * tiles, [&](int64_t task) {
      const int64_t h = task / tiles, tile = task % tiles;
      decompress(a, head + h, tile, laid, keys(h) + tile * kTileKeys * width, width,
                 values(h) + tile * kTileKeys * value_width);
    });
    parallel(threads, heads * blocks, [&](int64_t task) {
      const int64_t h = task / blocks, block = blocks - 1 - task % blocks; // the longest first
      prompt_task(a, head + h, block * kLanes, keys(h), width, values(h));
    });
  }
}
