// Attention of generated rows on the latents themselves: chunks of keys by themselves, merged in order.
#pragma once

constexpr int64_t kChunkKeys = 256; // of one task; fixed, so that sums do not follow the number of threads
constexpr int64_t kPartialBytes = 32 << 20;

// What a chunk of keys of one row comes to, its heads in groups of 16: m and l, then sums [16][V].
static inline int64_t entry_of(const K2Decode &d) {
  return round_up(d.num_heads, kLanes) * (2 + round_up(d.latent_width, 16));
}

// Keys [first, first + num_keys) as `score_tile` reads them: in `copy`, or where they lie.
static inline const Key *tile_of(const K2Decode &d, const int64_t *pages, int64_t first, int num_keys, int width,
                                 Key *copy) {
#if defined(K2_USE_AMX)
  const int64_t offset = first % d.cache.page_tokens;
  if (num_keys == kTileKeys && offset + kTileKeys <= d.cache.page_tokens && d.cache.width == width)
    return cached(d.cache, pages, first);
#endif
  for (int j = 0; j < kTileKeys; j++) {
    Key *to = copy + j * width;
    if (j >= num_keys || d.cache.width < width)
      memset(to, 0, size_t(width) * sizeof(Key));
    if (j < num_keys)
      copy_row(to, cached(d.cache, pages, first + j), d.cache.width);
  }
  return copy;
}

// The tile after the one at `first`, as far as it lies in one page.
static inline Ahead tile_after(const K2Decode &d, const int64_t *pages, int64_t first, int64_t end) {
  const int64_t next = first + kTileKeys, in_page = d.cache.page_tokens - next % d.cache.page_tokens;
  if (next >= end)
    return {};
  return {(const uint8_t *)cached(d.cache, pages, next), least(least(kTileKeys, end - next), in_page) * d.cache.width * 2};
}

// One chunk of keys of one row, all heads.
static void decode_chunk(const K2Decode &d, int64_t row, int64_t chunk, float *partial) {
  const int width = int(round_up(d.cache.width, 32)), value_width = int(round_up(d.latent_width, 16));
  const int64_t groups = (d.num_heads + kLanes - 1) / kLanes;
  const size_t query_bytes = size_t(groups) * size_t(width) * kLanes * sizeof(Query);
  const size_t key_bytes = size_t(kTileKeys) * size_t(width) * sizeof(Key);
  const size_t value_bytes = size_t(kTileKeys) * size_t(value_width) * sizeof(Value);
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_SUMS, query_bytes + key_bytes + value_bytes);
  Query *queries = (Query *)memory;
  Key *copy = (Key *)(memory + query_bytes);
  Value *values = (Value *)(memory + query_bytes + key_bytes);
  Lanes lanes[16];
  float *sums = partial + groups * kLanes * 2;
  auto lanes_of = [&](int64_t g) { return int(least(kLanes, d.num_heads - g * kLanes)); };
  for (int64_t g = 0; g < groups; g++) {
    put_queries(queries + g * width * kLanes, d.q + row * d.q_row_stride + g * kLanes * d.cache.width, d.cache.width,
                lanes_of(g), d.cache.width, width);
    lanes[g].sum = sums + g * kLanes * value_width;
    clear(lanes[g], value_width);
  }
  const int64_t begin = chunk * kChunkKeys, end = least(begin + kChunkKeys, d.length[row]);
  const int64_t *pages = d.pages + row * d.page_stride;
  begin_attention();
  for (int64_t first = begin; first < end; first += kTileKeys) {
    const int num_keys = int(least(kTileKeys, end - first));
    const Key *keys = tile_of(d, pages, first, num_keys, width, copy);
    lay_values(values, d.latent_width,
               [&](int j) -> const bf16 * { return j < num_keys ? cached(d.cache, pages, first + j) : nullptr; });
    for (int64_t g = 0; g < groups; g++) {
      int limit[kLanes];
      for (int i = 0; i < kLanes; i++)
        limit[i] = i < lanes_of(g) ? num_keys : 0;
      attend_tile(queries + g * width * kLanes, keys, width, values, value_width, limit, d.scale, lanes_of(g),
                  g ? Ahead{} : tile_after(d, pages, first, end), lanes[g]);
    }
  }
  end_attention();
  for (int64_t g = 0; g < groups; g++) {
    memcpy(partial + g * kLanes * 2, lanes[g].m, sizeof(lanes[g].m));
    memcpy(partial + g * kLanes * 2 + kLanes, lanes[g].l, sizeof(lanes[g].l));
  }
}

// One head of one row from its chunks, in order.
static void decode_merge(const K2Decode &d, int64_t row, int64_t head, const float *partial) {
  const int64_t value_width = round_up(d.latent_width, 16), entry = entry_of(d);
  const int64_t groups = (d.num_heads + kLanes - 1) / kLanes, chunks = (d.length[row] + kChunkKeys - 1) / kChunkKeys;
  const int64_t at = head / kLanes * kLanes * 2 + head % kLanes;
  auto m_of = [&](int64_t c) { return partial[c * entry + at]; };
  float m = -1e30f;
  bool is_nan = false;
  for (int64_t c = 0; c < chunks; c++) {
    m = m_of(c) > m ? m_of(c) : m;
    is_nan = is_nan || m_of(c) != m_of(c);
  }
  if (is_nan)
    m = __builtin_nanf("");
  float *sum = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(value_width) * 4);
  memset(sum, 0, size_t(value_width) * 4);
  Vec l = zero();
  for (int64_t c = 0; c < chunks; c++) {
    const Vec share = exp_of_negative(set1(m_of(c) - m));
    const float *from = partial + c * entry + groups * kLanes * 2 + head * value_width;
    l = fma(set1(partial[c * entry + at + kLanes]), share, l);
    for (int64_t v = 0; v < value_width; v += 16)
      store(sum + v, fma(load(from + v), share, load(sum + v)));
  }
  for (int64_t v = 0; v < d.latent_width; v += 16) {
    const Vec out = load(sum + v) / l + zero(); // one zero: a tile of exact zeros may have turned -0 into 0
    put_bf16(d.out + (row * d.num_heads + head) * d.latent_width + v, out, d.latent_width - v);
  }
}

static void mla_decode(int threads, const K2Decode *args) {
  const K2Decode &d = *args;
  const int64_t entry = entry_of(d);
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
    parallel(threads, num_rows * d.num_heads, [&](int64_t i) {
      const int64_t r = i / d.num_heads;
      decode_merge(d, done + r, i % d.num_heads, partial + begin[r] * entry);
    });
    done += num_rows;
  }
}
