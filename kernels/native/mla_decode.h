// Attention of generated rows on the latents themselves: chunks of keys by themselves, merged in order.
#pragma once

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
